"""Writes a decision in plain words: the method, the reasons, how sure it is, and what would change the decision."""

import math
from typing import NamedTuple

from common.numbers import NA, flops, integer, joined, percent, short
from common.types import Json
from tools.compare.decide import ENOUGH, LEAST, MOST_ROWS, Decision, Flip, Option, Price
from tools.compare.page_learning import Curve

# An article of May 2024, which this project is based on, says that LoRA trains 1.3 times as fast as full fine-tuning.
ARTICLE, TITLE = 1.3, "“Pre-training, Fine-tuning, and Kungfu!”"
UNITS = {"$": "dollars", "h": "machine hours", "FLOP": "FLOPs"}


class Answer(NamedTuple):
    """The texts on the first screen of the page."""

    title: str
    reasons: str  # two sentences
    sure: str
    changes: str
    wrong: str
    rule: str


def answer(d: Decision, record: Json) -> Answer:
    few = "Too close to decide" if d.rows_needed == MOST_ROWS else "Not enough test rows to decide"
    title = f"Use {d.best.label}" if d.enough else few
    if not d.enough and len(d.options) > 1:
        title += f": {d.best.label} or {d.options[1].label}"
    if not any(o.mean for o in d.options):
        title = "No method works"
    return Answer(title, _reasons(d, record), _sure(d), _changes(d), _wrong(d), _rule(d))


def money(price: Price, x: float) -> str:
    """Formats an amount in the unit of the price: "$0.43", "1.2 machine hours", "3 TFLOP"."""
    if not math.isfinite(x):
        return NA
    if price.unit == "$":
        return "$" + dollars(x)
    return f"{(number := short(x))} machine hour{'' if number == '1' else 's'}" if price.unit == "h" else flops(x)


def dollars(x: float) -> str:
    """Formats an amount of dollars: 1234 -> "1,234", 0.2 -> "0.20", 0.00031 -> "0.00031"."""
    if x >= 100 or not x:
        return f"{x:,.0f}"
    return f"{x:.{max(2, 1 - math.floor(math.log10(x)))}f}"


def chance(p: float) -> str:
    return "over 99 %" if p > 0.995 else "under 1 %" if p < 0.005 else f"{100 * p:.0f} %"


def points(x: float) -> str:
    number = f"{abs(100 * x):.1f}".removesuffix(".0")
    return f"{number} point{'' if number == '1' else 's'}"


def score(o: Option) -> str:
    right = {0.0, 1.0}.issuperset(o.scores.flat)
    return f"answers {percent(o.mean)} of the test questions right" if right else f"scores {percent(o.mean)}"


def named(o: Option) -> str:
    """Returns the label of an option as the subject of a sentence. If it contains a comma, another comma follows it."""
    return o.label + "," * ("," in o.label)


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _reasons(d: Decision, record: Json) -> str:
    if not any(o.mean for o in d.options):
        return "No tested method scores above 0 on any test question. Look at the answers below, and at the scorer."
    best, cost = d.best, d.cost[1]
    per_month = f"about {money(d.price, cost[0])} per month at {integer(d.given.requests)} requests"
    known = f" and costs {per_month}" if math.isfinite(cost[0]) else f"; its cost in {UNITS[d.price.unit]} is not known"
    if d.enough:
        return f"{sentence(named(best))} {score(best)}{known}. {_others(d)}"
    what = f"{d.rows} test rows do not show which method is best"
    if d.rows_needed == MOST_ROWS:
        first = f"{what}, and more rows would not help: the methods' scores or costs are too close."
    elif d.rows < LEAST and d.probability[0] >= ENOUGH:
        first = f"{what}: use at least {LEAST}."
    else:
        first = f"{what}: about {integer(d.rows_needed)} would be needed for a probability of {percent(ENOUGH)}."
    return f"{first} Until then {named(best)} is the first choice: it {score(best)}{known}."


def _others(d: Decision) -> str:
    """Writes a sentence that compares the chosen method with at most two others: the next best, the most accurate or
    the cheapest."""
    if len(d.options) == 1:
        return "No other method was tested."
    top = max(range(1, len(d.options)), key=lambda i: d.options[i].mean)
    cheapest = int(d.cost[1].argmin())
    picked: dict[int, None] = dict.fromkeys([1 if d.probability[1] >= 0.01 else top, top])
    if cheapest:
        picked[cheapest] = None
    return sentence("; ".join(_against(d, i) for i in list(picked)[:2])) + "."


def _against(d: Decision, i: int) -> str:
    """Writes a clause that compares another method's score and cost with those of the chosen method."""
    more, extra = d.options[i].mean - d.best.mean, _extra(d, i)
    scores = f"{points(more)} {'more' if more > 0 else 'less'}" if abs(more) >= 0.0005 else "the same"
    if extra is None:
        return f"{named(d.options[i])} scores {scores}, and their costs cannot be compared"
    costs = f"{money(d.price, abs(extra))} {'more' if extra > 0 else 'less'}" if extra else "the same"
    return f"{named(d.options[i])} scores {scores} {'but' if more * extra > 0 else 'and'} costs {costs}"


def _extra(d: Decision, i: int) -> float | None:
    """Returns how much more a method costs per month than the chosen one, or None unless both costs are known."""
    ours, theirs = d.cost[1][0], d.cost[1][i]
    return float(theirs - ours) if math.isfinite(ours) and math.isfinite(theirs) else None


def _sure(d: Decision) -> str:
    p, margin = d.probability, points(d.given.margin)
    drawn = "of 10,000 bootstrap samples of the test rows, the training seeds and the price"
    text = f"In {chance(p[0])} {drawn} it is the cheapest method within {margin} of the best score."
    if len(p) > 1:
        text += f" Next is {d.options[1].label}: {chance(p[1])}."
    if any(o.record["trained"] and len(o.scores) == 1 for o in d.options):
        text += " Each method was trained only once, so this figure leaves out how results vary between training runs."
    return text


def _changes(d: Decision) -> str:
    likely = [flip for flip in d.flips if flip.likelihood >= 0.01]
    if not likely:
        return "A change of a single input is unlikely to change it."
    first, *rest = [change(d, flip) for flip in likely]
    return f"Most likely: {first}." + (f" Less likely: {'; '.join(rest[:2])}." if rest else "")


def change(d: Decision, flip: Flip) -> str:
    """Describes a change of an input, how likely it is, and which method it makes the best."""
    then, now, likely = d.options[flip.to].label, getattr(d.given, flip.fact, 0.0), chance(flip.likelihood)
    if flip.fact == "rows" or flip.value is None:
        return f"other test rows or seeds ({likely}), then {then}"
    lower = flip.value < now
    facts = {
        "requests": f"{'fewer' if lower else 'more'} than {short(_round(flip.value))} requests per month",
        "price": f"a machine price {'below' if lower else 'above'} {short(flip.value / now)} times today's",
        "margin": f"a margin {'below' if lower else 'above'} {points(flip.value)}",
        "labels": f"labels that change {'more' if lower else 'less'} often than every {short(flip.value)} months",
        "documents": f"documents that change {'more' if lower else 'less'} often than every {short(flip.value)} months",
    }
    return f"{facts[flip.fact]} ({likely}), then {then}"


def _round(x: float) -> float:
    """Rounds to two significant digits."""
    return float(f"{x:.1e}")


def _wrong(d: Decision) -> str:
    share, lost, more = d.lost
    if not share:
        return "In none of the samples is another method better."
    parts = [f"{points(lost)} of the score"] if lost >= 0.0005 else []
    parts += [f"{money(d.price, more)} per month"] if 0 < more < math.inf else []
    known = f"loses {joined(parts)} on average" if parts else "loses nothing measurable"
    return f"In the {chance(share)} of samples in which another method is best, this one {known}."


def _rule(d: Decision) -> str:
    text = (
        f"The best method is the cheapest per month of those that score at most {points(d.given.margin)} below the top."
    )
    top = max(range(len(d.options)), key=lambda i: d.options[i].mean)
    extra, more = _extra(d, top), d.options[top].mean - d.best.mean
    if top and more > 0 and extra is not None:
        each = extra / (more * d.given.requests)
        worth = f"if one more right answer is worth {money(d.price, each)} or more"
        text += f" {sentence(named(d.options[top]))} would pay off {worth}."
    return text


def more_rows(curve: Curve | None, o: Option | None) -> str:
    if curve is None or o is None:
        return "The benefit of more training rows is unknown, because fewer than two numbers of rows were measured."
    now, span = curve.last, f"95 % interval {percent(curve.low)} to {percent(curve.high)}"
    text = f"On validation rows, {named(o)} scores {percent(now['mean'])} with {integer(now['rows'])} training rows"
    text += f" and may score {percent(curve.mean)} with {integer(curve.rows)} ({span}). This is an extrapolation from"
    return f"{text} {len(curve.points)} measured sizes. The interval assumes that its formula is right."


def speed(lora: float | None, full: float | None) -> str:
    """Says how much faster LoRA trained than full fine-tuning, next to the figure that the article gives."""
    if not lora or not full:
        return ""
    text = f"LoRA trained {lora / full:.2f} times as fast as full fine-tuning: {integer(lora)} against {integer(full)}"
    said = f"The article {TITLE} says about {ARTICLE} (7B parameters, 512 tokens, larger batches)."
    return f"{text} tokens/s, measured. {said}"
