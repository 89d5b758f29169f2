"""Makes documents searchable: indexes their chunks by words (BM25) and, with an embedder, by vectors.

    python -m tools.index --index=DIR --documents=SOURCE [--embedder=all-minilm-l6-v2] [--words=160]
    python -m tools.index --index=DIR --ask="a question" [--how=mean] [--k=5]
    python -m tools.index --index=DIR --questions=FILE [--k=5]
    python -m tools.index --index=DIR --documents=SOURCE --embedder=runs/embedder --questions=FILE

SOURCE is a file, a folder or a built-in name, as in config.data.source, or several of these separated by commas.
Running the command again updates the index, or continues an interrupted build. --ask prints the k best chunks.
--questions measures retrieval on rows with a `question` and its relevant `documents` (names as printed by --ask). Every
search method is scored by recall@k, nDCG@10 and MRR@10 with 95 % intervals. --how chooses the search method: bm25,
dense, or one of two combinations of both, which are mean (the mean of their scores, each scaled to [0, 1]) and rrf
(reciprocal rank fusion).

--embedder is a Hugging Face folder, a hub id, a packaged name, or a run that tuned such a model. In an existing index,
a new embedder replaces the old one only if it is better on --questions: the 95 % interval of its gain in nDCG@10, with
vector search, must be above 0.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from common import cli, files, stats
from common.errors import UserError
from common.types import Json

if TYPE_CHECKING:
    from infer.retrieve.index import Index
    from infer.retrieve.search import How

DEPTH = 10  # number of results considered by nDCG and MRR


@cli.command
def main(argv: list[str]) -> int | None:
    from infer.retrieve import chunks
    from infer.retrieve.search import How

    parser = cli.Parser("tools.index", __doc__)
    parser.add_argument("--index", required=True)
    for name in ("documents", "embedder", "ask", "questions"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--how", default=None, choices=get_args(How))
    parser.add_argument("--words", type=int, default=chunks.WORDS)
    parser.add_argument("--k", type=int, default=5)
    args = parser.parse_args(argv)
    if min(args.words, args.k) < 1:
        raise UserError("the values must be positive", "--words --k")
    if not (args.documents or args.ask or args.questions):
        raise UserError("there is nothing to do", "tools.index", "--documents to build, --ask or --questions to search")
    from infer.retrieve import index

    if args.documents:
        began = time.perf_counter()
        judge = _judge(args) if args.embedder else lambda new: None
        record = index.build(args.documents, args.index, args.embedder, args.words, _progress, judge)
        print(f"{args.index}: {record['chunks']:,} chunks in {time.perf_counter() - began:.1f} s")
        if record["injections"]:
            print(f"{record['injections']:,} chunks look like instructions to a model; prompts quote them unchanged")
    if args.ask:
        for hit in index.opened(args.index).search([args.ask], args.k, args.how)[0]:
            print(f"{hit.score:.3f}  {hit.chunk.document}\n{hit.chunk.passage}\n")
    if args.questions:
        print(table(measure(index.opened(args.index), questions(args.questions), args.k), args.k))


def _judge(args: argparse.Namespace) -> "Callable[[Index], None]":
    """Returns a function that raises UserError if the embedder of a new index is not better than the embedder that it
    replaces."""
    from evals import paired
    from infer.models import is_run
    from infer.retrieve import index

    known = files.read_json(Path(args.index).expanduser() / index.RECORD).get("embedder", "")
    if known == args.embedder or not (known or is_run(Path(args.embedder).expanduser())):
        return lambda new: None
    if not known:
        fix = "first build the index with the model from which it was tuned"
        raise UserError("a tuned embedder must first be compared with another one", f"--embedder={args.embedder}", fix)
    if not args.questions:
        fix = "give --questions=FILE, with questions on which it was not tuned"
        raise UserError(f"questions are needed to compare it with {known}", f"--embedder={args.embedder}", fix)
    old, asked = index.Index(args.index), questions(args.questions)

    def judge(new: "Index") -> None:
        name = f"nDCG@{DEPTH}"
        ours, theirs = (measure(one, asked, args.k, ("dense",))["dense"][name] for one in (new, old))
        found = paired.compare(ours, theirs)
        means = f"{name} {sum(ours) / len(ours):.3f}, compared with {sum(theirs) / len(theirs):.3f} for {known}"
        if found.low <= 0:
            what = f"not better: {means}, {found}"
            raise UserError(what, f"--embedder={args.embedder}", f"{args.index} is left as it was")
        print(f"{args.embedder} is better: {means}, {found}")

    return judge


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {total:,} chunks have vectors", end="\n" if done == total else "", file=sys.stderr)


def questions(path: str) -> list[tuple[str, dict[str, float]]]:
    """Reads a list of (question, {relevant document: its gain in nDCG}) from a file of rows. Raises UserError for a row
    without a question or documents."""
    from data import files as rows

    found = []
    for row in rows.read(Path(path).expanduser()):
        record = row.record or {}
        question, documents = record.get("question"), record.get("documents")
        if isinstance(documents, list):
            documents = dict.fromkeys(documents, 1.0)
        if not isinstance(question, str) or not isinstance(documents, dict) or not documents:
            raise UserError(
                "the row needs a question and its documents", row.where, "use the columns question and documents"
            )
        found.append((question, documents))
    return found


def measure(
    index: "Index", asked: Sequence[tuple[str, dict[str, float]]], k: int, ways: "Sequence[How]" = ()
) -> dict[str, Json]:
    """Returns {search method: {metric: one value per question}}. The rank of a document is the rank of its first
    chunk."""
    from evals import retrieval

    known, out = {chunk.document for chunk in index.chunks}, {}
    for question, relevant in asked:
        if strange := set(relevant) - known:
            fix = f"use names as --ask prints them, such as {min(known)!r}"
            raise UserError(f"the index has no document {min(strange)!r}", f"question {question!r}", fix)
    texts, began = [question for question, _ in asked], time.perf_counter()
    vectors = index.embedder.embed(texts, "query") if index.dense else None
    spent = time.perf_counter() - began  # questions are embedded once for all search methods
    for how in ways or (("bm25", "dense", "rrf", "mean") if index.dense else ("bm25",)):
        began = time.perf_counter() - spent * (how != "bm25")
        hits = index.search(texts, 3 * max(k, DEPTH), how, vectors)
        seconds = (time.perf_counter() - began) / max(len(asked), 1)
        ranked = [list(dict.fromkeys(hit.chunk.document for hit in found)) for found in hits]
        rows = list(zip(ranked, (relevant for _, relevant in asked), strict=True))
        out[how] = {
            f"recall@{k}": [retrieval.recall(*row, k) for row in rows],
            f"nDCG@{DEPTH}": [retrieval.ndcg(*row, DEPTH) for row in rows],
            f"MRR@{DEPTH}": [retrieval.reciprocal_rank(*row, DEPTH) for row in rows],
            "seconds": seconds,
        }
    return out


def table(measured: dict[str, Json], k: int) -> str:
    """Formats the metrics with their 95 % intervals, in one line per search method."""
    lines = []
    for how, figures in measured.items():
        scored = {name: values for name, values in figures.items() if name != "seconds"}
        n = len(next(iter(scored.values())))
        shown = []
        for name, values in scored.items():
            low, high = stats.of_scores(values)
            shown.append(f"{name} {sum(values) / n:.3f} ({low:.3f}-{high:.3f})")
        lines.append(f"{how:5} {'  '.join(shown)}  n = {n}  {1000 * figures['seconds']:.1f} ms per question")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
