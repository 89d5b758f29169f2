"""Measures how well a ranking finds the relevant documents for a question: recall, reciprocal rank, nDCG."""

import math
from collections.abc import Mapping, Sequence


def recall(ranked: Sequence[str], relevant: Mapping[str, float], k: int) -> float:
    """The share of the relevant documents that are among the first k documents of the ranking."""
    wanted = {name for name, gain in relevant.items() if gain > 0}
    return len(wanted & set(ranked[:k])) / len(wanted)


def reciprocal_rank(ranked: Sequence[str], relevant: Mapping[str, float], k: int) -> float:
    """1 divided by the rank of the first relevant document, or 0 if none of the first k documents is relevant."""
    return next((1 / at for at, name in enumerate(ranked[:k], 1) if relevant.get(name, 0) > 0), 0.0)


def ndcg(ranked: Sequence[str], relevant: Mapping[str, float], k: int) -> float:
    """Normalized discounted cumulative gain at k with linear gains, as in trec_eval and BEIR (Järvelin and Kekäläinen
    2002): the sum of gain / log2(rank + 1), divided by the same sum for the best possible order."""
    best = _dcg(sorted((g for g in relevant.values() if g > 0), reverse=True)[:k])
    return _dcg([relevant.get(name, 0.0) for name in ranked[:k]]) / best


def _dcg(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(at + 1) for at, gain in enumerate(gains, 1))
