"""Prints or runs the commands for an experiment on another machine, from the quota check to the cleanup.

    python -m tools.launch --on=tpu-vm|queued|mig|gke|slurm|local --accelerator=v5e-16 --config=configs/X.py
        --workdir=runs/NAME [--config.key=value ...] [--name=N] [--zone=Z --project=P] [--spot] [--nfs=HOST:/SHARE]
        [--bucket=gs://B] [--slices=2 (gke)] [--go [--from=STEP]]

Checks the config and the mesh, then prints the commands. --go runs the commands one by one and stops at the first
command that fails. A run that exits with code 75 is started again, and a preempted machine is replaced; the run then
resumes from its last checkpoint. The commands and their sources are in tools/launch/targets.toml.
"""

import math
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common import cli, exits, files
from common.errors import UserError
from common.paths import STORE
from common.types import Json
from configs import schema
from configs.schema import overrides

TABLE = tomllib.loads(Path(__file__).with_name("targets.toml").read_text("utf-8"))
FLAGS = dict.fromkeys(("on", "accelerator", "zone", "project", "bucket", "nfs", "from"), "")
FLAGS |= {"name": "kungfu", "spot": False, "go": False, "slices": 1}
LOST = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "SUSPENDED", "SUSPENDING", "FAILED")
# Exit codes of train.main for problems that another machine would not solve.
OWN_CODES = (exits.INPUT, exits.BROKEN, exits.BELOW_FLOOR)
POLL = 30.0  # seconds between checks of a machine's state


class Slice(NamedTuple):
    """The chips and hosts that an accelerator's name stands for. For example, v5p-8 stands for 4 chips on one host."""

    product: str
    type: str  # name of the accelerator for the Cloud TPU API and xpk
    chips: int
    host: int  # chips per host

    @property
    def hosts(self) -> int:
        return self.chips // self.host


class Plan(NamedTuple):
    target: Json
    steps: dict[str, list[str]]  # {step: the words of its shell command}, for the steps that this launch needs
    files: dict[str, str]  # {name: text} of files that the steps read in addition to the repository

    def names(self, part: str) -> list[str]:
        return [name for name in self.target.get(part, ()) if name in self.steps]


@cli.command
def main(argv: list[str]) -> int | None:
    loaded = schema.load(argv, flags=FLAGS, usage=__doc__)
    flags = {**loaded.flags, "workdir": loaded.workdir or ""}
    target = TABLE["targets"].get(flags["on"])
    if target is None:
        raise UserError(f"no target {flags['on']!r}", "--on", f"one of {', '.join(TABLE['targets'])}")
    a = slice_of(flags["accelerator"], target)
    check(flags, target, a, loaded.config)
    plan = make(flags, target, a, overrides.parse_args(argv, FLAGS))
    if flags["from"] not in ("", *plan.names("go")):
        raise UserError(f"no step {flags['from']!r}", "--from", f"one of {', '.join(plan.names('go'))}")
    return go(plan, flags["from"]) if flags["go"] else show(plan, a, flags)


def slice_of(name: str, target: Json) -> Slice:
    """Returns the TPU slice or GPUs for an accelerator's name. Raises UserError if the name is unknown."""
    from common import chips

    product, _, size = name.lower().replace("v5litepod", "v5e").partition("-")
    row, n = TABLE["generations"].get(product), int(size) if size.isdecimal() else 0
    if not target["kind"]:
        return Slice("", "this computer", 1, 1)
    if target["kind"] == "gpu":
        if row or not n or not chips.find(product):
            raise UserError(f"unknown GPUs {name!r}", "--accelerator", "write the chip and how many, such as h100-8")
        return Slice(product, name, n, math.gcd(n, 8))
    if row is None:
        raise UserError(f"unknown TPU {name!r}", "--accelerator", f"one of {', '.join(TABLE['generations'])}")
    count = n / row["cores"]
    if f"{count:g}" not in row["topologies"]:
        known = ", ".join(f"{product}-{int(c) * row['cores']}" for c in row["topologies"])
        raise UserError(
            f"no slice {name!r}", "--accelerator", f"one of {known}; the number counts {row['cores']} per chip"
        )
    if target["kind"] not in row:
        where = [f"--on={on}" for on, other in TABLE["targets"].items() if other["kind"] in row]
        raise UserError(f"this interface does not offer {product}", "--on", f"use {' or '.join(where)}")
    single = row["host"] if target["kind"] == "runtime" else 4
    return Slice(product, f"{row['type']}-{n}", int(count), min(int(count), single if count <= single else 4))


def check(flags: Json, target: Json, a: Slice, config: Any) -> None:
    """Raises UserError for missing or malformed options, and for a mesh that does not fit the slice."""
    from common import chips
    from train.mesh import mesh_shape

    for option, form in (TABLE["forms"] | {"workdir": target["workdir"]}).items():
        if (flags[option] or option in target["needs"]) and not re.fullmatch(form, flags[option]):
            raise UserError(f"{flags[option]!r} does not match {form}", f"--{option}", target.get("fix", ""))
    slices = flags["slices"]
    if slices < 1 or (slices > 1 and not target.get("slices")):
        where = [on for on, other in TABLE["targets"].items() if other.get("slices")]
        raise UserError(f"{slices} slices are not supported", "--slices", f"1, or more with --on={' or '.join(where)}")
    if target["kind"]:
        shape = mesh_shape(config.mesh, slices * a.chips * chips.find(a.product).devices)
        if shape[0] % slices:
            fix = f"make it a multiple of {slices}: slices split the data axis"
            raise UserError(f"data axis {shape[0]} cannot be split over {slices} slices", "config.mesh.data", fix)
    shared = flags["nfs"] or flags["workdir"].startswith(STORE)
    if target.get("hosts") and not shared and (flags["spot"] or a.hosts > 1):
        why = f"{a.hosts} hosts need a shared run folder" if a.hosts > 1 else "a preempted spot VM loses its disk"
        raise UserError(why, "--nfs", "name an NFS share, such as 10.0.0.2:/share, or a --workdir at gs://")


def make(flags: Json, target: Json, a: Slice, args: overrides.Args) -> Plan:
    """Makes all commands of a target. Every value in them is checked or quoted."""
    row, name = TABLE["generations"].get(a.product, {}), flags["name"]
    values = {**flags, **row, **a._asdict(), "hosts": a.hosts, "region": flags["zone"].rpartition("-")[0]}
    values |= {"topology": row.get("topologies", {}).get(str(a.chips)), "machine": f"{row.get('machine')}-{a.host}t"}
    omitted = set()  # names of steps and scripts to leave out
    if not flags["nfs"]:
        omitted.add("mount")
    if a.hosts == 1:
        omitted |= {"policy", "delete-policy"}
    if flags["workdir"].startswith(STORE):
        # The run folder is already in a bucket, so it is not fetched. Each host has a local copy of the metrics.
        omitted |= {"fetch-vm", "fetch-bucket", "keep"}
        values |= {"packages": "cloud", "lines": "~/.cache/kungfu/runs/*", "page": f"runs/{name}"}
    else:
        values |= {"packages": "base", "lines": f"kungfu/{flags['workdir']}", "page": flags["workdir"]}
    groups = {k: words.format(**values).split() for k, words in TABLE["groups"].items()}
    groups["capacity"] = ["--spot"] if flags["spot"] else ["--on-demand"]
    if not flags["spot"]:
        groups["spot"] = groups["model"] = []  # leaves these options out of the commands
    if a.hosts == 1:
        groups["slice"] = []
    groups["train"] = train_command(args, target, a.hosts)
    values["train"] = shlex.join(groups["train"])
    for script, text in TABLE["scripts"].items():
        values[script] = "true" if script in omitted else text.format(**values)
    used = {s for part in target.values() if isinstance(part, list) for s in part} - omitted
    steps = {s: fill(text, values, groups) for s, text in TABLE["steps"].items() if s in used}
    return Plan(target, steps, {f"{name}.boot.sh": values["boot"]} if "template" in target["go"] else {})


def train_command(args: overrides.Args, target: Json, hosts: int) -> list[str]:
    """Returns the command that trains with the user's options. JAX_NUM_PROCESSES is the number of hosts of the slice
    (see train/keep/hosts.py)."""
    several = ["env", f"JAX_NUM_PROCESSES={hosts}"] if target.get("hosts") and hosts > 1 else []
    config = f"{args.config}:{args.arg}" if args.arg else args.config
    keys = [f"--config.{key}={text}" for key, text in args.overrides.items()]
    return [*several, target["python"], "-m", "train.main", f"--config={config}", f"--workdir={args.workdir}", *keys]


def fill(template: str, values: Json, groups: Mapping[str, list[str]]) -> list[str]:
    """Returns the words of a shell command. Each word of the template is filled in separately, so that a value with
    spaces remains a single word."""
    words = shlex.split(template)
    return [x for w in words for x in (groups[w[1:-1]] if w[1:-1] in groups else [w.format(**values)])]


def show(plan: Plan, a: Slice, flags: Json) -> int:
    from common import chips

    chip, slices, spot = chips.find(a.product), flags["slices"], flags["spot"]
    usd = chip and (chip.usd_hour_spot if spot else chip.usd_hour)
    kind = " on spot" if spot else ""
    cost = f"about ${slices * a.chips * usd.value:,.2f} per hour{kind} ({usd.date})" if usd else "price n/a"
    times = f"{slices} x " if slices > 1 else ""
    print(f"# {times}{a.type}: chips {slices * a.chips}, hosts {slices * a.hosts}, {cost}")
    print(f"# Commands as of {TABLE['date']}: {plan.target['link']}")
    for name, text in plan.files.items():
        print(f"# The file {name}, written by --go:", *text.splitlines(), sep="\n#   ")
    for part, title in TABLE["titles"].items():
        if names := plan.names(part):
            print(f"\n# {title}", *(f"{shlex.join(plan.steps[n])}  # {n}" for n in names), sep="\n")
    return 0


def go(plan: Plan, start: str = "") -> int:
    """Runs the commands, and returns 0 or the exit code of the first command that failed."""
    for name, text in plan.files.items():
        files.write(Path(name), text)
    names = plan.names("go")
    for name in names[names.index(start) if start else 0 :]:
        if code := attend(plan, name) if name.startswith("run") else execute(plan, name):
            print(f"{name} ended with exit code {code}; fix the cause and continue with --from={name}", file=sys.stderr)
            for n in names + plan.names("later"):
                if n.startswith("delete"):
                    print(f"resources remain and cost money until: {shlex.join(plan.steps[n])}", file=sys.stderr)
            return code
    for name in plan.names("watch") + plan.names("later"):
        print(f"{'while it runs' if name.startswith('watch') else 'then'}: {shlex.join(plan.steps[name])}")
    return 0


def attend(plan: Plan, name: str) -> int:
    """Trains until the run is done or has failed. The run restarts after exit code 75, and on new machines if the old
    machines are lost."""
    while code := execute(plan, name):
        if code == exits.PREEMPTED:
            continue
        if code in OWN_CODES or not lost(plan):
            return code
        print("the machines were preempted: replacing them", file=sys.stderr)
        for step in plan.names("again"):
            if failed := execute(plan, step):
                return failed
    return 0


def lost(plan: Plan) -> bool:
    """Whether the machines are gone. The state is checked several times, since the connection to a preempted machine
    breaks before its state changes."""
    for command in [plan.steps[n] for n in plan.names("state")] * 4:
        if state_of(command) in LOST:
            return True
        time.sleep(POLL)
    return False


def state_of(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()


def execute(plan: Plan, name: str) -> int:
    """Runs one step and passes on its output. A step that prints the state of a machine is repeated until the state is
    ACTIVE."""
    command = plan.steps[name]
    print(f"+ {shlex.join(command)}", flush=True)
    try:
        if name not in plan.names("state"):
            code = subprocess.run(command).returncode
            return code if code >= 0 else 128 - code
        while (state := state_of(command)) != "ACTIVE":
            print(state, flush=True)
            if state in (*LOST, ""):
                return 1
            time.sleep(POLL)
        return 0
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed", f"step {name}", plan.target["link"]) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
