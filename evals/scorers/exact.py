"""Scores 1 if the answer and the reference are equal after both are normalized as in SQuAD."""

from evals.scorers import normalized


def score(answer: str, reference: str) -> float:
    return float(normalized(answer) == normalized(reference))
