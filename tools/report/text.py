"""Formats the numbers of the report, and writes sentences that summarize the results."""

import itertools
from typing import Any

from common.numbers import NA, joined, percent, signed, size
from evals import paired
from tools.report.data import Choice


def value(x: Any) -> str:
    return NA if x is None or x == "" else f"{x:,}" if isinstance(x, int) and not isinstance(x, bool) else str(x)


def result(c: Choice) -> str:
    """Formats a score with its interval: "31 % (23 to 41 %, n = 100)"."""
    low, high = c.result.get("low"), c.result.get("high")
    span = f"{percent(low).removesuffix(' %')} to {percent(high)}, " if low is not None and high is not None else ""
    return f"{percent(c.result['mean'])} ({span}n = {c.result['n']})"


def per_answer(c: Choice) -> float | None:
    """Returns the forward FLOPs per answer, as estimated by evals.run, or None if they are unknown."""
    total, n = c.result.get("flops"), c.result.get("n")
    return total / n if total is not None and n else None


def sentences(rows: list[Choice]) -> list[str]:
    """Returns sentences about the results of a task. They claim only statistically significant differences."""
    scores = joined([f"{c.label} gets {percent(_mean(c))}" for c in rows])
    out = [f"On {rows[0].task}, {scores} right."]
    prompted = [c for c in rows if not c.run.config]
    tuned = [c for c in rows if c.run.config]
    if prompted and tuned:
        out += _gain(max(prompted, key=_mean), max(tuned, key=_mean))
    out += _pairs(tuned)
    if prompted and tuned:
        out += _payback(max(prompted, key=_mean), min(tuned, key=lambda c: c.flops or 0))
    out += _forgot(tuned)
    return out


def _mean(c: Choice) -> float:
    return c.result["mean"]


def _differ(a: Choice, b: Choice) -> tuple[bool, str]:
    """Returns (whether two choices differ significantly, explanation). They are compared row by row if both results
    contain scores of the same rows, and otherwise by their confidence intervals."""
    if found := paired.pair(a.result, b.result):
        low, high = (f"{100 * x:+.0f}" for x in (found.low, found.high))
        return found.p < 0.05, f"row by row, 95 % interval {low} to {high} points, p = {found.p:.2g}, {found.test}"
    if None in (a.result.get("low"), b.result.get("low")):
        return False, "an interval is missing"
    apart = a.result["low"] > b.result["high"] or b.result["low"] > a.result["high"]
    return apart, "their intervals do not overlap" if apart else "their intervals overlap"


def _gain(prompt: Choice, tuned: Choice) -> list[str]:
    gain = 100 * (_mean(tuned) - _mean(prompt))
    shown, why = _differ(tuned, prompt)
    if not shown:
        return [f"{tuned.label} shows no significant gain over {prompt.label}: {why}."]
    word = "above" if gain > 0 else "below"
    return [f"The best tuning scores {abs(gain):.0f} percentage points {word} the best prompt ({why})."]


def _pairs(tuned: list[Choice]) -> list[str]:
    out = []
    for a, b in itertools.pairwise(tuned):
        shown, why = _differ(a, b)
        if not shown:
            out.append(f"On these examples {a.label} and {b.label} cannot be distinguished: {why}.")
        if a.store_bytes and b.store_bytes:
            small, large = sorted((a, b), key=lambda c: c.store_bytes)
            ratio = large.store_bytes / small.store_bytes
            kept = f"{size(small.store_bytes)} instead of {size(large.store_bytes)}"
            if ratio > 1.5:
                out.append(f"{small.label} stores {kept}, {ratio:.0f} times less.")
    return out


def _payback(prompt: Choice, tuned: Choice) -> list[str]:
    """Returns a sentence that says after how many answers the training has paid for itself. Returns [] unless the tuned
    model scores at least as high as the prompted model and its answers cost less."""
    more = (per_answer(prompt) or 0) - (per_answer(tuned) or 0)
    if not tuned.flops or more <= 0 or _mean(tuned) < _mean(prompt):
        return []
    each = joined([f"{_tokens(c)} with {c.label}" for c in (prompt, tuned)])
    answers = f"{tuned.flops / more:,.0f}"
    return [
        f"An answer takes {each}. In FLOPs, {tuned.label} has repaid its training after {answers} answers (estimate)."
    ]


def _tokens(c: Choice) -> str:
    return f"{c.result['prompt_tokens']:,.0f} + {c.result['completion_tokens']:,.0f} tokens"


def _forgot(tuned: list[Choice]) -> list[str]:
    known = [c for c in tuned if c.forgetting is not None]
    if not known:
        return []
    changes = [f"{signed(c.forgetting)}{'' if i else ' nats per token'} for {c.label}" for i, c in enumerate(known)]
    return [f"The loss on general text ({known[0].text}) changed by {joined(changes)}."]
