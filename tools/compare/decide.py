"""Derives a decision from the record of a comparison.

A decision says how likely each method is to be the best, which changes of the inputs would make another method the
best, and what a wrong choice costs. The best method is the one with the lowest monthly cost among the methods whose
scores are within a margin of the highest score. The user need not know what a right answer is worth in dollars. It is
enough to know the margin: how much lower the score may be if the method costs less.

The probability that a method is the best is the fraction of DRAWS in which it is. Each draw samples test rows with
replacement (the same rows for all methods), seeds with replacement, and a price from the price range.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from common.types import Json

DRAWS, BLOCK = 10_000, 500  # total number of draws; number of draws that are computed at a time
ENOUGH = 0.8  # the page recommends a method only if its probability of being the best is at least this
LEAST = 30  # minimum number of test rows for a recommendation; with fewer rows, a bootstrap is overconfident
MOST_ROWS = 1_000_000
# {input: factor by which the given value may be wrong, as one standard deviation of its logarithm}
DOUBT = {"requests": 3, "price": 2, "labels": 3, "documents": 3, "margin": 2}
FAR = 1000  # the largest factor by which an input is changed to find out if the recommendation changes


class Inputs(NamedTuple):
    """Inputs of a decision that the user gives, as opposed to measured inputs."""

    requests: float  # per month
    margin: float = 0.02  # how much lower a method may score than the best and still be chosen for its cost
    labels: float = 12.0  # months until the labels change and trained methods must be trained again
    documents: float = 1.0  # months until the documents change and must be indexed, or trained on, again
    people: float = 0.0  # cost of people's work per training run, in dollars
    idle: float = 0.0  # hours per month in which the machine is paid for but idle
    price: float = 1.0  # factor by which the machine's price is multiplied


class Option(NamedTuple):
    """A tested method. Costs are pairs (FLOPs, dollars), with NaN for an unknown number."""

    name: str
    label: str
    record: Json  # the method's entry in the record
    scores: np.ndarray  # [seeds, rows]
    request: tuple[float, float]  # cost per request
    training: tuple[float, float]  # cost of one training run
    index: tuple[float, float]  # cost of indexing all documents once

    @property
    def mean(self) -> float:
        return float(self.scores.mean())

    def monthly(self, given: Inputs, has_documents: bool) -> tuple[float, float]:
        """Returns (FLOPs, dollars) per month for training, indexing and people's work, but not for requests."""
        forgets = self.record["trained"] and has_documents and not self.record["documents"]
        trained = 1 / min(given.labels, given.documents if forgets else given.labels)
        indexed = 1 / given.documents
        people = given.people * trained if self.record["trained"] else 0.0
        return (
            self.training[0] * trained + self.index[0] * indexed,
            self.training[1] * trained + self.index[1] * indexed + people,
        )


class Price(NamedTuple):
    """The cost of a FLOP on the target machine, as (low, value, high). The `unit` is "$", "h" (machine hours) or
    "FLOP"."""

    unit: str
    per_flop: tuple[float, float, float]
    idle: float  # FLOPs that the machine could compute in one hour; 0 if unknown


class Decision(NamedTuple):
    """A decision between options. The option that is most likely to be the best comes first and is recommended."""

    given: Inputs
    price: Price
    options: list[Option]
    cost: np.ndarray  # cost per month [3, options] at the lowest, expected and highest price; infinite if unknown
    probability: np.ndarray  # each option's probability of being the best [options]
    flips: list["Flip"]  # changes that make another option the best, the most likely one first
    # (fraction of the draws in which another option than the first is the best; how much lower the first option's score
    # and how much higher its cost per month are than those of the best option, averaged over these draws)
    lost: tuple[float, float, float]
    rows: int  # number of test rows
    rows_needed: int | None  # test rows needed to decide; None if `rows` is enough; MOST_ROWS if more rows do not help
    grid: np.ndarray  # the numbers of requests per month for which `curve` is computed
    curve: np.ndarray  # [grid, options]: each option's probability of being the best at each number of requests
    has_documents: bool

    @property
    def best(self) -> Option:
        return self.options[0]

    @property
    def enough(self) -> bool:
        return self.rows_needed is None


class Flip(NamedTuple):
    """A change of one input that makes another method the recommended one."""

    fact: str  # name of the changed field of Inputs, or "rows"
    value: float | None  # new value of the field
    to: int  # index of the option that is recommended after the change
    likelihood: float


def options(record: Json) -> list[Option]:
    """Returns the tested methods, with their scores on the test rows, which are in the same order for all methods.
    Raises UserError if the methods were tested on different rows."""
    tested = [m for m in record["methods"] if m["status"] == "tested" and m["tests"]]
    names = [m["name"] for m in tested]
    labels = [m["label"] for m in tested]
    rows = tested[0]["tests"][0]["result"]["rows"] if tested else []
    known = lambda x: math.nan if x is None else float(x)
    index, out = record.get("index") or {}, []
    for m in tested:
        named = m["name"] if names.count(m["name"]) == 1 else f"{m['name']}:{m['model']}"
        label = m["label"] if labels.count(m["label"]) == 1 else f"{m['label']} ({m['model']})"
        asked, flops = m["request"], [known(t["flops"]) for t in m["tests"]]
        priced = asked["usd"] is not None  # a hosted model costs dollars, in addition to this machine's FLOPs
        request = (known(asked["flops"]) if not priced else asked["flops"] or 0.0, known(asked["usd"] or 0))
        indexed = (known(index.get("flops")) if m["documents"] else 0.0, 0.0)
        training = (float(np.mean(flops)) if m["trained"] else 0.0, 0.0)
        scores = np.array([_in_order(t["result"], rows, m["name"]) for t in m["tests"]], float)
        out.append(Option(named, label, m, scores, request, training, indexed))
    return out


def _in_order(result: Json, rows: Sequence[str], name: str) -> list[float]:
    """Returns the scores of a result, sorted in the order of `rows`. A row may occur several times."""
    if sorted(result["rows"]) != sorted(rows):
        raise UserError(f"the results of {name} are not on the same test rows", "comparison.json", "compare again")
    found: dict[str, list[float]] = {}
    for row, score in zip(result["rows"], result["scores"], strict=True):
        found.setdefault(row, []).append(score)
    return [found[row].pop(0) for row in rows]


def price_of(entry: Json) -> Price:
    """Returns the price of a FLOP on a machine, given the machine's entry in the record. The price is in dollars, or in
    machine hours if the price per hour is unknown, or in FLOPs if the speed is unknown as well."""
    seconds, usd = entry["seconds_per_flop"], entry["usd_hour"]
    if seconds is None:
        return Price("FLOP", (1.0, 1.0, 1.0), 0.0)
    hours = seconds / 3600
    if usd is None:
        return Price("h", (hours,) * 3, 1 / hours)
    low, value, high = (x * hours for x in usd)
    return Price("$", (low, value, high), 1 / hours)


def cost(found: Sequence[Option], price: Price, given: Inputs, per_flop: Any, documents: bool) -> np.ndarray:
    """Returns the options' costs per month, an array [..., options], at the prices `per_flop`, an array [..., 1].
    Unknown costs are infinite."""
    each = np.array([o.request for o in found])
    fixed = np.array([o.monthly(given, documents) for o in found])
    own = np.array([not o.record["leaves"] for o in found])
    flops = given.requests * each[:, 0] + fixed[:, 0] + own * given.idle * price.idle
    usd = given.requests * each[:, 1] + fixed[:, 1]
    if price.unit != "$":
        usd = np.where(given.requests * each[:, 1] > 0, np.inf, 0.0)  # dollars cannot be added to hours or FLOPs
    total = flops * np.asarray(per_flop) * given.price + usd
    return np.where(np.isnan(total), np.inf, total)


def drawn_scores(found: Sequence[Option], seed: int = 0) -> np.ndarray:
    """Returns the options' mean scores [DRAWS, options] over rows and seeds that are drawn with replacement.

    Drawing from only k seeds underestimates the variance between seeds. The deviations from the mean over seeds are
    therefore multiplied by √(k / (k - 1)), which removes the bias.
    """
    rng, n = np.random.default_rng(seed), found[0].scores.shape[1]
    blocks = []
    for _ in range(DRAWS // BLOCK):
        counts = rng.multinomial(n, np.full(n, 1 / n), BLOCK).astype(np.float32)  # [BLOCK, rows]
        means = []
        for o in found:
            each, k = counts @ o.scores.T.astype(np.float32) / n, len(o.scores)  # [BLOCK, seeds]
            taken = np.take_along_axis(each, rng.integers(0, k, (BLOCK, k)), 1).mean(1)
            center = each.mean(1)
            means.append(center + (taken - center) * (math.sqrt(k / (k - 1)) if k > 1 else 0.0))
        blocks.append(np.stack(means, 1))
    return np.concatenate(blocks)


def winners(scores: np.ndarray, costs: np.ndarray, margin: float) -> np.ndarray:
    """Returns the index of the best option in each draw, given scores and costs [draws, options]. The best option is
    the cheapest one whose score is within the margin of the highest score. Of equally cheap options, it is the one with
    the highest score."""
    near = scores >= scores.max(1, keepdims=True) - margin - 1e-6
    least = np.where(near, costs, np.inf).min(1, keepdims=True)
    return np.where(near & (costs <= least), scores, -np.inf).argmax(1)


class _Draws:
    """The bootstrap draws from which all probabilities of a decision are computed."""

    def __init__(self, found: Sequence[Option], price: Price, documents: bool):
        self.found, self.price, self.documents = found, price, documents
        self.scores = drawn_scores(found)
        low, value, high = price.per_flop
        rng = np.random.default_rng(1)
        self.per_flop = rng.triangular(low, value, high, (DRAWS, 1)) if low < high else np.full((DRAWS, 1), value)

    def costs(self, given: Inputs) -> np.ndarray:
        return cost(self.found, self.price, given, self.per_flop, self.documents)

    def best(self, given: Inputs, scores: np.ndarray | None = None) -> np.ndarray:
        return winners(self.scores if scores is None else scores, self.costs(given), given.margin)

    def probability(self, given: Inputs, scores: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(self.best(given, scores), minlength=len(self.found)) / DRAWS

    def chosen(self, given: Inputs) -> int:
        return int(self.probability(given).argmax())

    def with_rows(self, factor: float) -> np.ndarray:
        """Returns the scores that draws from `factor` times as many rows would have, assuming that the measured means
        are the true scores."""
        center = np.array([o.mean for o in self.found])
        return center + (self.scores - center) / math.sqrt(factor)


def decide(record: Json, given: Inputs, price: Price | None = None) -> Decision:
    """Derives the decision from a record. Raises UserError if no method was tested."""
    found = options(record)
    if not found:
        raise UserError("no method has test results", "comparison.json", "give tools.compare a larger budget")
    price = price or price_of(record["prices"][0])
    if price.unit != "$" and not any(o.request[0] or o.training[0] for o in found):
        price = Price("$", (0.0, 0.0, 0.0), 0.0)  # hosted models need no FLOPs on this machine
    documents = bool(record["documents"])
    draws = _Draws(found, price, documents)
    probability = draws.probability(given)
    order = sorted(range(len(found)), key=lambda i: (-probability[i], -found[i].mean))
    found[:], draws.scores = [found[i] for i in order], draws.scores[:, order]
    grid = given.requests * 10 ** np.linspace(-3, 3, 61)
    return Decision(
        given=given,
        price=price,
        options=found,
        cost=cost(found, price, given, np.array(price.per_flop)[:, None], documents),
        probability=probability[order],
        flips=_flips(draws, given),
        lost=_lost(draws, given),
        rows=found[0].scores.shape[1],
        rows_needed=_rows_needed(draws, given),
        grid=grid,
        curve=np.array([draws.probability(given._replace(requests=n)) for n in grid]),
        has_documents=documents,
    )


def elsewhere(d: Decision, price: Price) -> int:
    """Returns the index of the option that would be recommended at another price per FLOP."""
    return _Draws(d.options, price, d.has_documents).chosen(d.given)


def _lost(draws: _Draws, given: Inputs) -> tuple[float, float, float]:
    best, costs = draws.best(given), draws.costs(given)
    wrong, at = best != 0, np.arange(DRAWS)
    if not wrong.any():
        return 0.0, 0.0, 0.0
    points = (draws.scores[at, best] - draws.scores[:, 0])[wrong].clip(0)
    more = (costs[:, 0] - costs[at, best])[wrong].clip(0)
    return float(wrong.mean()), float(points.mean()), float(more.mean())


def _rows_needed(draws: _Draws, given: Inputs) -> int | None:
    """Returns None if there are enough test rows. Otherwise estimates the number of rows at which one of the methods
    would be the best with a probability of at least ENOUGH."""
    n = draws.found[0].scores.shape[1]
    if draws.probability(given)[0] >= ENOUGH:
        return None if n >= LEAST else LEAST
    size = n
    while size < MOST_ROWS:
        size = max(size + 1, math.ceil(size * 1.1))
        if draws.probability(given, draws.with_rows(size / n)).max() >= ENOUGH:
            break
    digits = 10 ** (len(str(size)) - 2)
    return max(LEAST, min(MOST_ROWS, math.ceil(size / digits) * digits))


# --- changes of the inputs that change the recommendation ---


def _flips(draws: _Draws, given: Inputs) -> list[Flip]:
    facts = ["requests", "price", "margin"]
    facts += ["labels"] * any(o.record["trained"] for o in draws.found) + ["documents"] * draws.documents
    found = [_rows_flip(draws, given)]
    found += [_nearest(draws, given, fact, direction) for fact in facts for direction in (-1, 1)]
    return sorted((f for f in found if f), key=lambda f: -f.likelihood)


def _rows_flip(draws: _Draws, given: Inputs) -> Flip | None:
    """Finds the method that would most likely replace the recommended one with other test rows and seeds, at the
    expected price."""
    costs = cost(draws.found, draws.price, given, np.full((DRAWS, 1), draws.price.per_flop[1]), draws.documents)
    share = np.bincount(winners(draws.scores, costs, given.margin), minlength=len(draws.found)) / DRAWS
    own, share[0] = float(share[0]), 0.0
    return Flip("rows", None, int(share.argmax()), 1 - own) if own < 1 else None


def _nearest(draws: _Draws, given: Inputs, fact: str, direction: int) -> Flip | None:
    """Finds the smallest change of an input that changes the recommendation: an increase if `direction` is 1, or a
    decrease if `direction` is -1."""
    at: Callable[[float], Inputs] = lambda log: given._replace(**{fact: getattr(given, fact) * 10 ** (direction * log)})
    if not getattr(given, fact):  # multiplying an input of 0 does not change it
        return None
    near, far, step = 0.0, math.log10(FAR), 0.1
    while draws.chosen(at(near + step)) == 0:
        near += step
        if near >= far:
            return None
    beyond = near + step
    for _ in range(6):
        middle = (near + beyond) / 2
        near, beyond = (middle, beyond) if draws.chosen(at(middle)) == 0 else (near, middle)
    z = beyond / math.log10(DOUBT[fact])
    return Flip(fact, getattr(at(beyond), fact), draws.chosen(at(beyond)), math.erfc(z / math.sqrt(2)) / 2)


def break_even(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, str]:
    """Compares the costs of two options, each given as (fixed cost per month, cost per request).

    Returns the number of requests per month at which both cost the same, and which option is cheaper. This is "a" or
    "b" if one is cheaper at any number of requests, in which case the number is None. It is "a then b" if a is cheaper
    below that number and b above it, "b then a" in the opposite case, and "equal" if the costs do not differ.
    """
    (fixed_a, each_a), (fixed_b, each_b) = a, b
    fixed, each = fixed_a - fixed_b, each_b - each_a  # a costs `fixed` more per month and `each` less per request
    if fixed == each == 0:
        return None, "equal"
    if fixed <= 0 <= each:
        return None, "a"
    if fixed >= 0 >= each:
        return None, "b"
    return fixed / each, "b then a" if each > 0 else "a then b"
