"""Scores a model on tasks, or measures its loss on general text.

    python -m evals.main --model=NAME_OR_RUN --tasks=dates,rows.jsonl:scorer=number [--shots=0,4] [--n=100] [--seed=0]
                         [--adapter=RUN] [--index=DIR] [--k=3] [--how=mean] [--against=RUN] [--contamination=SOURCE]
                         [--pick=random] [--instructions=FILE] [--cite] [--split=heldout]
                         [--text=pydocs] [--passages=16] [--latency=0] [--out=FOLDER] [--strict]

Prints a table and appends one line of JSON per result to FOLDER/evals.jsonl. If the model or adapter is given as a run
folder, FOLDER defaults to that folder. `--text` names a data source on which to measure the loss. A loss that is higher
after tuning than before shows how much the model has forgotten. `--against` names a folder or a .jsonl file with
earlier results on the same rows; the new results are compared with them row by row.
`--model=openai:URL#MODEL?in=0.15&out=0.6` asks an OpenAI-compatible endpoint; `in` and `out` are its prices in dollars
per million prompt tokens and per million answer tokens. The API key is read from the environment variable
OPENAI_API_KEY. `--contamination` names training data (a data source, a run folder or a token cache): task rows that
occur in it are listed, and are also scored separately. `--latency=20` also asks 20 questions one at a time, after
compilation, to measure the time per request.

The following options define how questions are asked; every combination of their values is scored. `--shots`: how many
solved examples the prompt contains, or "full" for as many as fit. `--pick`: how these examples are chosen from the
training rows: `random` (drawn anew for each question), `fixed` (the same for all questions), `diverse`, or `nearest`
(the most similar to the question). `--instructions`: "builtin", or a file with one system message per line, in which {}
stands for the task's own system message. `--index`: an index of documents (tools.index); the `--k` chunks that match a
question best are put before it, and `--how` chooses the search method (see tools.index). With `--cite`, the model is
also asked to name the chunks that its answers rely on; these citations are not scored. To compare prompting setups and
choose one, use `--split=validation`, so that test rows do not influence the choice.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from common import cli, files, gas, stats
from common.errors import UserError
from common.numbers import integer, percent
from common.types import Json

if TYPE_CHECKING:
    from evals.task import Task
    from infer.context import Context
    from infer.hosted import Hosted
    from infer.lm import LM

# If the half-width of a confidence interval exceeds SURE, a warning says how many rows would reduce it to SURE / 2.
SURE = 0.1


@cli.command
def main(argv: list[str]) -> int | None:
    from evals import rows
    from infer.retrieve.search import How

    about = "A task is a file in evals/tasks, or a data file with one question and its answer per row."
    parser = cli.Parser("evals.main", f"{__doc__}\n{about} {rows.__doc__}")
    parser.add_argument("--model", required=True)
    for name in ("adapter", "against", "index", "instructions", "text", "out"):
        parser.add_argument(f"--{name}", default="")
    for name in ("tasks", "contamination"):
        parser.add_argument(f"--{name}", default="", type=cli.listed)
    parser.add_argument("--shots", default="0", type=_shots)
    parser.add_argument("--pick", default="random")
    parser.add_argument("--how", default=None, choices=get_args(How))
    parser.add_argument("--split", default="heldout", choices=("heldout", "validation"))
    for name, default in dict(n=100, seed=0, passages=16, batch_size=16, k=3, latency=0).items():
        parser.add_argument(f"--{name}", default=default, type=cli.count)
    parser.add_argument("--cite", action="store_true", help="ask for the passages that the answers rely on")
    parser.add_argument("--strict", action="store_true", help="fail if the model's files have unused contents")
    run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> list[dict]:
    """Runs the evaluations that the command line asks for, and writes and prints the results."""
    if not (args.tasks or args.text):
        raise UserError("--tasks or --text is required", "evals.main", "see --help")
    from evals import task

    tasks = task.named(args.tasks)  # report errors in a task before loading the model
    for name, found in tasks.items():
        for note in found.notes:
            print(f"{name}: {note}")
    contexts, others, out = _contexts(args), _others(args, tasks), _folder(args)
    from infer import hosted

    if hosted.is_hosted(args.model) and (args.text or args.contamination):
        what = "endpoints provide neither log-probabilities of texts nor a tokenizer"
        raise UserError(what, args.model, "leave out --text and --contamination")
    start = time.perf_counter()
    lm = hosted.load(args.model, args.adapter or None, strict=args.strict)
    here = not isinstance(lm, hosted.Hosted)
    step = _step(args.adapter or args.model)
    used, results = [_gas(time.perf_counter() - start, 0.0)] if here else [], []
    for result in _measure(lm, args, tasks, contexts):
        spent = _gas(result["seconds"], result["flops"]) if here else gas.Gas(usd=result["usd"])
        line = {"time": round(time.time(), 3), "model": args.model, **step, **result, "gas": spent._asdict()}
        line = files.plain(line | ({"adapter": args.adapter} if args.adapter else {}))
        used.append(spent)
        results.append(line)
        if out:
            files.append(out / "evals.jsonl", line)
    show(results)
    for line in results:
        _compare(line, others.get(line.get("task", ""), []), args)
    print(lm if isinstance(lm, hosted.Hosted) else gas.total(used))
    return results


def _shots(text: str) -> list[int | str]:
    return [part if part == "full" else cli.count(part) for part in text.split(",")]


def _contexts(args: argparse.Namespace) -> "list[Context]":
    """Returns every prompting setup that the command-line options describe. Raises UserError for an impossible
    setup."""
    from infer.context import FULL, Context, instruction
    from infer.retrieve.index import opened

    if args.index:
        opened(args.index)
    shots = [FULL if n == "full" else n for n in args.shots]
    texts = instruction.read(args.instructions) if args.instructions else [""]
    return [Context(text, n, args.pick, args.index, args.k, args.how, args.cite) for text in texts for n in shots]


def _measure(
    lm: "LM | Hosted", args: argparse.Namespace, tasks: dict[str, "Task"], contexts: "list[Context]"
) -> Iterator[Json]:
    from evals import heldout
    from evals.run import evaluate, flops_per_token
    from infer.hosted import Hosted

    knobs = dict(n=args.n, seed=args.seed, batch_size=args.batch_size, split=args.split, timed=args.latency)
    for name, task in tasks.items():
        found = {} if isinstance(lm, Hosted) else _contaminated(name, task, args.contamination, args.split, lm)
        marked = _marked(name, task, found) if found else task
        for context in contexts:
            result = evaluate(marked, lm, name=name, context=context, **knobs).to_dict()
            yield result | ({"contamination": found} if args.contamination else {})
    if args.text and not isinstance(lm, Hosted):
        texts = heldout.passages(args.text, args.passages)
        start = time.perf_counter()
        total, tokens = heldout.text_loss(lm, texts)
        figures = {"loss": total / tokens, "tokens": tokens, "n": len(texts), "flops": flops_per_token(lm) * tokens}
        yield {"text": args.text, **figures, "seconds": time.perf_counter() - start}


def _gas(seconds: float, flops: float) -> gas.Gas:
    """The resources that an evaluation used, computed from its seconds, its FLOPs and the devices of this process."""
    import jax

    kind, count, processes = jax.devices()[0].device_kind, jax.device_count(), jax.process_count()
    devices = {"kind": kind, "count": count, "processes": processes}
    return gas.line([{"event": "session", "devices": devices}, {"seconds": {"eval": seconds}, "flops": flops}], {})


# --- contamination ---


def _contaminated(name: str, task: "Task", trained: list[str], split: str, lm: "LM") -> dict[str, str]:
    """Returns {row: location of a training text that contains the row}, and prints one line per source of training
    data."""
    from evals import overlap

    rows = task.examples(split)
    texts = [(overlap.asked(task.prompt(row)), row["answer"]) for row in rows]
    every: dict[str, str] = {}
    for source in trained:
        found = {_where(name, i, rows[i]): place for i, place in overlap.seen(texts, source, lm.tokenizer).items()}
        named = "; ".join(f"{row} ({place})" for row, place in list(found.items())[: overlap.SHOWN])
        print(f"{name}: {len(found):,} of {len(rows):,} rows occur in {source}{': ' if found else ''}{named}")
        every |= found
    return every


def _where(name: str, i: int, row: Json) -> str:
    return row.get("where", f"{name}:{i}")


def _marked(name: str, task: "Task", found: dict[str, str]) -> "Task":
    """Returns the task with its rows divided into two slices, which get separate scores: the contaminated rows, which
    are listed in `found`, and all others."""

    def examples(split: str) -> list[Json]:
        rows = list(task.examples(split))
        if split == "train":
            return rows
        marks = [{"contaminated": "yes" if _where(name, i, row) in found else "no"} for i, row in enumerate(rows)]
        return [row | {"slices": row.get("slices", {}) | more} for row, more in zip(rows, marks, strict=True)]

    return task._replace(examples=examples)


# --- results ---


def _folder(args: argparse.Namespace) -> Path | None:
    """The folder for results: `--out` if given, else the folder of the run that is scored, else None."""
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        return Path(args.out)
    for name in (args.adapter, args.model):
        if name and (Path(name) / "config.json").exists() and (Path(name) / "ckpt").is_dir():
            return Path(name)
    return None


def _step(name: str) -> Json:
    """Returns {"step": S} if the model is a run folder, or {} for other models. S is the step of the newest checkpoint,
    which is the one that is scored."""
    from model.io import saved

    steps = saved.steps(Path(name) / "ckpt")
    return {"step": steps[0]} if steps else {}


def _others(args: argparse.Namespace, tasks: dict[str, "Task"]) -> dict[str, list[Json]]:
    """Returns {task: earlier results on the rows to be scored}. Raises UserError if a task has no earlier results."""
    if not args.against:
        return {}
    from evals import paired
    from evals import task as module

    lines, found = paired.results(args.against), {}
    for name, task in tasks.items():
        rows = [module.identity(task, example) for example in module.draw(task, args.n, args.seed, args.split)]
        found[name] = paired.fitting(name, module.fingerprint(task), rows, lines, args.against)
    return found


def _compare(line: Json, others: list[Json], args: argparse.Namespace) -> None:
    from evals import paired

    for other in others:
        who = " with ".join(filter(None, (other.get("model") or args.against, other.get("adapter"))))
        title = f"{line['task']}, {line['asked']} against {who}, {paired.asked(other)}"
        print(f"{title}: {paired.pair(line, other, args.seed)}")


def show(results: list[Json]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    scores, losses = [r for r in results if "task" in r], [r for r in results if "text" in r]

    def table_of(first: str, *more: str) -> Table:
        heads = (Column("asked", overflow="fold"), "score", Column("95 % interval", no_wrap=True), "n")
        return Table(Column(first, overflow="fold"), *heads, *more)

    if scores:
        table = table_of("task", "seed", "prompt tokens", "seconds")
        for r in scores:
            numbers = (r["seed"], integer(r["prompt_tokens"]), f"{r['seconds']:.1f}")
            table.add_row(r["task"], r["asked"], f"{r['mean']:.3f}", _span(r), str(r["n"]), *map(str, numbers))
        Console().print(table)
    if any(r["slices"] for r in scores):
        table = table_of("slice")
        for r in scores:
            for name, part in r["slices"].items():
                cells = (r["asked"], f"{part['mean']:.3f}", _span(part), str(part["n"]))
                table.add_row(f"{r['task']}, {name}", *cells)
        Console().print(table)
    for line in (f"{r['task']}, {r['asked']}: {line}" for r in scores for line in _remarks(r)):
        print(line)
    for r in losses:
        print(f"{r['text']}: {r['loss']:.4f} nats per token over {r['tokens']:,} tokens of {r['n']} passages")


def _remarks(r: Json) -> Iterator[str]:
    """Yields remarks on a result, such as its score without length normalization, its most frequent answers, or a
    warning that its interval is too wide."""
    if r["by_sum"] is not None:
        by_sum = f"by total log-likelihood, the score would be {r['by_sum']:.3f}"
        yield f"the options are ranked by log-likelihood per byte; {by_sum}"
    if r["latency"]:
        times = (f"{r['latency'][key]:.2f} s ({key})" for key in ("p50", "p95"))
        yield f"{r['latency']['n']} requests one at a time: {' and '.join(times)}"
    often = [(text, count) for text, count in r["answers"] if count > 1]
    each = ", ".join(f"{_short(text)} {percent(count / r['n'])}" for text, count in often)
    yield f"most frequent answers: {each}" if often else f"all {r['n']} answers differ"
    if s := r["support"]:
        share = lambda name: percent(s[name])
        right = f"the right answer to {share('retrieved')} of the questions"
        yield f"the passages contain {right}, and {share('grounded')} of the model's answers"
        yield f"{share('cites')} of the answers cite a passage; {share('cited')} cite one with the right answer"
        yield f"exact match {s['exact']:.3f}, token F1 {s['f1']:.3f}"
        yield f"{s['injections']} of {s['passages']:,} passages read like instructions to the model"
    if line := _unsure(r):
        yield line


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def _span(r: Json) -> str:
    return " to ".join("n/a" if r[k] is None else f"{r[k]:.3f}" for k in ("low", "high"))


def _unsure(r: Json) -> str:
    """Returns a warning that the score's interval is too wide, with the number of rows needed for a half-width of SURE
    / 2. Returns "" if the interval is narrow enough."""
    if None in (r["low"], r["high"]):
        return "one row is not enough for a confidence interval"
    if (half := (r["high"] - r["low"]) / 2) <= SURE:
        return ""
    needed = 0.25 * (2 * stats.Z / SURE) ** 2  # rows needed if the mean is 0.5, where the interval is widest
    off = f"the score may be off by {100 * half:.0f} points, but with {needed:.0f} rows by at most {50 * SURE:.0f}"
    return f"{r['n']} rows are too few: {off}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
