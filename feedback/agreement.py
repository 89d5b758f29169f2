"""Measures, with 95 % intervals, how much people agree (Cohen's and Fleiss' kappa, Krippendorff's alpha), and their
position bias.

A *unit* is a pair of answers to the same item. Each person's vote assigns the unit to one of four categories: the first
answer is preferred, the second is preferred, the answers are tied, or all answers are bad. The bootstrap resamples
items, not units, so all units of an item are drawn or left out together.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import krippendorff
import numpy as np

from common import stats
from feedback.fold import Event, State, relation
from feedback.items import Item

CATEGORIES = (1, 0, -1, "bad")  # the first answer is preferred, tie, the second is preferred, all answers are bad
DRAWS = 400  # number of bootstrap samples
PEOPLE = 12  # maximum number of people for whom pairwise kappas are computed


class Figure(NamedTuple):
    """A statistic computed from `n` units, and its 95 % interval [low, high]. Numbers that cannot be computed are
    None."""

    value: float | None
    low: float | None
    high: float | None
    n: int


NONE = Figure(None, None, None, 0)


class Units(NamedTuple):
    """`votes[u][annotator]` is the category that the annotator chose for unit u, as an index into CATEGORIES.
    `items[u]` is the number of the item to which unit u belongs."""

    votes: list[dict[str, int]]
    items: list[int]


def units(state: State, items: Iterable[Item]) -> Units:
    out = Units([], [])
    for number, item in enumerate(items):
        votes = state.votes.get(item.hash, {}).items()
        for i, j in itertools.combinations(range(len(item.texts)), 2):
            found = {name: category(event, i, j) for name, event in votes}
            known = {name: CATEGORIES.index(value) for name, value in found.items() if value is not None}
            if known:
                out.votes.append(known)
                out.items.append(number)
    return out


def category(event: Event, i: int, j: int) -> int | str | None:
    return "bad" if event.content["choice"] == "bad" else relation(event.ranks, i, j)


def cohen(table: Sequence[Sequence[float]] | np.ndarray) -> float:
    """Cohen's kappa (1960) for a square table. Each cell counts how often one person chose the row's category while the
    other chose the column's category."""
    p = np.asarray(table, float)
    p = p / p.sum()
    chance = float(p.sum(0) @ p.sum(1))
    return math.nan if chance == 1 else (float(np.trace(p)) - chance) / (1 - chance)


def fleiss(counts: np.ndarray) -> float:
    """Fleiss' kappa (1971). `counts` [units,categories] is the number of votes per unit and category. Every unit must
    have the same number of votes."""
    n = counts.sum(1)
    observed = float((((counts**2).sum(1) - n) / (n * (n - 1))).mean())
    chance = float(((counts / n[:, None]).mean(0) ** 2).sum())
    return math.nan if chance == 1 else (observed - chance) / (1 - chance)


def alpha(counts: np.ndarray, level: str = "nominal") -> float:
    """Krippendorff's alpha. `counts` [units,categories] is the number of votes per unit and category. Units with a
    single vote are ignored. The result is NaN if all votes are in one category."""
    if ((counts.sum(1) > 1) @ counts > 0).sum() < 2:
        return math.nan
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement=level))  # type: ignore[arg-type]


def interval(value: Callable[[np.ndarray], float], rows: np.ndarray, groups: Sequence[int]) -> Figure:
    """Computes `value(rows)` and its 95 % interval with the percentile bootstrap. The bootstrap resamples whole groups,
    because the rows of a group are not independent."""
    if not len(rows):
        return NONE
    order = np.argsort(groups, kind="stable")
    sizes = np.unique(np.asarray(groups), return_counts=True)[1]
    starts, draw, drawn = np.cumsum(sizes) - sizes, np.random.default_rng(0), []
    for _ in range(DRAWS if len(sizes) > 1 else 0):
        chosen = draw.integers(0, len(sizes), len(sizes))
        counts = sizes[chosen]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        drawn.append(value(rows[order[np.repeat(starts[chosen], counts) + within]]))
    found, kept = value(rows), [x for x in drawn if math.isfinite(x)]
    if not math.isfinite(found):
        return NONE._replace(n=len(rows))
    low, high = np.quantile(kept, [0.025, 0.975]) if len(kept) > DRAWS / 2 else (None, None)
    return Figure(found, low, high, len(rows))


def with_others(u: Units, name: str) -> Figure:
    """The share of other people's votes that chose the same category as this person, over all units on which this
    person voted."""
    rows, groups = [], []
    for votes, item in zip(u.votes, u.items):
        if name in votes and len(votes) > 1:
            rows.append([sum(v == votes[name] for v in votes.values()) - 1, len(votes) - 1])
            groups.append(item)
    return interval(lambda x: float(x[:, 0].sum() / x[:, 1].sum()), np.array(rows), groups)


def of_pairs(u: Units) -> dict[tuple[str, str], Figure]:
    """Cohen's kappa for each pair of people who voted on at least one common unit. Only the first PEOPLE people in
    alphabetical order are included."""
    out = {}
    names = sorted({name for votes in u.votes for name in votes})[:PEOPLE]
    for a, b in itertools.combinations(names, 2):
        both = [(votes[a], votes[b], item) for votes, item in zip(u.votes, u.items) if a in votes and b in votes]
        rows = np.array([row[:2] for row in both], int).reshape(-1, 2)
        out[a, b] = interval(lambda x: cohen(_table(x)), rows, [row[2] for row in both])
    return {pair: figure for pair, figure in out.items() if figure.n}


def _table(pairs: np.ndarray) -> np.ndarray:
    out = np.zeros((len(CATEGORIES),) * 2)
    np.add.at(out, (pairs[:, 0], pairs[:, 1]), 1)
    return out


def of_all(u: Units) -> dict[str, Figure]:
    """The agreement among all people: the share of pairs of people who agree on a unit (averaged over units), Fleiss'
    kappa and Krippendorff's alpha. Fleiss' kappa needs the same number of votes for every unit, so it uses only the
    units with the most common number of votes. The others use all units with two or more votes."""
    kept = [(votes, item) for votes, item in zip(u.votes, u.items) if len(votes) > 1]
    if not kept:
        return {"share": NONE, "fleiss": NONE, "alpha": NONE}
    counts = np.array([[list(votes.values()).count(c) for c in range(len(CATEGORIES))] for votes, _ in kept], float)
    groups, n = np.array([item for _, item in kept]), counts.sum(1)
    same = n == Counter(n).most_common(1)[0][0]
    share = lambda x: float((((x**2).sum(1) - x.sum(1)) / (x.sum(1) * (x.sum(1) - 1))).mean())
    return {
        "share": interval(share, counts, groups.tolist()),
        "fleiss": interval(fleiss, counts[same], groups[same].tolist()),
        "alpha": interval(alpha, counts, groups.tolist()),
    }


def of_ratings(state: State, items: Sequence[Item], scale: int) -> dict[str, Figure]:
    """Krippendorff's alpha for the ratings of each aspect, which are treated as an interval scale. For ratings, a unit
    is a single answer."""
    counts: dict[str, list[list[int]]] = {}
    groups: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        votes = state.votes.get(item.hash, {}).values()
        for aspect, i in itertools.product(item.aspects, range(len(item.texts))):
            given = [event.content["ratings"].get(aspect, [None] * (i + 1))[i] for event in votes]
            if sum(value is not None for value in given) > 1:
                counts.setdefault(aspect, []).append([given.count(value) for value in range(1, scale + 1)])
                groups.setdefault(aspect, []).append(number)
    value = lambda x: alpha(x, "interval")
    return {aspect: interval(value, np.array(rows, float), groups[aspect]) for aspect, rows in counts.items()}


def share(hits: Sequence[bool]) -> Figure:
    """The share of `hits` that are true, with Wilson's 95 % interval."""
    if not hits:
        return NONE
    p = sum(hits) / len(hits)
    return Figure(p, *stats.wilson(p, len(hits)), len(hits))


def first_shown(events: Iterable[Event]) -> Figure:
    """The share of decisions that prefer the first answer on the page to the second, among the decisions that prefer
    one of these two. Without position bias, this share is 50 %."""
    sides = [relation(event.ranks, *event.content["order"][:2]) for event in events]
    return share([side > 0 for side in sides if side])


def with_ranks(pairs: Iterable[tuple[Event, list[int | None]]]) -> Figure:
    """The share of votes that agree with the given ranks, which are gold ranks or a judge's ranks. Pairs of answers
    that the given ranks tie or that the vote does not compare are ignored. A vote agrees only if it prefers the same
    answer as the ranks in each of the other pairs."""
    hits = []
    for event, ranks in pairs:
        strict = [
            (relation(ranks, i, j), category(event, i, j))
            for i, j in itertools.combinations(range(len(ranks)), 2)
            if relation(ranks, i, j) and category(event, i, j) is not None
        ]
        hits += [all(a == b for a, b in strict)] if strict else []
    return share(hits)
