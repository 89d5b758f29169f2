"""Scores the F1 of the words that the answer and the reference share, as in SQuAD. A word that both have several times
counts several times."""

from collections import Counter

from evals.scorers import f1, normalized


def score(answer: str, reference: str) -> float:
    said, wanted = normalized(answer).split(), normalized(reference).split()
    return f1((Counter(said) & Counter(wanted)).total(), len(said), len(wanted))
