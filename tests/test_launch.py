"""Launch commands: every flag against the dated list, refusals, and the TPU path with a fake gcloud, preempted."""

import json
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from tools.launch import __main__ as launch
from train.keep import hosts

ROOT = Path(__file__).resolve().parents[1]
WIDE = {"project", "quiet", "format", "filter"}  # flags of every gcloud command
CLOUD = ["--zone=us-west4-a", "--project=my-project", "--nfs=10.0.0.2:/share", "--bucket=gs://my-bucket/x"]
SLICES = [
    ("tpu-vm", "v5e-16"), ("tpu-vm", "v4-8"), ("queued", "v5p-8"), ("queued", "v6e-8"), ("mig", "v6e-8"),
    ("mig", "v5p-8"), ("mig", "tpu7x-16"), ("gke", "tpu7x-8"), ("gke", "v5e-16"), ("slurm", "h100-16"), ("local", ""),
]  # fmt: skip


def argv(on: str, accelerator: str, *more: str) -> list[str]:
    workdir = "/runs/first" if on == "gke" else "runs/first"
    return [
        f"--on={on}",
        f"--accelerator={accelerator}",
        *CLOUD,
        "--config=configs/sft/tiny.py",
        f"--workdir={workdir}",
        *more,
    ]


def commands(text: str) -> list[list[str]]:
    """The command lines of a page, as a shell would split them."""
    return [shlex.split(line, comments=True) for line in text.splitlines() if line and not line.startswith("#")]


@pytest.fixture
def printed(capsys):
    def run(*args: str) -> list[list[str]]:
        assert launch.main(argv(*args)) == 0
        return commands(capsys.readouterr().out)

    return run


def check_flags(command: list[str]) -> None:
    if command[0] in ("git", "python", "env"):
        return
    verbs = [v for v in launch.TABLE["flags"] if command[: len(v.split())] == v.split()]
    assert verbs, command
    verb = max(verbs, key=len)
    row = launch.TABLE["flags"][verb]
    known = set(row["flags"].split()) | (WIDE if verb.startswith("gcloud") else set())
    flags = {w[2:].partition("=")[0] for w in command if w.startswith("--")}
    assert flags <= known, (verb, flags - known)
    assert row["link"].startswith("https://")


@pytest.mark.parametrize("spot", [(), ("--spot",)], ids=["", "spot"])
@pytest.mark.parametrize(("on", "accelerator"), SLICES)
def test_every_flag_is_in_the_dated_list(printed, on, accelerator, spot):
    lines = printed(on, accelerator, *spot)
    for command in lines:
        check_flags(command)
    spots = [c for c in lines if {"--spot", "--provisioning-model=SPOT"} & set(c)]
    assert bool(spots) == (bool(spot) and on not in ("slurm", "local"))


@pytest.mark.parametrize(("on", "accelerator"), [("tpu-vm", "v5e-16"), ("queued", "v5p-8"), ("mig", "v6e-8")])
def test_a_run_in_a_bucket_needs_no_share_and_no_copy(capsys, on, accelerator):
    args = [*argv(on, accelerator, "--spot", "--nfs="), "--workdir=gs://my-bucket/runs/first"]
    assert launch.main(args) == 0
    text = capsys.readouterr().out
    for command in commands(text):
        check_flags(command)
    assert "--workdir=gs://my-bucket/runs/first" in text and "requirements/cloud.txt" in text
    assert "tools.report gs://my-bucket/runs/first --out=runs/kungfu.html" in text
    assert "rsync" not in text and "mount" not in text and not re.search(r"scp .*:kungfu", text)


def test_a_flag_that_no_documentation_has_is_found():
    with pytest.raises(AssertionError):
        check_flags(["gcloud", "compute", "tpus", "tpu-vm", "delete", "x", "--force"])


@pytest.mark.parametrize(
    ("on", "name", "type", "chips", "hosts"),
    [
        ("tpu-vm", "v5e-16", "v5litepod-16", 16, 4),
        ("tpu-vm", "v5litepod-8", "v5litepod-8", 8, 1),
        ("queued", "v5p-8", "v5p-8", 4, 1),  # 8 cores
        ("queued", "v6e-8", "v6e-8", 8, 1),
        ("mig", "v6e-8", "v6e-8", 8, 2),  # two machines of four chips
        ("gke", "tpu7x-8", "tpu7x-8", 4, 1),
        ("slurm", "h100-16", "h100-16", 16, 2),
    ],
)
def test_product_names(on, name, type, chips, hosts):
    a = launch.slice_of(name, launch.TABLE["targets"][on])
    assert (a.type, a.chips, a.hosts) == (type, chips, hosts)


def test_topologies_hold_as_many_chips_as_they_say():
    for row in launch.TABLE["generations"].values():
        for chips, topology in row["topologies"].items():
            assert eval(topology.replace("x", "*")) == int(chips)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (argv("tpu-vm", "tpu7x-8"), "use --on=mig or --on=gke"),
        (argv("mig", "v5e-16"), "--on=queued"),
        (argv("tpu-vm", "v5p-7"), "counts 2 per chip"),
        (argv("tpu-vm", "v6e-12"), "no slice"),
        (argv("tpu-vm", "h100-8"), "unknown TPU"),
        (argv("slurm", "v6e-8"), "unknown GPUs"),
        (argv("tpu-vm", "v5e-16", "--config.mesh.data=8"), "is not 16 devices"),
        (argv("gke", "tpu7x-8", "--config.mesh.data=4"), "is not 8 devices"),  # two devices a chip
        (argv("tpu-vm", "v5e-16", "--nfs="), "4 hosts need a shared run folder"),
        (argv("tpu-vm", "v5e-8", "--nfs=", "--spot"), "spot VM loses its disk"),
        (argv("tpu-vm", "v5e-8", "--slices=2"), "--on=gke"),
        (argv("gke", "v5e-16", "--slices=2", "--config.mesh.data=1", "--config.mesh.fsdp=-1"), "a multiple of 2"),
        (argv("tpu-vm", "v5e-8", "--zone="), "--zone"),
        (argv("mig", "v6e-8", "--bucket="), "--bucket"),
        (argv("tpu-vm", "v5e-8", "--name=a;rm -rf ~"), "--name"),
        (argv("tpu-vm", "v5e-8", "--zone=us-west4-a --async"), "--zone"),
        (argv("tpu-vm", "v5e-8", "--workdir=runs/../x"), "--workdir"),
        (argv("tpu-vm", "v5e-8", "--config.lrr=1"), "did you mean"),
        (argv("nowhere", "v5e-8"), "no target"),
        (argv("tpu-vm", "v5e-8", "--go", "--from=nothing"), "no step"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals(capsys, args, words):
    assert launch.main(args) == 2
    out, err = capsys.readouterr()
    assert words in err and not out


def test_several_slices_are_one_run(printed, capsys):
    commands = [c for c in printed("gke", "v5e-16", "--slices=2") if c[0] == "xpk"]
    assert [c[2] for c in commands if "--num-slices=2" in c] == ["create", "create"]
    launch.main(argv("gke", "v5e-16", "--slices=2"))
    assert "# 2 x v5litepod-16: chips 32, hosts 8, about $" in capsys.readouterr().out


def test_a_hostile_value_stays_one_word(printed):
    text = "$(touch x) 'a' `b`; rm -rf ~"
    run = next(
        c for c in printed("tpu-vm", "v5e-16", f"--config.samples={text},") if "run-vm" in c or "train.main" in c[-1]
    )
    script = next(w for w in run if w.startswith("--command=")).partition("=")[2]
    inner = re.search(r"until (.*); do code", script)[1]
    assert f"--config.samples={text}," in shlex.split(inner)
    assert shlex.split(inner)[:2] == ["env", "JAX_NUM_PROCESSES=4"]


# A cloud of one folder: gcloud keeps a state file, ssh runs the command for real, with a python of given exit codes.
FAKE = r"""#!/usr/bin/env python3
import json, os, pathlib, subprocess, sys
here, words = pathlib.Path(os.environ["FAKE"]), sys.argv[1:]
with open(here / "log", "a") as f:
    f.write(json.dumps(words) + "\n")
state, vm = here / "state", here / "vm"
verb = [w for w in words if not w.startswith("-")]
if "create" in verb:
    if state.exists():
        sys.exit("already exists")
    state.write_text("WAITING_FOR_RESOURCES" if "queued-resources" in verb else "READY")
    vm.mkdir()
elif "describe" in verb:
    print(state.read_text())
    if state.read_text() == "WAITING_FOR_RESOURCES":
        state.write_text("ACTIVE")
elif "delete" in verb:
    state.unlink()
    subprocess.run(["rm", "-r", str(vm)])
elif "scp" in verb and "--recurse" not in words:
    subprocess.run(["cp", verb[-2], str(vm)], check=True)
elif "ssh" in verb:
    command = next(w for w in words if w.startswith("--command="))[10:]
    if "until" not in command:
        sys.exit(subprocess.run(["tar", "-xzf", str(next(vm.glob("*.tar.gz"))), "-C", str(vm)]).returncode)
    python = vm / "kungfu/.venv/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    if not python.exists():
        python.symlink_to(here / "python")
    code = subprocess.run(["bash", "-c", command.replace("sleep 10", "sleep 0")], cwd=vm).returncode
    if code == 9:  # the machine is gone
        state.write_text("PREEMPTED" if state.read_text() == "READY" else "SUSPENDED")
        code = 255
    sys.exit(code)
"""
PYTHON = r"""#!/usr/bin/env python3
import os, pathlib, sys
here = pathlib.Path(os.environ["FAKE"])
with open(here / "runs", "a") as f:
    f.write(" ".join(sys.argv[1:]) + "\n")
codes = (here / "codes").read_text().split()
(here / "codes").write_text(" ".join(codes[1:]))
sys.exit(int(codes[0]))
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A repository of one commit to launch from, and the fakes first on PATH."""
    fake = tmp_path / "fake"
    fake.mkdir()
    for name, text in (("gcloud", FAKE), ("python", PYTHON)):
        (fake / name).write_text(text)
        (fake / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.setenv("PATH", f"{fake}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(launch, "POLL", 0.0)
    config = (ROOT / "configs/sft/tiny.py").resolve()
    repository = tmp_path / "repository"
    (repository / "configs/sft").mkdir(parents=True)
    (repository / "configs/sft/tiny.py").write_text(config.read_text())
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    monkeypatch.chdir(repository)
    return fake


def verbs(cloud: Path) -> list[str]:
    known = ("create", "describe", "scp", "ssh", "delete", "list", "enable")
    lines = [json.loads(line) for line in (cloud / "log").read_text().splitlines()]
    return [next(w for w in line if w in known) for line in lines]


@pytest.mark.parametrize("on", ["tpu-vm", "queued"])
def test_preempted_launch_ends_and_cleans_up(cloud, on):
    """75 and again on the same machine; the machine lost; a new one; done; fetched, reported, deleted."""
    (cloud / "codes").write_text("75 9 75 0 0")  # the last is the report
    assert launch.main(argv(on, "v5e-8", "--nfs=", "--go")) == 0
    runs = (cloud / "runs").read_text().splitlines()
    assert runs[:4] == ["-m train.main --config=configs/sft/tiny.py --workdir=runs/first"] * 4
    assert runs[4].startswith("-m tools.report runs/first")
    wait = ["describe", "describe"] if on == "queued" else []
    made = ["create", *wait, "scp", "ssh"]
    assert verbs(cloud) == ["list", "enable", *made, "ssh", "describe", "delete", *made, "ssh", "scp", "delete"]
    assert not (cloud / "state").exists()


def test_a_local_run_goes_on_after_75(cloud):
    (cloud / "codes").write_text("75 75 0 0")
    assert launch.main(argv("local", "", "--go")) == 0
    assert [line.split()[1] for line in (cloud / "runs").read_text().splitlines()] == ["train.main"] * 3 + [
        "tools.report"
    ]


@pytest.mark.parametrize("code", [2, 70, 1])
def test_a_broken_run_stops_with_its_code_and_says_what_costs(cloud, capfd, code):
    (cloud / "codes").write_text(str(code))
    assert launch.main(argv("tpu-vm", "v5e-8", "--nfs=", "--go")) == code
    err = capfd.readouterr().err
    assert "--from=run-vm" in err and "cost money until: gcloud compute tpus tpu-vm delete kungfu" in err
    assert (cloud / "state").read_text() == "READY"
    (cloud / "codes").write_text("0 0")
    assert launch.main(argv("tpu-vm", "v5e-8", "--nfs=", "--go", "--from=run-vm")) == 0
    assert not (cloud / "state").exists()


def test_the_first_failure_stops(cloud):
    (cloud / "state").write_text("READY")  # a machine of this name is there
    assert launch.main(argv("tpu-vm", "v5e-8", "--nfs=", "--go")) == 1
    assert verbs(cloud) == ["list", "enable", "create"]


def test_a_missing_program_is_one_line(cloud, capfd, monkeypatch):
    (cloud / "gcloud").unlink()
    git = Path(subprocess.run(["which", "git"], capture_output=True, text=True).stdout.strip())
    (cloud / "git").symlink_to(git)
    monkeypatch.setenv("PATH", str(cloud))
    assert launch.main(argv("tpu-vm", "v5e-8", "--nfs=", "--go")) == 2
    assert "gcloud is not installed" in capfd.readouterr().err


def test_slurm_requeues_after_75_alone(cloud, printed):
    wrap = next(w for w in printed("slurm", "h100-8")[0] if w.startswith("--wrap="))[7:]
    for name, text in (("srun", 'exec "$@"'), ("scontrol", 'echo "$@" >> $FAKE/requeued')):
        (cloud / name).write_text(f"#!/bin/bash\n{text}\n")
        (cloud / name).chmod(stat.S_IRWXU)
    for code in (75, 0, 70):
        (cloud / "codes").write_text(str(code))
        assert subprocess.run(["bash", "-c", wrap], env={**os.environ, "SLURM_JOB_ID": "7"}).returncode == code
    assert (cloud / "requeued").read_text() == "requeue 7\n"


def test_the_boot_script_is_bash(printed, capsys):
    launch.main(argv("mig", "tpu7x-16"))
    script = "\n".join(x[4:] for x in capsys.readouterr().out.splitlines() if x.startswith("#   "))
    assert script.startswith("#!/bin/bash") and "JAX_NUM_PROCESSES=2" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_slice_of_several_hosts_joins(monkeypatch):
    called = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda *a: called.append(a))
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    hosts.connect()
    assert not called
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    hosts.connect()
    assert called == [()]


def test_the_commands_of_the_page_are_those_of_the_tool(capsys):
    """The launch line of docs/tpu.md, run as it is written, prints the commands that the page lists."""
    section = (ROOT / "docs/tpu.md").read_text("utf-8").split("## On Cloud TPU")[1].split("\n## ")[0]
    calls = [shlex.split(line) for line in section.splitlines() if line.startswith("kungfu launch ")]
    assert calls
    for call in calls:
        assert launch.main([w for w in call[2:] if w != "--go"]) == 0
    lines = [" ".join(c) for c in commands(capsys.readouterr().out)]
    listed = re.findall(r"`(gcloud [^`]*?) \.\.\.`", section)
    assert len(listed) >= 5
    for told in listed:
        assert any(line.startswith(told) for line in lines), told
