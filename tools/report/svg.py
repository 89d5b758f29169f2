"""Draws charts as inline SVG without scripts. The charts take their colors from the page's CSS and fit on a phone."""

import itertools
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

from markupsafe import Markup

from common import numbers

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, SCATTER = 640, 300, 360  # SCATTER is the height of scatter plots
LEFT, RIGHT, TOP, BOTTOM = 68, 16, 14, 40
PERCENT = (0.0, 0.25, 0.5, 0.75, 1.0)


def lines(
    series: Sequence[tuple[str, str, Points]],
    x_label: str,
    y_label: str,
    zero: bool = True,
    log_x: bool = False,
    percent: bool = False,
    mark: float | None = None,
) -> Markup:
    """Draws a line chart of `series`, a list of (label, CSS class, points). The y axis is logarithmic if all y values
    are positive and their ratio exceeds 30.

    `zero`: whether a linear y axis includes 0. `log_x`: whether the x axis is logarithmic, which requires positive x
    values. `percent`: whether y values are fractions to show as percentages. `mark`: where to draw a vertical line.
    """
    points = [p for _, _, points in series for p in points]
    if not points:
        return Markup('<p class="na">n/a: no points yet</p>')
    ys = [y for _, y in points if y > 0] or [1.0]
    low = min(y for _, y in points)
    log = low > 0 and max(ys) / min(ys) > 30 and not percent
    y_ticks = (
        PERCENT
        if percent
        else decades(min(ys), max(ys))
        if log
        else ticks(min(low, 0.0) if zero else low, max(y for _, y in points))
    )
    x_ticks = (decades if log_x else ticks)(min(x for x, _ in points), max(x for x, _ in points))
    scale = math.log10 if log else float
    along = math.log10 if log_x else float
    x_of = linear(along(x_ticks[0]), along(x_ticks[-1]), LEFT, WIDTH - RIGHT)
    x_at = lambda x: x_of(along(x))
    y_of = linear(scale(y_ticks[0]), scale(y_ticks[-1]), HEIGHT - BOTTOM, TOP)
    y_at = lambda y: y_of(scale(y))
    out = [_y_grid(y, y_at(y), percent) for y in y_ticks] + [_x_tick(x, x_at(x)) for x in x_ticks]
    if mark is not None:
        out.append(f'<path class="mark" d="{mark_at([x for x, _ in points], mark)}"/>')
    for _, css, found in series:
        path = " ".join(f"{'L' if i else 'M'}{x_at(x):.1f} {y_at(y):.1f}" for i, (x, y) in enumerate(found))
        out.append(f'<path class="line {css}" d="{path}"/>')
        if any(kind in css for kind in ("heldout", "dots", "marked")):
            out += [f'<circle class="dot {css}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5"/>' for x, y in found]
    label = f"{y_label}{', logarithmic' if log else ''}"
    out.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>')
    title = f"{label} by {x_label}: {', '.join(name for name, _, _ in series)}"
    legend = "".join(f"<li>{_key(css)}{escape(name)}</li>" for name, css, _ in series if name)
    return _figure(label, title, HEIGHT, out, f'<ul class="legend">{legend}</ul>')


def _key(css: str) -> str:
    """Draws the short line that the legend shows next to the name of a series."""
    dot = f'<circle class="{css} dot" cx="14" cy="5" r="4"/>' if "dots" in css else ""
    return f'<svg class="key" viewBox="0 0 28 10" aria-hidden="true"><path class="{css} line" d="M0 5H28"/>{dot}</svg>'


def _figure(caption: str, label: str, height: int, parts: Sequence[str], legend: str = "") -> Markup:
    """Makes a figure of `parts`, the SVG elements of a chart. `label` describes the chart for screen readers."""
    drawing = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    return Markup(f"<figure><figcaption>{escape(caption)}</figcaption>{legend}{drawing}</figure>")


def mark_at(xs: Sequence[float], x: float) -> str:
    """Returns the SVG path of the vertical line that marks x in a chart made by `lines` with a logarithmic x axis. `xs`
    are the x values of all points in the chart."""
    at = [math.log10(t) for t in decades(min(xs), max(xs))]
    return f"M{linear(at[0], at[-1], LEFT, WIDTH - RIGHT)(math.log10(x)):.1f} {TOP}V{HEIGHT - BOTTOM}"


class Dot(NamedTuple):
    """A point in a scatter plot: x, y, and the interval (low, high) of each."""

    label: str
    x: float
    y: float
    xs: tuple[float, float]
    ys: tuple[float, float]
    css: str = ""


def scatter(dots: Sequence[Dot], x_label: str, y_label: str) -> Markup:
    """Draws labeled points with intervals over a logarithmic x axis. y values are between 0 and 1. A line connects the
    Pareto front: the points for which no other point has a larger y at the same or a smaller x."""
    x_ticks = decades(min(d.xs[0] for d in dots), max(d.xs[1] for d in dots))
    x_of = linear(math.log10(x_ticks[0]), math.log10(x_ticks[-1]), LEFT, WIDTH - RIGHT)
    x_at = lambda x: x_of(math.log10(x))
    y_at = linear(0, 1, SCATTER - BOTTOM, TOP)
    out = [_y_grid(y, y_at(y), True) for y in PERCENT]
    out += [_x_tick(x, x_at(x), SCATTER) for x in x_ticks]
    front = [d for d in sorted(dots, key=lambda d: d.x) if not any(o.x <= d.x and o.y > d.y for o in dots)]
    steps = " ".join(
        f"{'H' if i else 'M'}{x_at(d.x):.1f}{'V' if i else ' '}{y_at(d.y):.1f}" for i, d in enumerate(front)
    )
    out.append(f'<path class="front" d="{steps}"/>')
    for d in dots:
        x, y, (bottom, top) = x_at(d.x), y_at(d.y), (y_at(min(max(end, 0), 1)) for end in d.ys)
        ends = f"M{x_at(d.xs[0]):.1f} {y:.1f}H{x_at(d.xs[1]):.1f}M{x:.1f} {bottom:.1f}V{top:.1f}"
        out.append(f'<path class="span {d.css}" d="{ends}"/>')
        out.append(f'<circle class="dot {d.css}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
    out += _labels([(d.label, x_at(d.x), y_at(d.y)) for d in dots])
    out.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{SCATTER - 6}" text-anchor="end">{escape(x_label)}</text>')
    return _figure(y_label, f"{y_label} by {x_label}: " + ", ".join(f"{d.label} {d.y:.0%}" for d in dots), SCATTER, out)


def _labels(points: Sequence[tuple[str, float, float]]) -> list[str]:
    """Places a label beside each point, at the first position where it covers no point and no other label. The width of
    a label is computed for the largest font in the page's CSS, which is used on narrow screens."""
    out: list[str] = []
    taken = [(x - 6, x + 6, y) for _, x, y in points]
    for label, x, y in sorted(points, key=lambda p: p[2]):
        wide = 10.5 * len(label)
        sides = [(x + 9, "start"), (x - 9, "end")][:: 1 if x < WIDTH * 0.6 else -1]
        for down, (at, anchor) in itertools.product((-8, 24, -30, 46, -52, 68, -74, 90), sides):
            left = at if anchor == "start" else at - wide
            free = all(abs(y + down - 5 - other) > 20 or left > b or left + wide < a for a, b, other in taken)
            if free and left > 0 and left + wide < WIDTH and TOP < y + down < SCATTER - BOTTOM:
                break
        taken.append((left, left + wide, y + down - 5))
        text = f'x="{at:.1f}" y="{y + down:.1f}" text-anchor="{anchor}">{escape(label)}</text>'
        out.append(f'<text class="name halo" {text}')
    return out


def _y_grid(value: float, y: float, percent: bool = False) -> str:
    shown = f"{value:.0%}" if percent else _number(value)
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>'
    )


def _number(x: float) -> str:
    return numbers.scaled(x) if abs(x) >= 1e4 else f"{x:g}"


def _x_tick(value: float, x: float, height: int = HEIGHT) -> str:
    anchor = "end" if x > WIDTH - RIGHT - 1 else "middle"
    return f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="{anchor}">{_number(value)}</text>'


def bars(rows: Sequence[tuple[str, float, float | None, float | None]], label: str) -> Markup:
    """Draws one dot with its interval per row. Each row is (name, mean, low, high), with values between 0 and 1."""
    step, height = 56, 56 * len(rows) + 40
    x_at = linear(0.0, 1.0, 24, WIDTH - 24)
    out = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        x = x_at(value)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{height - 30}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{height - 12}" text-anchor="middle">{value:.0%}</text>')
    for i, (name, mean, low, high) in enumerate(rows):
        y = step * i + 40
        out.append(f'<text class="name" x="0" y="{y - 16}">{escape(name)}</text>')
        if low is not None and high is not None:
            a, b = x_at(max(low, 0)), x_at(min(high, 1))
            out.append(f'<line class="interval" x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}"/>')
        out.append(f'<circle class="mean" cx="{x_at(mean):.1f}" cy="{y}" r="6"/>')
    title = label + ": " + ", ".join(f"{name} {mean:.0%}" for name, mean, _, _ in rows)
    return _figure(label, title, height, out)


class Path(NamedTuple):
    """A line across the axes of a parallel coordinates chart."""

    values: Sequence[Any]  # one per axis
    title: str  # tooltip
    look: str  # CSS classes
    opacity: float


# Height and margins of a parallel coordinates chart. LAST is the margin on the right, for the labels of the last axis.
PARALLEL, ABOVE, BELOW, BESIDE, LAST = 340, 64, 24, 20, 96


def parallel(axes: Sequence[str], paths: Sequence[Path], caption: str, show: Callable[[Any], str]) -> Markup:
    """Draws a parallel coordinates chart with one axis per name in `axes`. The first path is drawn on top. `show`
    formats a value as a label."""
    out: list[str] = []
    points: list[list[str]] = [[] for _ in paths]
    for i, name in enumerate(axes):
        x = BESIDE + i * (WIDTH - BESIDE - LAST) / max(len(axes) - 1, 1)
        values = [path.values[i] for path in paths]
        y_at, labels = axis(values)
        anchor = "middle" if i else "start"
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{ABOVE}" y2="{PARALLEL - BELOW}"/>')
        out.append(f'<text class="name" x="{x:.1f}" y="{22 + i % 2 * 24}" text-anchor="{anchor}">{escape(name)}</text>')
        for v in labels:
            out.append(f'<text class="halo" x="{x + 7:.1f}" y="{y_at(v) + 5:.1f}">{escape(show(v))}</text>')
        for line, v in zip(points, values, strict=True):
            line.append(f"{x:.1f} {y_at(v):.1f}")
    drawn = []
    for line, p in zip(points, paths, strict=True):
        path = f'<path class="{p.look}" opacity="{p.opacity:.2f}" d="M{" L".join(line)}"/>'
        drawn.append(f"<g><title>{escape(p.title)}</title>{path}</g>")
    return _figure(caption, f"parallel coordinates of {', '.join(axes)}", PARALLEL, drawn[::-1] + out)


def axis(values: Sequence[Any]) -> tuple[Callable[[Any], float], list[Any]]:
    """Returns a function that maps a value to its y coordinate, and the list of values to label.

    Numbers are placed on a linear scale, or on a logarithmic one if all are positive and their ratio is ten or more.
    Other values are placed at equal distances, in the given order.
    """
    start, end = PARALLEL - BELOW, ABOVE
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        names = list(dict.fromkeys(map(repr, values)))
        place = linear(-0.5, len(names) - 0.5, start, end)
        return lambda v: place(names.index(repr(v))), list({repr(v): v for v in values}.values())
    low, high = min(values), max(values)
    log = math.log10 if low > 0 and high >= 10 * low else float
    place = linear(log(low), log(high), start, end)

    def y_at(v: float) -> float:
        return place(log(v))

    labels = [low, high] if high > low else [low]
    for v in dict.fromkeys(values):  # the best settings come first and get labels where there is room
        if all(abs(y_at(v) - y_at(other)) >= 26 for other in labels):
            labels.append(v)
    return y_at, labels


def linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda v: start + (v - low) / span * (end - start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round values that cover [low, high]: ticks(0, 9) -> [0, 2, 4, 6, 8, 10]."""
    if high <= low:
        high = low + 1
    rough = (high - low) / count
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Returns consecutive powers of ten that cover [low, high]."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0**e for e in range(first, max(last, first + 1) + 1)]
