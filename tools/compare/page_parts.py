"""Makes the tables and charts for the page of a decision."""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from markupsafe import Markup

from common import gas
from common.numbers import NA, flops, integer, number, percent, scaled, seconds, signed, size
from common.types import Json
from tools.compare import decide, page_text
from tools.compare.decide import Decision, Option
from tools.compare.page_learning import Curve
from tools.compare.page_text import chance, dollars, money, sentence
from tools.report import data, svg
from tools.report import page as report
from tools.report.page import Cell, Table

DASHES = 6  # number of line styles in page.css
GIVEN = {
    "requests": ("requests per month", "--requests"),
    "margin": ("how much lower a method may score than the best and still be chosen for its cost", "--margin"),
    "labels": ("months between changes of the labels, after which training is repeated", "--labels"),
    "documents": ("months between changes of the documents, after which they are indexed again", "--documents"),
    "people": ("cost of people's work per training run", "--people"),
    "idle": ("hours per month in which the machine is paid for but idle", "--idle"),
}


def anchor(o: Option) -> str:
    return "run-" + report.slug(o.name)


def link(o: Option) -> Markup:
    return Markup('<a href="#{}">{}</a>').format(anchor(o), o.label)


def each(price: decide.Price, o: Option) -> float:
    """Returns the cost per request at the expected price."""
    each = o.request[0] * price.per_flop[1] + o.request[1]
    return math.inf if math.isnan(each) or (o.request[1] and price.unit != "$") else each


def main_table(d: Decision, record: Json) -> Table:
    """Makes the table of quality and cost. Every number links to the runs of its method."""
    kind = f"{record['prices'][0]['kind']}, {record['prices'][0]['name']}"
    heads = [("", ""), ("score", "measured, 95 % interval"), ("chance", "of being best"), ("cost per month", kind)]
    heads += [("per 1,000 requests", ""), ("training", "FLOPs, measured"), ("training", "cost, once")]
    rows = []
    for o, p, (low, value, high) in zip(d.options, d.probability, d.cost.T, strict=True):
        result = over_seeds(o)
        spread = f"{money(d.price, low)} to {money(d.price, high)}" if low < high < math.inf else ""
        once = o.training[0] * d.price.per_flop[1] + o.training[1]
        cells = [
            report.score(result),
            Cell(chance(p)),
            Cell(money(d.price, value), spread),
            Cell(money(d.price, 1000 * each(d.price, o))),
            Cell(flops(None if math.isnan(o.training[0]) else o.training[0])),
            Cell(money(d.price, once)),
        ]
        rows.append((link(o), [c._replace(href=f"#{anchor(o)}") for c in cells]))
    return Table(heads, rows, "compare")


def over_seeds(o: Option) -> Json:
    """Returns the mean score and its 95 % confidence interval. The interval covers the random choice of test rows and,
    if there are several seeds, the differences between seeds."""
    first = o.record["tests"][0]["result"]
    span = first["low"], first["high"]
    if len(o.scores) > 1:
        span = np.quantile(decide.drawn_scores([o])[:, 0], [0.025, 0.975]).tolist()
    return {"mean": o.mean, "n": o.scores.shape[1], "low": span[0], "high": span[1]}


def more_table(d: Decision, record: Json) -> Table:
    machine = record["machine"]["name"]
    heads = [("", ""), ("tokens", "per request: prompt + answer"), ("latency", f"p50, p95; measured, {machine}")]
    heads += [("peak memory", "of training, measured"), ("to store", "bytes"), ("forgetting", "nats per token")]
    heads += [("data leaves", "this machine")]
    rows = []
    for o in d.options:
        asked, late = o.record["request"], o.record["request"]["latency"]
        worst = lambda key, o=o: max((t[key] or 0 for t in o.record["tests"]), default=0) or None
        cells = [
            Cell(f"{integer(asked['prompt_tokens'])} + {integer(asked['completion_tokens'])}"),
            Cell(f"{seconds(late['p50'])}, {seconds(late['p95'])}", f"n = {late['n']}") if late else Cell(NA),
            Cell(size(worst("peak_bytes")) if o.record["trained"] else "none"),
            Cell(size(worst("store_bytes") or 0)),
            Cell(signed(o.record["forgetting"])),
            Cell("yes" if o.record["leaves"] else "no"),
        ]
        rows.append((link(o), [c._replace(href=f"#{anchor(o)}") for c in cells]))
    return Table(heads, rows, "compare")


def front(d: Decision) -> Markup:
    dots = []
    for i, o in enumerate(d.options):
        low, value, high = d.cost[:, i]
        if 0 < value < math.inf:
            shown = over_seeds(o)
            dots.append(svg.Dot(o.label, value, o.mean, (low, high), (shown["low"], shown["high"]), f"c{i % 8}"))
    if not dots:
        return Markup('<p class="na">n/a: no costs are known</p>')
    return svg.scatter(dots, f"cost per month, {page_text.UNITS[d.price.unit]}", "score")


def front_note(d: Decision) -> str:
    missing = [o.label for o, x in zip(d.options, d.cost[1], strict=True) if not 0 < x < math.inf]
    text = f"At {integer(d.given.requests)} requests per month. For a method on the line, no other one is both better"
    text += " and cheaper. Bars show the 95 % intervals of the scores, and the costs at the lowest and highest price."
    return text + (f" Without a known cost: {', '.join(missing)}." if missing else "")


# --- requests per month ---


def chances(d: Decision, requests: float, probability: np.ndarray) -> list[Json]:
    fixed = d.given._replace(requests=requests)
    costs = decide.cost(d.options, d.price, fixed, [[d.price.per_flop[1]]], d.has_documents)[0]
    return [
        {
            "label": o.label,
            "score": percent(o.mean),
            "width": round(50 * float(p), 1),
            "chance": chance(p),
            "cost": money(d.price, x),
        }
        for o, p, x in zip(d.options, probability, costs, strict=True)
    ]


def live(d: Decision, path: list[str]) -> Json:
    """Returns the texts that the page shows at each position of the slider."""
    shown = [integer(float(f"{n:.1e}")) for n in d.grid]
    rows = [chances(d, n, p) for n, p in zip(d.grid, d.curve, strict=True)]
    return {
        "at": int(np.argmin(abs(d.grid - d.given.requests))),
        "points": [
            {"n": n, "mark": mark, "methods": [(m["width"], m["chance"], m["cost"]) for m in row]}
            for n, mark, row in zip(shown, path, rows, strict=True)
        ],
    }


def curve(d: Decision) -> tuple[Markup, list[str]]:
    """Returns (chart, marks). The chart shows each method's probability of being the best as a function of the requests
    per month. There is one mark for each position of the slider, to be drawn in the chart."""
    series = [
        (o.label, f"c{i % 8} dash{i % DASHES}", list(zip(d.grid, d.curve[:, i], strict=True)))
        for i, o in enumerate(d.options)
        if d.curve[:, i].max() >= 0.01
    ]
    drawn = svg.lines(series, "requests per month", "chance of being best", True, True, True, d.given.requests)
    return drawn, [svg.mark_at(d.grid.tolist(), n) for n in d.grid]


def break_even(d: Decision) -> Iterator[str]:
    """Yields one sentence for each method other than the chosen one, which says at what numbers of requests per month
    the chosen method is cheaper than it."""
    none = d.given._replace(requests=0.0)
    fixed = decide.cost(d.options, d.price, none, [[d.price.per_flop[1]]], d.has_documents)[0]
    lines = [(x, each(d.price, o)) for x, o in zip(fixed, d.options, strict=True)]
    mine, *others = lines
    for o, other in zip(d.options[1:], others, strict=True):
        if not all(map(math.isfinite, (*mine, *other))):
            continue
        n, which = decide.break_even(mine, other)
        at = "" if n is None else f"{integer(float(f'{n:.1e}'))} requests per month"
        yield {
            "a": f"{d.best.label} is cheaper than {o.label} at any number of requests.",
            "b": f"{o.label} is cheaper than {d.best.label} at any number of requests.",
            "a then b": f"{d.best.label} is cheaper than {o.label} up to {at}.",
            "b then a": f"{d.best.label} is cheaper than {o.label} from {at}.",
            "equal": f"{d.best.label} and {o.label} cost the same.",
        }[which]


def points(o: Option, record: Json) -> list[Json]:
    """Returns the scores of a method at several numbers of training rows."""
    return [p for p in record["learning"] if (p["method"], p["model"]) == (o.record["name"], o.record["model"])]


def learning(curve: Curve | None) -> Markup | str:
    if not curve:
        return ""
    mean, low, high = (
        [*((p["rows"], p[key]) for p in curve.points), (curve.rows, getattr(curve, key))]
        for key in ("mean", "low", "high")
    )
    series = [("measured", "c0 marked", mean[:-1]), ("extrapolated", "c0 dash1", mean[-2:])]
    series += [("95 % interval", "c5 dash2", low), ("", "c5 dash2", high)]
    return svg.lines(series, "training rows", "score", log_x=True, percent=True)


# --- sources of the figures ---


def speed(d: Decision, out: Path, name: str) -> float | None:
    """Returns the tokens per second of a method's first training, read from its run folder."""
    tests = [t for o in d.options if o.record["name"] == name for t in o.record["tests"]]
    folder = out / tests[0]["run"] if tests and tests[0]["run"] else None
    known = folder is not None and (folder / "metrics.jsonl").exists()
    return data.read(folder).done.get("tokens_per_second") if known else None


def dropped(record: Json) -> list[tuple[str, str]]:
    return [(m["label"], f"{m['status']}; {m['why']}") for m in record["methods"] if m["status"] != "tested"]


def priced(d: Decision, record: Json) -> str:
    first = record["prices"][0]
    if not any(d.price.per_flop):
        return "Costs are the given prices of the hosted models."
    if d.price.unit == "$":
        usd = dollars(first["usd_hour"][1])
        return f"Costs ({first['kind']}) are for {first['name']} at ${usd} per hour, from the FLOPs of each request."
    what = page_text.UNITS[d.price.unit]
    fix = "for dollars, run tools.compare with --price=LOW:VALUE:HIGH, in dollars per hour"
    return f"The price of {first['name']} is not known, so costs are in {what}; {fix}."


def prices(d: Decision, record: Json) -> Table:
    """Makes a table that shows which method would be the best on other machines, with the same scores."""
    heads = [("", ""), ("", "figures are"), ("price", "$ per hour"), ("speed", "FLOP/s in use"), ("best there", "")]
    heads += [("cost per month", "of that method")]
    rows = []
    for entry in record["prices"]:
        price = decide.price_of(entry)
        i = decide.elsewhere(d, price)
        value = decide.cost(d.options, price, d.given, [[price.per_flop[1]]], d.has_documents)[0][i]
        usd = entry["usd_hour"]
        cells = [entry["kind"], NA if usd is None else " to ".join(dict.fromkeys(map(dollars, (usd[0], usd[2]))))]
        rate = None if entry["seconds_per_flop"] is None else 1 / entry["seconds_per_flop"]
        cells += [scaled(rate, "FLOP/s"), d.options[i].label, money(price, value)]
        rows.append((entry["name"], [Cell(c) for c in cells]))
    return Table(heads, rows, "left")


def given(d: Decision) -> Table:
    rows = []
    for name, (text, option) in GIVEN.items():
        x = getattr(d.given, name)
        shown = page_text.points(x) if name == "margin" else f"${dollars(x)}" if name == "people" else number(x)
        rows.append((text, [Cell("not counted" if x == 0 and name != "margin" else shown), Cell(option)]))
    return Table([("", ""), ("given", ""), ("to change it", "kungfu decide OUT ...")], rows, "left")


def spent(record: Json) -> list[str]:
    """Returns lines about the resources that the comparison used in total, and about the FLOPs of each method."""
    spent, machine, budget = record["spent"], record["machine"], record["budget"]
    line = {"kind": "event", "flops": spent["flops"], "seconds": {"step": spent["seconds"]}}
    devices = {"kind": machine["chip"] or machine["name"], "count": machine["devices"], "processes": 1}
    left = record["unspent"]["flops"]
    lines = [str(gas.line([line], {"devices": devices}))]
    if budget["flops"] is not None:
        lines.append(f"Of the budget of {budget['asked']} or {flops(budget['flops'])}, {flops(left)} were not spent.")
    each = [f"{m['label']} {flops(m['spent']['flops'])}" for m in record["methods"] if m["spent"]["flops"]]
    return [*lines, "By method: " + ", ".join(each) + "."]


def decided(record: Json) -> Iterator[str]:
    labels = {c["id"]: c["label"] for c in record["candidates"]}
    for rung in record["decisions"]:
        kept = "; ".join(labels.get(name, name) for name in rung["kept"])
        yield f"On {rung['rows']} validation rows, with {percent(rung['share'])} of the training rows: kept {kept}."
        for drop in rung["dropped"]:
            yield f"Stopped: {labels.get(drop['candidate'], drop['candidate'])}, {drop['why']}."
    task = record["task"]
    train, test = (integer(task["rows"][split]) for split in ("train", "test"))
    yield f"The {test} test rows were used once, after all choices were made; {train} rows were used for training."
    yield from (sentence(note) + "." for note in (*task["notes"], *task["duplicates"]))


def runs(o: Option, record: Json) -> Json:
    """Returns the chosen setting of a method, and the folders and commands of its tests."""
    tests = o.record["tests"]
    return {
        "id": anchor(o),
        "label": o.label,
        "how": o.record["how"],
        "setting": next((c["label"] for c in record["candidates"] if c["id"] == o.record["candidate"]), ""),
        "folders": list(dict.fromkeys(t["run"] for t in tests if t["run"])),
        "commands": ["python -m " + shlex.join(argv) for t in tests for argv in t["commands"]],
    }
