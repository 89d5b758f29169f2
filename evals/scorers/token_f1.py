"""Scores F1 over the words of the answer and the reference, as in SQuAD. A repeated word counts as often as it occurs
in both."""

from collections import Counter

from evals.scorers import f1, normalized


def score(answer: str, reference: str) -> float:
    said, wanted = normalized(answer).split(), normalized(reference).split()
    return f1((Counter(said) & Counter(wanted)).total(), len(said), len(wanted))
