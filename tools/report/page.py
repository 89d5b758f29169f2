"""The page: sections of HTML around the rows of report_data, every number with its unit and n/a for the unknown."""

import datetime
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path

from common import files, paths
from common.errors import UserError
from common.numbers import NA, flops, integer, percent, scaled, seconds, short, signed, size
from tools.report import data, svg, text
from tools.report.data import Choice, Run

CSS = Path(__file__).with_name("page.css")
SAMPLES = 6
TITLE = "What it brought, what it cost"
Cell = tuple[str, str]  # a value, and what is told below it in small

HEADS = [
    ("", ""), ("score", "95 % interval"), ("training", "FLOPs"), ("training", "seconds"),
    ("peak memory", "of training"), ("to store", "bytes"), ("prompt", "tokens"), ("per answer", "FLOPs, estimate"),
    ("forgetting", "Δ nats per token"),
]  # fmt: skip


def write(folders: list[str | Path], out: Path) -> Path:
    """Writes the page at `out` and its short form; both appear whole or not at all. Raises UserError."""
    if not folders:
        raise UserError("no run folders", "tools.report", "python -m tools.report runs/a runs/b")
    with tempfile.TemporaryDirectory() as scratch:
        runs = [data.read(local(folder, scratch)) for folder in folders]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in ((out, html(runs)), (out.with_suffix(".md"), markdown(runs))):
            files.write(path, text)
    except OSError as e:
        raise UserError(f"cannot be written: {e.strerror}", str(out), "choose another --out") from e
    return out


def local(folder: str | Path, scratch: str) -> Path:
    """The folder, or a copy in `scratch` of what a run at gs://BUCKET/FOLDER holds beside its checkpoints."""
    home = paths.parse(folder)
    if not paths.remote(home):
        return home
    copy = Path(scratch) / files.mirror(home).name / home.name
    copy.mkdir(parents=True)
    with paths.told(home):
        files.fetch(home, copy)
    return copy


def html(runs: list[Run]) -> str:
    found = data.choices(runs)
    parts = [_header(runs, found)]
    for task, rows in found.items():
        parts += [f"<h2>The choice: {escape(task)}</h2>", _scores(rows), _choice_table(rows), _samples(rows)]
    trained = [run for run in runs if run.metrics]
    if trained:
        parts += [
            "<h2>Loss</h2>",
            f'<div class="charts">{"".join(_curves(trained))}</div>',
            "<h2>Runs</h2>",
            _run_table(trained),
            _used(trained),
        ]
        parts += [_written(trained), _configs(trained), _environment(trained)]
    parts.append(_notes())
    return document("Run report", "\n".join(filter(None, parts)))


def document(title: str, body: str) -> str:
    """A page of one file: its style inside, no script, no address elsewhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>\n{CSS.read_text('utf-8')}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _header(runs: list[Run], found: dict[str, list[Choice]]) -> str:
    lead = [s for rows in found.values() for s in text.sentences(rows)] or _losses(runs)
    times = [line["time"] for run in runs for line in (*run.metrics, *run.evals) if "time" in line]
    when = datetime.datetime.fromtimestamp(max(times), datetime.UTC).strftime("%d %B %Y, %H:%M UTC") if times else NA
    meta = f"{', '.join(escape(run.name) for run in runs)} · {when}"
    told = "".join(f"<p>{escape(s)}</p>" for s in _paragraphs(lead))
    return f'<header><h1>{TITLE}</h1><p class="meta">{meta}</p></header><div class="lead">{told}</div>'


def _paragraphs(sentences: list[str]) -> list[str]:
    return [" ".join(p) for p in (sentences[:2], sentences[2:]) if p]


def _losses(runs: list[Run]) -> list[str]:
    """For runs without a task: what became of the held-out loss."""
    out = []
    for run in runs:
        points = data.curves(run)["held-out"]
        if len(points) > 1:
            (_, first), (step, last) = points[0], points[-1]
            out.append(
                f"{run.name} took the held-out loss from {first:.3f} to {last:.3f} nats per token in {step:,} steps."
            )
    return out or ["There is no held-out result yet."]


# --- the choice ---


def _scores(rows: list[Choice]) -> str:
    if not all(0 <= c.result["mean"] <= 1 for c in rows):
        return ""
    points = [(c.label, c.result["mean"], c.result.get("low"), c.result.get("high")) for c in rows]
    n = " or ".join(sorted({f"{c.result['n']}" for c in rows}))
    return svg.bars(points, f"share of {n} held-out examples that are right, with 95 % intervals")


def _choice_table(rows: list[Choice]) -> str:
    return table(HEADS, [(c.label, _choice_cells(c)) for c in rows])


def _choice_cells(c: Choice) -> list[Cell]:
    r = c.result
    low, high = r.get("low"), r.get("high")
    span = f"{percent(low).removesuffix(' %')}–{percent(high)}" if None not in (low, high) else NA
    peak = size(c.peak_bytes) if c.run.config else "none"
    return [
        (f"<b>{percent(r['mean'])}</b>", f"{span}, n = {r['n']}"),
        (flops(c.flops), ""),
        (seconds(c.seconds), ""),
        (peak, ""),
        (size(c.store_bytes), ""),
        (integer(r.get("prompt_tokens")), ""),
        (flops(text.per_answer(c)), ""),
        (signed(c.forgetting), escape(c.text)),
    ]


def table(heads: Sequence[tuple[str, str]], rows: Sequence[tuple[str, list[Cell]]]) -> str:
    small = lambda s: f"<small>{s}</small>" if s else ""
    cell = lambda v, below: f"<td{' class=na' if v == NA else ''}>{v}{small(below)}</td>"
    head = "".join(f'<th scope="col">{escape(a)}{small(escape(b))}</th>' for a, b in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>{"".join(cell(*c) for c in cells)}</tr>' for label, cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _samples(rows: list[Choice]) -> str:
    pairs = data.side_by_side(rows, SAMPLES)
    if not pairs:
        return ""
    return "<h3>The same questions, answered</h3>" + '<div class="samples">' + "".join(map(_sample, pairs)) + "</div>"


def _sample(pair: tuple[dict, list[tuple[str, dict]]]) -> str:
    question, answers = pair
    row = lambda label, s: (
        f'<dt>{escape(label)}</dt><dd class="{"right" if s["score"] == 1 else "wrong"}">{_clip(s["completion"])}</dd>'
    )
    told = "".join(row(label, s) for label, s in answers)
    return (
        f'<div class="sample"><blockquote>{_clip(question["prompt"], 600)}</blockquote>'
        f"<dl><dt>expected</dt><dd>{escape(str(question['answer']))}</dd>{told}</dl></div>"
    )


def _clip(s: str, n: int = 240) -> str:
    s = s.strip()
    return escape(s if len(s) <= n else s[: n - 1] + "…") or '<span class="na">(empty)</span>'


# --- the runs ---


def _curves(runs: list[Run]) -> list[str]:
    """One chart for the runs that started from the same weights."""
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


RUN_HEADS = [
    ("", ""), ("method", ""), ("parameters", "trained of all"), ("steps", "optimizer"), ("tokens", "read, learnt"),
    ("speed", "tokens/s"), ("FLOPs", "of training"), ("time", "compile + steps"), ("peak memory", ""),
    ("held-out loss", "nats per token, bits per byte"),
]  # fmt: skip


def _run_table(runs: list[Run]) -> str:
    return table(RUN_HEADS, [(run.name, _run_cells(run)) for run in runs])


def _run_cells(run: Run) -> list[Cell]:
    done, cost = run.done, run.cost
    steps = (
        f"{done['step']:,}" if done else f"{max((m['step'] for m in run.metrics if 'step' in m), default=0):,} so far"
    )
    fell = lambda key: [line[key] for line in run.lines("eval") if isinstance(line.get(key), float)]
    path = lambda v: " → ".join(f"{x:.3f}" for x in dict.fromkeys((v[0], v[-1]))) if v else NA
    return [
        (escape(data.method(run)), ""),
        (scaled(cost.get("trained")), f"of {scaled(cost.get('parameters'))}"),
        (steps, ""),
        (integer(done.get("tokens")), integer(done.get("targets"))),
        (integer(done.get("tokens_per_second")), ""),
        (flops(done.get("flops")), ""),
        (seconds(data.seconds(run)), ""),
        (size(done.get("peak_rss_bytes")), ""),
        (path(fell("nll")), path(fell("bits_per_byte"))),
    ]


def _used(runs: list[Run]) -> str:
    """A box for each run, and one for their sum."""
    out = []
    for name, gas in data.used(runs):
        told = [str(gas), gas.goodput_line()]
        if gas.co2_kg_cci is not None:
            told.append(f"{short(gas.co2_kg_cci)} kgCO2e, embodied in, by the fleet's carbon a FLOP")
        out.append(f'<div class="sample"><b>{escape(name)}</b>{"".join(f"<p>{escape(s)}</p>" for s in told)}</div>')
    return f'<h2>What they used</h2><div class="samples">{"".join(out)}</div>'


def _written(runs: list[Run]) -> str:
    """Samples that the runs wrote before and after training."""
    out = []
    for run in runs:
        steps: dict[str, list[tuple[str, str]]] = {}
        for line in run.lines("sample"):
            steps.setdefault(line.get("prompt", ""), []).append((f"step {line['step']:,}", line.get("answer", "")))
        for prompt, answers in steps.items():
            told = "".join(f"<dt>{a}</dt><dd>{_clip(s, 400)}</dd>" for a, s in answers)
            out.append(
                f'<div class="sample"><blockquote>{escape(run.name)}: {_clip(prompt)}</blockquote><dl>{told}</dl></div>'
            )
    return "<h2>Samples</h2>" + '<div class="samples">' + "".join(out) + "</div>" if out else ""


def _configs(runs: list[Run]) -> str:
    rows = data.config_rows(runs)
    if len(runs) < 2 or not rows:
        return ""
    return "<h2>Where the configs differ</h2>" + _plain_table(["key", *(r.name for r in runs)], rows)


def _environment(runs: list[Run]) -> str:
    keys = ("python", "packages", "devices", "git", "code", "started")
    rows = []
    for key in keys:
        shown = [_plain(run.environment.get(key)) for run in runs]
        same = len(set(shown)) == 1
        rows.append((key, shown[:1] if same else shown))
    body = "".join(
        f"<tr><th>{key}</th>"
        + "".join(f"<td{f' colspan={len(runs)}' if len(v) == 1 else ''}>{escape(s)}</td>" for s in v)
        + "</tr>"
        for key, v in rows
    )
    head = "".join(f"<th>{escape(n)}</th>" for n in ("", *(r.name for r in runs)))
    rows = f'<table class="left"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<h2>Environment</h2><div class="wide">{rows}</div>'


def _plain(x: object) -> str:
    if isinstance(x, dict):
        return ", ".join(f"{k} {v}" for k, v in x.items()) or NA
    return text.value(x)


def _plain_table(heads: list[str], rows: list[tuple[str, list[str]]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(
        f'<tr><th class="mono">{escape(k)}</th>'
        + "".join(f'<td class="mono">{escape(v)}</td>' for v in values)
        + "</tr>"
        for k, values in rows
    )
    return f'<div class="wide"><table class="left"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _notes() -> str:
    return (
        '<h2>How to read it</h2><p class="note">Scores are means over held-out examples; intervals are Wilson\'s for '
        "right-or-wrong scores. Training FLOPs follow from the model's equations and the tokens it read, without "
        "recomputation; training seconds hold compiling and steps, not loading, evaluation or saving. Peak memory is "
        "the largest resident size of the training process. To store: the bytes of the trained parameters, beside the "
        "model they started from. FLOPs per answer are an estimate: 2 for each parameter that multiplies and token "
        "of prompt and answer. Forgetting is the loss on passages of general text, less that of the model before. "
        "What they used counts every second from launch to end, on all devices, with MFU over all of them; prices "
        "and watts are those of chips.json, with their dates and sources; a range is an estimate's. "
        "k = 10³, M = 10⁶, G = 10⁹, T = 10¹².</p>"
    )


# --- the short form ---


def markdown(runs: list[Run]) -> str:
    out = [f"# {TITLE}", ""]
    found = data.choices(runs)
    for task, rows in found.items():
        out += [" ".join(text.sentences(rows)), "", f"## {task}", ""]
        out.append("| | " + " | ".join(f"{a}, {b}" if b else a for a, b in HEADS[1:]) + " |")
        out.append("|---" * len(HEADS) + "|")
        for c in rows:
            cells = [" ".join(filter(None, (v.replace("<b>", "").replace("</b>", ""), s))) for v, s in _choice_cells(c)]
            out.append(f"| {c.label} | " + " | ".join(cells) + " |")
        out.append("")
    if not found:
        out += [" ".join(_losses(runs)), ""]
    out += [f"- {name}: {gas}" for name, gas in data.used(runs)] + [""]
    return "\n".join(out)
