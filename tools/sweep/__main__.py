"""Runs many variants of a config, called points. Before the first run, checks all points and estimates their cost.

    python -m tools.sweep --config=configs/X.py[:ARG] --out=runs/sweeps/NAME [--config.key=value ...]
        --sweep=NAME       runs `def sweep_NAME()` instead of `def sweep()`; NAME,OTHER runs all combinations of both
        --search=tpe       (or random) draws --trials=20 points with Optuna from the ranges of `def search()`
        --jobs=1           number of concurrent runs, each of which uses all accelerators that it sees
        --retry-failed     runs failed points again
        --metric=eval/nll  metric to rank points by   --maximize     a higher metric is better
        --dry-run          only estimates the cost    --collect      only writes results.csv and index.html
        --emit=slurm       (or skypilot, xpk, gcloud, lines) only writes files to OUT/emit/ that run the points on a
                           cluster

Each point is trained in a run folder OUT/ID. The same command can be run again, or on other machines at the same time.
It then skips points that are done or running, and resumes interrupted points. The exit code is 0 if all points are
done, 1 if some points failed, 2 if the input is invalid, and 75 after an interruption.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common import chips, cli, exits, files, jobs, numbers
from common.errors import did_you_mean
from common.types import Leaf
from configs import schema, sweeps
from configs.schema import overrides
from configs.schema.problems import ConfigError, Problem

if TYPE_CHECKING:
    from tools.sweep.run import Point

FLAGS = {
    "out": "", "sweep": "", "search": "", "trials": 20, "jobs": 1, "retry-failed": False, "metric": "eval/nll",
    "maximize": False, "dry-run": False, "collect": False, "emit": "",
}  # fmt: skip
CHOICES = {"search": ("tpe", "random"), "emit": ("skypilot", "xpk", "slurm", "gcloud", "lines")}
MFU_RANGE = 0.2, 0.5  # assumed range of the MFU


@cli.command
def main(argv: list[str]) -> int:
    args = overrides.parse_args(argv, FLAGS)
    if args.help:
        print(__doc__)
        return exits.DONE
    return run(args)


def run(args: overrides.Args) -> int:
    flags, code = args.flags, 0
    check(args)
    out = Path(flags["out"])
    from tools.sweep import emit
    from tools.sweep import page as sweep_page

    if not flags["collect"]:
        points = planned_points(args)
        price(points, flags["trials"] if flags["search"] else 0)
        if flags["dry-run"]:
            return 0
        if flags["emit"]:
            print(*emit.write(flags["emit"], points, out), sep="\n")
            return 0
        code = work(args, points, out)
    page = sweep_page.write(out, flags["metric"], flags["maximize"])
    print(page, page.with_name("results.csv"), sep="  ")
    return code


def check(args: overrides.Args) -> None:
    """Raises ConfigError, which lists all problems, if the options are invalid."""
    flags, problems = args.flags, list(args.problems)
    for name, known in CHOICES.items():
        if flags[name] and flags[name] not in known:
            fix = did_you_mean(flags[name], known, f"one of {', '.join(known)}")
            problems.append(Problem(f"--{name}", flags[name], "unknown choice", fix))
    problems += [Problem(f"--{n}", str(flags[n]), "must be at least 1") for n in ("jobs", "trials") if flags[n] < 1]
    for name in ("emit", "sweep", "retry-failed"):
        if flags["search"] and flags[name]:
            problems.append(Problem(f"--{name}", "", "cannot be combined with --search", "drop one of the two"))
    if not flags["out"] or "://" in flags["out"]:
        problems.append(
            Problem("--out", flags["out"], "must be a local folder (mount a bucket)", "write --out=runs/sweeps/NAME")
        )
    if args.workdir:
        problems.append(Problem("--workdir", args.workdir, "each point has its own", "write --out=runs/sweeps/NAME"))
    if problems:
        raise ConfigError(problems)


def planned_points(args: overrides.Args) -> "list[Point]":
    """Returns every point of a sweep. A search has too many possible points. For a search, returns only the
    combinations of its choices with the lowest and highest values of its ranges.

    Raises UserError, or ConfigError with the problems of all points.
    """
    if args.flags["search"]:
        ranges = sweeps.space(args.config, args.arg)
        found = sweeps.product({key: r.choices or (r.low, r.high) for key, r in ranges.items()})
    else:
        found = sweeps.points(args.config, args.arg, args.flags["sweep"])
    points, problems, make = {}, {}, maker(args)
    for i, values in enumerate(found, 1):
        try:
            point = make(values)
            points[point.id] = point
        except ConfigError as e:
            for problem in e.problems:
                problems.setdefault(problem, []).append(str(i))
    for problem, at in list(problems.items()):
        more = f" and {len(at) - 5} more" if len(at) > 5 else ""
        problems[problem] = problem._replace(problem=f"{problem.problem} (point {', '.join(at[:5])}{more})")
    if problems or not points:
        raise ConfigError(problems.values() or [Problem("sweep", "", "has no points")], args.config)
    return list(points.values())


def maker(args: overrides.Args) -> "Callable[[dict[str, Leaf]], Point]":
    """Returns a function that takes {config key: value}, checks the values, and makes a Point of them. It raises
    ConfigError for invalid values."""
    from model.io import saved
    from tools.sweep.run import Point
    from train.keep import runs

    config = schema.read(args.config, args.arg)
    spec = f"--config={args.config}:{args.arg}" if args.arg else f"--config={args.config}"

    def make(values: dict[str, Leaf]) -> Point:
        both = values.keys() & args.overrides
        twice = [
            Problem(f"config.{key}", "", "is also set by the sweep", "drop one of the two") for key in sorted(both)
        ]
        texts = args.overrides | {key: text(value) for key, value in values.items()}
        resolved, typed = schema.resolve(config, texts, twice, args.config)
        values = {key: typed[key] for key in values}
        name = hashlib.sha256(json.dumps(schema.to_dict(values)).encode()).hexdigest()[:8]
        folder = Path(args.flags["out"]) / name
        if saved.steps(folder / "ckpt"):
            changed = dict(runs.differences(files.read_json(folder / "config.json"), schema.to_dict(resolved)))
            if unsafe := runs.unsafe(changed, resolved.allow):
                reason = f"{folder} was trained with another value: {changed[unsafe[0]]}"
                raise ConfigError([Problem(f"config.{unsafe[0]}", "", reason, "choose another --out")], args.config)
        return Point(name, values, [spec, *(f"--config.{key}={value}" for key, value in texts.items())], resolved)

    return make


def text(value: Leaf) -> str:
    """Formats a value for the command line."""
    return "none" if value is None else value if isinstance(value, str) else repr(value)


def label(values: dict[str, Leaf]) -> str:
    """Formats the values of a point as a short text, with four digits for floats."""
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={text(v)}" for k, v in values.items())


def price(points: "list[Point]", trials: int) -> None:
    """Prints the size and maximum cost of each point, and the total. For a search, only the cheapest and the most
    expensive point are listed."""
    from train import plan

    plans: dict[str, dict] = {}
    rows = []
    for p in points:  # points that differ only in seed or optimizer settings share a plan
        key = schema.digest(schema.to_dict(p.config) | {"seed": 0, "optim": {"name": p.config.optim.name}})
        plans[key] = plans.get(key) or plan.describe(p.config, plan.blueprint(p.config))
        rows.append((p, plans[key]))
    rows = [pick(rows, key=lambda row: row[1]["flops"]) for pick in (min, max)] if trials else rows
    heads = "point", "sets", "trained", "tokens", "FLOPs", "bytes per device", "chip-hours", "$ on demand"
    cells = []
    for p, d in rows:
        sizes = [f"{d['trained']:,}", f"{d['tokens']:,}", numbers.flops(d["flops"])]
        sizes += [numbers.size(d["bytes_per_device"]["total"]), *costs(p.config.chip, d["flops"])]
        cells.append([p.id, label(p.values), *sizes])
    cli.table(cells, heads, width=None if sys.stdout.isatty() else 200)
    rows, kind = (rows[-1:] * trials, "trials") if trials else (rows, "points")
    tokens, flops = (sum(d[key] for _, d in rows) for key in ("tokens", "flops"))
    hours, dollars = costs(points[0].config.chip, flops)
    print(f"{len(rows)} {kind}: at most {tokens:,} tokens, {numbers.flops(flops)}, {hours} chip-hours, $ {dollars}")
    if hours != numbers.NA:
        print(f"Hours and $ are estimates, for an MFU of {MFU_RANGE[1]:.0%} to {MFU_RANGE[0]:.0%}.")


def costs(name: str, flops: float) -> tuple[str, str]:
    """Returns two ranges: the chip-hours that the training FLOPs take on a chip, and the price of these hours in
    dollars. Returns n/a for both if config.chip is not set."""
    chip = chips.find(name)
    if not chip:
        return numbers.NA, numbers.NA
    hours = [flops / (chip.tflops.value * 1e12 * mfu) / 3600 for mfu in reversed(MFU_RANGE)]
    dollars = [h * chip.usd_hour.value for h in hours] if chip.usd_hour else None
    return numbers.span(hours, ".2g"), numbers.span(dollars, ".2g")


def work(args: overrides.Args, points: "list[Point]", out: Path) -> int:
    """Runs the points of a sweep, or the trials of a search, that are not finished yet. Returns the exit code."""
    from tools.sweep import run as runs

    flags = args.flags
    if flags["search"]:
        from tools.sweep.search import Search

        ranges, make = sweeps.space(args.config, args.arg), maker(args)
        total, queue = flags["trials"], Search(ranges, make, out, flags, points[0].config)
    else:
        total, queue = len(points), runs.Listed(points, out, flags["retry-failed"])
    with jobs.interruptible() as stop, screen(out, flags["metric"], total) as show:
        jobs.drain(queue, flags["jobs"], stop, show)
    if stop:
        print("interrupted; run the same command to continue", file=sys.stderr)
        return exits.PREEMPTED
    failed = [p.parent for p in sorted(out.glob("*/ended.json")) if files.read_json(p).get("state") == runs.FAILED]
    for folder in failed:
        said = files.read_json(folder / "ended.json")["said"]
        print(f"{folder} failed: {said} · see its log.txt; --retry-failed runs it again", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def screen(out: Path, metric: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields a function that shows the states of the points in OUT. In a terminal, it updates a live table. Otherwise,
    it prints a line whenever the state of a point has changed."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from tools.sweep import page as sweep_page
    from tools.sweep import run as runs

    known: dict[str, str] = {}
    live = Live(auto_refresh=False) if sys.stdout.isatty() else None

    def show() -> None:
        rows = sweep_page.results(out, metric)
        done = f"{sum(r.state in runs.ENDED for r in rows)} of {total} ended"
        table = Table("point", "sets", "state", "step", metric, title=done, title_justify="left")
        for r in sorted(rows, key=lambda r: r.state != runs.RUNNING):  # a small screen shows only the first points
            line = (r.id, label(r.values), r.state, f"{r.step:,}", sweep_page.number(r.value))
            table.add_row(*map(Text, line))
            if not live and known.get(r.id, runs.WAITING) != r.state:
                print(f"{done} · {line[0]}  {line[1]}  {line[2]} at step {line[3]}, {metric} {line[4]}", flush=True)
            known[r.id] = r.state
        if live:
            live.update(table, refresh=True)

    with live or contextlib.nullcontext():
        yield show


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
