"""95 % confidence intervals of means."""

import math
from collections.abc import Sequence

Z = 1.959964  # quantile of the normal distribution for a two-sided 95 % interval


def of_scores(scores: Sequence[float]) -> tuple[float, float]:
    """Returns Wilson's interval (1927) if all scores are 0 or 1, and otherwise the interval of the normal
    approximation, which is infinite for a single score.

    Wilson's interval stays within [0, 1], and has a positive width even if all answers are right or all are wrong.
    """
    n, p = len(scores), sum(scores) / len(scores)
    if set(scores) <= {0.0, 1.0}:
        return wilson(p, n)
    half = Z * standard_error(scores) if n > 1 else math.inf
    return p - half, p + half


def wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for the true fraction of right answers, if a fraction `p` of `n` answers was right."""
    center, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, (center - half) / (1 + Z**2 / n)), min(1.0, (center + half) / (1 + Z**2 / n))


def student(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's t interval for the mean of a few values of unknown variance, such as the scores of several seeds.
    Returns None for a single value."""
    from scipy.special import stdtrit

    n, center = len(values), sum(values) / len(values)
    if n < 2:
        return None
    half = float(stdtrit(n - 1, 0.975)) * standard_error(values)
    return center - half, center + half


def standard_error(values: Sequence[float]) -> float:
    n, center = len(values), sum(values) / len(values)
    return math.sqrt(sum((v - center) ** 2 for v in values) / (n - 1) / n)
