"""Scores 1 if the answer contains the words of the reference in sequence, after both are normalized as in SQuAD."""

from evals.scorers import normalized


def score(answer: str, reference: str) -> float:
    said, wanted = normalized(answer), normalized(reference)
    return float(f" {wanted} " in f" {said} ") if wanted else float(not said)
