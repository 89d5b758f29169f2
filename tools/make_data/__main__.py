"""Makes instruction data from documents: a local model or templates write it, and filters drop unsuitable rows.

    python -m tools.make_data --documents=SOURCE --to=FOLDER [--by=auto] [--model=smollm2-135m-instruct] [--most=200]
                              [--words=160] [--seed=0] [--against=TASK,...]

The command writes FOLDER/rows.jsonl for train.main, with the keys `question`, `answer`, `passage` (which contains the
answer) and `meta` (the document, the chunk and the writer). It also writes dropped.jsonl, with the reason why each row
was dropped, and the page samples.html.

--documents is a source as in tools.index. --most=N draws N documents at random. --words sets the length of the chunks.
--by says what writes the questions: model, templates (for English sentences), or auto. With auto, templates replace the
model if less than a quarter of its first rows pass the filters. --against names tasks of evals.main. Rows that contain
a question of these tasks are dropped. If the command is interrupted, the same command resumes where it stopped.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli, files
from common.errors import UserError
from common.numbers import percent

if TYPE_CHECKING:
    from evals.task import Task
    from infer.retrieve.chunks import Chunk
    from tools.make_data.filters import Row

# `auto` keeps the model if the filters accept at least the fraction LEAST of its first TRIAL rows.
TRIAL, LEAST = 32, 0.25
RECORD = "record.json"
SAMPLES, PER_REASON = 20, 4  # the page shows up to SAMPLES kept rows, and up to PER_REASON dropped rows per reason


@cli.command
def main(argv: list[str]) -> int | None:
    from infer.retrieve import chunks

    parser = cli.Parser("tools.make_data", __doc__)
    for name in ("documents", "to"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--by", default="auto", choices=("auto", "model", "templates"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--against", default="", type=cli.listed)
    for name, default in dict(most=0, words=chunks.WORDS, seed=0).items():
        parser.add_argument(f"--{name}", default=default, type=cli.count)
    make(parser.parse_args(argv))


def make(args: argparse.Namespace) -> None:
    """Writes the folder --to. Does nothing if the same command has already written this folder."""
    from data import sources
    from evals import task

    to = Path(args.to).expanduser()
    inputs = {k: v for k, v in vars(args).items() if k != "to"} | {"content": sources.content_id(args.documents)}
    if to.exists():
        if files.read_json(to / RECORD).get("inputs") != inputs:
            raise UserError("the folder has other content", args.to, "choose a new folder")
        print(f"{to}: made already")
        return
    tasks, found = task.named(args.against), chosen(args)
    made, flops = written(args, found, to.with_name(to.name + ".parts"))
    with files.folder(to, RECORD) as work:
        kept, dropped = filtered(made, tasks, work)
        if not kept:
            causes = "; ".join(f"{reason} ({n})" for reason, n in reasons(dropped))
            raise UserError(f"none of {len(made)} rows passes the filters: {causes}", args.documents, "--by=templates")
        files.write_lines(work / "rows.jsonl", (row.record() for row in kept))
        files.write_lines(work / "dropped.jsonl", (row.record(reason=reason) for row, reason in dropped))
        files.write(work / "samples.html", page(args, found, kept, dropped))
        files.write_json(work / RECORD, {"inputs": inputs, "kept": len(kept), "dropped": dict(reasons(dropped))})
    files.remove(to.with_name(to.name + ".parts"))
    by = Counter(row.meta["by"] for row in kept)
    print(f"{to}: {len(kept):,} rows from {len(found):,} chunks, {len(dropped):,} dropped; {flops:.1e} FLOPs")
    cli.table([*by.most_common(), *((f"dropped: {reason}", n) for reason, n in reasons(dropped))], ("by", "rows"))
    print(f"look at them: {to / 'samples.html'}")


def chosen(args: argparse.Namespace) -> "list[Chunk]":
    """Returns the chunks of the chosen documents. Raises UserError if the documents have no text."""
    from data import sources
    from infer.retrieve import chunks

    every = [c for spec in sources.mixture(args.documents) for c in chunks.of_source(spec, args.words)]
    names = list(dict.fromkeys(chunk.document for chunk in every))
    if not names:
        raise UserError("the documents have no text", args.documents)
    if args.most and args.most < len(names):
        taken = set(random.Random(args.seed).sample(names, args.most))
        every = [chunk for chunk in every if chunk.document in taken]
    return every


def written(args: argparse.Namespace, found: "Sequence[Chunk]", parts: Path) -> "tuple[list[Row], float]":
    """Returns the rows that the model, the templates or both wrote, and the FLOPs that the model spent."""
    from tools.make_data import filters, templates

    rows, flops, by = [], 0.0, args.by
    if by != "templates":
        rows, flops = asked(args.model, found[:TRIAL], parts)
        good = sum(not filters.by_rules(row) for row in rows) / len(rows)
        by = "model" if by == "model" or good >= LEAST else "templates"
        print(f"{args.model}: {percent(good)} of its first {len(rows)} rows pass the filters; the others are by: {by}")
    if by == "model":
        more, spent = asked(args.model, found[TRIAL:], parts)
        return rows + more, flops + spent
    made = ((chunk, *row) for chunk in found for row in templates.rows(chunk))
    return rows + [row_of(chunk, asked, answer, f"template {name}") for chunk, name, asked, answer in made], flops


def asked(name: str, found: "Sequence[Chunk]", parts: Path) -> "tuple[list[Row], float]":
    """Lets a model write one row per chunk. Returns the rows and the FLOPs spent."""
    from infer.models import load
    from tools.make_data import model

    said = model.write(load(name), found, parts)
    return [row_of(chunk, *pair, name) for chunk, pair in zip(found, said.rows, strict=True)], said.flops


def row_of(chunk: "Chunk", question: str, answer: str, by: str) -> "Row":
    from tools.make_data.filters import Row

    meta = {"document": chunk.document, "chunk": chunk.id, "by": by}
    return Row(question, answer, chunk.title, chunk.passage, meta)


def filtered(
    made: "Sequence[Row]", tasks: "dict[str, Task]", scratch: Path
) -> "tuple[list[Row], list[tuple[Row, str]]]":
    """Returns (kept rows, [(dropped row, reason)]). Rows that break a rule are dropped first, then rows that repeat an
    earlier one, and then rows that contain an example of an evaluation."""
    from tools.make_data import filters

    dropped: list[tuple[Row, str]] = []
    for find in (
        lambda rows: {i: reason for i, row in enumerate(rows) if (reason := filters.by_rules(row))},
        filters.copies,
        lambda rows: filters.contaminated(rows, tasks, scratch),
    ):
        out = find(made)
        dropped += [(made[i], reason) for i, reason in sorted(out.items())]
        made = [row for i, row in enumerate(made) if i not in out]
    return list(made), dropped


def reasons(dropped: "Sequence[tuple[Row, str]]") -> list[tuple[str, int]]:
    """Returns [(kind of reason, number of dropped rows)], starting with the most frequent kind."""
    return Counter(kind(reason) for _, reason in dropped).most_common()


def kind(reason: str) -> str:
    """Returns the kind of a reason: the text before the colon, without the details after it."""
    return reason.partition(": ")[0]


def page(args: argparse.Namespace, found: "Sequence[Chunk]", kept: "Sequence[Row]", dropped: "Sequence") -> str:
    """Renders a page with a sample of the kept rows and, for each reason, a sample of the rows that were dropped for
    it. The samples are spread evenly over the rows."""
    from tools.report.page import render

    some = lambda rows, n: list(rows)[:: max(1, -(-len(rows) // n))]
    groups: dict[str, list] = {}
    for row, reason in dropped:
        groups.setdefault(kind(reason), []).append((row, reason))
    shown = [(name, len(rows), some(rows, PER_REASON)) for name, rows in groups.items()]
    return render(
        "made.html.j2", title=f"Questions on {args.documents}",
        chunks=len(found), kept=len(kept), dropped=len(dropped),
        samples=some(kept, SAMPLES), groups=shown,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
