"""Decides which generated rows are dropped, and gives the reason for each."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common import files
from common.types import Json
from data.text import formats
from evals import overlap, scorers
from evals.task import Task
from infer.retrieve import injections
from tools.make_data.templates import ASIDE

QUESTION, ANSWER = (3, 60), (1, 25)  # minimum and maximum number of words
VAGUE = re.compile(r"\b(passage|the text|this text|article|paragraph|document|above|mentioned|following)\b", re.I)
OPEN = re.compile(r"^(he|she|it|they|this|these|its|his|her|their|such|both)\b", re.I)


class Row(NamedTuple):
    question: str
    answer: str
    title: str
    passage: str
    meta: Json  # origin of the row: document, chunk and writer

    @property
    def text(self) -> str:
        return f"{self.question} {self.answer}"

    def record(self, **more: str) -> Json:
        """Returns the row in a training format. The `passage` is for training an embedder or a model that reads
        passages."""
        return {"question": self.question, "answer": self.answer, **more, "passage": self.passage, "meta": self.meta}


def by_rules(row: Row) -> str:
    """Returns the reason to drop a row, or "" if the row passes all rules."""
    asked, answer = row.question.split(), scorers.normalized(row.answer)
    blank = "____" in row.question
    if not row.question:
        return "the model wrote no question with an answer"
    if not blank and not row.question.endswith("?"):
        return "it is not a question"
    if not QUESTION[0] <= len(asked) <= QUESTION[1]:
        return f"the question does not have {QUESTION[0]} to {QUESTION[1]} words"
    if not answer or not ANSWER[0] <= len(row.answer.split()) <= ANSWER[1]:
        return f"the answer does not have {ANSWER[0]} to {ANSWER[1]} words"
    texts = (row.passage, ASIDE.sub("", row.passage))
    if not any(f" {answer} " in f" {scorers.normalized(text)} " for text in texts):
        return "the answer is not in the passage"
    if f" {answer} " in f" {scorers.normalized(row.question)} ":
        return "the answer is in the question"
    if VAGUE.search(row.question) or OPEN.match(row.question):
        return "the question cannot be understood on its own"
    subject = {word for word in overlap.words(row.title.split(" · ")[0]) if len(word) > 2}
    if subject and not subject & set(overlap.words(row.question)):
        return "the question does not name its subject"
    if found := injections.found(row.text):
        return f"it reads as an instruction: {found!r}"
    return ""


def copies(rows: Sequence[Row]) -> dict[int, str]:
    """Returns {index: reason} for rows whose question is the same, or nearly the same, as that of an earlier row."""
    seen: dict[str, int] = {}
    out = {}
    for i, row in enumerate(rows):
        if (first := seen.setdefault(scorers.normalized(row.question), i)) != i:
            out[i] = f"the same question as an earlier row: {rows[first].meta['document']}"
    for i, j in overlap.near([row.question for row in rows]):
        out.setdefault(j, f"nearly the same question as an earlier row: {rows[i].meta['document']}")
    return out


def contaminated(rows: Sequence[Row], tasks: dict[str, Task], scratch: Path) -> dict[int, str]:
    """Returns {index: reason} for the rows that contain an example of an evaluation task, or whose question is nearly
    the same as that of an example."""
    out: dict[int, str] = {}
    for name, task in tasks.items():
        asked = [(overlap.asked(task.prompt(e)), e["answer"], e.get("where", name)) for e in task.examples("heldout")]
        near = overlap.near([*(question for question, _, _ in asked), *(row.question for row in rows)])
        for i, j in near:
            if i < len(asked) <= j:
                out.setdefault(j - len(asked), f"nearly the same question as in an evaluation: {asked[i][2]}")
        same = {scorers.normalized(question): where for question, _, where in asked}
        for i, row in enumerate(rows):
            if where := same.get(scorers.normalized(row.question)):
                out[i] = f"the same question as in an evaluation: {where}"
        for i, where in _holding(rows, asked, scratch):
            out.setdefault(i, f"the row contains an example of an evaluation: {where}")
    return dict(sorted(out.items()))


def _holding(rows: Sequence[Row], asked: Sequence[tuple[str, str, str]], scratch: Path) -> Iterator[tuple[int, str]]:
    """Yields (index of a row, location of an evaluation example) for each row that shares word n-grams with an
    evaluation example (see evals/overlap.py)."""
    left = dict(enumerate(rows))
    while left:
        path, numbers = scratch / "decontaminated.jsonl", list(left)
        files.write_lines(path, ({"text": row.text} for row in left.values()))
        found = overlap.seen([pair[:2] for pair in asked], str(path), formats.load("bytes"))
        path.unlink()
        if not found:
            return
        for at, place in found.items():
            number = numbers[int(place.rpartition(":")[2]) - 1]
            if left.pop(number, None):
                yield number, asked[at][2]
