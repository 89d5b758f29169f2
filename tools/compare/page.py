"""Rewrites the decision page of a comparison (decision.html, .md and .json) for changed inputs, such as --requests.

    python -m tools.compare.page OUT [--requests=N] [--margin=2] [--labels=12] [--documents=1] [--people=USD] [--idle=H]

OUT is the output folder of tools.compare. The measured scores stay the same. The page is one file without external
resources. Its only script updates the page when the slider for requests per month is moved.
"""

import argparse
import dataclasses
import math
import re
import sys
from pathlib import Path

from common import cli, files
from common.errors import UserError
from common.numbers import integer
from common.types import Json
from tools.compare import decide, page_text
from tools.compare import page_parts as parts
from tools.compare import record as records
from tools.compare.decide import Decision, Inputs
from tools.compare.page_learning import extrapolate
from tools.report import data
from tools.report import page as report

SAMPLES = 6


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.compare.page", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    for name, (text, option) in parts.GIVEN.items():
        default = {"requests": None, "margin": 2.0}.get(name, Inputs._field_defaults.get(name))
        unit = {"margin": ", in percentage points", "people": ", in dollars"}.get(name, "")
        shown = "" if default is None else f" (default {default:g})"
        parser.add_argument(
            option, type=months if "months between" in text else amount, default=default, help=f"{text}{unit}{shown}"
        )
    parser.add_argument("--credit", default="", help="a line about the sources of the texts and their licenses")
    args = vars(parser.parse_args(argv))
    out, credit = args.pop("out"), args.pop("credit")
    found = records.load(out)
    if not found:
        raise UserError(f"there is no {records.NAME}", str(out), "give the --out folder of tools.compare")
    record = dataclasses.asdict(found)
    args["requests"] = args["requests"] or record["requests"]
    path = write(out, record, Inputs(**args | {"margin": args["margin"] / 100}), credit)
    print(f"{path}  {path.with_suffix('.md')}  {path.with_suffix('.json')}")


def amount(text: str) -> float:
    if not (math.isfinite(x := float(text)) and x >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return x


def months(text: str) -> float:
    if not (x := amount(text)):
        raise argparse.ArgumentTypeError("there must be more than 0 months between two changes")
    return x


def write(out: Path, record: Json, given: Inputs | None = None, credit: str = "") -> Path:
    """Writes decision.json, .md and .html to the folder of a comparison. Raises UserError if no method was tested.

    `credit` is a line about the sources of the texts.
    """
    d = decide.decide(record, given or Inputs(record["requests"]))
    files.write_json(out / "decision.json", files.plain(to_json(d, record)))
    files.write(out / "decision.md", markdown(d, record))
    files.write(out / "decision.html", html(d, record, out, credit))
    return out / "decision.html"


# --- short forms ---


def to_json(d: Decision, record: Json) -> Json:
    names = [o.name for o in d.options]
    share, lost, more = d.lost
    return {
        "task": record["task"]["name"],
        "answer": page_text.answer(d, record)._asdict(),
        "method": d.best.name,
        "enough": d.enough,
        "rows": d.rows,
        "rows_needed": d.rows_needed,
        "given": d.given._asdict(),
        "unit": d.price.unit,
        "methods": {
            o.name: {
                "mean": o.mean,
                "probability": p,
                "cost": dict(zip(("low", "value", "high"), cost, strict=True)),
            }
            for o, p, cost in zip(d.options, d.probability, d.cost.T, strict=True)
        },
        "flips": [f._asdict() | {"to": names[f.to]} for f in d.flips],
        "wrong": {"probability": share, "score": lost, "cost": more},
        "requests": {"grid": d.grid, "best": [names[i] for i in d.curve.argmax(1)]},
    }


def markdown(d: Decision, record: Json) -> str:
    told, head = page_text.answer(d, record), parts.main_table(d, record)
    lines = [f"# {told.title}", "", _meta(d, record), "", told.reasons, ""]
    titles = ("How sure", "Changes", "If it is wrong", "The rule")
    lines += [f"- **{title}**: {text}" for title, text in zip(titles, told[2:], strict=True)]
    lines += ["", "## Methods", "", "| | " + " | ".join(f"{a}, {b}" if b else a for a, b in head.heads[1:]) + " |"]
    lines.append("|---" * len(head.heads) + "|")
    for (_, cells), o in zip(head.rows, d.options, strict=True):
        lines.append("| " + " | ".join([o.label, *(f"{c.value} {c.below}".strip() for c in cells)]) + " |")
    return "\n".join(lines) + "\n"


def _meta(d: Decision, record: Json) -> str:
    task, seeds = record["task"], max((len(o.scores) for o in d.options if o.record["trained"]), default=0)
    runs = {0: "", 1: ", one training run per method"}.get(seeds, f", {seeds} training runs per method")
    about = f"Task {task['name']}", f"{d.rows} test rows{runs}", ", ".join(record["models"])
    return " · ".join([*about, f"{integer(d.given.requests)} requests per month"])


# --- the page ---


def html(d: Decision, record: Json, out: Path, credit: str) -> str:
    asked = [(o.label, o.record["tests"][0]["result"]) for o in d.options]
    curves = ((o, extrapolate(parts.points(o, record))) for o in d.options)
    trained, curve = next((found for found in curves if found[1]), (None, None))
    drawn, path = parts.curve(d)
    text = report.render(
        "decision.html.j2",
        title=f"Decision: {record['task']['name']}",
        answer=page_text.answer(d, record),
        meta=_meta(d, record),
        how=d.best.record["how"],
        requests=integer(d.given.requests),
        chances=parts.chances(d, d.given.requests, d.probability),
        live=parts.live(d, path),
        front=parts.front(d),
        front_note=parts.front_note(d),
        main=parts.main_table(d, record),
        more=parts.more_table(d, record),
        speed=page_text.speed(parts.speed(d, out, "lora"), parts.speed(d, out, "full")),
        dropped=parts.dropped(record),
        curve=drawn,
        changes=[page_text.sentence(page_text.change(d, flip)) + "." for flip in d.flips],
        break_even=list(parts.break_even(d)),
        credit=credit,
        more_rows=page_text.more_rows(curve, trained),
        learning=parts.learning(curve),
        details=list(report.details(asked)),
        samples=data.side_by_side(asked, SAMPLES),
        priced=parts.priced(d, record),
        prices=parts.prices(d, record),
        given=parts.given(d),
        spent=parts.spent(record),
        decided=list(parts.decided(record)),
        runs=[parts.runs(o, record) for o in d.options],
    )
    return re.sub(r"(?<=\d) %", "\u00a0%", text)  # a line must not break between a number and "%"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
