"""Helpers for config files. Besides `get_config`, a config file may define the variants that a sweep or a search runs:

    def sweep():  # or sweep_NAME, chosen by --sweep=NAME; --sweep=NAME,OTHER takes their product
        yield from product({"optim.lr": logspace(1e-4, 1e-2, 5), "seed": range(3)})

    def search():  # the ranges of --search
        return {"optim.lr": loguniform(1e-4, 1e-2), "peft.rank": choice(4, 8, 16)}

A point is a dict {dotted key: value} that describes one run. The helpers take axes: a list of points is one axis, and a
dict {key: values, ...} has one axis per key. A config file may also define `get_hyper(h)`, as big_vision's configs do.
"""

import inspect
import itertools
import random
import re
import runpy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from common.errors import UserError
from common.types import Leaf
from configs import schema

Point = dict[str, Leaf]  # {dotted key: value}
Points = Iterable[Point] | Mapping[str, Iterable[Leaf]]


def product(*parts: Points) -> list[Point]:
    """Combines one point from each axis into one point, in all possible ways. The last axis varies fastest."""
    return [_merged(points) for points in itertools.product(*_axes(parts))]


def zip_(*parts: Points) -> list[Point]:
    """Merges the first points of all axes into one point, then the second points, and so on. Raises ValueError if the
    axes have different lengths."""
    return [_merged(points) for points in zip(*_axes(parts), strict=True)]


def chain(*parts: Points) -> list[Point]:
    """Returns the points of all axes in one list, axis by axis."""
    return list(itertools.chain(*_axes(parts)))


def sample(n: int, points: Iterable[Point], seed: int = 0) -> list[Point]:
    """Draws n of the points at random, without replacement. Raises ValueError if there are fewer than n points."""
    return random.Random(seed).sample(list(points), n)


def logspace(low: float, high: float, n: int) -> list[float]:
    """Returns n values from low to high in equal ratios, rounded to six significant digits: logspace(1, 100, 3) ->
    [1.0, 10.0, 100.0]."""
    return [float(f"{low * (high / low) ** (i / max(n - 1, 1)):.6g}") for i in range(n)]


def _axes(parts: Iterable[Points]) -> list[list[Point]]:
    axes = []
    for part in parts:
        if not isinstance(part, Mapping):
            axes.append(list(part))
            continue
        for key, values in part.items():
            if isinstance(values, str) or not isinstance(values, Iterable):
                raise UserError(f"{key!r} needs a list of values", "sweep", f"[{values!r}]")
            axes.append([{key: value} for value in values])
    return axes


def _merged(points: Iterable[Point]) -> Point:
    merged: Point = {}
    for point in points:
        if twice := merged.keys() & point.keys():
            raise UserError(f"{', '.join(sorted(twice))} is set twice", "sweep", "to append axes, use chain")
        merged |= point
    return merged


HYPER = SimpleNamespace(  # the argument of get_hyper(h)
    sweep=lambda key, values: [{key: value} for value in values],
    fixed=lambda key, value, length=1: [{key: value}] * length,
    product=lambda parts, name="": _under(name, product(*parts)),
    zipit=lambda parts, name="": _under(name, zip_(*parts)),
    chainit=lambda parts, name="": _under(name, chain(*parts)),
)


def _under(name: str, points: list[Point]) -> list[Point]:
    return [{f"{name}.{key}": value for key, value in p.items()} for p in points] if name else points


# --- ranges of a search ---


class Range(NamedTuple):
    """The values that a search may give to a key: the range from `low` to `high`, including both, or a list of
    `choices`."""

    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple = ()


def uniform(low: float, high: float) -> Range:
    return _range(float(low), float(high), False)


def loguniform(low: float, high: float) -> Range:
    return _range(float(low), float(high), True)


def integers(low: int, high: int, log: bool = False) -> Range:
    return _range(int(low), int(high), log)


def choice(*values: Leaf) -> Range:
    if not values or not all(v is None or isinstance(v, str | int | float) for v in values):
        raise ValueError(f"choice takes strings, numbers, booleans and None, not {values!r}")
    return Range(choices=values)


def _range(low: float, high: float, log: bool) -> Range:
    if not low <= high or (log and low <= 0):
        raise ValueError(f"invalid {'logarithmic ' * log}range from {low} to {high}")
    return Range(low, high, log)


# --- reading sweeps and ranges from a config file ---


def points(path: str, arg: str = "", chosen: str = "") -> list[Point]:
    """Returns the points that a file's `sweep` or `get_hyper` yields. If `chosen` names sweeps, such as "lr,seed",
    returns the product of these sweeps.

    Raises UserError if the file has no such function, or if the function yields something other than points.
    """
    with schema.running(Path(path)):
        found = _functions(path, r"sweep(_\w+)?|get_hyper")
        named = [name.removeprefix("sweep_") for name in found if name.startswith("sweep_")]
        names = [f"sweep_{name}" for name in chosen.split(",") if name] or [n for n in found if "sweep_" not in n][:1]
        if not names or set(names) - set(found):
            fix = f"--sweep takes {', '.join(named)}" if named else "see configs/sweeps.py"
            raise UserError(f"the file has no {' or '.join(names) or 'sweep()'}", path, fix)
        parts = [_call(found[name], HYPER if name == "get_hyper" else arg) for name in names]
        return [_point(p) for p in (product(*parts) if len(parts) > 1 else parts[0])]


def space(path: str, arg: str = "") -> dict[str, Range]:
    """Returns the ranges that a file's function `search` defines. Raises UserError if the file defines no ranges."""
    with schema.running(Path(path)):
        found = _functions(path, "search")
        ranges = _point(_call(found["search"], arg)) if found else {}
        if not ranges or not all(isinstance(r, Range) for r in ranges.values()):
            raise UserError("the file has no search() that returns {key: range}", path, "see configs/sweeps.py")
        return ranges


def _functions(path: str, pattern: str) -> dict[str, Callable]:
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError("no such config file", path or "--config", "a sweep is defined in a .py config file")
    return {n: f for n, f in runpy.run_path(path).items() if inspect.isfunction(f) and re.fullmatch(pattern, n)}


def _call(function: Callable, arg: object) -> Any:
    return function(arg) if inspect.signature(function).parameters else function()


def _point(point: object) -> Point:
    """Checks a point, removes "config." from its keys, and converts NumPy scalars to Python numbers."""
    if not isinstance(point, Mapping) or not all(isinstance(key, str) for key in point):
        raise UserError(f"{point!r} is not a dict of dotted keys", "sweep", 'yield {"optim.lr": 1e-3}')
    plain = lambda v: v.item() if hasattr(v, "item") else v
    return {key.removeprefix("config."): plain(value) for key, value in point.items()}
