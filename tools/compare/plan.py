"""Estimates the cost of a comparison before it runs: the FLOPs, and from them ranges of time, money and energy."""

import dataclasses
import functools
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence

from common import chips, cli, numbers
from common.errors import UserError
from common.types import Json
from tools.compare import inputs
from tools.compare.halving import BASELINE, ETA, joining, measured
from tools.compare.inputs import Comparison
from tools.compare.method import PASSAGE, Candidate

MFU = 0.2, 0.5  # assumed range of the speed, as fractions of the peak FLOP/s of a chip
OF_PRODUCT = 0.1, 0.6  # assumed range, as fractions of the FLOP/s of this machine in matrix products
ALL = "all"  # the --budget with which no setting is dropped before the last rung, as tools.compare.audit needs
ROOM = 32  # assumed answer length, in tokens, for a model that does not stop on its own


@dataclasses.dataclass(frozen=True)
class Prices:
    """Estimates what candidates cost, in FLOPs and dollars."""

    c: Comparison
    seeds: int

    def train(self, x: Candidate, rows: int) -> float:
        """Returns the FLOPs of training on `rows` rows, or 0 for a method that trains nothing."""
        if x.setting.train is None:
            return 0.0
        base, passages = self.c.bases[x.model], self._passages(x)
        shape = inputs.shape(base.longest + passages, 0, base.context)
        changes = {**x.setting.train, "init": x.model, **shape, "optim.lr": 1e-3}
        layer, head = _per_token(tuple(sorted(changes.items())))
        return self.c.epochs * rows * ((base.prompt + passages + base.answer) * layer + base.answer * head)

    def ask(self, x: Candidate, rows: int, result: Json | None = None) -> tuple[float, float]:
        """Returns the (low, high) FLOPs of answering `rows` questions. If an earlier `result` is given, both are its
        measured FLOPs per question times `rows`. Examples that all prompts share are computed once."""
        if result:
            return (result["flops"] / result["n"] * rows,) * 2
        base, shown = self.c.bases[x.model], self._examples(x)
        once = shown if x.setting.ask.pick == "fixed" else 0.0
        read = self._read(x) - once
        options = max(1, len(self.c.task.scored["test"][0].get("options", ())))
        low, high = base.answer, max(ROOM, base.answer)
        return tuple(base.forward * (once + rows * (options * read + written)) for written in (low, high))

    def dollars(self, x: Candidate, rows: int) -> tuple[float, float]:
        """Returns the (low, high) dollars of asking a hosted model `rows` questions. The cost is 0 for other models,
        and for hosted models with unknown prices."""
        base = self.c.bases[x.model]
        each = base.usd or (0.0, 0.0)
        low, high = (
            (each[0] * self._read(x) + each[1] * n) * rows / 1e6 for n in (base.answer, max(ROOM, base.answer))
        )
        return low, high

    def _read(self, x: Candidate) -> float:
        """Returns the number of tokens in a prompt."""
        base = self.c.bases[x.model]
        return base.prompt + self._examples(x) + self._passages(x)

    def _examples(self, x: Candidate) -> float:
        """Returns the number of tokens of the examples in a prompt."""
        base = self.c.bases[x.model]
        return x.setting.ask.shots * (base.prompt + base.answer)

    def _passages(self, x: Candidate) -> int:
        return PASSAGE * x.setting.ask.k * bool(x.setting.ask.index)

    def rung(self, x: Candidate, rung: Json, result: Json | None = None, end: int = 1) -> float:
        """Returns the maximum FLOPs of a candidate in one rung, or the minimum if `end` is 0."""
        return self.train(x, rung["train"]) + self.ask(x, rung["rows"], result)[end]

    def test(self, x: Candidate, trained: int, result: Json | None = None, end: int = 1) -> float:
        """Returns the maximum FLOPs of testing a candidate with all seeds, or the minimum if `end` is 0. `trained` is
        the number of seeds with which it has been trained already."""
        scored = self.c.task.scored
        runs = self.seeds if x.trained else 1
        asked = self.ask(x, len(scored["test"]), result)[end]
        return (runs - min(trained, runs)) * self.train(x, len(scored["train"])) + runs * asked


@functools.cache
def _per_token(changes: tuple) -> tuple[float, float]:
    """Returns the training FLOPs of the layers per token, and those of the head per target token."""
    from train import cost, plan

    cfg = inputs.config(dict(changes))
    found = cost.of_plan(plan.blueprint(cfg), cfg.data.seq_len)
    return found.layer_train_flops, found.head_train_flops


# --- budgets and prices ---


def budget(text: str, usd_hour: float | None) -> tuple[float | None, float | None]:
    """Parses a budget such as "1e15", "30min", "2h" or "2usd" into (FLOPs, seconds). One of the two is None. If no
    budget is set, both are."""
    if text in ("", ALL):
        return None, None
    found = re.fullmatch(r"([0-9.]+(?:e\+?[0-9]+)?)\s*(s|min|h|usd)?", text.strip().lower())
    try:
        value = float(found[1]) if found else 0.0
    except ValueError:
        value = 0.0
    if not found or not value:
        raise UserError(f"{text!r} is not a budget", "--budget", "write 30min, 2h, 2usd, or FLOPs such as 1e15")
    if found[2] == "usd":
        if not usd_hour:
            raise UserError("a budget in dollars needs a price per hour", "--budget", "--price=USD or --chip=NAME")
        return None, value / usd_hour * 3600
    scale = {"s": 1, "min": 60, "h": 3600}
    return (None, value * scale[found[2]]) if found[2] else (value, None)


def price(text: str) -> list[float] | None:
    """Parses "VALUE" or "LOW:VALUE:HIGH" into [low, value, high], in dollars per hour."""
    if not text:
        return None
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if len(parts) == 1:
        parts = parts * 3
    if len(parts) != 3 or not 0 <= parts[0] <= parts[1] <= parts[2]:
        raise UserError(f"{text!r} is not a price", "--price", "write USD per hour: 2 or LOW:VALUE:HIGH")
    return parts


def prices(machine: Json, given: list[float] | None, chip: str) -> list[Json]:
    """Returns the prices of the target machine and, if another chip is the target, of this machine. The target is the
    chip named by `chip` or, if that is empty, this machine."""
    here = {
        "name": machine["name"], "kind": "measured", "usd_hour": None if chip else given, "seconds_per_flop": None,
    }  # fmt: skip
    known = chips.find(machine["chip"] or "")
    if known and known.usd_hour and not here["usd_hour"]:
        here["usd_hour"] = _three(known.usd_hour)
    if not chip:
        return [here]
    if not (found := chips.find(chip)):
        raise UserError(f"no chip {chip!r}", "--chip", "a name in common/chips.json, such as v5e or h100")
    middle = (MFU[0] * MFU[1]) ** 0.5
    target = {
        "name": found.name, "kind": "planned", "usd_hour": given or (found.usd_hour and _three(found.usd_hour)),
        "seconds_per_flop": 1 / (found.tflops.value * 1e12 * middle),
    }  # fmt: skip
    return [target, here]


def _three(number: chips.Number) -> list[float]:
    return [number.low, number.value, number.high]


RATE = """
import time, jax, jax.numpy as jnp
x, product = jnp.ones((1024, 1024)), jax.jit(lambda x: (x @ x) / 1024)
product(x).block_until_ready()
start = time.perf_counter()
for _ in range(3):
    x = product(x)
x.block_until_ready()
print(3 * 2 * 1024**3 / (time.perf_counter() - start))
"""


def rate() -> float:
    """Measures the FLOP/s of float32 matrix products on the first device of this machine, in another process."""
    return float(subprocess.run([sys.executable, "-c", RATE], capture_output=True, text=True, check=True).stdout)


# --- --plan ---


def show(c: Comparison, found: Sequence[Candidate], rungs: list[Json], seeds: int, target: Json, every: bool) -> None:
    """Prints the estimated cost of the comparison as a range. At the low end, every method except the baseline is
    dropped after the first rung. If `every` is true, all settings are measured in all rungs instead."""
    flops, n = Prices(c, seeds), len(c.task.scored["test"])
    dollars = lambda x, rung, end: flops.dollars(x, rung["rows"])[end]
    lines, work, paid = [], [0.0, 0.0], [0.0, 0.0]
    for key in dict.fromkeys(x.key for x in found):
        mine = [x for x in found if x.key == key]
        mine_work = _bounds(
            mine, rungs, lambda x, rung, end: flops.rung(x, rung, None, end),
            lambda x, end: flops.test(x, bool(rungs), None, end), every,
        )  # fmt: skip
        mine_paid = _bounds(mine, rungs, dollars, lambda x, end: flops.dollars(x, n)[end], every)
        work, paid = [[a + b for a, b in zip(*pair, strict=True)] for pair in ((work, mine_work), (paid, mine_paid))]
        lines.append([mine[0].method.label, key[1], str(len(mine)), *_spans(mine_work, mine_paid, target)])
    lines.append(["all", "", str(len(found)), *_spans(work, paid, target)])
    heads = ("method", "model", "settings", "FLOPs", "seconds", "$", "kWh")
    cli.table(lines, heads, width=None if sys.stdout.isatty() else 160)
    sizes = ", ".join(f"{r['train']} to train and {r['rows']} to validate" for r in rungs) or "no rungs"
    print(f"rows per rung: {sizes}; test rows: {n}; seeds of the test: {seeds}")
    print(f"Seconds, $ and kWh are estimates for {target['name']}: {target['assumed']}.")


def _bounds(
    mine: Sequence[Candidate], rungs: list[Json], rung: Callable[[Candidate, Json, int], float],
    test: Callable[[Candidate, int], float], every: bool,
) -> list[float]:  # fmt: skip
    """Returns the [minimum, maximum] cost of a method. The minimum counts the settings that take part in the first
    rung. The maximum also counts the later rungs, each with the most expensive third of the previous rung's settings,
    and the most expensive test. If `every` is true, both count all settings in all rungs."""
    n, low, high = len(mine), 0.0, 0.0
    joined = max(joining(x, mine, len(rungs)) for x in mine)  # the rung from which on all settings take part
    for number in measured(mine[0], rungs):
        each = rungs[number]
        left = n if every else 1 if number < joined else math.ceil(n / ETA ** (number - joined))
        low += sum(rung(x, each, 0) for x in mine[:left]) if every or number == 0 else 0.0
        high += sum(sorted((rung(x, each, 1) for x in mine), reverse=True)[:left])
    if not rungs or every or mine[0].name == BASELINE:
        low += test(mine[0], 0)
    return [low, high + max(test(x, 1) for x in (mine if rungs else mine[:1]))]


def _shares(span: tuple[float, float]) -> str:
    return f"{100 * span[0]:.0f} to {100 * span[1]:.0f} %"


def _spans(work: Sequence[float], paid: Sequence[float], target: Json) -> list[str]:
    """Formats ranges of FLOPs, seconds, dollars and kWh. `work` is in FLOPs, and `paid` is the dollars for hosted
    models."""
    seconds = [flops * each for flops, each in zip(work, target["seconds_per_flop"], strict=True)]
    usd, watts = target["usd_hour"], target["watts"]
    hours = [s / 3600 for s in seconds]
    dollars = [h * u + p for h, u, p in zip(hours, (usd[0], usd[2]), paid, strict=True)] if usd else None
    dollars = paid if not any(work) and any(paid) else dollars
    energy = [h / 1000 * w for h, w in zip(hours, watts, strict=True)] if watts else None
    flops = " to ".join(dict.fromkeys(map(numbers.flops, work)))
    return [
        flops,
        numbers.span(seconds, ",.0f") if any(work) else numbers.NA,
        numbers.span(dollars, ".2g"),
        numbers.span(energy, ".2g"),
    ]


def planned(prices: list[Json]) -> Json:
    """Returns the target's price and power, and the assumed range of its seconds per FLOP."""
    target, chip = prices[0], chips.find(prices[0]["name"])
    if chip:
        peak = chip.tflops.value * 1e12
        span, assumed = [1 / (peak * share) for share in reversed(MFU)], f"an MFU of {_shares(MFU)}"
    else:
        product = rate()
        span = [1 / (product * share) for share in reversed(OF_PRODUCT)]
        assumed = f"{_shares(OF_PRODUCT)} of its speed in matrix products, measured as {product / 1e9:,.0f} GFLOP/s"
    watts = [chip.watts.low, chip.watts.high] if chip else None
    return {
        "name": target["name"],
        "usd_hour": target["usd_hour"],
        "seconds_per_flop": span,
        "assumed": assumed,
        "watts": watts,
    }
