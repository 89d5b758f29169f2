"""1 if answer and reference are equal, normalized as in SQuAD."""

from evals.scorers import normalized


def score(answer: str, reference: str) -> float:
    return float(normalized(answer) == normalized(reference))
