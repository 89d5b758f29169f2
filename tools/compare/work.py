"""Runs the jobs of a comparison. Each job is an ordinary command with its own run folder, and can be rerun by hand."""

import hashlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import exits, files, gas, jobs
from common import record as metrics
from common.errors import UserError
from common.jobs import Stage
from common.types import Json
from tools.compare import inputs
from tools.compare.inputs import Comparison
from tools.compare.method import Candidate
from tools.report import data as report

TEXT, PASSAGES = "pydocs", 12  # forgetting is the rise of the loss on this general text; number of passages from it
LATENCY = 10  # number of requests sent one at a time to measure the latency
LEFT_OUT = ("time", "gas", "model")  # fields of an evals.jsonl line that are not copied to the record


class Failed(Exception):
    """A command failed. The message is its error or the last line of its log."""


class Stopped(Exception):
    """The comparison was interrupted."""


class Asked(NamedTuple):
    """Which rows to score, and whether to measure the latency and the loss on general text as well."""

    split: str
    n: int
    latency: bool = False
    text: bool = False


def index(c: Comparison) -> Json | None:
    """Builds the index of the documents. Raises UserError if that fails."""
    if not c.documents:
        return None
    from infer.retrieve.index import opened

    folder = c.out / "index"
    argv, start = index_command(c, folder), time.perf_counter()
    try:
        _run(c, "index of the documents", [Stage("index", argv, lambda: 0.0, 5)])
    except Failed as e:
        raise UserError(f"the documents cannot be indexed: {e}", c.documents) from e
    size = sum(path.stat().st_size for path in folder.iterdir())
    seconds, made = time.perf_counter() - start, opened(folder)
    spent = {"flops": made.build_flops, "seconds": seconds, "usd": 0.0}
    return {"chunks": len(made.chunks), "bytes": size, **spent, "commands": [argv]}


def index_command(c: Comparison, folder: Path) -> list[str]:
    argv = ["tools.index", f"--index={folder}", f"--documents={c.documents}"]
    return [*argv, f"--embedder={c.embedder}"] if c.embedder else argv


def check_documents(c: Comparison) -> None:
    """Raises UserError if the documents or the embedder have changed since this comparison indexed them."""
    from infer.retrieve import index

    made = files.read_json(c.out / "index" / index.RECORD)
    if made.get("embedder") != c.embedder:
        what = (
            f"the comparison in {c.out} indexed the documents with another embedder: {made.get('embedder') or 'none'}"
        )
        raise UserError(what, "--embedder", "choose a new folder: --out")
    if made.get("content") != index.content(c.documents or ""):
        what = f"the documents have changed since the comparison in {c.out} began"
        raise UserError(what, c.documents or "", "choose a new folder: --out")


def train(c: Comparison, x: Candidate, rows: int, seed: int, folder: Path) -> tuple[Stage, list[str]]:
    """Returns (stage, command) for training a candidate on the first `rows` training rows. Writes the training data to
    OUT/rows."""
    asked, context = x.setting.ask, c.bases[x.model].context
    path = c.out / "rows" / f"train-{rows}{f'-{asked.k}-passages' if asked.index else ''}.jsonl"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        inputs.write(path, inputs.order(c.task.scored["train"])[:rows], asked)
    sizes = inputs.tokens(path, x.model)
    longest = min(max(sizes), context)
    changes = {
        "init": x.model, "seed": seed, "epochs": c.epochs, "data.source": path, "data.eval_source": "",
        "data.holdout": 0.0, **inputs.shape(longest, sum(sizes), context), "eval_every": 0, **(x.setting.train or {}),
    }  # fmt: skip
    argv = ["train.main", f"--config={inputs.CONFIG}", *(f"--config.{key}={value}" for key, value in changes.items())]
    argv.append(f"--workdir={folder}")
    return Stage(f"train {x.id}", argv, lambda: trained(folder), 30), argv


def trained(folder: Path) -> float:
    """Returns the fraction of a run's steps that are done. It is 1 only if the last line of metrics.jsonl is "done"."""
    lines = metrics.read(folder / "metrics.jsonl")
    if any(line.get("event") == "done" for line in lines[-1:]):
        return 1.0
    steps = files.read_json(folder / "config.json").get("steps") or 1
    return min(0.99, max((line["step"] for line in lines), default=0) / steps)


def together(x: Candidate) -> tuple:
    """Returns a key. One command can score all candidates that have the same key."""
    how = x.setting.ask
    if x.trained or how.index:
        return (x.id,)
    return x.model, "instruction" if how.instruction else how.pick if how.shots else "fixed"


def ask(c: Comparison, group: Sequence[Candidate], what: Asked, folder: Path) -> tuple[Stage, list[str]]:
    """Returns (stage, command) for letting a group of candidates answer questions. The command writes the results to
    `folder`."""
    first, each = group[0], [x.setting.ask for x in group]
    argv = ["evals.main", f"--model={folder if first.trained else first.model}", f"--tasks={c.task.spec}{inputs.TEST}"]
    argv += [f"--n={what.n}", f"--out={folder}"]
    if what.split != "test":
        argv.append(f"--split={what.split}")
    if any(how.instruction for how in each):
        variants = folder / "instructions.txt"
        files.write(variants, "".join(f"{how.instruction}\n" for how in each))
        argv.append(f"--instructions={variants}")
    if any(how.shots for how in each):
        pick = next(how.pick for how in each if how.shots)
        argv += [f"--shots={','.join(str(how.shots) for how in each)}", f"--pick={pick}"]
    if index := each[0].index:
        argv += [f"--index={index}", f"--k={each[0].k}"]
        argv += [f"--how={each[0].how}"] if each[0].how else []
    argv += [f"--latency={LATENCY}"] if what.latency else []
    argv += [f"--text={TEXT}", f"--passages={PASSAGES}"] if what.text else []
    done = lambda: float(all(result(x, what, folder) for x in group))
    return Stage(f"ask {', '.join(x.id for x in group)}", argv, done, 20), argv


def result(x: Candidate, what: Asked, folder: Path) -> Json | None:
    """Returns a candidate's newest result in `folder`, in the format of the record. Returns None if there is no such
    result, or if `what` also asks for the loss on general text and that has not been measured."""
    split = "heldout" if what.split == "test" else what.split
    key = split, what.n, x.setting.ask.to_dict()
    lines = [line for line in files.read_lines(folder / "evals.jsonl") if "task" in line]
    found = [line for line in lines if (line["split"], line["n"], line["context"]) == key]
    if not found or (what.text and not loss(folder)):
        return None
    return {name: value for name, value in found[-1].items() if name not in LEFT_OUT}


def loss(folder: Path) -> Json | None:
    """Returns the loss on general text that a run folder records, or None if it has none."""
    found = [line for line in files.read_lines(folder / "evals.jsonl") if line.get("text") == TEXT]
    return {key: found[-1][key] for key in ("loss", "tokens", "flops", "seconds")} if found else None


def spent(folder: Path) -> tuple[float, float]:
    """Returns the FLOPs and the seconds that a run spent on training."""
    run = report.read(folder)
    return run.done["flops"], report.seconds(run) or 0.0


def everything(folder: Path) -> float:
    """Returns the total seconds that a run took, including loading and saving."""
    return sum(sum(session.spent.values()) for session in gas.sessions(metrics.read(folder / "metrics.jsonl")))


def do(c: Comparison, title: str, stages: list[Stage]) -> None:
    """Runs the stages, unless all are done already. Raises Failed if a command fails, Stopped if it is interrupted, or
    UserError if the disk is full."""
    if any(stage.share() < 1 for stage in stages):
        _run(c, title, stages)


def _run(c: Comparison, title: str, stages: list[Stage]) -> None:
    logs = c.out / "logs" / slug(title)
    logs.mkdir(parents=True, exist_ok=True)
    print(f"{title}", flush=True)
    code = jobs.run(stages, logs)
    if code == exits.PREEMPTED:
        raise Stopped
    if code:
        last = max(logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
        said = [line.strip() for line in jobs.tail(last, 20) if line.strip()]
        errors = [line for line in said if " · " in line]  # UserErrors are printed with this separator
        why = (errors or said or [f"exit code {code}"])[-1]
        if any(os.strerror(number) in why for number in files.FULL):  # the command did not fail because of its method
            raise UserError(why, "", "" if "make room" in why else "make room and run the same command again")
        raise Failed(why)


def slug(text: str) -> str:
    """Turns `text` into a folder name."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    digest = hashlib.blake2b(text.encode(), digest_size=3).hexdigest()
    return name if len(name) <= 80 else f"{name[:35]}-{digest}-{name[-35:]}"
