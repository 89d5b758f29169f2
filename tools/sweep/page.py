"""What a sweep has brought, from its run folders alone: rows, results.csv and one page without scripts."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from common import files, stats
from common.errors import UserError
from common.gas import Gas
from common.numbers import NA, flops, integer, joined, number, short, signed, size
from tools.report import data, text
from tools.report import page as report_page
from tools.report import svg as report_svg
from tools.sweep import run as runs

HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 340, 64, 24, 20, 96  # of the parallel coordinates, with room for the last labels


class Result(NamedTuple):
    """A point as its folder has it. `value` is the metric's last one, final when the state is done."""

    id: str
    values: dict[str, Any]
    state: str
    step: int
    value: float | None
    time: float  # of the last line
    method: str  # of config.peft
    rank: int | None
    trained: int | None  # parameters
    forgetting: float | None  # nats a token: eval/text_nll at the end less that of the start
    stored: int | None = None  # bytes of the trained parameters in a checkpoint
    peak: int | None = None  # bytes of memory of the host
    rate: float | None = None  # tokens a second of training

    @property
    def kind(self) -> tuple[str, int | None, int | None]:
        return self.method, self.rank, self.trained

    @property
    def final(self) -> bool:
        return self.state == runs.DONE and self.value is not None

    @property
    def setting(self) -> dict[str, Any]:
        return {key: value for key, value in self.values.items() if key != "seed"}


class Group(NamedTuple):
    """Finished points that differ in nothing but their seed; [low, high] holds the mean with 95 % confidence."""

    values: dict[str, Any]
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
        peft, trained = config.get("peft", {}), files.read_json(folder / "cost.json").get("trained")
        forgetting = known[-1] - known[0] if len(known) > 1 and None not in (known[0], known[-1]) else None
        state, value = runs.state(folder, config.get("steps", 0)), curve[-1][1] if curve else None
        size = peft.get("name") or "full", peft.get("rank"), trained, forgetting, data.stored(folder)
        done = next((line for line in lines[::-1] if line.get("event") == "done"), {})
        price = done.get("peak_rss_bytes"), done.get("tokens_per_second")
        found.append((point["index"], Result(folder.name, point["values"], state, step, value, time, *size, *price)))
    return [result for _, result in sorted(found, key=lambda x: (x[0], x[1].id))]


def groups(rows: list[Result], maximize: bool) -> list[Group]:
    """The best first."""
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
    """Writes OUT/index.html, OUT/results.csv and a page for each point that has begun. Raises UserError."""
    rows = results(out, metric)
    if not rows:
        raise UserError("holds no points", str(out), "name the --out of a sweep")
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
    told = joined([f"{states.count(s)} {s}" for s in dict.fromkeys(states)])
    parts = [f'<header><h1>Sweep {escape(name)}</h1><p class="meta">{len(rows)} points: {told}</p></header>']
    lead = [
        *sentences(ranked, varying(ranked + pruned), metric, maximize),
        *(str(g) for g in list(used.values())[-1:]),
    ]  # the last is the sum
    parts += ['<div class="lead">', *(f"<p>{escape(s)}</p>" for s in lead), "</div>"]
    if ranked:
        parts += ["<h2>What the keys do</h2>", parallel(ranked, pruned, metric)]
        parts += methods(rows, ranked, metric)
        parts += sizes(rows, ranked, metric)
        parts += ["<h2>Best so far</h2>", _best(rows, metric, maximize)]
    parts += ["<h2>Points</h2>", _table(rows, ranked, metric, used)]
    return report_page.document(f"Sweep {name}", "\n".join(parts))


def sentences(ranked: list[Group], keys: list[str], metric: str, maximize: bool) -> list[str]:
    if not ranked:
        return [f"No point is done with a finite {metric} yet."]
    best, *others = ranked
    name = lambda g: ", ".join(f"{key} {shown(g.values.get(key))}" for key in keys) or "the only setting"
    out = [f"The {'highest' if maximize else 'lowest'} {metric} has {name(best)}: {best}."]
    if others and best.n > 1 and others[0].n > 1:
        apart = best.low > others[0].high if maximize else best.high < others[0].low
        out.append(f"The next is {name(others[0])}: {others[0]}; the intervals {'lie apart' if apart else 'overlap'}.")
    elif others:
        out.append("Where a setting has one seed, a small difference may be chance.")
    return out


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "none" if value == "" else text.value(value)


def parallel(ranked: list[Group], pruned: list[Group], metric: str) -> str:
    """Parallel coordinates: an axis for each key that varies, the last for the metric; the best one stands out."""
    settings = ranked + pruned
    keys, out, lines = [*varying(settings), metric], [], [[] for _ in settings]
    for i, key in enumerate(keys):
        x = LEFT + i * (report_svg.WIDTH - LEFT - RIGHT) / max(len(keys) - 1, 1)
        values = [g.mean if key == metric else g.values.get(key) for g in settings]
        y_at, labels = axis(values)
        anchor, name = "middle" if i else "start", key if key == metric else key.rpartition(".")[2]
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(f'<text class="name" x="{x:.1f}" y="{22 + i % 2 * 24}" text-anchor="{anchor}">{escape(name)}</text>')
        for v in labels:
            out.append(f'<text class="halo" x="{x + 7:.1f}" y="{y_at(v) + 5:.1f}">{escape(shown(v))}</text>')
        for line, v in zip(lines, values, strict=True):
            line.append(f"{x:.1f} {y_at(v):.1f}")
    drawn = []
    for i, (line, g) in enumerate(zip(lines, settings, strict=True)):
        look = f'class="line c0" opacity="{0.8 - 0.6 * i / len(ranked):.2f}"' if i else 'class="line c1"'
        look = look if i < len(ranked) else 'class="line heldout c5" opacity="0.5"'
        title = escape(f"{', '.join(f'{k} {shown(v)}' for k, v in g.values.items())}: {g}")
        drawn.append(f'<g><title>{title}</title><path {look} d="M{" L".join(line)}"/></g>')
    caption = "a line for each setting that is done, its mean over seeds; the best in the other colour"
    caption += "; dashed: stopped early, with the last value" * bool(pruned)
    label = escape(f"parallel coordinates of {joined(keys)}")
    svg = f'<svg viewBox="0 0 {report_svg.WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return f"<figure><figcaption>{caption}</figcaption>{svg}{''.join(drawn[::-1] + out)}</svg></figure>"


def axis(values: list[Any]) -> tuple[Callable[[Any], float], list[Any]]:
    """A function from a value to its y, and the values to label.

    Numbers have their scale, logarithmic where they span ten times or more; others stand in the order they come.
    """
    start, end = HEIGHT - BOTTOM, TOP
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        names = list(dict.fromkeys(map(repr, values)))
        place = report_svg.linear(-0.5, len(names) - 0.5, start, end)
        return lambda v: place(names.index(repr(v))), list({repr(v): v for v in values}.values())
    low, high = min(values), max(values)
    log = math.log10 if low > 0 and high >= 10 * low else float
    place = report_svg.linear(log(low), log(high), start, end)
    y_at = lambda v: place(log(v))
    labels = [low, high] if high > low else [low]
    for v in sorted(set(values), key=values.index):  # the best settings first, where there is room
        if all(abs(y_at(v) - y_at(other)) >= 26 for other in labels):
            labels.append(v)
    return y_at, labels


def of_each_kind(rows: list[Result], ranked: list[Group]) -> list[tuple[Group, list[Result]]]:
    """The best setting of each method and size, the best first, with its points."""
    best: dict[tuple, tuple[Group, list[Result]]] = {}
    for g in ranked:
        same = [r for r in rows if r.final and r.setting == g.values]
        best.setdefault(same[0].kind, (g, same))
    return list(best.values())


def average(points: list[Result], field: str) -> float | None:
    """None unless all of them have it."""
    values = [getattr(r, field) for r in points]
    return None if None in values else sum(values) / len(values)


def over_seeds(g: Group | str) -> tuple[str, str]:
    """The mean of a group, and what stands below it: how many, and the interval."""
    head, _, tail = str(g).partition(" (")
    return head, tail.rstrip(")").replace("95 % interval ", "")


def methods(rows: list[Result], ranked: list[Group], metric: str) -> list[str]:
    """A row for each method and size at its best setting, where there are several: what it brings and what it takes."""
    best = of_each_kind(rows, ranked)
    if len(best) < 2:
        return []
    keys = [key for key in varying([g for g, _ in best]) if key not in ("peft.name", "peft.rank")]
    heads = [("", ""), (metric, "mean over seeds"), ("forgetting", "nats a token"), ("trained", "parameters")]
    heads += [("stored", ""), ("peak memory", "of the host"), ("tokens/s", "of training")]
    heads += [(key, "the best of those tried") for key in keys]
    table = []
    for g, same in best:
        method, rank, trained = same[0].kind
        head, below = over_seeds(g)
        mean = lambda field, same=same: average(same, field)
        cells = [(f"<b>{head}</b>", below), (signed(mean("forgetting")), "")]
        cells += [(integer(trained), ""), (size(mean("stored")), ""), (size(mean("peak")), "")]
        cells += [(integer(mean("rate")), ""), *((escape(shown(g.values.get(key))), "") for key in keys)]
        table.append((data.label(method, rank), cells))
    return ["<h2>Methods</h2>", report_page.table(heads, table)]


def sizes(rows: list[Result], ranked: list[Group], metric: str) -> list[str]:
    """Charts of the metric and of forgetting by rank and by trained parameters, where settings differ in these.

    A line for each method; of settings of one size it has the best one's means over seeds.
    """
    best = [(same[0], g.mean, average(same, "forgetting")) for g, same in of_each_kind(rows, ranked)]
    charts = []
    for field, name in (("rank", "rank"), ("trained", "trained parameters")):
        known = [(getattr(r, field), r.method, *ys) for r, *ys in best if getattr(r, field)]
        if len({point[:2] for point in known}) == len({method for _, method, *_ in known}):
            continue  # one size a method
        for i, label in enumerate((metric, "forgetting, nats a token of general text")):
            points = sorted((x, method, ys[i]) for x, method, *ys in known if ys[i] is not None)
            methods = list(dict.fromkeys(method for _, method, _ in points))
            series = [(m, f"c{j} marked", [(x, y) for x, of, y in points if of == m]) for j, m in enumerate(methods)]
            charts += [report_svg.lines(series, name, label, zero=False, log_x=True)] if points else []
    return ["<h2>What size buys</h2>", *charts] if charts else []


def _best(rows: list[Result], metric: str, maximize: bool) -> str:
    """The best final value by the steps spent until then, those of pruned and failed points counted."""
    spent, each, best = 0, [], []
    for r in sorted((r for r in rows if r.state in runs.ENDED), key=lambda r: r.time):
        spent += r.step
        best += [(spent, best[-1][1])] if best else []
        if r.final:
            each.append((spent, r.value))
            best.append((spent, (max if maximize else min)([r.value] + [y for _, y in best[-1:]])))
    series = [("each point when it was done", "dots c0", each), ("the best so far", "c1", best)]
    return report_svg.lines(series, "optimizer steps of all points", metric, zero=False)


def _table(rows: list[Result], ranked: list[Group], metric: str, used: dict[str, Gas]) -> str:
    """The best setting first, its seeds together; then the points that have no final value."""
    keys, places = varying(rows), {repr(g.values): i for i, g in enumerate(ranked)}
    heads = [("point", ""), (metric, "last"), ("over seeds", "mean"), *((key, "") for key in keys), ("state", "")]
    heads += [("steps", ""), ("FLOPs", "of training"), ("chip-hours", "launch to end"), ("$", "on demand"), ("", "")]
    table = []
    for r in sorted(rows, key=lambda r: (not r.final, places.get(repr(r.setting), 0))):
        cells = [(f"<b>{number(r.value)}</b>", ""), over_seeds(ranked[places[repr(r.setting)]] if r.final else NA)]
        cells += [*((escape(shown(r.values.get(key))), "") for key in keys), (r.state, ""), (f"{r.step:,}", "")]
        g = used.get(r.id, Gas())
        cells += [(flops(g.flops), ""), (short(g.hours), ""), (short(g.usd), "")]
        cells.append((f'<a href="{r.id}/report.html">report</a>' if r.step else "", ""))
        table.append((r.id, cells))
    return report_page.table(heads, table)
