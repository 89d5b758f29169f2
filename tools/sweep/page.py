"""Reads the results of a sweep from its run folders, and writes results.csv and a page without scripts."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import files, stats
from common.errors import UserError
from common.gas import Gas
from common.numbers import NA, flops, integer, joined, number, short, signed, size
from common.types import Json, Leaf
from tools.report import data, svg, text
from tools.report import page as report_page
from tools.report.page import Cell, Table
from tools.sweep import run as runs


class Result(NamedTuple):
    """The results in a point's folder. `value` is the last value of the metric. This value is final if `state` is
    "done"."""

    id: str
    values: dict[str, Leaf]
    state: str
    step: int
    value: float | None
    time: float  # when the last line of metrics.jsonl was written
    method: str  # see tools.report.data.method
    rank: int | None
    trained: int | None  # number of trained parameters
    forgetting: float | None  # rise of eval/text_nll since the start, in nats per token
    stored: int | None = None  # bytes of the trained parameters in a checkpoint
    peak: int | None = None  # peak host memory in bytes
    rate: float | None = None  # training tokens per second

    @property
    def kind(self) -> tuple[str, int | None, int | None]:
        return self.method, self.rank, self.trained

    @property
    def final(self) -> bool:
        return self.state == runs.DONE and self.value is not None

    @property
    def setting(self) -> Json:
        return {key: value for key, value in self.values.items() if key != "seed"}


class Group(NamedTuple):
    """Finished points that differ only in their seed. `low` and `high` are the ends of the 95 % confidence interval of
    the mean."""

    values: dict[str, Leaf]
    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        span = "" if self.low is None else f", 95 % interval {number(self.low)} to {number(self.high)}"
        return f"{number(self.mean)} (n = {self.n}{span})"


def results(out: Path, metric: str) -> list[Result]:
    found = []
    for path in out.glob("*/point.json"):
        folder, point = path.parent, files.read_json(path)
        lines, curve = runs.read(folder), runs.curve(folder, metric)
        step, time = (max((line[key] for line in lines), default=0) for key in ("step", "time"))
        config, known = files.read_json(folder / "config.json"), [y for _, y in runs.curve(folder, "eval/text_nll")]
        rank, trained = config.get("peft", {}).get("rank"), files.read_json(folder / "cost.json").get("trained")
        forgetting = known[-1] - known[0] if len(known) > 1 and None not in (known[0], known[-1]) else None
        state, value = runs.state(folder, config.get("steps", 0)), curve[-1][1] if curve else None
        size = data.method(config), rank, trained, forgetting, data.stored(folder)
        done = next((line for line in lines[::-1] if line.get("event") == "done"), {})
        price = done.get("peak_rss_bytes"), done.get("tokens_per_second")
        found.append((point["index"], Result(folder.name, point["values"], state, step, value, time, *size, *price)))
    return [result for _, result in sorted(found, key=lambda x: (x[0], x[1].id))]


def groups(rows: list[Result], maximize: bool) -> list[Group]:
    """Groups the finished points by setting (all values except the seed). The best setting comes first."""
    found: dict[str, list[Result]] = {}
    for r in rows:
        if r.final:
            found.setdefault(repr(r.setting), []).append(r)
    out = []
    for same in found.values():
        values = [r.value for r in same]
        low, high = stats.student(values) or (None, None)
        out.append(Group(same[0].setting, sum(values) / len(values), low, high, len(values)))
    return sorted(out, key=lambda g: -g.mean if maximize else g.mean)


def varying(rows: Sequence[Result | Group]) -> list[str]:
    keys = dict.fromkeys(key for r in rows for key in r.values)
    return [key for key in keys if len({repr(r.values.get(key)) for r in rows}) > 1]


def write(out: Path, metric: str, maximize: bool) -> Path:
    """Writes OUT/index.html, OUT/results.csv and a page for each point that has started. Raises UserError."""
    rows = results(out, metric)
    if not rows:
        raise UserError("the folder has no points", str(out), "give the --out folder of a sweep")
    if any(r.state == runs.DONE for r in rows) and not any(r.value is not None for r in rows):
        lines = [line for r in rows for line in runs.read(out / r.id) if line["kind"] in ("train", "eval")]
        known = sorted({f"{line['kind']}/{key}" for line in lines for key in line if isinstance(line[key], float)})
        raise UserError(f"no run has {metric!r}", "--metric", f"they have {', '.join(known)}")
    begun = [out / r.id for r in rows if runs.read(out / r.id)]
    used = dict(data.used([data.read(folder) for folder in begun]))
    with runs.alone(out):
        for folder in begun:
            page = folder / "report.html"
            if not page.exists() or page.stat().st_mtime < (folder / "metrics.jsonl").stat().st_mtime:
                report_page.write([folder], page)
        files.write(out / "results.csv", _csv(rows, metric, used))
        files.write(out / "index.html", _html(out.name, rows, metric, maximize, used))
    return out / "index.html"


def _csv(rows: list[Result], metric: str, used: dict[str, Gas]) -> str:
    keys, table = list(dict.fromkeys(key for r in rows for key in r.values)), io.StringIO()
    lines = [["point", "state", *keys, "step", metric, "flops", "chip_hours", "usd", "trained", "forgetting"]]
    lines[0] += ["stored_bytes", "peak_rss_bytes", "tokens_per_second"]
    for r in rows:
        g = used.get(r.id, Gas())
        price, size = (g.flops, g.hours, g.usd), (r.trained, r.forgetting, r.stored, r.peak, r.rate)
        lines.append([r.id, r.state, *map(r.values.get, keys), r.step, r.value, *price, *size])
    csv.writer(table, lineterminator="\n").writerows(lines)
    return table.getvalue()


def _html(name: str, rows: list[Result], metric: str, maximize: bool, used: dict[str, Gas]) -> str:
    ranked, states = groups(rows, maximize), [r.state for r in rows]
    pruned = [Group(r.setting, r.value, None, None, 1) for r in rows if r.state == runs.PRUNED and r.value is not None]
    counts = joined([f"{states.count(s)} {s}" for s in dict.fromkeys(states)])
    lead = sentences(ranked, varying(ranked + pruned), metric, maximize)
    return report_page.render(
        "sweep.html.j2",
        title=f"Sweep {name}",
        meta=f"{len(rows)} points: {counts}",
        paragraphs=[*lead, *map(str, list(used.values())[-1:])],  # the last entry is the sum over all points
        keys=parallel(ranked, pruned, metric) if ranked else "",
        methods=methods(rows, ranked, metric),
        sizes=sizes(rows, ranked, metric),
        best=_best(rows, metric, maximize) if ranked else "",
        points=_points(rows, ranked, metric, used),
    )


def sentences(ranked: list[Group], keys: list[str], metric: str, maximize: bool) -> list[str]:
    if not ranked:
        return [f"No point with a finite {metric} has finished yet."]
    best, *others = ranked
    name = lambda g: ", ".join(f"{key} {shown(g.values.get(key))}" for key in keys) or "the only setting"
    out = [f"The setting with the {'highest' if maximize else 'lowest'} {metric} is {name(best)}: {best}."]
    if others and best.n > 1 and others[0].n > 1:
        apart = best.low > others[0].high if maximize else best.high < others[0].low
        out.append(f"The next is {name(others[0])}: {others[0]}; the intervals {'do not ' if apart else ''}overlap.")
    elif others:
        out.append("Small differences between settings with one seed may be due to chance.")
    return out


def shown(value: Leaf) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "none" if value == "" else text.value(value)


def parallel(ranked: list[Group], pruned: list[Group], metric: str) -> str:
    """Draws a parallel coordinates chart with one axis per varying key and one for the metric. The best setting is
    highlighted."""
    keys, paths = varying(ranked + pruned), []
    for i, g in enumerate(ranked + pruned):
        look, opacity = ("line c0", 0.8 - 0.6 * i / len(ranked)) if i else ("line c1", 1.0)
        if i >= len(ranked):
            look, opacity = "line heldout c5", 0.5
        title = f"{', '.join(f'{k} {shown(v)}' for k, v in g.values.items())}: {g}"
        paths.append(svg.Path([*map(g.values.get, keys), g.mean], title, look, opacity))
    caption = "each line is a finished setting (mean over seeds); the best is highlighted"
    if pruned:
        caption += "; dashed: stopped early (last value)"
    return svg.parallel([*(key.rpartition(".")[2] for key in keys), metric], paths, caption, shown)


def of_each_kind(rows: list[Result], ranked: list[Group]) -> list[tuple[Group, list[Result]]]:
    """Returns (best setting, points with this setting) for each method and size, starting with the best result. The
    size of a method is its rank and its number of trained parameters."""
    best: dict[tuple, tuple[Group, list[Result]]] = {}
    for g in ranked:
        same = [r for r in rows if r.final and r.setting == g.values]
        best.setdefault(same[0].kind, (g, same))
    return list(best.values())


def average(points: list[Result], field: str) -> float | None:
    """Returns the mean of a field over points, or None if it is unknown for any of them."""
    values = [getattr(r, field) for r in points]
    return None if None in values else sum(values) / len(values)


def over_seeds(g: Group, strong: bool = False) -> Cell:
    """Makes a cell with the mean of a group. Below it are the number of seeds and the interval."""
    head, _, tail = str(g).partition(" (")
    return Cell(head, tail.rstrip(")").replace("95 % interval ", ""), strong)


def methods(rows: list[Result], ranked: list[Group], metric: str) -> Table:
    """Makes a table of the result and cost of each method and size, at its best setting. The table has no rows if all
    points have the same method and size."""
    best = of_each_kind(rows, ranked)
    keys = [key for key in varying([g for g, _ in best]) if key not in ("peft.name", "peft.rank")]
    heads = [("", ""), (metric, "mean over seeds"), ("forgetting", "nats per token"), ("trained", "parameters")]
    heads += [("stored", ""), ("peak memory", "of the host"), ("tokens/s", "of training")]
    heads += [(key, "best of those tried") for key in keys]
    table = []
    for g, same in best if len(best) > 1 else ():
        method, rank, trained = same[0].kind
        forgetting, stored, peak, rate = (average(same, field) for field in ("forgetting", "stored", "peak", "rate"))
        figures = signed(forgetting), integer(trained), size(stored), size(peak), integer(rate)
        cells = [over_seeds(g, strong=True), *map(Cell, figures), *(Cell(shown(g.values.get(key))) for key in keys)]
        table.append((data.label(method, rank), cells))
    return Table(heads, table)


def sizes(rows: list[Result], ranked: list[Group], metric: str) -> list[str]:
    """Draws the metric and the forgetting against the rank and against the number of trained parameters, if any method
    has several sizes.

    Each chart has one line per method, with one point per size: the mean over seeds at the best setting of this size.
    """
    best = [(same[0], g.mean, average(same, "forgetting")) for g, same in of_each_kind(rows, ranked)]
    charts = []
    for field, name in (("rank", "rank"), ("trained", "trained parameters")):
        known = [(getattr(r, field), r.method, *ys) for r, *ys in best if getattr(r, field)]
        if len({point[:2] for point in known}) == len({method for _, method, *_ in known}):
            continue  # each method has only one size, so there is nothing to plot
        for i, label in enumerate((metric, "forgetting, nats per token of general text")):
            points = sorted((x, method, ys[i]) for x, method, *ys in known if ys[i] is not None)
            methods = list(dict.fromkeys(method for _, method, _ in points))
            series = [(m, f"c{j} marked", [(x, y) for x, of, y in points if of == m]) for j, m in enumerate(methods)]
            charts += [svg.lines(series, name, label, zero=False, log_x=True)] if points else []
    return charts


def _best(rows: list[Result], metric: str, maximize: bool) -> str:
    """Draws the best final value so far against the optimizer steps spent so far, including those of pruned and failed
    points."""
    spent, each, best = 0, [], []
    for r in sorted((r for r in rows if r.state in runs.ENDED), key=lambda r: r.time):
        spent += r.step
        best += [(spent, best[-1][1])] if best else []
        if r.final:
            each.append((spent, r.value))
            best.append((spent, (max if maximize else min)([r.value] + [y for _, y in best[-1:]])))
    series = [("each finished point", "dots c0", each), ("best so far", "c1", best)]
    return svg.lines(series, "optimizer steps of all points", metric, zero=False)


def _points(rows: list[Result], ranked: list[Group], metric: str, used: dict[str, Gas]) -> Table:
    """Makes a table of all points. They are sorted from the best setting to the worst, and points without a final value
    come last."""
    keys, places = varying(rows), {repr(g.values): i for i, g in enumerate(ranked)}
    heads = [("point", ""), (metric, "last"), ("over seeds", "mean"), *((key, "") for key in keys), ("state", "")]
    heads += [("steps", ""), ("FLOPs", "of training"), ("chip-hours", "launch to end"), ("$", "on demand"), ("", "")]
    table = []
    for r in sorted(rows, key=lambda r: (not r.final, places.get(repr(r.setting), 0))):
        gas = used.get(r.id, Gas())
        cells = [Cell(number(r.value), strong=True)]
        cells.append(over_seeds(ranked[places[repr(r.setting)]]) if r.final else Cell(NA))
        cells += [Cell(shown(r.values.get(key))) for key in keys]
        cells += map(Cell, (r.state, f"{r.step:,}", flops(gas.flops), short(gas.hours), short(gas.usd)))
        cells.append(Cell("report", href=f"{r.id}/report.html") if r.step else Cell(""))
        table.append((r.id, cells))
    return Table(heads, table)
