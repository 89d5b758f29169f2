"""1 when answer and reference are the same words, as SQuAD normalizes them."""

from evals.scorers import normalized


def score(answer: str, reference: str) -> float:
    return float(normalized(answer) == normalized(reference))
