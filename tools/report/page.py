"""Renders the report page from the rows of tools.report.data. Unknown numbers are shown as n/a."""

import datetime
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from common import files, gas, paths
from common.errors import UserError
from common.numbers import NA, flops, integer, percent, scaled, seconds, short, signed, size
from common.types import Json
from tools.report import data, svg, text
from tools.report.data import Choice, Run

SAMPLES, SLICES = 6, 8  # maximum numbers of examples and of slices that the page shows
TITLE = "Results and cost"


class Cell(NamedTuple):
    value: str
    below: str = ""  # a second line in small print
    strong: bool = False
    href: str = ""
    columns: int = 1


class Table(NamedTuple):
    heads: Sequence[tuple[str, str]]  # (heading, small print below it)
    rows: Sequence[tuple[str, Sequence[Cell]]]  # (label, cells)
    look: str = ""  # CSS classes; "left" aligns text to the left


CHOICE_HEADS = [
    ("", ""), ("score", "95 % interval"), ("training", "FLOPs"), ("training", "seconds"),
    ("peak memory", "of training"), ("to store", "bytes"), ("prompt", "tokens"), ("per answer", "FLOPs, estimate"),
    ("forgetting", "Δ nats per token"),
]  # fmt: skip
RUN_HEADS = [
    ("", ""), ("method", ""), ("parameters", "trained of all"), ("steps", "optimizer"), ("tokens", "read, in the loss"),
    ("speed", "tokens/s"), ("FLOPs", "of training"), ("time", "compile + steps"), ("peak memory", ""),
    ("held-out loss", "nats per token, bits per byte"),
]  # fmt: skip


def render(template: str, **values: Any) -> str:
    """Renders a template as a self-contained page without external resources. All values except Markup are escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    pages.filters |= {"clip": clip, "slug": slug}
    return pages.get_template(template).render(values)


def clip(s: str, n: int = 240) -> str:
    s = s.strip()
    return (s if len(s) <= n else s[: n - 1] + "…") or Markup('<span class="na">(empty)</span>')


def slug(title: str) -> str:
    """Makes the id of a section from its title: "Where the configs differ" -> "where-the-configs-differ"."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def write(folders: list[str | Path], out: Path) -> Path:
    """Writes the Markdown summary, then the page at `out`. Each file is written atomically, so it is never incomplete.

    Raises UserError.
    """
    if not folders:
        raise UserError("no run folders are given", "tools.report", "for example, python -m tools.report runs/a runs/b")
    with tempfile.TemporaryDirectory() as scratch:
        runs = [data.read(local(folder, scratch)) for folder in folders]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in ((out.with_suffix(".md"), markdown(runs)), (out, html(runs))):
            files.write(path, text)
    except OSError as e:
        raise UserError(f"the page cannot be written: {e.strerror}", str(out), "choose another --out") from e
    return out


def local(folder: str | Path, scratch: str) -> Path:
    """Returns the path of a local folder unchanged. Copies a run at gs://BUCKET/FOLDER to `scratch`, without its
    checkpoints, and returns the copy's path."""
    home = paths.parse(folder)
    if not paths.remote(home):
        return home
    copy = Path(scratch) / files.mirror(home).name / home.name
    copy.mkdir(parents=True)
    with paths.store_errors(home):
        files.fetch(home, copy)
    return copy


def html(runs: list[Run]) -> str:
    tasks = [
        {
            "name": task,
            "scores": _scores(rows),
            "tables": [("", _choices(rows)), *details(answered)],
            "samples": data.side_by_side(answered, SAMPLES),
        }
        for task, rows in data.choices(runs).items()
        for answered in [[(c.label, c.result) for c in rows]]
    ]
    trained = [run for run in runs if run.metrics]
    times = [line["time"] for run in runs for line in (*run.metrics, *run.evals) if "time" in line]
    when = f"{datetime.datetime.fromtimestamp(max(times), datetime.UTC):%d %B %Y, %H:%M UTC}" if times else NA
    lead = _lead(runs)
    return render(
        "report.html.j2",
        title="Run report",
        heading=TITLE,
        meta=f"{', '.join(run.name for run in runs)} · {when}",
        paragraphs=[" ".join(p) for p in (lead[:2], lead[2:]) if p],
        tasks=tasks,
        trained=trained and _trained(trained),
    )


def markdown(runs: list[Run]) -> str:
    """Returns a summary of the report in Markdown."""
    out, tasks = [f"# {TITLE}", ""], data.choices(runs)
    for task, rows in tasks.items():
        out += [" ".join(text.sentences(rows)), "", f"## {task}", ""]
        out.append("| | " + " | ".join(f"{a}, {b}" if b else a for a, b in CHOICE_HEADS[1:]) + " |")
        out.append("|---" * len(CHOICE_HEADS) + "|")
        for label, cells in _choices(rows).rows:
            out.append("| " + " | ".join([label, *(f"{c.value} {c.below}".strip() for c in cells)]) + " |")
        out.append("")
    if not tasks:
        out += [" ".join(_lead(runs)), ""]
    out += [f"- {name}: {gas}" for name, gas in data.used(runs)] + [""]
    return "\n".join(out)


def _lead(runs: list[Run]) -> list[str]:
    """Returns sentences about the task results or, if no task has been scored, about the held-out loss."""
    out = [s for rows in data.choices(runs).values() for s in text.sentences(rows)]
    if out:
        return out
    for run in runs:
        points = data.curves(run)["held-out"]
        if len(points) > 1:
            (_, first), (step, last) = points[0], points[-1]
            change = f"from {first:.3f} to {last:.3f} nats per token in {step:,} steps"
            out.append(f"The held-out loss of {run.name} went {change}.")
    return out or ["There is no held-out result yet."]


# --- scores and costs ---


def _scores(rows: list[Choice]) -> str:
    if not all(0 <= c.result["mean"] <= 1 for c in rows):
        return ""
    points = [(c.label, c.result["mean"], c.result.get("low"), c.result.get("high")) for c in rows]
    n = " or ".join(sorted({f"{c.result['n']}" for c in rows}))
    return svg.bars(points, f"accuracy on {n} held-out examples, with 95 % intervals")


def _choices(rows: list[Choice]) -> Table:
    return Table(CHOICE_HEADS, [(c.label, _choice(c)) for c in rows])


def details(rows: Sequence[tuple[str, Json]]) -> Iterator[tuple[str, Table]]:
    """Yields a table of scores by slice and a table of the most frequent answers, if the results contain these. Slices
    with the largest differences come first. Each row is (label, result of evals.run.evaluate)."""
    parts = [(label, result.get("slices") or {}) for label, result in rows]
    found: dict[str, list[float]] = {}
    for name, part in (item for _, of in parts for item in of.items()):
        found.setdefault(name, []).append(part["mean"])
    if slices := sorted(found, key=lambda name: min(found[name]) - max(found[name]))[:SLICES]:
        cells = [(label, [score(of[name]) if name in of else Cell(NA) for name in slices]) for label, of in parts]
        yield "By slice", Table([("", ""), *((name, "95 % interval") for name in slices)], cells)
    if most := max(len(result.get("answers") or ()) for _, result in rows):
        often = [
            (label, [Cell(clip(answer, 60), percent(count / of["n"])) for answer, count in of.get("answers") or ()])
            for label, of in rows
        ]
        filled = [(label, [*each, *[Cell(NA)] * (most - len(each))]) for label, each in often]
        yield "Most frequent answers", Table([("", ""), *(("", f"{i + 1}.") for i in range(most))], filled, "left")


def score(r: Json) -> Cell:
    low, high = r.get("low"), r.get("high")
    span = NA if low is None or high is None else f"{percent(low).removesuffix(' %')}–{percent(high)}"
    return Cell(percent(r["mean"]), f"{span}, n = {r['n']}", strong=True)


def _choice(c: Choice) -> list[Cell]:
    r = c.result
    return [
        score(r),
        Cell(flops(c.flops)),
        Cell(seconds(c.seconds)),
        Cell(size(c.peak_bytes) if c.run.config else "none"),
        Cell(size(c.store_bytes)),
        Cell(integer(r.get("prompt_tokens"))),
        Cell(flops(text.per_answer(c))),
        Cell(signed(c.forgetting), c.text),
    ]


# --- runs ---


def _trained(runs: list[Run]) -> Json:
    names = [("", ""), *((run.name, "") for run in runs)]
    differ = data.config_rows(runs) if len(runs) > 1 else []
    return {
        "curves": _curves(runs),
        "preferences": [(run.name, *shown) for run in runs if (shown := _preferences(run))],
        "runs": Table(RUN_HEADS, [(run.name, _run(run)) for run in runs]),
        "used": [(name, _used(used)) for name, used in data.used(runs)],
        "written": [(run.name, *sample) for run in runs for sample in data.written(run)],
        "configs": Table(names, [(key, [Cell(v) for v in values]) for key, values in differ], "left mono"),
        "environment": Table(names, _environment(runs), "left"),
    }


def _curves(runs: list[Run]) -> list[str]:
    """Draws the loss curves, with one chart for each group of runs that have the same initial weights."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.config.get("init") or run.name, []).append(run)
    return [_chart(group) for group in groups.values()]


def _chart(runs: list[Run]) -> str:
    series = []
    for i, run in enumerate(runs):
        points = data.curves(run)
        series.append((f"{run.name}, training", f"train c{i % 6}", points["train"]))
        series.append((f"{run.name}, held-out", f"heldout c{i % 6}", points["held-out"]))
    return svg.lines([s for s in series if s[2]], "optimizer step", "loss, nats per token")


def _preferences(run: Run) -> tuple[bool, list[str]] | None:
    """Returns (whether the run trains a policy, charts), or None for a run that does not learn from pairs. A run that
    does not train a policy trains a reward model."""
    if not (found := data.preferences(run)):
        return None
    looks = ("heldout c0", "heldout c1")
    charts = []
    for axis, series in found:
        drawn = [(name, look, points) for (name, points), look in zip(series, looks)]
        charts.append(svg.lines(drawn, "optimizer step", axis, zero=False))
    return any(name == "logp_chosen" for _, series in found for name, _ in series), charts


def _run(run: Run) -> list[Cell]:
    done, cost = run.done, run.cost
    reached = max((line["step"] for line in run.metrics if "step" in line), default=0)
    return [
        Cell(data.of_run(run)),
        Cell(scaled(cost.get("trained")), f"of {scaled(cost.get('parameters'))}"),
        Cell(f"{done['step']:,}" if done else f"{reached:,} so far"),
        Cell(integer(done.get("tokens")), integer(done.get("targets"))),
        Cell(integer(done.get("tokens_per_second"))),
        Cell(flops(done.get("flops"))),
        Cell(seconds(data.seconds(run))),
        Cell(size(done.get("peak_rss_bytes"))),
        Cell(_path(run, "nll"), _path(run, "bits_per_byte")),
    ]


def _path(run: Run, key: str) -> str:
    """Formats the first and last held-out values of a metric, as in "3.000 → 0.250"."""
    values = [line[key] for line in run.lines("eval") if isinstance(line.get(key), float)]
    return " → ".join(f"{x:.3f}" for x in dict.fromkeys((values[0], values[-1]))) if values else NA


def _used(used: gas.Gas) -> list[str]:
    lines = [str(used), used.goodput_line()]
    if used.co2_kg_cci is not None:
        lines.append(f"{short(used.co2_kg_cci)} kgCO2e including embodied emissions (fleet-average carbon per FLOP)")
    return lines


def _environment(runs: list[Run]) -> list[tuple[str, list[Cell]]]:
    rows = []
    for key in ("python", "packages", "devices", "git", "code", "started"):
        shown = [_plain(run.environment.get(key)) for run in runs]
        same = len(set(shown)) == 1
        rows.append((key, [Cell(shown[0], columns=len(runs))] if same else [Cell(s) for s in shown]))
    return rows


def _plain(x: Any) -> str:
    if isinstance(x, dict):
        return ", ".join(f"{k} {v}" for k, v in x.items()) or NA
    return text.value(x)
