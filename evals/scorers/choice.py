"""Scores 1 if the answer, which is the option with the highest log-likelihood per byte, equals the reference."""


def score(answer: str, reference: str) -> float:
    return float(answer.strip() == reference.strip())
