"""Scores a model on tasks, or measures its loss on general text.

    python -m evals.main --model=NAME_OR_RUN --tasks=dates,modules [--shots=0,4] [--n=100] [--seed=0]
                         [--adapter=RUN] [--text=pydocs] [--passages=16] [--out=FOLDER]

Prints a table and appends one line of JSON for each result to FOLDER/evals.jsonl; by default the folder is that of the
run, when the model or the adapter is one. `--text` names a data source; its loss before and after a tuning is what the
tuning made the model forget.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import files
from common.errors import UserError
from configs.schema.problems import did_you_mean

OPTIONS = dict(
    model="", adapter="", tasks="", shots="0", n="100", seed="0", text="", passages="16", batch_size="16", out=""
)


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        run(parse(argv))
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


def run(options: dict[str, str]) -> list[dict]:
    """The results of a command line's options, written and shown as they come."""
    whole = {k: _whole(k, options[k]) for k in ("n", "seed", "passages", "batch_size")}
    shots = [_whole("shots", k) for k in options["shots"].split(",")]
    names = [name.strip() for name in options["tasks"].split(",") if name.strip()]
    if not options["model"] or not (names or options["text"]):
        raise UserError("--model, and --tasks or --text, are needed", "evals.main", "see --help")
    from evals import task

    for name in names:
        task.load(name)  # a typo shows before the model is read
    out = _folder(options)
    from infer.models import load

    lm = load(options["model"], adapter=options["adapter"] or None)
    results = []
    for result in _measure(lm, names, shots, options["text"], whole):
        line = {"time": round(time.time(), 3), "model": options["model"], **files.plain(result)}
        if options["adapter"]:
            line["adapter"] = options["adapter"]
        results.append(line)
        if out:
            files.append(out / "evals.jsonl", line)
    show(results)
    return results


def _measure(lm: Any, names: list[str], shots: list[int], text: str, whole: dict[str, int]) -> Iterator[dict]:
    from evals import heldout
    from evals.run import evaluate

    for name in names:
        for k in shots:
            yield evaluate(name, lm, whole["n"], whole["seed"], k, whole["batch_size"]).to_dict()
    if text:
        texts = heldout.passages(text, whole["passages"])
        start = time.perf_counter()
        total, tokens = heldout.text_loss(lm, texts)
        seconds = time.perf_counter() - start
        yield {"text": text, "loss": total / tokens, "tokens": tokens, "n": len(texts), "seconds": seconds}


def parse(argv: list[str]) -> dict[str, str]:
    options = dict(OPTIONS)
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in OPTIONS:
            raise UserError("unknown option", word, did_you_mean(name, list(OPTIONS), "see --help"))
        if not equals:
            raise UserError("needs a value", word, f"write --{name}=VALUE")
        options[name] = value
    return options


def _whole(name: str, text: str) -> int:
    if not text.strip().isdigit():
        raise UserError(f"{text!r} is not a whole number", f"--{name}")
    return int(text)


def _folder(options: dict[str, str]) -> Path | None:
    """Where results go: `out`, else the run folder that was measured, else nowhere."""
    if options["out"]:
        Path(options["out"]).mkdir(parents=True, exist_ok=True)
        return Path(options["out"])
    for name in (options["adapter"], options["model"]):
        if name and (Path(name) / "config.json").exists() and (Path(name) / "ckpt").is_dir():
            return Path(name)
    return None


def show(results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    scores, losses = [r for r in results if "task" in r], [r for r in results if "text" in r]
    if scores:
        table = Table("task", "shots", "score", "95 % interval", "n", "seed", "tokens a prompt", "seconds")
        for r in scores:
            low, high = (("n/a" if r[k] is None else f"{r[k]:.3f}") for k in ("low", "high"))
            per_byte = "" if r["normalised"] is None else f" ({r['normalised']:.3f} per byte)"
            numbers = (r["n"], r["seed"], f"{r['prompt_tokens']:.0f}", f"{r['seconds']:.1f}")
            table.add_row(
                r["task"], str(r["shots"]), f"{r['mean']:.3f}{per_byte}", f"{low} to {high}", *map(str, numbers)
            )
        Console().print(table)
    for r in losses:
        print(f"{r['text']}: {r['loss']:.4f} nats per token over {r['tokens']:,} tokens of {r['n']} passages")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
