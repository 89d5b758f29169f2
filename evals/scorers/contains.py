"""1 when the words of the reference stand one behind the other in the answer, as SQuAD normalizes them."""

from evals.scorers import normalized


def score(answer: str, reference: str) -> float:
    said, wanted = normalized(answer), normalized(reference)
    return float(f" {wanted} " in f" {said} ") if wanted else float(not said)
