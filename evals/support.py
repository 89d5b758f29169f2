"""Measures whether retrieved passages support the answers, regardless of whether the answers are right."""

from collections.abc import Sequence

from common.types import Json
from evals import scorers
from evals.task import Example
from infer.retrieve import injections
from infer.retrieve.index import Hit


def measure(
    examples: Sequence[Example], answers: Sequence[str], hits: Sequence[Sequence[Hit]], cited: Sequence[Sequence[int]]
) -> Json:
    """Returns the following figures. Each of the first four is the fraction of questions for which the given statement
    is true.

    `retrieved`: a reference is in one of the passages.
    `cites`: the answer cites one of the passages by its number.
    `cited`: a reference is in a passage that the answer cites.
    `grounded`: the model's answer is in a passage that it cites, or in any passage if it cites none.
    `exact`, `f1`: the mean scores of the answers by exact match and by token F1, whatever scorer the task has. The
    score of an answer is the best one over its references.
    `injections`, `passages`: the number of retrieved passages that read like instructions to the model
    (infer.retrieve.injections), and the number of all retrieved passages.
    """
    references = [example.get("references", [example["answer"]]) for example in examples]
    passages = [[hit.chunk.passage for hit in row] for row in hits]
    chosen = [[row[at - 1] for at in numbers] for row, numbers in zip(passages, cited, strict=True)]
    best = lambda name: [
        max(scorers.find(name)(a, r) for r in each) for a, each in zip(answers, references, strict=True)
    ]
    rows = {
        "retrieved": [_any(row, each) for row, each in zip(passages, references, strict=True)],
        "cites": [bool(row) for row in chosen],
        "cited": [_any(row, each) for row, each in zip(chosen, references, strict=True)],
        "grounded": [_any(row or every, [a]) for row, every, a in zip(chosen, passages, answers, strict=True)],
        "exact": best("exact"),
        "f1": best("token_f1"),
    }
    unique = {hit.chunk for row in hits for hit in row}
    found = sum(bool(injections.found(chunk.passage)) for chunk in unique)
    return {name: sum(row) / len(row) for name, row in rows.items()} | {"injections": found, "passages": len(unique)}


def _any(passages: Sequence[str], answers: Sequence[str]) -> bool:
    """Returns whether any of the passages contains the words of any of the answers in sequence. Both are normalized as
    by the scorer `exact`."""
    wanted = [normal for answer in answers if (normal := scorers.normalized(answer))]
    texts = [f" {scorers.normalized(passage)} " for passage in passages]
    return any(f" {answer} " in passage for answer in wanted for passage in texts)
