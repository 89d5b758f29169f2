"""A real chat model learns something on this machine, and what each way of teaching it cost.

    python -m tools.demo [--out=runs/demo]

A small decoder learns English from nothing; then SmolLM2-135M-Instruct is asked to read dates in old speeches: as it
is, with examples in the prompt, tuned by LoRA, and tuned as a whole. Every stage is a command that you can run
yourself; its output goes to a log beside its results. Run it again after an interruption: what is done stays done, and
a training run goes on from its last checkpoint.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import files
from common.errors import UserError

TASK, SHOTS, EXAMPLES, TEXT, PASSAGES = "dates", "0,4", 100, "pydocs", 12
MODEL = "smollm2-135m-instruct"
INTERRUPTED = 75


class Stage(NamedTuple):
    """`share` is the part of the stage that is done, from 0 to 1, read from its files; 1 means: skip it."""

    title: str
    argv: list[str]  # python -m ...
    share: Callable[[], float]
    seconds: float  # about, on two cores: the length of its part of the bar


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        given = [word.partition("=") for word in argv]
        if any(name != "--out" or not value for name, _, value in given):
            raise UserError(
                f"unknown options {' '.join(argv)!r}", "tools.demo", "python -m tools.demo [--out=runs/demo]"
            )
        return demo(Path(given[-1][2] if given else "runs/demo"))
    except UserError as e:
        print(e, file=sys.stderr)
        return 2


def demo(out: Path) -> int:
    """Runs what is left of the stages. 0: done; 75: interrupted; otherwise the exit code of the stage that failed."""
    out.mkdir(parents=True, exist_ok=True)
    code = run(stages(out), out)
    if code == 0:
        print((out / "report.md").read_text("utf-8").split("\n## ")[0].partition("\n")[2].strip())
        print(f"\nThe report: {out / 'report.html'}")
    return code


def stages(out: Path) -> list[Stage]:
    data = [f"--config.data.source={out}/{TASK}/train.jsonl", f"--config.data.eval_source={out}/{TASK}/heldout.jsonl"]
    folders = [str(out / name) for name in ("prompting", "lora", "full", "pretrain")]
    return [
        _train("a small model learns English from nothing", out / "pretrain", 75),
        Stage(
            "examples of the task",
            ["evals.export", f"--task={TASK}", f"--out={out / TASK}"],
            lambda: float((out / TASK / "heldout.jsonl").exists()),
            5,
        ),
        _measure("SmolLM2 as it is, and with examples in the prompt", MODEL, out / "prompting", SHOTS, 110),
        _train("LoRA", out / "lora", 60, *data),
        _measure("the model tuned by LoRA", out / "lora", out / "lora", "0", 40),
        _train("full fine-tuning", out / "full", 65, *data),
        _measure("the model tuned as a whole", out / "full", out / "full", "0", 40),
        Stage("the report", ["tools.report", *folders, f"--out={out / 'report.html'}"], lambda: 0.0, 3),
    ]


def _train(title: str, folder: Path, seconds: float, *more: str) -> Stage:
    argv = ["train.main", f"--config=configs/demo/{folder.name}.py", f"--workdir={folder}", *more]
    return Stage(title, argv, lambda: trained(folder), seconds)


def _measure(title: str, model: str | Path, folder: Path, shots: str, seconds: float) -> Stage:
    argv = ["evals.main", f"--model={model}", f"--tasks={TASK}", f"--shots={shots}", f"--n={EXAMPLES}"]
    argv += [f"--text={TEXT}", f"--passages={PASSAGES}", f"--out={folder}"]
    return Stage(title, argv, lambda: measured(folder, len(shots.split(",")) + 1), seconds)


def trained(folder: Path) -> float:
    """The share of a run's steps that are done; 1 only when its last line says so."""
    lines = files.read_lines(folder / "metrics.jsonl")
    if any(line.get("event") == "done" for line in lines[-1:]):
        return 1.0
    steps = json.loads((folder / "config.json").read_text("utf-8"))["steps"] if lines else 1
    return min(0.99, max((line.get("step", 0) for line in lines), default=0) / steps)


def measured(folder: Path, results: int) -> float:
    """The share of the results that are there and no older than the run they are of."""
    since = max((line["time"] for line in files.read_lines(folder / "metrics.jsonl") if "time" in line), default=0)
    fresh = [line for line in files.read_lines(folder / "evals.jsonl") if line["time"] >= since]
    return min(1.0, len({(line.get("task"), line.get("shots"), line.get("text")) for line in fresh}) / results)


# --- running them ---


def run(stages: list[Stage], out: Path) -> int:
    """Runs the stages that are not done, one after the other, under one progress bar."""
    with _bar(stages) as show, interruptible() as stop:
        for i, stage in enumerate(stages):
            if stage.share() >= 1:
                continue
            code = _run(stage, out / f"{i + 1}.log", lambda i=i: show(i), stop)
            if code:
                _explain(stage, out / f"{i + 1}.log", INTERRUPTED if stop else code)
                return INTERRUPTED if stop else code
        show(len(stages))
    return 0


def _run(stage: Stage, log: Path, tick: Callable[[], None], stop: list[int]) -> int:
    """The exit code of a stage. A signal to stop is passed on once, and the stage may save before it ends.

    The child has a session of its own: Ctrl-C in a terminal would reach it a second time, and that means at once.
    """
    argv, told = [sys.executable, "-m", *stage.argv], False
    with log.open("a", encoding="utf-8") as file:
        child = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while child.poll() is None:
                tick()
                if stop and not told:
                    child.send_signal(stop[0])
                    told = True
                time.sleep(0.25)
        finally:
            child.kill()
    return child.wait()


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that holds the signal once Ctrl-C or SIGTERM came; a second one ends the process as usual."""
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: Any) -> None:
        caught.append(signal.SIGTERM)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _bar(stages: list[Stage]) -> Iterator[Callable[[int], None]]:
    """A function that shows stage i (`len(stages)`: all done): a bar on a terminal, else a line for each new stage."""
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


def _explain(stage: Stage, log: Path, code: int) -> None:
    if code == INTERRUPTED:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return
    tail = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-12:])
    print(f"{tail}\n{stage.title}: failed with exit code {code}; all of it is in {log}", file=sys.stderr)
    print(f"the command: python -m {' '.join(stage.argv)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
