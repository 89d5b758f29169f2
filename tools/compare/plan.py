"""The price of a comparison before it runs: FLOPs from the equations, then time, money and energy as ranges."""

import dataclasses
import functools
import re
import sys
import time
from collections.abc import Sequence

from common import chips, cli, numbers
from common.errors import UserError
from common.types import Json
from tools.compare import inputs
from tools.compare.inputs import Comparison
from tools.compare.method import PASSAGE, Candidate

MFU = 0.2, 0.5  # of a chip's peak, assumed
OF_PRODUCT = 0.1, 0.6  # of this machine's rate of matrix products, assumed
ALL = "all"  # a budget with which every setting is measured to the end, as tools.compare.audit needs
ROOM = 32  # tokens that an answer may have at least: a model that does not stop writes them all


@dataclasses.dataclass(frozen=True)
class Prices:
    """FLOPs of candidates."""

    c: Comparison
    seeds: int

    def train(self, x: Candidate, rows: int) -> float:
        """Of training on a number of rows; 0 for a method that trains nothing."""
        if x.setting.train is None:
            return 0.0
        base, passages = self.c.bases[x.model], self._passages(x)
        changes = {**x.setting.train, "init": x.model, **inputs.shape(base.longest + passages, 0, 0), "optim.lr": 1e-3}
        layer, head = _per_token(tuple(sorted(changes.items())))
        return self.c.epochs * rows * ((base.prompt + passages + base.answer) * layer + base.answer * head)

    def ask(self, x: Candidate, rows: int, result: Json | None = None) -> tuple[float, float]:
        """(low, high) of asking a number of questions; from an earlier `result` if there is one."""
        if result:
            return (result["flops"] / result["n"] * rows,) * 2
        base = self.c.bases[x.model]
        shots = x.setting.ask.shots
        read = base.prompt + shots * (base.prompt + base.answer) + self._passages(x)
        options = max(1, len(self.c.task.scored["test"][0].get("options", ())))
        low, high = base.answer, max(ROOM, base.answer)
        return tuple(base.forward * rows * (options * read + written) for written in (low, high))

    def _passages(self, x: Candidate) -> int:
        return PASSAGE * x.setting.ask.k * bool(x.setting.ask.index)

    def rung(self, x: Candidate, rung: Json, result: Json | None = None) -> float:
        """At most, for one rung."""
        return self.train(x, rung["train"]) + self.ask(x, rung["rows"], result)[1]

    def test(self, x: Candidate, trained: int, result: Json | None = None) -> float:
        """At most, for the test with all seeds, of which `trained` have been trained."""
        scored = self.c.task.scored
        runs = self.seeds if x.trained else 1
        asked = self.ask(x, len(scored["test"]), result)[1]
        return (runs - min(trained, runs)) * self.train(x, len(scored["train"])) + runs * asked


@functools.cache
def _per_token(changes: tuple) -> tuple[float, float]:
    """Training FLOPs per token through the layers, and per target through the head."""
    from train import cost, plan

    cfg = inputs.config(dict(changes))
    found = cost.of_plan(plan.blueprint(cfg), cfg.data.seq_len)
    return found.layer_train_flops, found.head_train_flops


# --- budgets and prices ---


def budget(text: str, usd_hour: float | None) -> tuple[float | None, float | None]:
    """(FLOPs, seconds) of "1e15", "30min", "2h" or "2usd"; one of the two is None, or both if there is none."""
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
            raise UserError("a budget in money needs the price of an hour", "--budget", "--price=USD or --chip=NAME")
        return None, value / usd_hour * 3600
    scale = {"s": 1, "min": 60, "h": 3600}
    return (None, value * scale[found[2]]) if found[2] else (value, None)


def price(text: str) -> list[float] | None:
    """[low, value, high] dollars per hour of "VALUE" or "LOW:VALUE:HIGH"."""
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
    """The target first: the chip if one is named, else this machine."""
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


def rate() -> float:
    """FLOP/s of matrix products on the devices here, in float32."""
    import jax
    import jax.numpy as jnp

    n, times = 1024, 3
    x = jnp.ones((n, n), jnp.float32)
    product = jax.jit(lambda x: (x @ x) / n)
    product(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(times):
        x = product(x)
    x.block_until_ready()
    return times * 2 * n**3 / (time.perf_counter() - start)


# --- --plan ---


def show(c: Comparison, found: Sequence[Candidate], rungs: list[Json], seeds: int, target: Json) -> float:
    """Prints what the comparison costs at most, and at least if each rung keeps one setting; returns the maximum."""
    flops = Prices(c, seeds)
    rows, low, high = [], 0.0, 0.0
    for key in dict.fromkeys(x.key for x in found):
        mine = [x for x in found if x.key == key]
        each = [sum(flops.rung(x, rung) for rung in rungs) for x in mine]
        first = flops.rung(mine[0], rungs[0]) if rungs else 0.0
        test = flops.test(mine[0], bool(rungs))
        least, most = first + (test if key[0] == "zero_shot" or len(rungs) == 0 else 0.0), sum(each) + test
        low, high = low + least, high + most
        rows.append([mine[0].method.label, key[1], str(len(mine)), *_spans(least, most, target)])
    rows.append(["all", "", str(len(found)), *_spans(low, high, target)])
    heads = ("method", "model", "settings", "FLOPs", "seconds", "$", "kWh")
    cli.table(rows, heads, width=None if sys.stdout.isatty() else 160)
    sizes = ", ".join(f"{r['train']} to train and {r['rows']} to validate" for r in rungs) or "none"
    print(f"rows of the rungs: {sizes}; seeds of the test: {seeds}")
    print(f"Time, $ and kWh are estimates for {target['name']}: {target['assumed']}.")
    return high


def _shares(span: tuple[float, float]) -> str:
    return f"{100 * span[0]:.0f} to {100 * span[1]:.0f} %"


def _spans(low: float, high: float, target: Json) -> list[str]:
    fast, slow = target["seconds_per_flop"]
    seconds = low * fast, high * slow
    usd, watts = target["usd_hour"], target["watts"]
    dollars = (seconds[0] / 3600 * usd[0], seconds[1] / 3600 * usd[2]) if usd else None
    energy = (seconds[0] / 3.6e6 * watts[0], seconds[1] / 3.6e6 * watts[1]) if watts else None
    work = f"{numbers.flops(low)} to {numbers.flops(high)}"
    return [work, numbers.span(seconds, ",.0f"), numbers.span(dollars, ".2g"), numbers.span(energy, ".2g")]


def planned(prices: list[Json]) -> Json:
    """The target's seconds per FLOP as a range, and its power."""
    target, chip = prices[0], chips.find(prices[0]["name"])
    if chip:
        peak = chip.tflops.value * 1e12
        span, assumed = [1 / (peak * share) for share in reversed(MFU)], f"an MFU of {_shares(MFU)}"
    else:
        product = rate()
        span = [1 / (product * share) for share in reversed(OF_PRODUCT)]
        assumed = f"{_shares(OF_PRODUCT)} of its matrix products, measured at {product / 1e9:,.0f} GFLOP/s"
    watts = [chip.watts.low, chip.watts.high] if chip else None
    return {
        "name": target["name"],
        "usd_hour": target["usd_hour"],
        "seconds_per_flop": span,
        "assumed": assumed,
        "watts": watts,
    }
