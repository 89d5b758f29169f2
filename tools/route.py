"""Asks people for labels where a judge model is unsure, audits the judge, and measures how much labels help.

    python -m tools.route --items=items.jsonl --judge=MODEL --people=100 [--audit=0.2] [--seed=0] --out=FOLDER
    python -m tools.route --routed=FOLDER --votes=preference.jsonl
    python -m tools.route --curve=PAIRS --features=MODEL [--verdicts=FOLDER] [--labels=25,50,100,200] [--replays=10]
                          [--noise=0] [--label_seconds=SECONDS] --out=FOLDER

The first form lets the judge compare the two answers of each item, in both orders. It then writes three files to the
folder --out. people.jsonl has the --people items that people should label with feedback.main: a fraction --audit of
them is drawn at random, and the others are those about which the judge is least sure. judged.jsonl has the judge's
preferences for all other items, as training data. routes.jsonl has its probabilities for all items.

The second form compares the judge's probabilities with people's votes. Only the results for the items drawn at random
show how often the judge is right on the items that it labels itself.

The third form shows how much labels help. It trains a linear reward model on frozen features with more and more of the
existing labels, and measures its accuracy at each number of labels in --labels. It does so for three orders in
which pairs could be labeled: random, most uncertain prediction first, and largest disagreement between the model and a
judge first. --verdicts is a folder with this judge's verdicts, written by tools.judge. Without it, the rule
"longer is better" takes the place of the judge.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import cli, files
from common.errors import UserError
from common.numbers import NA, duration, percent
from common.types import Json

MODES = {"items": ("judge", "people", "out"), "routed": ("votes",), "curve": ("features", "out")}


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.route", __doc__)
    for name in ("items", "judge", "routed", "votes", "curve", "features", "verdicts", "out"):
        parser.add_argument(f"--{name}", default="")
    for name, default in dict(people=0, replays=10, seed=0).items():
        parser.add_argument(f"--{name}", default=default, type=cli.count)
    for name, default in dict(audit=0.2, noise=0.0, label_seconds=None).items():
        parser.add_argument(f"--{name}", default=default, type=float)
    parser.add_argument("--labels", default=[25, 50, 100, 200], type=cli.counts)
    args = parser.parse_args(argv)
    chosen = [name for name in MODES if getattr(args, name)]
    if len(chosen) != 1:
        raise UserError("exactly one of --items, --routed and --curve is required", "tools.route", "see --help")
    if missing := [name for name in MODES[chosen[0]] if not getattr(args, name)]:
        raise UserError(f"--{missing[0]} is required with --{chosen[0]}", "tools.route", "see --help")
    rising = args.labels == sorted(set(args.labels)) and args.labels[0] > 0
    if not (0 <= args.audit <= 1 and 0 <= args.noise < 0.5 and args.replays and rising):
        raise UserError("a setting is out of range", "tools.route", "--audit <= 1, --noise < 0.5, --labels increase")
    {"items": send, "routed": check, "curve": curve}[chosen[0]](args)


def send(args: argparse.Namespace) -> None:
    """Judges items. Writes the items that people should label, and the judge's preferences for the others."""
    from evals import answers, router
    from evals.judge import Judge

    items = answers.items(args.items)
    if odd := next((item for item in items if len(item["answers"]) != 2), None):
        raise UserError(f"an item has {len(odd['answers'])} answers, not two", args.items, "--answers=2 when sampling")
    judge, texts = Judge(args.judge), [[answer["text"] for answer in item["answers"]] for item in items]
    found = judge.compare([item["prompt"] for item in items], [a for a, _ in texts], [b for _, b in texts])
    routes = router.route(np.array([v.p for v in found]), args.people, args.audit, args.seed)
    people, judged, lines = [], [], []
    for item, (a, b), v, asked, audited in zip(items, texts, found, routes.people, routes.audited, strict=True):
        ranks = {1: [1, 2], -1: [2, 1], 0: [1, 1]}[v.winner]
        why = f"the first answer is better with probability {v.p:.2f}"
        if asked:
            people.append(item | {"judge": {"model": args.judge, "ranks": ranks, "why": why}})
        elif v.winner:
            said = lambda text, item=item: text if isinstance(item["prompt"], str) else [_turn(text)]
            best, worst = (a, b) if v.winner > 0 else (b, a)
            judged.append({"prompt": item["prompt"], "chosen": said(best), "rejected": said(worst)})
        lines.append({"prompt": item["prompt"], "answers": [a, b], "p": v.p, "audited": bool(audited)})
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("people", people), ("judged", judged), ("routes", lines)):
        files.write_lines(out / f"{name}.jsonl", rows)
    undecided = len(items) - len(people) - len(judged)
    print(
        f"{len(items):,} items: {len(people):,} for people ({routes.audited.sum():,} at random), {len(judged):,} judged"
    )
    print(f"{undecided:,} get no label, because the judge's verdicts in the two orders differ")


def _turn(text: str) -> Json:
    return {"role": "assistant", "content": text}


def check(args: argparse.Namespace) -> None:
    """Compares the judge's probabilities with people's votes."""
    from evals import pairs, router

    votes = {}
    for pair in pairs.read(args.votes):
        label = 0.5 + np.sign(sum(pair.votes)) / 2
        asked = pairs.text(pair.prompt)
        votes[asked, pair.chosen, pair.rejected], votes[asked, pair.rejected, pair.chosen] = label, 1 - label
    lines = files.read_lines(Path(args.routed) / "routes.jsonl")
    if not lines:
        raise UserError("no routes.jsonl in the folder", args.routed, "give the --out folder of the first form")
    voted = [(line, votes[key]) for line in lines if (key := (pairs.text(line["prompt"]), *line["answers"])) in votes]
    if not voted:
        raise UserError("no vote is about an item in routes.jsonl", args.votes, "give a file of feedback.export")
    for label, part in {
        "drawn at random": [(line["p"], label) for line, label in voted if line["audited"]],
        "least sure": [(line["p"], label) for line, label in voted if not line["audited"]],
    }.items():
        if not part:
            print(f"{label}: no votes")
            continue
        found = router.calibration(*zip(*part, strict=True))
        right = f"{percent(found.accuracy)} ({percent(found.low)} to {percent(found.high)})"
        print(f"{label}: the judge is right in {right} of {found.n:,}; Brier score {found.brier:.3f}")
        rows = [
            (f"{low:.1f} to {low + 0.1:.1f}", f"{n:,}", f"{sure:.2f}", percent(right), f"{percent(a)} to {percent(b)}")
            for low, n, sure, right, (a, b) in found.bins
        ]
        cli.table(rows, ("confidence", "n", "mean", "right", "95 % interval"), f"calibration error {found.error:.3f}")


def curve(args: argparse.Namespace) -> None:
    """Measures the accuracy of a reward model as existing labels are added in three orders, and writes OUT/curve.json
    and OUT/curve.html."""
    from evals import features, pairs, router
    from tools.report import svg
    from tools.report.page import render

    found, out = pairs.decided(pairs.read(args.curve)), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    x, fold = features.differences(args.features, found, out), pairs.folds(found, 5)
    if args.labels[-1] > (least := min(int((fold != k).sum()) for k in np.unique(fold))):
        raise UserError(f"{args.labels[-1]:,} labels, but a replay has {least:,} pairs", "--labels", "use fewer")
    judge = _verdicts(args.verdicts, found) if args.verdicts else pairs.longest(found)
    points = {
        order: router.curve(x, fold, judge, order, args.labels, args.replays, noise=args.noise, seed=args.seed)
        for order in router.ORDERS
    }
    record = {"pairs": args.curve, "features": args.features, "noise": args.noise, "replays": args.replays}
    files.write_json(out / "curve.json", files.plain(record | {k: [p._asdict() for p in v] for k, v in points.items()}))
    series = [(order, f"heldout c{i}", [(p.labels, p.mean) for p in v]) for i, (order, v) in enumerate(points.items())]
    chart = svg.lines(series, "labels", "accuracy on held-out pairs", zero=False, log_x=True)
    files.write(out / "curve.html", render("curve.html.j2", title="Labels and accuracy", chart=chart, record=record))
    rows = []
    for i, size in enumerate(args.labels):
        cells = [f"{percent(p[i].mean)} ({percent(p[i].low)} to {percent(p[i].high)})" for p in points.values()]
        time = NA if args.label_seconds is None else duration(size * args.label_seconds)
        rows.append((f"{size:,}", time, *cells))
    title = f"accuracy on held-out pairs, mean of {args.replays} replays (95 % interval)"
    cli.table(rows, ("labels", "people's time", *points), title)


def _verdicts(folder: str, found: "Sequence") -> np.ndarray:
    """Returns a probability for each pair, from the judges.json that tools.judge wrote for these pairs. If it has the
    verdicts of several judges, the last judge is used."""
    rows = files.load_json(Path(folder) / "judges.json")["rows"]
    given = [row["p"] for row in rows if "p" in row]
    if not given or len(given[-1]) != len(found):
        raise UserError("no judge has judged all of these pairs", folder, "python -m tools.judge --judges=MODEL")
    return np.array(given[-1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
