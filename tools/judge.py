"""Measures how well judge models, reward models, a bag of words and "longer is better" predict preferences.

    python -m tools.judge --pairs=FILE [--judges=MODEL,...] [--rewards=SPEC ...] [--features=MODEL] [--n=N] [--folds=5]
                          [--label_seconds=SECONDS] [--wage=DOLLARS] [--seed=0] --out=FOLDER

--pairs names a file of preferences or rankings in any format that training reads. Rows with the same two answers count
as votes by several people. The first two lines of the table show how often people agree with each other, and the
highest accuracy that a predictor can therefore be expected to reach. Only these two lines include ties. A judge sees
each pair of answers in both orders, and prefers an answer only if it chooses that answer both times. An undecided pair
counts as half correct.

--rewards lists rewards as in evals.reward, separated by spaces. --features trains a linear reward model on the hidden
states of a frozen model. The linear reward model and the bag-of-words model are cross-validated over --folds.
--label_seconds (the time that a person needs per label) and --wage (per hour) are your estimates. Verdicts are saved in
--out, so the same command resumes after an interruption.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import cli, files, stats
from common.errors import UserError
from common.numbers import NA, percent, short
from common.types import Json

if TYPE_CHECKING:
    from evals.pairs import Pair

CHUNK = 16  # number of pairs that are judged before their verdicts are saved
HEADS = (
    "",
    "accuracy",
    "95 % interval",
    "n",
    "undecided",
    "first shown",
    "orders differ",
    "s per 1,000",
    "$ per 1,000",
)


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.judge", __doc__)
    for name in ("pairs", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--judges", default="", type=cli.listed)
    parser.add_argument("--rewards", default="", type=str.split)
    parser.add_argument("--features", default="")
    for name, default in dict(n=0, folds=5, seed=0).items():
        parser.add_argument(f"--{name}", default=default, type=cli.count)
    for name in ("label_seconds", "wage"):
        parser.add_argument(f"--{name}", type=float)
    run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> list[Json]:
    """Measures all predictors, writes OUT/judges.json, prints the table, and returns the rows of the table."""
    from evals import pairs

    every = pairs.read(args.pairs)
    found = pairs.decided(every)
    if args.folds < 2:
        raise UserError("cross-validation needs two folds or more", "--folds")
    order = np.random.default_rng(args.seed).permutation(len(found))
    drawn = [found[i] for i in sorted(order[: args.n or None])]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [*_people(every, args), _row("the longer answer", pairs.longest(drawn), 0.0)]
    for label, predict in _trained(found, args):
        start = time.perf_counter()
        p = predict()[sorted(order[: args.n or None])]
        rows.append(_row(label, p, (time.perf_counter() - start) / len(found)))
    for spec in args.rewards:
        lines, _ = _kept(out, spec, drawn, lambda spec=spec: _rewarded(spec))
        rows.append(_row(spec, np.array([line["p"] for line in lines]), _mean(lines, "seconds")))
    for name in args.judges:
        lines, judge = _kept(out, f"judge:{name}", drawn, lambda name=name: _judged(name))
        rows.append(_of_judge(f"judge {name}", lines))
        if judge:
            print(f"judge {name}: {judge}")
    files.write_json(out / "judges.json", files.plain({"pairs": args.pairs, "n": len(drawn), "rows": rows}))
    _show(rows)
    return rows


# --- the predictors ---


def _people(every: "Sequence[Pair]", args: argparse.Namespace) -> Iterator[Json]:
    """Yields two rows: how often people agree with each other, and the highest accuracy that a predictor can therefore
    be expected to reach. Yields nothing if no pair has several votes."""
    from evals import pairs

    agreed = pairs.agreement(every)
    if not agreed:
        return
    usd = args.label_seconds * args.wage / 3600 if None not in (args.label_seconds, args.wage) else None
    yield _scored("agreement between people", agreed, args.label_seconds, usd)
    mean, span = float(np.mean(agreed)), stats.of_scores(agreed)
    low, high = map(pairs.ceiling, span)
    yield {
        "label": "highest expected accuracy",
        "mean": pairs.ceiling(mean),
        "low": low,
        "high": high,
        "n": len(agreed),
    }


def _trained(found: "Sequence[Pair]", args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Yields (label, function) for each predictor that is trained by cross-validation. The function predicts each fold
    after training on the other folds, and returns the probabilities p [n] that people prefer the chosen answers."""
    from evals import pairs

    yield f"bag of words, {args.folds} folds", lambda: pairs.bag_of_words(found, args.folds)
    if args.features:
        from evals import features

        label = f"linear model on {args.features}, {args.folds} folds"
        yield label, lambda: features.predicted(args.features, found, args.folds, Path(args.out))


def _rewarded(spec: str) -> tuple[Callable[[Sequence["Pair"]], list[Json]], Any]:
    from evals import pairs, reward

    rewards = reward.load(spec)

    def judged(part: "Sequence[Pair]") -> list[Json]:
        prompts, rows = [pair.prompt for pair in part] * 2, [{}] * (2 * len(part))
        values = rewards(prompts, [p.chosen for p in part] + [p.rejected for p in part], rows)
        gaps = np.array(values[: len(part)]) - np.array(values[len(part) :])
        return [{"p": float(p)} for p in pairs.sigmoid(gaps)]

    return judged, None


def _judged(name: str) -> tuple[Callable[[Sequence["Pair"]], list[Json]], Any]:
    from evals.judge import Judge
    from infer.hosted import Hosted

    judge = Judge(name)
    theirs = judge.lm if isinstance(judge.lm, Hosted) else None

    def judged(part: "Sequence[Pair]") -> list[Json]:
        before = len(theirs.replies) if theirs else 0
        found = judge.compare([p.prompt for p in part], [p.chosen for p in part], [p.rejected for p in part])
        usd = theirs.used(theirs.replies[before:]).usd if theirs else None
        return [{"p": v.p, "votes": v.votes, "usd": None if usd is None else usd / len(part)} for v in found]

    return judged, theirs


def _kept(out: Path, name: str, drawn: "Sequence[Pair]", make: Callable[[], tuple]) -> tuple[list[Json], Any]:
    """Returns (lines, judge): one line {"pair", "p", "seconds", ...} per pair, and the judge if it is a hosted model
    that had to judge pairs, or otherwise None. Lines that an earlier call has written are reused."""
    from data import splits

    path = out / f"{splits.key(name):016x}.jsonl"
    names = [f"{splits.key(repr(pair[:3])):016x}" for pair in drawn]
    found = {line.get("pair"): line for line in files.read_lines(path) if line.get("judge") == name}
    todo = [i for i, key in enumerate(names) if key not in found]
    if not todo:
        return [found[key] for key in names], None
    (judged, judge), lines = make(), files.Lines(path)
    for at in range(0, len(todo), CHUNK):
        part, start = todo[at : at + CHUNK], time.perf_counter()
        verdicts = judged([drawn[i] for i in part])
        seconds = (time.perf_counter() - start) / len(part)
        for i, verdict in zip(part, verdicts, strict=True):
            found[names[i]] = {"pair": names[i], "judge": name, "seconds": seconds, **verdict}
            lines.write(found[names[i]])
        lines.sync()
        print(f"{name}: {at + len(part):,} of {len(todo):,} pairs", flush=True)
    lines.close()
    return [found[key] for key in names], judge


# --- the table ---


def _row(label: str, p: np.ndarray, seconds: float) -> Json:
    from evals import pairs

    return _scored(label, pairs.correct(p), seconds)


def _scored(label: str, scores: list[float], seconds: float | None, usd: float | None = None, **more: Any) -> Json:
    low, high = stats.of_scores(scores)
    tied = sum(score == 0.5 for score in scores) / len(scores)
    found = {"mean": float(np.mean(scores)), "low": low, "high": high, "n": len(scores), "undecided": tied}
    return {"label": label, **found, "seconds": seconds, "usd": usd, "scores": scores, **more}


def _of_judge(label: str, lines: list[Json]) -> Json:
    from evals.judge import Verdict, bias

    verdicts = [Verdict(line["p"], tuple(line["votes"])) for line in lines]
    first, differ = bias(verdicts)
    scores = [0.5 + 0.5 * v.winner for v in verdicts]
    more = {"first": first, "differ": differ, "p": [v.p for v in verdicts]}
    return _scored(label, scores, _mean(lines, "seconds"), _mean(lines, "usd"), **more)


def _mean(lines: list[Json], name: str) -> float | None:
    values = [line.get(name) for line in lines]
    return None if None in values else float(np.mean(values))  # type: ignore[arg-type]


def _show(rows: list[Json]) -> None:
    thousand = lambda x: NA if x is None else short(1000 * x)
    cells = []
    for r in rows:
        span = f"{percent(r['low']).removesuffix(' %')} to {percent(r['high'])}"
        tied, first, differ = (percent(r.get(name)) for name in ("undecided", "first", "differ"))
        spent = (thousand(r.get(name)) for name in ("seconds", "usd"))
        cells.append((r["label"], percent(r["mean"]), span, f"{r['n']:,}", tied, first, differ, *spent))
    cli.table(cells, HEADS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
