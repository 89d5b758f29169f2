"""Generates data for small tasks with known answers, so that any method can be tried without downloading data.

A task is specified as NAME?k=v&k=v, for example "add?n=1000&digits=2&seed=0". The same specification gives the same
records on every machine.
"""

import random
from collections.abc import Iterator

from common.errors import UserError

VERSION = 1  # increased when a code change yields different records for the same specification


def records(spec: str) -> Iterator[dict]:
    name, _, query = spec.partition("?")
    make = TASKS.get(name)
    if make is None:
        raise UserError(f"unknown task; known: {' '.join(TASKS)}", f"synthetic:{spec}")
    options = {"n": 1000, "digits": 2, "length": 8, "seed": 0}
    for pair in filter(None, query.split("&")):
        key, _, value = pair.partition("=")
        if key not in options or not value.isdigit():
            raise UserError(f"{pair!r} is not an option", f"synthetic:{spec}", f"{' '.join(options)}, whole numbers")
        options[key] = int(value)
    return make(random.Random(options["seed"]), **options)


def _below(rng: random.Random, n: int) -> int:
    return int(rng.random() * n)  # only the method `random()` gives the same numbers in all versions of Python


def add(rng: random.Random, n: int, digits: int, **_) -> Iterator[dict]:
    """ "17+25=" -> "42" """
    for _ in range(n):
        a, b = _below(rng, 10**digits), _below(rng, 10**digits)
        yield {"prompt": f"{a}+{b}=", "completion": str(a + b)}


def add_pairs(rng: random.Random, n: int, digits: int, **_) -> Iterator[dict]:
    """Yields preference pairs. The chosen answer is the sum, and the rejected answer is slightly larger."""
    for record in add(rng, n, digits):
        wrong = int(record["completion"]) + 1 + _below(rng, 9)
        yield {"prompt": record["prompt"], "chosen": record["completion"], "rejected": str(wrong)}


def add_labels(rng: random.Random, n: int, digits: int, **_) -> Iterator[dict]:
    """Yields sums with answers, about half of which are wrong. Right answers have the label 1, wrong answers the label
    0."""
    for pair in add_pairs(rng, n, digits):
        right = _below(rng, 2)
        answer = pair["chosen"] if right else pair["rejected"]
        yield {"prompt": pair["prompt"], "completion": answer, "label": right}


def add_matches(rng: random.Random, n: int, digits: int, **_) -> Iterator[dict]:
    """Yields pairs of a query (a sum such as 1+2=) and a passage (a sentence with the sum and its result)."""
    for record in add(rng, n, digits):
        yield {"query": record["prompt"], "passage": f"The sum is {record['prompt']}{record['completion']}."}


def add_ratings(rng: random.Random, n: int, digits: int, **_) -> Iterator[dict]:
    """Yields sums with answers that are too large by 0 to 4. The rating is 5 if the answer is right, and 1 if it is off
    by 4."""
    for record in add(rng, n, digits):
        off = _below(rng, 5)
        yield record | {"completion": str(int(record["completion"]) + off), "rating": 5 - off}


def add_ranks(rng: random.Random, n: int, digits: int, **_) -> Iterator[dict]:
    """Yields sums with three ranked answers in varying order: one is right, one is too large by 1 to 4, and one is too
    large by 5 to 8."""
    for record in add(rng, n, digits):
        answers = [int(record["completion"]), *(int(record["completion"]) + far + _below(rng, 4) for far in (1, 5))]
        first = _below(rng, 3)
        order = [(first + i) % 3 for i in range(3)]
        yield {
            "prompt": record["prompt"],
            "answers": [str(answers[i]) for i in order],
            "ranks": [i + 1 for i in order],
        }


def copy(rng: random.Random, n: int, length: int, **_) -> Iterator[dict]:
    """ "copy xyz:" -> "xyz" """
    for _ in range(n):
        word = "".join("abcdefghijklmnopqrstuvwxyz"[_below(rng, 26)] for _ in range(length))
        yield {"prompt": f"copy {word}:", "completion": word}


TASKS = {
    "add": add,
    "add_pairs": add_pairs,
    "add_labels": add_labels,
    "add_matches": add_matches,
    "add_ratings": add_ratings,
    "add_ranks": add_ranks,
    "copy": copy,
}
