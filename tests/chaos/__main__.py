"""Kills commands at chosen points and at any moment, and fills their disk; the same command must then end as if nothing
had happened: with the same bits, the same record and no file left over.

    python -m tests.chaos [--seconds=600] [--tries=N] [--seed=0] [--kinds=kill,full,moment]
        [--only=train,continue,resume,quantize,export,prepare]

The tries are drawn by seed from all points of all commands (tests/chaos/points.py) and from random moments, in turn
from each command and each way, until --seconds have passed or --tries are done. Exit code 1 when one of them failed.
Every command runs in a process forked from this one, which has imported everything and holds no jax backend.
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
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import train.flow  # noqa: F401
from common import cli, files
from evals import heldout, run  # noqa: F401
from infer import models  # noqa: F401
from model.io import export, saved  # noqa: F401
from model.quant import _calibrate, int8  # noqa: F401
from tests.chaos import points
from tests.helpers.processes import record
from tools import export as tool_export
from tools import prepare, quantize
from train import main as training

NAMES = ["train", "continue", "resume", "quantize", "export", "prepare"]
PATIENCE = 120.0  # seconds that a command may take
TINY = [
    "--config=configs/sft/tiny.py", "--config.steps=4", "--config.log_every=1", "--config.ckpt.every=2",
    "--config.eval_batches=1", "--config.eval_every=2", '--config.samples=("2+3=",)', "--config.data.batch_size=4",
    "--config.data.source=synthetic:add?n=60&digits=1", "--config.data.tokenizer=bpe:270",
]  # fmt: skip


class Command(NamedTuple):
    """`argv` runs in `root`, which `start` has filled. `outcome` is what must be the same in the end."""

    main: Callable[[list[str]], int]
    argv: Callable[[Path], list[str]]
    start: Callable[[Path], None]


def commands(base: Path) -> dict[str, Command]:
    """`base` holds a finished run, a run that was stopped behind its first checkpoint, and texts."""
    train = lambda root: [*TINY, f"--workdir={root / 'run'}", f"--config.data.cache={root / 'cache'}"]
    source = f"--model={base / 'run'}"
    sizes = ["--rows=2", "--seq_len=16", "--eval_tokens=32", "--dtype=float32"]
    nothing = lambda root: None
    return {
        "train": Command(training.main, train, nothing),
        "continue": Command(training.main, lambda root: [*train(root), "--config.ckpt.on_error=continue"], nothing),
        "resume": Command(training.main, train, lambda root: _copy(base / "half", root)),
        "quantize": Command(
            quantize.main,
            lambda root: [source, "--quant=int8", f"--data={base / 'texts.jsonl'}", f"--out={root / 'out'}", *sizes],
            nothing,
        ),
        "export": Command(
            tool_export.main, lambda root: [f"--from={base / 'run'}", f"--to={root / 'out'}"], nothing
        ),
        "prepare": Command(
            prepare.main, lambda root: [a for a in train(root) if "workdir" not in a], nothing
        ),
    }  # fmt: skip


def _copy(source: Path, root: Path) -> None:
    shutil.copytree(source, root, dirs_exist_ok=True)


# --- processes ---


def fork(command: Command, root: Path, kind: str = "", at: int = -1) -> int:
    """The id of a process that runs the command; its output goes to `root`.log, its points' names to `root`.names."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        log = os.open(f"{root}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        names = open(f"{root}.names", "w")  # noqa: SIM115
        watch = points.Points(root, kind, at)
        points.install(watch)
        code = command.main(command.argv(root))
        names.write("\n".join(watch.names))
        names.close()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pid: int, seconds: float = PATIENCE) -> int:
    """The exit code of a process, negative for a signal; one that takes longer is killed."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


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
        elif path.is_dir():
            found[name] = "folder"
        elif path.name not in ("environment.json", files.LOCK):
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
    points: dict[str, list[str]]  # kind -> names
    seconds: float


def measured(name: str, command: Command, root: Path) -> Case:
    """Runs the command once for each kind of point, undisturbed."""
    found, seconds = {}, 0.0
    for kind in ("full", "kill"):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        command.start(root)
        began = time.monotonic()
        code = wait(fork(command, root, kind))
        seconds = time.monotonic() - began
        if code:
            sys.exit(f"{name}, undisturbed: exit code {code}\n{Path(f'{root}.log').read_text()}")
        found[kind] = Path(f"{root}.names").read_text().split("\n")
    return Case(name, command, outcome(root), found, seconds)


def tries(cases: list[Case], kinds: list[str], r: random.Random) -> Iterator[tuple[Case, str, float]]:
    """Without end: (case, kind, point or seconds), from each case and kind in turn, points drawn without repetition."""

    def drawn(case: Case, kind: str) -> Iterator[tuple[Case, str, float]]:
        while True:
            for at in r.sample(range(len(case.points[kind])), len(case.points[kind])):
                yield case, kind, at

    def moments(case: Case) -> Iterator[tuple[Case, str, float]]:
        while True:
            yield case, "moment", r.uniform(0, case.seconds)

    streams = [moments(case) if kind == "moment" else drawn(case, kind) for kind in kinds for case in cases]
    yield from itertools.chain.from_iterable(zip(*streams, strict=True))


def attempt(case: Case, kind: str, at: float, root: Path) -> str:
    """Disturbs the command, then runs it again; returns what is wrong, "" when nothing is."""
    shutil.rmtree(root, ignore_errors=True)
    Path(f"{root}.log").unlink(missing_ok=True)
    root.mkdir()
    case.command.start(root)
    if kind == "moment":
        pid = fork(case.command, root)
        code = wait(pid, at)
        good = code in (0, -signal.SIGKILL)
    else:
        code = wait(fork(case.command, root, kind, int(at)))
        told = Path(f"{root}.log").read_text()
        one_line = code == 2 and "Traceback" not in told and os.strerror(errno.ENOSPC) in told.strip().split("\n")[-1]
        good = code == -signal.SIGKILL if kind == "kill" else one_line
    if not good:
        return f"exit code {code}"
    code = wait(fork(case.command, root))
    if code:
        return f"the same command again: exit code {code}"
    return differences(outcome(root), case.wanted)


def made(work: Path, names: list[str]) -> list[Case]:
    """The commands, measured; what they start from is made on the way."""
    base, root = work / "base", work / "root"
    base.mkdir()
    (base / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i} and {i + 1} " * 20}) + "\n" for i in range(9)))
    every = commands(base)
    train = measured("train", every["train"], root)
    _copy(root / "run", base / "run")
    first = next(i for i, name in enumerate(train.points["kill"]) if name.startswith("after re") and "/2" in name)
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
    parser.add_argument(
        "--only", type=cli.listed, default=["train", "continue", "resume", "quantize", "export", "prepare"]
    )
    parser.add_argument("--kinds", type=cli.listed, default=["kill", "full", "moment"])
    args = parser.parse_args(argv)
    end, done, failed = time.monotonic() + args.seconds, Counter(), 0
    with tempfile.TemporaryDirectory() as work:
        cases = made(Path(work), args.only)
        for case in cases:
            sizes = ", ".join(f"{len(names)} points to {kind}" for kind, names in case.points.items())
            print(f"{case.name}: {sizes}, {case.seconds:.1f} s", flush=True)
        for case, kind, at in itertools.islice(tries(cases, args.kinds, random.Random(args.seed)), args.tries):
            if time.monotonic() > end:
                break
            wrong = attempt(case, kind, at, Path(work) / "root")
            done[case.name, kind] += 1
            if wrong:
                failed += 1
                where = f"after {at:.2f} s" if kind == "moment" else case.points[kind][int(at)]
                log = Path(work, "root.log").read_text().splitlines()[-12:]
                print(f"FAILED {case.name}, {kind} {at:g}, {where}: {wrong}", *log, sep="\n    ", flush=True)
    for (name, kind), n in sorted(done.items()):
        print(f"{name:>9} {kind:>7} {n:>5}")
    print(f"{done.total()} tries, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
