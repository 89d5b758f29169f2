"""Predicts the score with more training rows: fits a line to the scores at several numbers of rows, and extends it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common import stats
from common.types import Json
from tools.compare.decide import DRAWS


class Curve(NamedTuple):
    """A line fitted to measured scores, and its prediction. It assumes that the log odds of the score are linear in the
    logarithm of the number of rows."""

    points: list[Json]  # the method's entries in the record's list "learning"
    rows: float  # number of training rows for which the score is predicted
    mean: float
    low: float
    high: float

    @property
    def last(self) -> Json:
        return self.points[-1]


def extrapolate(points: Sequence[Json], factor: float = 10.0, seed: int = 0) -> Curve | None:
    """Predicts the score with `factor` times the largest measured number of rows. Returns None if there are scores for
    fewer than two different numbers of training rows.

    The 95 % confidence interval of the prediction follows from the intervals of the points: the line is fitted again to
    points whose log odds are drawn from normal distributions. The interval assumes that the formula is right. Log odds
    keep the predictions between 0 and 1.
    """
    points = sorted(points, key=lambda p: p["rows"])
    if len({p["rows"] for p in points}) < 2:
        return None
    odds = lambda x: np.log((s := np.clip(x, 0.002, 0.998)) / (1 - s))
    x = np.log10([p["rows"] for p in points])
    center, low, high = (odds(np.array([p[key] for p in points], float)) for key in ("mean", "low", "high"))
    sd = np.maximum((high - low) / (2 * stats.Z), 1e-3)
    rng = np.random.default_rng(seed)
    ys = np.concatenate([center[None], center + sd * rng.standard_normal((DRAWS, len(x)))])
    weight = 1 / sd**2
    middle = (weight * x).sum() / weight.sum()
    slope = (ys * weight * (x - middle)).sum(1) / (weight * (x - middle) ** 2).sum()
    far = (ys * weight).sum(1) / weight.sum() + slope * (x[-1] + math.log10(factor) - middle)
    predicted = 1 / (1 + np.exp(-far))
    low, high = np.quantile(predicted[1:], [0.025, 0.975])
    return Curve(points, points[-1]["rows"] * factor, float(predicted[0]), float(low), float(high))
