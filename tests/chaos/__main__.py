"""Kills commands at chosen points and at any moment, and fills their disk; the same command must then end as if nothing
had happened: with the same bits, the same record and no file left over.

    python -m tests.chaos [--seconds=600] [--tries=N] [--seed=0] [--kinds=kill,full,moment]
        [--only=train,short,continue,resume,pair,quantize,export,gguf,prepare,sweep,demo,serve] [--every]

The tries are drawn by seed from all points of all commands (tests/chaos/points.py) and from random moments, in turn
from each command and each way, until --seconds have passed or --tries are done; --every takes all points, in their
order. Exit code 1 when one of them failed. Every command (tests/chaos/commands.py) runs in processes forked from this
one, which has imported everything and holds no jax backend.
"""

import os
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = ""
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"kungfu-chaos-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import errno
import hashlib
import itertools
import json
import random
import shutil
import signal
import socket
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import train.flow  # noqa: F401
from common import cli, files
from evals import export as evals_export  # noqa: F401
from evals import heldout, run  # noqa: F401
from evals import main as evaluating  # noqa: F401
from infer import models  # noqa: F401
from model.io import export, saved  # noqa: F401
from model.quant import _calibrate, int8  # noqa: F401
from tests.chaos import points
from tests.chaos.commands import TWO, Command, commands, copy
from tests.helpers.processes import record, timeless

NAMES = [
    "train",
    "short",
    "continue",
    "resume",
    "pair",
    "quantize",
    "export",
    "gguf",
    "prepare",
    "sweep",
    "demo",
    "serve",
]
PATIENCE = 150.0  # seconds that a command may take
PEER = 5.0  # seconds that the other process of a launch has when one is killed
# Files with times in them: that they are there is what counts.
TIMED = ("*.log", "log.txt", "*.html", "report.md", "decision.*", "results.csv", "CLAIM", "SWEEP")
APART = ("environment.json", files.LOCK)


class Point(NamedTuple):
    """A line of `names` of process `rank`."""

    rank: int
    index: int
    name: str


# --- processes ---


def fork(command: Command, root: Path, kind: str = "", at: Point | None = None) -> list[int]:
    """The ids of the processes that run the command. Their output goes to `root`.log."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    sys.stdout.flush()
    return [_forked(command, root, kind, at, rank, address) for rank in range(command.processes)]


def _forked(command: Command, root: Path, kind: str, at: Point | None, rank: int, address: str) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open(f"{root}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if command.processes > 1:
            numbers = {"JAX_NUM_PROCESSES": str(command.processes), "JAX_PROCESS_ID": str(rank)}
            os.environ.update(numbers, JAX_COORDINATOR_ADDRESS=address)
        names = Path(f"{root}.names{rank}") if kind and not at else None
        points.install(points.Points(root, kind, at.index if at and at.rank == rank else -1, names))
        code = command.main(command.argv(root))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pids: list[int], seconds: float = PATIENCE, victim: int = 0) -> list[int]:
    """The exit code of each process, negative for a signal. After `seconds` the victim is killed; when one was killed,
    the others have PEER seconds."""
    codes: dict[int, int] = {}
    end, peers = time.monotonic() + seconds, float("inf")
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(status[1])
        if -signal.SIGKILL in codes.values():
            peers = min(peers, time.monotonic() + PEER)
        if time.monotonic() > end and pids[victim] not in codes:
            os.kill(pids[victim], signal.SIGKILL)
        if time.monotonic() > min(peers, end + PATIENCE):
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


# --- what must be the same ---


def outcome(root: Path) -> dict[str, object]:
    """The files below `root`: checkpoints by their arrays' digests, metrics by `record`, others by their bytes."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        step = next((p for p in path.parents if saved.STEP.fullmatch(p.name) and p.parent.name == "ckpt"), None)
        if step and step != root:
            found[step.relative_to(root).as_posix()] = saved.read_manifest(step)["leaves"]
        elif path.name == "metrics.jsonl":
            found[name] = record(path.parent)
        elif path.name == "evals.jsonl":
            lines = [json.dumps(timeless(line), sort_keys=True) for line in files.read_lines(path)]
            found[name] = sorted({line.replace(str(root), "ROOT") for line in lines})
        elif path.name == "comparison.json":
            found[name] = json.dumps(timeless(files.load_json(path))).replace(str(root), "ROOT")
        elif path.is_dir() or any(map(path.match, TIMED)):
            found[name] = "there"
        elif path.name not in APART:
            found[name] = hashlib.sha256(path.read_bytes().replace(str(root).encode(), b"ROOT")).hexdigest()
    return found


def differences(found: dict[str, object], wanted: dict[str, object]) -> str:
    names = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    return "".join(f" {name} is " + ("missing" if name not in found else "left over" if name not in wanted else "other")
                   for name in names)  # fmt: skip


# --- tries ---


class Case(NamedTuple):
    name: str
    command: Command
    wanted: dict[str, object]
    points: dict[str, list[Point]]  # by kind
    seconds: float


def measured(name: str, command: Command, root: Path) -> Case:
    """Runs the command once for each kind of point, undisturbed."""
    found, seconds = {}, 0.0
    for kind in ("full", "kill"):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        command.start(root)
        began = time.monotonic()
        codes = wait(fork(command, root, kind))
        seconds = time.monotonic() - began
        if any(codes):
            sys.exit(f"{name}, undisturbed: exit codes {codes}\n{Path(f'{root}.log').read_text()}")
        told = [Path(f"{root}.names{rank}").read_text().splitlines() for rank in range(command.processes)]
        found[kind] = [Point(rank, i, each) for rank, names in enumerate(told) for i, each in enumerate(names)]
    return Case(name, command, outcome(root), found, seconds)


def tries(cases: list[Case], kinds: list[str], r: random.Random, every: bool) -> Iterator[tuple[Case, str, Point]]:
    """(case, kind, point), from each case and kind in turn; a moment is a point whose name is its seconds.

    Drawn without repetition, and without end unless `every` asks for each point once.
    """

    def drawn(case: Case, kind: str) -> Iterator[tuple[Case, str, Point]]:
        while True:
            found = case.points[kind]
            yield from ((case, kind, at) for at in (found if every else r.sample(found, len(found))))
            if every:
                return

    def moments(case: Case) -> Iterator[tuple[Case, str, Point]]:
        while True:
            seconds = r.uniform(0, case.seconds)
            yield case, "moment", Point(r.randrange(case.command.processes), 0, f"{seconds:.2f}")

    streams = [moments(c) if kind == "moment" else drawn(c, kind)
               for kind in kinds for c in cases if kind == "moment" or c.points[kind]]  # fmt: skip
    for turn in itertools.zip_longest(*streams):
        yield from filter(None, turn)


def attempt(case: Case, kind: str, at: Point, root: Path) -> str:
    """Disturbs the command, then runs it again; returns what is wrong, "" when nothing is."""
    shutil.rmtree(root, ignore_errors=True)
    Path(f"{root}.log").unlink(missing_ok=True)
    root.mkdir()
    case.command.start(root)
    if kind == "moment":
        code = wait(fork(case.command, root), float(at.name), at.rank)[at.rank]
        good = code in (0, -signal.SIGKILL)
    else:
        code = wait(fork(case.command, root, kind, at))[at.rank]
        told = Path(f"{root}.log").read_text()
        lines = told.strip().split("\n")
        last = lines[-1:] if case.command.processes == 1 else lines  # another process may print its own end later
        one_line = code == 2 and "Traceback" not in told and any(os.strerror(errno.ENOSPC) in line for line in last)
        unreached = code == 0 and case.command.processes > 1  # the other process wrote the cache
        good = (code == -signal.SIGKILL or unreached) if kind == "kill" else one_line
    if not good:
        return f"exit code {code}"
    codes = wait(fork(case.command, root))
    if any(codes):
        return f"the same command again: exit codes {codes}"
    return differences(outcome(root), case.wanted)


def made(work: Path, names: list[str]) -> list[Case]:
    """The commands, measured; what they start from is made on the way."""
    base, root = work / "base", work / "root"
    base.mkdir()
    (base / "two.py").write_text(TWO)
    (base / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i} and {i + 1} " * 20}) + "\n" for i in range(9)))
    every = commands(base)
    train = measured("train", every["train"], root)
    copy(root / "run", base / "run")
    first = next(at for at in train.points["kill"] if at.name.startswith("after re") and "/2" in at.name)
    shutil.rmtree(root)
    root.mkdir()
    wait(fork(every["train"], root, "kill", first))
    root.rename(base / "half")
    return [train if name == "train" else measured(name, every[name], root) for name in names]


@cli.command
def main(argv: list[str]) -> int:
    parser = cli.Parser("tests.chaos", __doc__)
    parser.add_argument("--seconds", type=cli.count, default=600)
    parser.add_argument("--tries", type=cli.count, default=1 << 30)
    parser.add_argument("--seed", type=cli.count, default=0)
    parser.add_argument("--only", type=cli.listed, default=NAMES)
    parser.add_argument("--kinds", type=cli.listed, default=["kill", "full", "moment"])
    parser.add_argument("--every", action="store_true")
    args = parser.parse_args(argv)
    end, done, failed = time.monotonic() + args.seconds, Counter(), 0
    with tempfile.TemporaryDirectory() as work:
        cases = made(Path(work), args.only)
        for case in cases:
            sizes = ", ".join(f"{len(names)} points to {kind}" for kind, names in case.points.items())
            print(f"{case.name}: {sizes}, {case.seconds:.1f} s", flush=True)
        drawn = tries(cases, args.kinds, random.Random(args.seed), args.every)
        for case, kind, at in itertools.islice(drawn, args.tries):
            if time.monotonic() > end:
                print("the time is over")
                break
            wrong = attempt(case, kind, at, Path(work) / "root")
            done[case.name, kind] += 1
            if wrong:
                failed += 1
                log = Path(work, "root.log").read_text().splitlines()[-12:]
                where = f"process {at.rank}, {at.name}"
                print(f"FAILED {case.name}, {kind} {at.index}, {where}: {wrong}", *log, sep="\n    ", flush=True)
    for (name, kind), n in sorted(done.items()):
        print(f"{name:>9} {kind:>7} {n:>5}")
    print(f"{done.total()} tries, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
