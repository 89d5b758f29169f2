"""Picks the examples whose questions are most similar to the given question, as measured by BM25. The most similar
example is shown last."""

from collections.abc import Sequence

from infer.context.shots import Picker
from infer.retrieve import search


def picker(pool: Sequence[tuple[str, str]], seed: int) -> Picker:
    known = search.Words([question for question, _ in pool])
    return lambda questions, n: [search.best(known.scores(q), n)[::-1].tolist() for q in questions]
