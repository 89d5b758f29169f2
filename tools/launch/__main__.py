"""What it takes to run an experiment elsewhere: the exact commands, from quota to report to cleanup.

    python -m tools.launch --on=tpu-vm|queued|mig|gke|slurm|local --accelerator=v5e-16 --config=configs/X.py
        --workdir=runs/NAME [--config.key=value ...] [--name=N] [--zone=Z --project=P] [--spot] [--nfs=HOST:/SHARE]
        [--bucket=gs://B] [--slices=2 (gke)] [--go [--from=STEP]]

Checks the config and the mesh, then prints the commands; --go runs them one by one and stops at the first that fails. A
run that exits with 75 is started again; a machine that was taken away is replaced, and the same command goes on from
the last checkpoint. The commands, and where they were read, are in tools/launch/targets.toml.
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
# Exit codes of train.main that no other machine would change.
OWN_CODES = (exits.INPUT, exits.BROKEN, exits.BELOW_FLOOR)
POLL = 30.0  # seconds between two looks at a machine's state


class Slice(NamedTuple):
    """An accelerator: v5p-8 is 4 chips on one host."""

    product: str
    type: str  # its name for the Cloud TPU API and xpk
    chips: int
    host: int  # chips a host

    @property
    def hosts(self) -> int:
        return self.chips // self.host


class Plan(NamedTuple):
    target: Json
    steps: dict[str, list[str]]  # step -> words of its command, of the steps that apply
    files: dict[str, str]  # what the steps read besides the repository

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
    """The slice or the GPUs of a product name. Raises UserError."""
    from common import chips

    product, _, size = name.lower().replace("v5litepod", "v5e").partition("-")
    row, n = TABLE["generations"].get(product), int(size) if size.isdecimal() else 0
    if not target["kind"]:
        return Slice("", "this computer", 1, 1)
    if target["kind"] == "gpu":
        if row or not n or not chips.find(product):
            raise UserError(f"no GPUs by the name {name!r}", "--accelerator", "write h100-8: the chip and how many")
        return Slice(product, name, n, math.gcd(n, 8))
    if row is None:
        raise UserError(f"no TPU by the name {name!r}", "--accelerator", f"one of {', '.join(TABLE['generations'])}")
    count = n / row["cores"]
    if f"{count:g}" not in row["topologies"]:
        known = ", ".join(f"{product}-{int(c) * row['cores']}" for c in row["topologies"])
        raise UserError(f"no slice {name!r}", "--accelerator", f"one of {known}; {row['cores']} to a chip")
    if target["kind"] not in row:
        where = [f"--on={on}" for on, other in TABLE["targets"].items() if other["kind"] in row]
        raise UserError(f"{product} is not offered there", "--on", f"use {' or '.join(where)}")
    single = row["host"] if target["kind"] == "runtime" else 4
    return Slice(product, f"{row['type']}-{n}", int(count), min(int(count), single if count <= single else 4))


def check(flags: Json, target: Json, a: Slice, config: Any) -> None:
    """Raises UserError for an option that is missing or of another form, and for a mesh that is not this slice."""
    from common import chips
    from train.mesh import mesh_shape

    for option, form in (TABLE["forms"] | {"workdir": target["workdir"]}).items():
        if (flags[option] or option in target["needs"]) and not re.fullmatch(form, flags[option]):
            raise UserError(f"{flags[option]!r} is not of the form {form}", f"--{option}", target.get("fix", ""))
    slices = flags["slices"]
    if slices < 1 or (slices > 1 and not target.get("slices")):
        where = [on for on, other in TABLE["targets"].items() if other.get("slices")]
        raise UserError(f"{slices} slices", "--slices", f"1, or more with --on={' or '.join(where)}")
    if target["kind"]:
        shape = mesh_shape(config.mesh, slices * a.chips * chips.find(a.product).devices)
        if shape[0] % slices:
            fix = f"slices split the data axis: make it a multiple of {slices}"
            raise UserError(f"data {shape[0]} on {slices} slices", "config.mesh.data", fix)
    shared = flags["nfs"] or flags["workdir"].startswith(STORE)
    if target.get("hosts") and not shared and (flags["spot"] or a.hosts > 1):
        why = f"{a.hosts} hosts must see one run folder" if a.hosts > 1 else "a spot machine takes its disk along"
        raise UserError(
            why, "--nfs", "name a share that the machines reach, as 10.0.0.2:/share, or a --workdir at gs://"
        )


def make(flags: Json, target: Json, a: Slice, args: overrides.Args) -> Plan:
    """Every command of a target; nothing is in them that was not checked or quoted."""
    row, spot, name = TABLE["generations"].get(a.product, {}), flags["spot"], flags["name"]
    values = {**flags, **row, **a._asdict(), "hosts": a.hosts, "region": flags["zone"].rpartition("-")[0]}
    values |= {"topology": row.get("topologies", {}).get(str(a.chips)), "machine": f"{row.get('machine')}-{a.host}t"}
    # Only --nfs and several hosts make these steps; an empty group of words drops out of its command.
    absent = {"mount": not flags["nfs"], "policy": a.hosts == 1, "delete-policy": a.hosts == 1}
    values |= {"packages": "base", "lines": f"kungfu/{flags['workdir']}", "page": flags["workdir"]}
    if flags["workdir"].startswith(STORE):  # the run is in its bucket already; a host has a copy of its lines
        absent |= dict.fromkeys(("fetch-vm", "fetch-bucket", "keep"), True)
        values |= {"packages": "cloud", "lines": "~/.cache/kungfu/runs/*", "page": f"runs/{name}"}
    groups = {k: words.format(**values).split() for k, words in TABLE["groups"].items()}
    groups |= {k: groups[k] * spot for k in ("spot", "model")}
    groups["capacity"] = groups["capacity"][:1] if spot else groups["capacity"][1:]
    groups["slice"] *= a.hosts > 1
    groups["train"] = train_command(args, target, a.hosts)
    values |= {"train": shlex.join(groups["train"])}
    for script, text in TABLE["scripts"].items():
        values[script] = "true" if absent.get(script) else text.format(**values)
    used = {s for part in target.values() if isinstance(part, list) for s in part if not absent.get(s)}
    steps = {s: fill(text, values, groups) for s, text in TABLE["steps"].items() if s in used}
    return Plan(target, steps, {f"{name}.boot.sh": values["boot"]} if "template" in target["go"] else {})


def train_command(args: overrides.Args, target: Json, hosts: int) -> list[str]:
    """The run, as the user wrote it. JAX_NUM_PROCESSES tells it of the hosts of the slice: see train/keep/hosts.py."""
    several = ["env", f"JAX_NUM_PROCESSES={hosts}"] * (target.get("hosts", False) and hosts > 1)
    config = f"{args.config}:{args.arg}" if args.arg else args.config
    keys = [f"--config.{key}={text}" for key, text in args.overrides.items()]
    return [*several, target["python"], "-m", "train.main", f"--config={config}", f"--workdir={args.workdir}", *keys]


def fill(template: str, values: Json, groups: Mapping[str, list[str]]) -> list[str]:
    """The words of a command, each filled in by itself: what a value holds never becomes a word of its own."""
    words = shlex.split(template)
    return [x for w in words for x in (groups[w[1:-1]] if w[1:-1] in groups else [w.format(**values)])]


def show(plan: Plan, a: Slice, flags: Json) -> int:
    from common import chips

    chip, slices, spot = chips.find(a.product), flags["slices"], flags["spot"]
    usd = chip and (chip.usd_hour_spot if spot else chip.usd_hour)
    cost = f"about ${slices * a.chips * usd.value:,.2f} an hour{' spot' * spot} ({usd.date})" if usd else "price n/a"
    times = f"{slices} x " if slices > 1 else ""
    print(f"# {times}{a.type}: chips {slices * a.chips}, hosts {slices * a.hosts}, {cost}")
    print(f"# Commands as of {TABLE['date']}: {plan.target['link']}")
    for name, text in plan.files.items():
        print(f"# {name}, which --go writes:", *text.splitlines(), sep="\n#   ")
    for part, title in TABLE["titles"].items():
        if names := plan.names(part):
            print(f"\n# {title}", *(f"{shlex.join(plan.steps[n])}  # {n}" for n in names), sep="\n")
    return 0


def go(plan: Plan, start: str = "") -> int:
    """Runs the commands; returns 0, or the exit code of the first that failed."""
    for name, text in plan.files.items():
        files.write(Path(name), text)
    names = plan.names("go")
    for name in names[names.index(start) if start else 0 :]:
        if code := attend(plan, name) if name.startswith("run") else execute(plan, name):
            print(f"{name} ended with exit code {code}; mend it and go on with --from={name}", file=sys.stderr)
            for n in names + plan.names("later"):
                if n.startswith("delete"):
                    print(f"what was made stays and costs until: {shlex.join(plan.steps[n])}", file=sys.stderr)
            return code
    for name in plan.names("watch") + plan.names("later"):
        print(f"{'while it runs' if name.startswith('watch') else 'then'}: {shlex.join(plan.steps[name])}")
    return 0


def attend(plan: Plan, name: str) -> int:
    """Trains until it is done or broken: again after 75, on new machines when the old ones are lost."""
    while code := execute(plan, name):
        if code == exits.PREEMPTED:
            continue
        if code in OWN_CODES or not lost(plan):
            return code
        print("the machines were taken away: replacing them", file=sys.stderr)
        for step in plan.names("again"):
            if failed := execute(plan, step):
                return failed
    return 0


def lost(plan: Plan) -> bool:
    """Whether the machines are gone. A connection breaks before the state says so, hence several looks."""
    for command in [plan.steps[n] for n in plan.names("state")] * 4:
        if state_of(command) in LOST:
            return True
        time.sleep(POLL)
    return False


def state_of(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()


def execute(plan: Plan, name: str) -> int:
    """Runs one step, its output on ours; one that tells a state is asked until it says ACTIVE."""
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
