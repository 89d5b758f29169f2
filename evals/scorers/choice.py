"""1 if the answer, which is the most likely option per byte, is the reference."""


def score(answer: str, reference: str) -> float:
    return float(answer.strip() == reference.strip())
