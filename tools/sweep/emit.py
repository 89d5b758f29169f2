"""Writes files that run a sweep's points on a cluster with the cluster's own command-line tools."""

import json
import os
import shlex
from pathlib import Path

from common import files
from tools.sweep.run import Point, alone, declare

# Only the user knows the names of a cluster's resources, so the scripts read these names from environment variables.
LINES = {
    "lines": "{command}",
    "gcloud": 'gcloud compute tpus tpu-vm ssh "${{TPU:?}}" --zone "${{ZONE:?}}" --worker all '
    '--command "cd ${{FOLDER:?folder of the repository on the TPU machine}} && "{quoted}',
    "xpk": 'xpk workload create --cluster "${{CLUSTER:?}}" --tpu-type "${{TPU_TYPE:?like v6e-8}}" --docker-image '
    '"${{IMAGE:?an image with the repository as working directory}}" --restart-on-exit-codes 75 --max-restarts 100 '
    "--workload {name} --command {quoted}",
    "skypilot": 'sky jobs launch --yes --detach-run --gpus "${{ACCELERATOR:?like tpu-v6e-8}}" '
    '--env BUCKET="${{BUCKET:?like gs://mine/sweep}}" {task}',
}
SCRIPT = '#!/usr/bin/env bash\ncd "$(dirname "$0")"/{root} || exit\n{lines}\n'
SLURM = """#!/usr/bin/env bash
# Run this in the repository: sbatch --gres=gpu:1 --time=4:00:00 OUT/emit/sweep.sbatch
#SBATCH --job-name={name} --array=0-{last} --ntasks=1 --requeue --signal=B:TERM@120 --output={log}
case "$SLURM_ARRAY_TASK_ID" in
{cases}
esac
"""
SKYPILOT = """name: {name}
workdir: .
envs:
  BUCKET: ""
resources:
  job_recovery:
    recover_on_exit_codes: [75]
file_mounts:
  {mount}: {{source: "${{BUCKET}}", mode: MOUNT}}
setup: pip install -r requirements/base.txt
run: |
  {command}
"""


def write(kind: str, points: list[Point], out: Path) -> list[Path]:
    """Writes the files of OUT/emit/ for "skypilot", "xpk", "slurm", "gcloud" or "lines", and returns their paths.

    The run folders are the same as in a local sweep, so the cluster and the machine that collects the results must
    share OUT.
    """
    folder, made, lines = out / "emit", {}, []
    sweep = "".join(c if c.isalnum() else "-" for c in out.name.lower()).strip("-")[:24] or "sweep"
    with alone(out):
        for i, point in enumerate(points):
            declare(point, out, i)
    for i, point in enumerate(points):
        command = shlex.join(["python", "-m", "train.main", *point.argv, f"--workdir={out / point.id}"])
        name, task = f"{sweep}-{point.id}", folder / f"{point.id}.yaml"
        if kind == "skypilot":
            mount = json.dumps(str(Path("~/sky_workdir") / out))  # if OUT is an absolute path, the result is OUT
            made[task] = SKYPILOT.format(name=name, mount=mount, command=command)
        if kind == "slurm":
            lines.append(f"{i}) exec {command} ;;")
        else:
            lines.append(
                LINES[kind].format(command=command, quoted=shlex.quote(command), name=name, task=shlex.quote(str(task)))
            )
    if kind == "slurm":
        file = folder / "sweep.sbatch"
        last, cases = len(points) - 1, "\n".join(lines)
        made[file] = SLURM.format(log=shlex.quote(f"{folder}/%a.log"), name=sweep, last=last, cases=cases)
    else:
        root = shlex.quote(os.path.relpath(Path.cwd(), folder))
        made[folder / f"{kind}.sh"] = SCRIPT.format(root=root, lines="\n".join(lines))
    folder.mkdir(exist_ok=True)
    for path, content in made.items():
        files.write(path, content)
    return list(made)
