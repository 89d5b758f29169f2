"""1 when the option that the model finds most likely, per byte, is the reference; the answer is that option."""


def score(answer: str, reference: str) -> float:
    return float(answer.strip() == reference.strip())
