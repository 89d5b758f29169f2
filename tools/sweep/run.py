"""Manages the points of a sweep: their run folders OUT/ID, their states and the processes that run them.

A launcher is a process of tools.sweep. Before it starts the run of a point, it locks OUT/ID/CLAIM. The run's process
inherits the lock, and the kernel releases the lock when both processes have ended.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import exits, files, jobs, record
from common.errors import UserError
from common.types import Leaf
from train.keep.runs import take_lock

DONE, FAILED, PRUNED, RUNNING, STOPPED, WAITING = "done", "failed", "pruned", "running", "stopped", "waiting"
BELOW = "below floor"  # stopped by config.floors; a repeated run would stop at the same step
ENDED = (DONE, FAILED, PRUNED, BELOW)
_parsed: dict[Path, tuple[tuple, list[dict]]] = {}


class Point(NamedTuple):
    """One run of a sweep. `values` are the config values that the sweep sets. `argv` are the arguments of train.main
    except --workdir."""

    id: str
    values: dict[str, Leaf]
    argv: list[str]
    config: Any


class Child(NamedTuple):
    point: Point
    process: subprocess.Popen
    claim: int
    trial: Any = None  # the Optuna trial, if the point is part of a search


class Listed:
    """The queue of a sweep whose points are listed in advance. A search uses the queue of tools.sweep.search instead.
    If `retry` is true, failed points are run again."""

    def __init__(self, points: list[Point], out: Path, retry: bool):
        self.points, self.out = {p.id: p for p in points}, out
        with alone(out):
            for i, point in enumerate(points):
                declare(point, out, i)
        self.retry = {p.id for p in points if retry and state(out / p.id, p.config.steps) == FAILED}

    def take(self) -> Child | None:
        """Starts the next point that no other process is running."""
        for point in list(self.points.values()):
            again = point.id in self.retry
            states = (WAITING, STOPPED, FAILED) if again else (WAITING, STOPPED)
            if child := start(point, self.out, states):
                self.retry.discard(point.id)
                return child
            if not again and state(self.out / point.id, point.config.steps) in ENDED:
                del self.points[point.id]
        return None

    def left(self) -> bool:
        return bool(self.points)

    def hopeless(self, child: Child) -> bool:
        return False

    def close(self, child: Child, hopeless: bool) -> None:
        finish(child, self.out / child.point.id, hopeless)


def finish(child: Child, folder: Path, hopeless: bool) -> None:
    """Records whether a run failed or was stopped early, and releases the claim on its point. If the disk was full,
    raises UserError instead of recording a failure, so the same command can resume the run later."""
    code, ended = child.process.returncode, {}
    with os.fdopen(child.claim):
        if outcome(folder, child.point.config.steps) == DONE:
            return
        if hopeless:
            ended = {"state": PRUNED}
        elif code not in (exits.PREEMPTED, -signal.SIGTERM):  # SIGTERM may end a run that has no handler yet
            events = [line["event"] for line in read(folder) if line.get("exit_code") == code]
            said = "".join((events or jobs.tail(folder / "log.txt", 1))[-1:])
            if code == exits.INPUT and any(os.strerror(number) in said for number in files.FULL):
                raise UserError("no space is left for the run", str(folder), "make room and run the same command again")
            ended = {"state": BELOW if code == exits.BELOW_FLOOR else FAILED, "code": code, "said": said}
        if ended:
            files.write_json(folder / "ended.json", ended)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Holds the sweep's lock, which only one launcher at a time can hold."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "SWEEP", "a", opener=files.not_followed) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def declare(point: Point, out: Path, index: int) -> None:
    """Creates the point's folder, from which the results are collected. Callers must hold the sweep's lock
    (`alone`)."""
    (out / point.id).mkdir(parents=True, exist_ok=True)
    if not (out / point.id / "point.json").exists():
        files.write_json(out / point.id / "point.json", {"values": point.values, "index": index})


def start(point: Point, out: Path, states: tuple[str, ...], trial: Any = None) -> Child | None:
    """Starts a process that runs the point. Returns None if another process is running or has claimed the point, or if
    the point's state is not in `states`."""
    folder = out / point.id
    if held(folder):
        return None
    with contextlib.suppress(UserError):  # another launcher may take the lock first
        claim = take_lock(folder / "CLAIM")
        if outcome(folder, point.config.steps) in states:
            (folder / "ended.json").unlink(missing_ok=True)
            argv = ["train.main", *point.argv, f"--workdir={folder}"]
            return Child(point, jobs.start(argv, folder / "log.txt", pass_fds=[claim]), claim, trial)
        os.close(claim)
    return None


def held(folder: Path) -> bool:
    """Whether a launcher has claimed the point, or the point is being run without a launcher."""
    for name in ("CLAIM", "LOCK"):
        with contextlib.suppress(FileNotFoundError), (folder / name).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def state(folder: Path, steps: int) -> str:
    return RUNNING if held(folder) else outcome(folder, steps)


def outcome(folder: Path, steps: int) -> str:
    """Returns the state of a run according to its files. A run is STOPPED if it was interrupted, or if it is done but
    `steps` has been raised since."""
    lines, ended = read(folder), files.read_json(folder / "ended.json")
    if any(line.get("event") == "done" and line["step"] >= steps for line in lines):
        return DONE
    codes = [line["exit_code"] for line in lines if "exit_code" in line]
    if "state" in ended or not lines:
        return ended.get("state", WAITING)
    ends = {exits.PREEMPTED: STOPPED, exits.BELOW_FLOOR: BELOW}
    return ends.get(codes[-1], FAILED) if codes else STOPPED


def read(folder: Path) -> list[dict]:
    """Returns the lines of a run's metrics.jsonl. The file is parsed again only after it has changed."""
    path = folder / "metrics.jsonl"
    with contextlib.suppress(FileNotFoundError):
        now = path.stat().st_mtime_ns, path.stat().st_size
        if _parsed.get(path, ((), []))[0] != now:
            _parsed[path] = now, record.read(path)
        return _parsed[path][1]
    return []


def curve(folder: Path, metric: str) -> list[tuple[int, float | None]]:
    """Returns [(step, value)] of a metric "KIND/NAME", such as "eval/nll". Values that were not finite are None."""
    kind, _, name = metric.partition("/")
    return [(line["step"], line[name]) for line in read(folder) if line["kind"] == kind and name in line]
