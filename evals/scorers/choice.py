"""1 if the answer (the option with the highest log-likelihood per byte) is the reference."""


def score(answer: str, reference: str) -> float:
    return float(answer.strip() == reference.strip())
