"""Chooses which items people should label: those on which a judge model is unsure, and a random sample of the others as
an audit. Also measures how the accuracy of a reward model grows with the number of labels."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from common import stats
from evals.pairs import correct, logistic, sigmoid

Order = Literal["random", "uncertain", "disagreement"]
ORDERS: tuple[Order, ...] = ("random", "uncertain", "disagreement")
BINS = 5  # number of confidence bins in a calibration


class Route(NamedTuple):
    """Says who labels each item: people label the items for which `unsure` [n] or `audited` [n] is True, and the judge
    labels all other items."""

    unsure: np.ndarray
    audited: np.ndarray

    @property
    def people(self) -> np.ndarray:
        return self.unsure | self.audited


def route(p: np.ndarray, people: int, audit: float, seed: int = 0) -> Route:
    """Chooses the items that people label. `people` is the number of items that people have time to label. A fraction
    `audit` of these items is drawn at random. The others are the items about which the judge is least sure, that is,
    whose first answer it prefers with a probability p [n] nearest to one half."""
    count = min(people, len(p))
    random = round(count * audit)
    # a random order, which breaks ties between items with equal p
    order = np.random.default_rng(seed).permutation(len(p))
    unsure, audited = np.zeros((2, len(p)), bool)
    nearest = order[np.argsort(np.abs(p[order] - 0.5), kind="stable")]
    unsure[nearest[: count - random]] = True
    audited[order[~unsure[order]][:random]] = True
    return Route(unsure, audited)


class Calibration(NamedTuple):
    """The result of `calibration`. Each of the `bins` is (lowest confidence, number of items, mean confidence,
    accuracy, 95 % interval of the accuracy)."""

    n: int
    accuracy: float
    low: float
    high: float
    brier: float  # mean (p - label)^2: 0.25 for a judge that always says one half
    error: float  # expected calibration error: the mean of |confidence - accuracy| over the bins, weighted by bin size
    bins: list[tuple[float, int, float, float, tuple[float, float]]]


def calibration(p: Sequence[float], label: Sequence[float]) -> Calibration:
    """Measures how well predicted probabilities match people's labels. `p` [n] is the probability that the first answer
    is better; `label` [n] is 1 if people prefer the first answer, 0 if they prefer the second, and 0.5 for a tie."""
    x, y = np.asarray(p, float), np.asarray(label, float)
    sure = np.maximum(x, 1 - x)
    right = np.where(x > 0.5, y, np.where(x < 0.5, 1 - y, 0.5))
    place = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = []
    for i in range(BINS):
        if (at := place == i).any():
            scores = right[at].tolist()
            means = float(sure[at].mean()), float(np.mean(scores))
            bins.append((0.5 + i / 2 / BINS, len(scores), *means, stats.of_scores(scores)))
    error = sum(n * abs(mean - accuracy) for _, n, mean, accuracy, _ in bins) / len(x)
    low, high = stats.of_scores(right.tolist())
    return Calibration(len(x), float(right.mean()), low, high, float(((x - y) ** 2).mean()), float(error), bins)


# --- accuracy as a function of the number of labels ---


class Point(NamedTuple):
    """The held-out accuracy of a reward model that is trained on `labels` labels: the accuracy in each of the `replays`
    of `curve`, their mean, and the Student-t interval of the mean."""

    labels: int
    mean: float
    low: float
    high: float
    replays: list[float]


def curve(
    x: np.ndarray, fold: np.ndarray, judge: np.ndarray, order: Order, sizes: Sequence[int], replays: int = 10,
    l2: float | None = None, noise: float = 0.0, seed: int = 0,
) -> list[Point]:  # fmt: skip
    """Measures how the accuracy of a linear reward model grows with the number of labels. The model is fitted to
    feature differences x [n,D].

    The measurement is repeated `replays` times. Each replay holds out one of the groups of pairs that `fold` [n]
    defines, and draws pairs from the other groups to label them. `order` says which pairs are labeled first: pairs
    drawn at random ("random"), those that the model predicts with a probability nearest to one half ("uncertain"), or
    those for which the model's probability differs most from the judge's probability in `judge` [n] ("disagreement").
    In every order, the first `sizes[0]` pairs are drawn at random. `noise` is the share of labels that are flipped, to
    simulate mistakes. A row of x holds the features of the preferred answer minus those of the other answer, so its
    label is 1, or -1 if it is flipped.
    """
    penalty = x.shape[1] if l2 is None else l2
    found = np.array([_replay(x, fold, judge, order, sizes, penalty, noise, seed + i, i) for i in range(replays)])
    points = []
    for size, scores in zip(sizes, found.T, strict=True):
        low, high = stats.student(scores.tolist()) or (math.nan, math.nan)
        points.append(Point(size, float(scores.mean()), low, high, scores.tolist()))
    return points


def _replay(
    x: np.ndarray, fold: np.ndarray, judge: np.ndarray, order: Order, sizes: Sequence[int], l2: float, noise: float,
    seed: int, number: int,
) -> list[float]:  # fmt: skip
    rng = np.random.default_rng(seed)
    groups = np.unique(fold)
    held = fold == groups[number % len(groups)]
    pool = rng.permutation(np.flatnonzero(~held))
    label = np.where(rng.random(len(x)) < noise, -1.0, 1.0)
    taken, scores, w = pool[:0], [], np.zeros(x.shape[1])
    for size in sizes:
        left = pool[~np.isin(pool, taken)]
        p = sigmoid(x[left] @ w)
        if order == "uncertain" and len(taken):
            left = left[np.argsort(np.abs(p - 0.5), kind="stable")]
        elif order == "disagreement" and len(taken):
            left = left[np.argsort(-np.abs(p - judge[left]), kind="stable")]
        taken = np.concatenate([taken, left[: size - len(taken)]])
        w = logistic(x[taken], label[taken], l2, w)
        scores.append(float(np.mean(correct(sigmoid(x[held] @ w)))))
    return scores
