"""Runs commands as child processes: either several commands of a queue at once, or stages one after the other with a
progress bar.

Finished work is not repeated: a queue starts only unfinished commands, and a stage is skipped if the files that it has
written show that it is done.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from common import exits, files

PARENT = "KUNGFU_PARENT"  # environment variable with the parent's process id; if the parent dies, the command is killed


class Running(Protocol):
    """A running command that a queue has started: its process and any other attributes that the queue needs."""

    @property
    def process(self) -> subprocess.Popen: ...


R = TypeVar("R", bound=Running)


class Queue(Protocol[R]):
    def take(self) -> R | None:
        """Starts the next command and returns it. Returns None if no command can start now."""

    def left(self) -> bool:
        """Whether a command can still be started, now or later."""

    def hopeless(self, job: R) -> bool:
        """Whether a running command should be stopped before it has finished."""

    def close(self, job: R, hopeless: bool) -> None:
        """Records that the process of `job` has ended. The argument `hopeless` is True if the job was stopped early
        because the method `hopeless` returned True for it."""


class Stage(NamedTuple):
    """A command to run. `share` returns the fraction of the stage that is done, computed from the stage's files. A
    stage is skipped if this fraction is 1."""

    title: str
    argv: list[str]  # python -m ...
    share: Callable[[], float]
    seconds: float  # expected duration; sets how much of the progress bar the stage fills


def start(argv: Sequence[str], log: Path, **options: Any) -> subprocess.Popen:
    """Starts `python -m ARGV`, and appends the output of the process to the file `log`.

    The process gets its own session. In the parent's session, it would receive Ctrl-C twice, once from the terminal and
    once from its parent, and the second signal would stop a run immediately.
    """
    with open(log, "ab", opener=files.not_followed) as file:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        return subprocess.Popen([sys.executable, "-m", *argv], **pipes, start_new_session=True, **options)


def follow_parent() -> None:
    """If the environment variable PARENT is set, makes the kernel kill this process when its parent dies. A parent that
    is killed cannot stop its children itself."""
    parent = os.environ.pop(PARENT, "")
    if not parent:
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # only Linux has this call
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)


def tail(log: Path, lines: int) -> list[str]:
    return log.read_text("utf-8", errors="replace").strip().splitlines()[-lines:]


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Yields an empty list. The first SIGTERM or Ctrl-C appends SIGTERM to the list instead of ending the process. A
    second signal ends the process as usual."""
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(*_: Any) -> None:
        caught.append(signal.SIGTERM)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        restore()


def drain(queue: Queue[R], at_once: int, stop: list[int], show: Callable[[], None]) -> None:
    """Runs the commands of a queue, at most `at_once` at a time, until the queue is empty. Once the list `stop`
    contains a signal, starts no more commands, and sends SIGTERM to the running processes. Returns when all processes
    have ended. Meanwhile, calls `show` four times per second."""
    running: list[R] = []
    asked: list[R] = []  # jobs to which SIGTERM was sent
    try:
        while True:
            while not stop and len(running) < at_once and (job := queue.take()):
                running.append(job)
            for job in list(running):
                if job.process.poll() is not None:
                    running.remove(job)
                    queue.close(job, hopeless=job in asked and not stop)
                elif job not in asked and (stop or queue.hopeless(job)):
                    job.process.send_signal(signal.SIGTERM)
                    asked.append(job)
            show()
            if not running and (stop or not queue.left()):
                return
            time.sleep(0.25)
    finally:
        for job in running:
            job.process.terminate()


# --- running stages one after the other ---


class _Stages:
    """A queue of stages. After one stage fails, no more stages are started."""

    def __init__(self, stages: list[Stage], out: Path):
        self.stages, self.out, self.at, self.code = stages, out, 0, 0

    def log(self) -> Path:
        return self.out / f"{self.at + 1}.log"

    def take(self) -> "_Job | None":
        while self.left() and self.stages[self.at].share() >= 1:
            self.at += 1
        if not self.left():
            return None
        # If this process is killed, so is the child: otherwise, the child would keep its run folder locked.
        own = os.environ | {PARENT: str(os.getpid())}
        return _Job(start(self.stages[self.at].argv, self.log(), env=own))

    def left(self) -> bool:
        return not self.code and self.at < len(self.stages)

    def hopeless(self, job: "_Job") -> bool:
        return False

    def close(self, job: "_Job", hopeless: bool) -> None:
        self.code = job.process.returncode
        self.at += self.code == 0


class _Job(NamedTuple):
    process: subprocess.Popen


def run(stages: list[Stage], out: Path) -> int:
    """Runs the unfinished stages, and writes a log of each stage to the folder `out`. Returns 0 if all succeed,
    PREEMPTED after a signal, or the exit code of the stage that failed."""
    queue = _Stages(stages, out)
    with _bar(stages) as show, interruptible() as stop:
        drain(queue, 1, stop, lambda: show(queue.at))
    if stop and (queue.code or queue.left()):
        print("interrupted; run the same command to continue", file=sys.stderr)
        return exits.PREEMPTED
    if queue.code:
        stage, log = stages[queue.at], queue.log()
        print(*tail(log, 12), sep="\n", file=sys.stderr)
        print(f"{stage.title}: failed with exit code {queue.code}; the full log is {log}", file=sys.stderr)
        print(f"the command: python -m {' '.join(stage.argv)}", file=sys.stderr)
    return queue.code


@contextlib.contextmanager
def _bar(stages: list[Stage]) -> Iterator[Callable[[int], None]]:
    """Yields a function `show(i)`, which shows that stage i is running or, if i is `len(stages)`, that all stages are
    done. It draws a progress bar if the output is a terminal, and otherwise prints one line per stage."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console, shown = Console(), set()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(stage.seconds for stage in stages))

        def show(i: int) -> None:
            now = stages[i].share() * stages[i].seconds if i < len(stages) else 0
            title = f"{i + 1}/{len(stages)} {stages[i].title}" if i < len(stages) else "done"
            progress.update(task, completed=sum(s.seconds for s in stages[:i]) + now, description=title)
            if i not in shown and not console.is_terminal:
                print(title, flush=True)
            shown.add(i)

        yield show
