"""Successive halving over methods and their settings, on validation rows (Jamieson & Talwalkar 2016).

Decisions depend only on recorded scores and FLOPs, never on timing or randomness.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common import numbers, stats
from common.types import Json
from evals import paired
from tools.compare.method import Candidate

ETA = 3  # each rung has ETA times as many training rows as the one before it, and 1 / ETA of its settings
ROWS = (50, 100, 200)  # maximum number of validation rows in each of the last three rungs
LEAST = 24  # minimum number of training rows in a rung
BASELINE = "zero_shot"  # always tested, even if it is clearly worse: the other methods are compared with it

Result = Callable[[Candidate], Json]


def first(found: Sequence[Candidate]) -> list[Candidate]:
    """Returns the first candidate of each method and model."""
    return list({x.key: x for x in reversed(found)}.values())[::-1]


def joining(x: Candidate, found: Sequence[Candidate], rungs: int) -> int:
    """Returns the number of the first rung in which a candidate takes part, out of `rungs` rungs.

    The first setting of a method and all settings without training take part from the beginning. The other settings of
    a trained method join in the last rung but one. Before that, they would train on so few rows that the best learning
    rate there is often not the best one on all rows.
    """
    return max(0, rungs - 2) if x.trained and x not in first(found) else 0


class Drop(NamedTuple):
    candidate: Candidate
    why: str


def rungs(n: int, train: int, validation: int) -> list[Json]:
    """Returns up to `n` rungs. For each, gives the fraction of the training rows that it uses, their number, and the
    number of validation rows. The last rung trains on all rows. Earlier rungs with fewer than LEAST training rows are
    left out.
    """
    shares = [ETA**-i for i in reversed(range(n))]
    kept = [share for share in shares if share == 1 or share * train >= LEAST]
    rows = ROWS[-len(kept) :] if len(kept) <= len(ROWS) else (ROWS[0],) * (len(kept) - len(ROWS)) + ROWS
    return [
        {"share": share, "train": math.ceil(share * train), "rows": min(most, validation)}
        for share, most in zip(kept, rows, strict=bool(kept))
    ]


def measured(x: Candidate, rungs: Sequence[Json]) -> list[int]:
    """Returns the numbers of the rungs on which a candidate is measured. An untrained candidate gives the same answers
    on every rung, so it is not measured again on a rung that has no more validation rows than the previous one."""
    return [n for n, rung in enumerate(rungs) if x.trained or n == 0 or rung["rows"] > rungs[n - 1]["rows"]]


def settings(alive: Sequence[Candidate], result: Result, last: bool) -> tuple[list[Candidate], list[Drop]]:
    """Keeps each method's best third of settings or, after the last rung, only its best setting.

    Before the last rung, a difference of less than one standard error is ignored (the one-standard-error rule, Breiman
    et al. 1984): of the settings that are this close to the best score, those that are listed first are kept. After the
    last rung, the setting that is listed first is kept only if scores are equal.
    """
    kept, dropped = [], []
    for key in _keys(alive):
        listed = [x for x in alive if x.key == key]
        best = max(listed, key=lambda x: result(x)["mean"])
        close = [x for x in listed if not last and _close(result(best), result(x))]
        mine = sorted(listed, key=lambda x: (x not in close, 0.0 if x in close else -result(x)["mean"]))
        n = 1 if last else math.ceil(len(mine) / ETA)
        kept += mine[:n]
        for x in mine[n:]:
            why = f"{_score(result(x))} on {result(x)['n']} validation rows; {_named(mine[0])} scored "
            dropped.append(Drop(x, why + _score(result(mine[0]))))
    return kept, dropped


def _close(best: Json, other: Json | None) -> bool:
    """Whether a score is at most one standard error, of the paired difference, below the best score."""
    found = paired.pair(best, other) if other else None
    return found is not None and found.difference <= (found.difference - found.low) / stats.Z


def methods(
    alive: Sequence[Candidate], result: Result, before: Callable[[Candidate], Json | None], full: bool
) -> tuple[list[Candidate], list[Drop]]:
    """Drops the methods that are clearly worse than the best one. "Clearly worse" means that the paired 95 % confidence
    interval of the score difference, over the same rows, is entirely above 0.

    If `full` is false, methods have trained on only part of the rows, so a trained method may still improve. It is
    dropped only if it would stay clearly worse after improving once more by as much as it did since the previous rung.
    If `before` returns no result of the previous rung for it, it is kept.
    """
    best = {key: max((x for x in alive if x.key == key), key=lambda x: result(x)["mean"]) for key in _keys(alive)}
    leader = max(best.values(), key=lambda x: result(x)["mean"])
    kept, dropped = [], []
    for key, mine in best.items():
        every = [x for x in alive if x.key == key]
        found = paired.pair(result(leader), result(mine))
        hope = 0.0
        if mine.trained and not full:
            earlier = before(mine)
            hope = max(0.0, result(mine)["mean"] - earlier["mean"]) if earlier else math.inf
        if found is None or found.low <= hope:
            kept += every
            continue
        gain = ", more than its last gain could make up for" if hope else ""
        span = f"95 % interval {100 * found.low:.0f} to {100 * found.high:.0f}"
        points = f"{100 * found.difference:.0f} points better on {found.n} validation rows"
        dropped += [Drop(x, f"{_named(leader)} is {points} ({span}){gain}") for x in every]
    return kept, dropped


def affordable(
    alive: Sequence[Candidate], result: Callable[[Candidate], Json | None], now: Callable[[Candidate], float],
    later: Callable[[Candidate], float], left: float | None, share: float = 1.0, must: bool = False,
) -> tuple[list[Candidate], list[Drop]]:  # fmt: skip
    """Keeps as many methods as `left` FLOPs can pay for, with fewer settings per method if necessary. The best setting
    of each method is paid for first: that of the leader, then those of the other methods in order of their scores. The
    other settings are paid for as long as the rung takes at most the fraction `share` of the FLOPs left.

    `now(x)` returns the FLOPs that candidate x needs in the next rung, and `later(x)` the FLOPs that it needs in the
    last rung and the test. Part of the budget is reserved for the later FLOPs of the most expensive candidate, so that
    any one of them can still be tested. If `must` is true, the leader is kept even if the budget is too small.
    """
    if left is None:
        return list(alive), []
    ahead = leader(alive, result, lambda x: now(x) + later(x))
    each = _ranked(alive, result)
    each = {ahead.key: each[ahead.key]} | each
    reserve = lambda some: max(map(later, some), default=0.0)
    kept, spent, short = [], 0.0, {}
    for place in range(max(map(len, each.values()))):
        for key, mine in each.items():
            if place >= len(mine) or key in short:
                continue
            x = mine[place]
            after = spent + now(x)
            if after + reserve([*kept, x]) <= left and (place == 0 or after <= share * left):
                kept.append(x)
                spent = after
            elif place == 0:
                needed, free = now(x) + later(x), max(0.0, left - spent - reserve(kept))
                short[key] = f"the budget has {numbers.flops(free)} left; this needs {numbers.flops(needed)}"
    if must and not kept:
        kept = [ahead]
        short.pop(ahead.key)
    why = "the budget has no room for more settings"
    dropped = [Drop(x, short.get(x.key, why)) for x in alive if x not in kept]
    return [x for x in alive if x in kept], dropped


def leader(
    alive: Sequence[Candidate], result: Callable[[Candidate], Json | None], cost: Callable[[Candidate], float]
) -> Candidate:
    """Returns the candidate to pay for first. Without any results, this is the candidate that is listed first.

    Otherwise it is one of the candidates whose scores are within one standard error of the best score: the cheapest of
    those that train, since they can still improve, or the cheapest of all if none of them trains.
    """
    best = [mine[0] for mine in _ranked(alive, result).values()]
    top = result(best[0])
    if top is None:
        return best[0]
    return min((x for x in best if x is best[0] or _close(top, result(x))), key=lambda x: (not x.trained, cost(x)))


def _ranked(
    alive: Sequence[Candidate], result: Callable[[Candidate], Json | None]
) -> dict[tuple[str, str], list[Candidate]]:
    """Returns {method: its candidates}, both from the best score to the worst. Candidates without a result come last,
    in the order in which they are listed."""
    found: dict[tuple[str, str], list[Candidate]] = {}
    for x in sorted(alive, key=lambda x: -known["mean"] if (known := result(x)) else 1.0):
        found.setdefault(x.key, []).append(x)
    return found


def _keys(found: Sequence[Candidate]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(x.key for x in found))


def _named(x: Candidate) -> str:
    return x.row()["label"]


def _score(result: Json) -> str:
    return f"{100 * result['mean']:.0f} %"
