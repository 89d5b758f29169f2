"""Audits cheaper ways to choose a method: replays them on comparisons that measured every setting.

    python -m tools.compare.audit FOLDER... [--out=audit.json]

Each FOLDER is the output of tools.compare with --budget=all, three rungs and several methods. These are the ways to
choose a method:

rule      few-shot prompts below 50 training rows, else retrieval if there are documents, else LoRA
          (the rule of `soup advise`, soup-cli 0.77)
zero-shot always prompts without examples
pilot     the setting with the best score in the first rung, which trains on a ninth of the rows
halving   the choice of tools.compare if its budget is a quarter of the FLOPs of "all"
all       the method with the highest score on the test rows, after measuring every setting

For each way, a table shows how many percentage points its choice scores above or below that of "all" on the same test
rows, with a paired 95 % confidence interval. Gas is the cost of choosing, in percent of the cost of "all": the FLOPs
spent on measuring settings on validation rows and on training the chosen setting once on all rows.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import cli, files
from common.errors import UserError
from common.numbers import percent
from common.types import Json
from evals import paired
from tools.compare import halving, plan
from tools.compare.engine import Engine
from tools.compare.method import Candidate, Method, Setting
from tools.compare.record import Record, load

# "rule" chooses few-shot prompts if there are fewer than FEW training rows. "halving" may spend the fraction QUARTER
# of the FLOPs of "all". A score that is lower by at most CLOSE counts as equally good.
FEW, QUARTER, CLOSE = 50, 0.25, 0.02


class Way(NamedTuple):
    """One way to choose a method, and the result of its choice.

    If `estimated` is true, the chosen setting was not tested, but another setting of the same method was. The score is
    then that setting's test score, plus the difference between the validation scores of the two settings. The interval
    combines the intervals of both differences (MOVER, Zou & Donner 2008).
    """

    name: str
    candidate: str
    score: float  # on the test rows
    difference: float  # this score minus that of the method chosen by "all"
    low: float
    high: float
    gas: float  # cost of choosing, as a fraction of the cost of "all"
    estimated: bool

    @property
    def close(self) -> bool:
        """Whether the choice is as good as that of "all". The wide interval of an estimate does not make it so."""
        return self.difference >= -CLOSE or (self.high >= 0 and not self.estimated)


class Replay(Engine):
    """Repeats the decisions of a comparison for another budget, using the measurements in a complete record."""

    def __init__(self, full: Record, budget: float | None):
        self.full = full
        record = dataclasses.replace(
            full,
            budget={**full.budget, "asked": "", "flops": budget},
            decisions=[],
            candidates=[{**row, "rungs": []} for row in full.candidates],
            methods=[{**row, "tests": [], "spent": {}} for row in full.methods],
            spent={"flops": 0.0, "seconds": 0.0, "usd": 0.0},
            index=None,
        )
        self.r, self.found, self.flops = record, [_candidate(full, row) for row in full.candidates], self

    def rung(self, x: Candidate, rung: Json, result: Json | None = None) -> float:
        """Returns the FLOPs that a candidate spent in a rung."""
        return sum(map(gas, self._measured(x, self.r.rungs.index(rung))))

    def _measured(self, x: Candidate, number: int) -> list[Json]:
        """Returns the recorded measurement of a candidate in a rung, as a list with at most one entry. Untrained
        candidates were not measured again on the same validation rows."""
        source = max(n for n in halving.measured(x, self.r.rungs) if n <= number)
        return [row for row in self.full.candidate(x.id)["rungs"] if row["rung"] == source]

    def test(self, x: Candidate, trained: int, result: Json | None = None) -> float:
        """Returns 0 FLOPs, because the cost of testing is not counted when choosing a candidate."""
        return 0.0

    def choose(self) -> str:
        alive = self._survivors()
        return max(alive, key=lambda x: self._result(x, len(self.r.rungs) - 1)["mean"]).id

    def _measure(self, group: list[Candidate], number: int) -> None:
        for x in group:
            known = self._measured(x, number)
            self.r.candidate(x.id)["rungs"] += known
            if not known:
                self.r.candidate(x.id)["failed"] = "failed in the complete comparison"
        self.r.count()

    def _say(self, text: str) -> None:
        """Does nothing: a replay does not print its decisions."""

    def _save(self) -> None:
        """Does nothing: a replay is not saved."""


def _candidate(record: Record, row: Json) -> Candidate:
    method = next(m for m in record.methods if (m["name"], m["model"]) == (row["method"], row["model"]))
    setting = Setting(row["settings"], {} if method["trained"] else None)
    return Candidate(row["id"], row["method"], row["model"], Method(method["label"], method["how"]), setting)


def gas(rung: Json) -> float:
    """Returns the FLOPs that a candidate's training and validation took in a rung."""
    return rung["flops"] + (rung["result"]["flops"] or 0.0)


# --- ways to choose a method ---


def ways(record: Record) -> list[Way]:
    """Returns the result of every way to choose a method. Raises UserError unless the comparison measured every
    setting."""
    tested = [m for m in record.methods if m["status"] == "tested"]
    if record.budget["asked"] != plan.ALL or len(tested) < 2 or len(record.rungs) < 2:
        raise UserError("the comparison did not measure every setting", "", "repeat it with --budget=all --rungs=3")
    best = max(tested, key=lambda m: _scores(m).mean())
    total = sum(gas(rung) for row in record.candidates for rung in row["rungs"])
    pilot = max((row for row in record.candidates if row["rungs"]), key=lambda row: row["rungs"][0]["result"]["mean"])
    replay = Replay(record, QUARTER * total)
    chosen = replay.choose()
    first = sum(gas(row["rungs"][0]) for row in record.candidates if row["rungs"])
    rule, zero = _first(record, _rule(record)), _first(record, "zero_shot")
    found = [
        ("rule", rule, _training(record, rule)),
        ("zero-shot", zero, 0.0),
        ("pilot", pilot["id"], first + _training(record, pilot["id"])),
        ("halving", chosen, replay.r.spent["flops"]),
        ("all", best["candidate"], total),
    ]
    return [_way(record, name, candidate, best, spent / total) for name, candidate, spent in found]


def _rule(record: Record) -> str:
    if record.task["rows"]["train"] < FEW:
        return "few_shot"
    return "rag" if record.documents else "lora"


def _first(record: Record, method: str) -> str:
    """Returns the first setting of a method. It is the one to choose if nothing has been measured."""
    found = [row["id"] for row in record.candidates if row["method"] == method and row["rungs"]]
    if not found:
        raise UserError(f"the comparison has no method {method!r}", "", "repeat it with all methods")
    return found[0]


def _training(record: Record, candidate: str) -> float:
    """Returns the FLOPs of training a candidate once on all rows."""
    return record.candidate(candidate)["rungs"][-1]["flops"]


def _way(record: Record, name: str, candidate: str, best: Json, share: float) -> Way:
    row = record.candidate(candidate)
    key = row["method"], row["model"]
    method = next(m for m in record.methods if (m["name"], m["model"]) == key)
    if method["status"] != "tested":
        raise UserError(f"{method['label']} was not tested: {method['why']}", "", "run tools.compare again")
    mine = _scores(method)
    test = paired.compare(mine.tolist(), _scores(best).tolist())
    difference, low, high = test.difference, test.low, test.high
    estimated = method["candidate"] != candidate
    if estimated:
        last = lambda name: record.candidate(name)["rungs"][-1]["result"]
        other = paired.pair(last(candidate), last(method["candidate"]))
        assert other is not None  # in the last rung, all settings are measured on the same rows
        difference += other.difference
        low = difference - math.hypot(test.difference - test.low, other.difference - other.low)
        high = difference + math.hypot(test.high - test.difference, other.high - other.difference)
    score = float(_scores(best).mean()) + difference
    return Way(name, candidate, score, difference, low, high, share, estimated)


def _scores(method: Json) -> np.ndarray:
    """Returns the score of each test row, averaged over the seeds. The rows are sorted by name."""
    each = []
    for test in method["tests"]:
        rows = sorted(zip(test["result"]["rows"], test["result"]["scores"], strict=True))
        each.append([score for _, score in rows])
    return np.mean(each, axis=0)


# --- command ---


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.compare.audit", __doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    found = {}
    for folder in args.folders:
        if not (record := load(folder)):
            raise UserError("the folder has no comparison.json", str(folder), "give the --out folder of tools.compare")
        try:
            found[str(folder)] = record, ways(record)
        except UserError as e:
            raise UserError(e.what, str(folder), e.fix) from None
    show(list(found.values()))
    if args.out:
        files.write_json(args.out, [_cell(record, each) for record, each in found.values()])


def show(found: Sequence[tuple[Record, list[Way]]]) -> None:
    rows = []
    for record, each in found:
        for way in each:
            span = f"{100 * way.difference:+.1f} ({100 * way.low:+.1f} to {100 * way.high:+.1f})"
            score = percent(way.score) + " (estimate)" * way.estimated
            rows.append([record.task["name"], way.name, way.candidate, score, span, percent(way.gas)])
    heads = ("task", "choice by", "chosen", "test score", "points against all", "gas")
    cli.table(rows, heads, width=None if sys.stdout.isatty() else 160)
    for name in [way.name for way in found[0][1]][:-1]:
        mine = [way for _, each in found for way in each if way.name == name]
        close = sum(way.close for way in mine)
        worst = min(way.difference for way in mine)
        share = percent(sum(way.gas for way in mine) / len(mine))
        print(
            f"{name}: as good as all on {close} of {len(mine)} tasks (at most {100 * CLOSE:.0f} points worse, or the "
            f"interval reaches 0); at worst {100 * worst:+.1f} points; on average {share} of the gas"
        )


def _cell(record: Record, each: list[Way]) -> Json:
    task = {key: record.task[key] for key in ("name", "hash", "scorer", "rows")}
    scores = {m["candidate"]: float(_scores(m).mean()) for m in record.methods if m["status"] == "tested"}
    return {"task": task, "models": record.models, "machine": record.machine, "seeds": record.seeds} | {
        "epochs": record.epochs, "rungs": record.rungs, "spent": record.spent,
        "candidates": [row["id"] for row in record.candidates], "test_scores": scores,
        "ways": [way._asdict() | {"close": way.close} for way in each],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
