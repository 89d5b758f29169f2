"""Compares two results on the same rows: computes the difference of their means, its confidence interval and its
p-value."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import files
from common.errors import UserError
from common.stats import wilson
from common.types import Json

DRAWS = 10_000  # number of bootstrap samples
BLOCK = 1 << 20  # number of random numbers that are drawn at a time


class Paired(NamedTuple):
    """`difference` is the mean of the first result minus the mean of the second; [low, high] is the 95 % confidence
    interval of the difference."""

    n: int
    difference: float
    low: float
    high: float
    p: float  # two-sided p-value under the null hypothesis of no difference
    wins: int  # number of rows on which the first result is better
    losses: int
    test: str

    def __str__(self) -> str:
        span = f"95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}"
        rows = f"better on {self.wins:,} and worse on {self.losses:,} of {self.n:,} rows"
        return f"{100 * self.difference:+.1f} points ({span}, p = {self.p:.3g}, {self.test}): {rows}"


def compare(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Paired:
    """Compares the scores of two models on the same rows, given in the same order.

    If all scores are 0 or 1, McNemar's exact test and Newcombe's interval for paired proportions are used; otherwise, a
    percentile bootstrap over rows is used.
    """
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    wins, losses = int((a > b).sum()), int((a < b).sum())
    if set(a) | set(b) <= {0.0, 1.0}:
        low, high = newcombe(int((a * b).sum()), wins, losses, int(((1 - a) * (1 - b)).sum()))
        p, test = mcnemar(wins, losses), "McNemar's exact test"
    else:
        low, high, p = bootstrap(a - b, seed)
        test = f"bootstrap of {DRAWS:,} draws, seed {seed}"
    return Paired(len(a), float((a - b).mean()), low, high, p, wins, losses, test)


def mcnemar(wins: int, losses: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test, which uses only the rows on which exactly one of two
    models is right. Under the null hypothesis, either model is equally likely to be the one that is right on such a
    row."""
    n, ways, total = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):
        total, ways = total + ways, ways * (n - k) // (k + 1)  # exact binomial coefficients
    return min(1.0, 2 * total / 2**n)


def newcombe(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval for the difference between two paired proportions (Newcombe 1998, Statistics
    in Medicine 17, 2635, method 10). The arguments count the rows that both models, only the first, only the second, or
    neither of them got right."""
    n = both + first + second + neither
    p, q = (both + first) / n, (both + second) / n
    (p_low, p_high), (q_low, q_high) = wilson(p, n), wilson(q, n)
    cross = both * neither - first * second
    root = math.sqrt((both + first) * (second + neither) * (both + second) * (first + neither))
    phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / root if root else 0.0

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return p - q - distance(p - p_low, q_high - q), p - q + distance(p_high - p, q - q_low)


def bootstrap(differences: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Returns (low, high, p) for the mean of `differences` [n]. [low, high] is the 95 % percentile interval over DRAWS
    bootstrap samples of the rows. `p` is the two-sided p-value of the null hypothesis that the mean is 0. It is
    estimated from these samples and is at least 1 / DRAWS."""
    rng, n = np.random.default_rng(seed), len(differences)
    size = max(1, BLOCK // n)
    blocks = [min(size, DRAWS - at) for at in range(0, DRAWS, size)]
    means = np.concatenate([differences[rng.integers(0, n, (block, n))].mean(1) for block in blocks])
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return float(low), float(high), float(min(1.0, max(2 * tail, 1 / DRAWS)))


# --- results in files ---


def results(path: str | Path) -> list[Json]:
    """Reads the task results in a .jsonl file, or in a folder's evals.jsonl and metrics.jsonl. Only the newest result
    is returned for each combination of task, model, adapter and prompting setup."""
    place = Path(path).expanduser()
    names = [place / "metrics.jsonl", place / "evals.jsonl"] if place.is_dir() else [place]
    lines = [line for name in names for line in files.read_lines(name) if "task" in line]
    if not lines:
        raise UserError("there are no task results", str(path), "name a folder or .jsonl written by evals.main")
    if not (whole := [line for line in lines if "rows" in line]):
        raise UserError("the results do not record their rows", str(path), "score again with this version of Kungfu")
    keys = ("task_hash", "split", "n", "seed", "shots", "context", "index", "model", "adapter")
    return list({tuple(str(x.get(k)) for k in keys): x for x in whole}.values())


def asked(result: Json) -> str:
    """Describes the prompting setup of a result in words. Results from earlier versions of Kungfu record only `shots`
    and `index`."""
    parts = [f"{result['shots']}-shot"] * bool(result.get("shots")) + ["retrieval"] * bool(result.get("index"))
    return result.get("asked") or ", ".join(parts) or "zero-shot"


def fitting(task: str, task_hash: str, rows: Sequence[str], others: Sequence[Json], source: str) -> list[Json]:
    """Returns the earlier results on the same rows with the same scoring. Raises UserError if there are none."""
    ours = {"task_hash": task_hash, "rows": list(rows)}
    if found := [x for x in others if alike(ours, x)]:
        return found
    same = [x for x in others if x["task"] == task]
    if not same:
        known = ", ".join(sorted({x["task"] for x in others}))
        what = f"there is no result for the task {task}, only for {known}"
        raise UserError(what, source, "score that model on this task, too")
    rescored = all(x["task_hash"] != task_hash for x in same)
    why = "the file or the scorer has changed" if rescored else "other rows were drawn"
    drawn = f"n={same[-1]['n']}, seed={same[-1]['seed']}, scorer {same[-1].get('scorer') or 'of the task'}"
    what = f"the result of {task} ({drawn}) cannot be compared row by row: {why}"
    raise UserError(what, source, "score both on the same file with the same scorer, n and seed")


def alike(ours: Json, theirs: Json) -> bool:
    """Returns whether two results are on the same rows with the same scoring."""
    known = "rows" in ours and "rows" in theirs and ours.get("task_hash") == theirs.get("task_hash")
    return known and sorted(ours["rows"]) == sorted(theirs["rows"])


def pair(ours: Json, theirs: Json, seed: int = 0) -> Paired | None:
    """Compares two results row by row. Returns None if their rows or their scoring differ."""
    if not alike(ours, theirs):
        return None
    scores: dict[str, list[float]] = {}
    for row, score in zip(theirs["rows"], theirs["scores"], strict=True):
        scores.setdefault(row, []).append(score)  # a file may contain a row twice
    return compare(ours["scores"], [scores[row].pop(0) for row in ours["rows"]], seed)
