"""Scores a model on tasks, or measures its loss on general text.

    python -m evals.main --model=NAME_OR_RUN --tasks=dates,modules [--shots=0,4] [--n=100] [--seed=0]
                         [--adapter=RUN] [--text=pydocs] [--passages=16] [--out=FOLDER]

Prints a table and appends one line of JSON for each result to FOLDER/evals.jsonl; by default the folder is that of the
run, when the model or the adapter is one. `--text` names a data source; its loss before and after a tuning is what the
tuning made the model forget.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli, files
from common.errors import UserError

if TYPE_CHECKING:
    from infer.lm import LM


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("evals.main", __doc__)
    parser.add_argument("--model", required=True)
    for name in ("adapter", "text", "out"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--tasks", default="", type=cli.listed)
    parser.add_argument("--shots", default="0", type=cli.counts)
    for name, default in dict(n=100, seed=0, passages=16, batch_size=16).items():
        parser.add_argument(f"--{name}", default=default, type=cli.count)
    run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> list[dict]:
    """The results of a command line's options, written and shown as they come."""
    if not (args.tasks or args.text):
        raise UserError("--tasks or --text is needed", "evals.main", "see --help")
    from evals import task

    for name in args.tasks:
        task.load(name)  # a typo shows before the model is read
    out = _folder(args)
    from infer.models import load

    lm = load(args.model, adapter=args.adapter or None)
    results = []
    for result in _measure(lm, args):
        line = {"time": round(time.time(), 3), "model": args.model, **files.plain(result)}
        if args.adapter:
            line["adapter"] = args.adapter
        results.append(line)
        if out:
            files.append(out / "evals.jsonl", line)
    show(results)
    return results


def _measure(lm: "LM", args: argparse.Namespace) -> Iterator[dict]:
    from evals import heldout
    from evals.run import evaluate

    for name in args.tasks:
        for k in args.shots:
            yield evaluate(name, lm, args.n, args.seed, k, args.batch_size).to_dict()
    if args.text:
        texts = heldout.passages(args.text, args.passages)
        start = time.perf_counter()
        total, tokens = heldout.text_loss(lm, texts)
        seconds = time.perf_counter() - start
        yield {"text": args.text, "loss": total / tokens, "tokens": tokens, "n": len(texts), "seconds": seconds}


def _folder(args: argparse.Namespace) -> Path | None:
    """Where results go: `out`, else the run folder that was measured, else nowhere."""
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        return Path(args.out)
    for name in (args.adapter, args.model):
        if name and (Path(name) / "config.json").exists() and (Path(name) / "ckpt").is_dir():
            return Path(name)
    return None


def show(results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    scores, losses = [r for r in results if "task" in r], [r for r in results if "text" in r]
    if scores:
        table = Table("task", "shots", "score", "95 % interval", "n", "seed", "prompt tokens", "seconds")
        for r in scores:
            low, high = (("n/a" if r[k] is None else f"{r[k]:.3f}") for k in ("low", "high"))
            per_byte = "" if r["normalised"] is None else f" ({r['normalised']:.3f} per byte)"
            numbers = (r["n"], r["seed"], f"{r['prompt_tokens']:.0f}", f"{r['seconds']:.1f}")
            table.add_row(
                r["task"], str(r["shots"]), f"{r['mean']:.3f}{per_byte}", f"{low} to {high}", *map(str, numbers)
            )
        Console().print(table)
        if any(r["normalised"] is not None for r in scores):
            print("per byte: the score when each option's log-likelihood is divided by its length in bytes")
    for r in scores:
        often = f"{r['commonest_n']} of {r['n']}"
        print(f"{r['task']}, {r['shots']} shots: the most frequent answer, {often}, is {_short(r['commonest'])}")
    for r in losses:
        print(f"{r['text']}: {r['loss']:.4f} nats per token over {r['tokens']:,} tokens of {r['n']} passages")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
