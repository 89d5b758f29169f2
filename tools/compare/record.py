"""Defines the record of a comparison, OUT/comparison.json, which is rewritten after every job.

Paths are relative to OUT. Numbers are in units without a prefix, such as bytes and seconds. None stands for an unknown
value. Decisions depend on scores and FLOPs but not on seconds, so resuming an interrupted comparison leads to the same
record except for the measured times.
"""

import dataclasses
from pathlib import Path

from common import files
from common.errors import UserError
from common.types import Json

NAME, FORMAT = "comparison.json", 1
ASKED = (
    "task",
    "models",
    "documents",
    "seeds",
    "epochs",
    "rungs",
    "methods_asked",
    "budget",
)  # fields that must not change when a comparison is resumed


@dataclasses.dataclass
class Record:
    task: Json  # keys: name, source, hash, scorer, rows (by split), notes, duplicates
    models: list[str]
    documents: str | None
    requests: float  # per month
    seeds: list[int]
    epochs: float
    rungs: list[Json]  # rungs of successive halving; keys: share, train, rows (see halving.rungs)
    methods_asked: list[str]
    budget: Json  # keys: asked, flops, rate, rate_from
    machine: Json  # keys: name, devices, chip
    prices: list[Json]  # prices of machines; the first is the machine that will answer requests
    index: Json | None = None  # keys: chunks, bytes, flops, seconds, usd, commands
    decisions: list[Json] = dataclasses.field(default_factory=list)
    candidates: list[Json] = dataclasses.field(default_factory=list)
    methods: list[Json] = dataclasses.field(default_factory=list)
    learning: list[Json] = dataclasses.field(default_factory=list)
    spent: Json = dataclasses.field(default_factory=lambda: {"flops": 0.0, "seconds": 0.0, "usd": 0.0})
    unspent: Json = dataclasses.field(default_factory=dict)  # FLOPs left in the budget, or None if no budget is set

    def candidate(self, name: str) -> Json:
        return next(c for c in self.candidates if c["id"] == name)

    def __post_init__(self) -> None:
        self.count()

    def finish(self) -> None:
        """Derives further results once all tests are done: the learning curves, the forgetting of each method, and this
        machine's seconds per FLOP."""
        tested = [row for row in self.methods if row["status"] == "tested"]
        self.learning = []
        for row in (row for row in tested if row["trained"]):
            for rung in self.candidate(row["candidate"])["rungs"]:
                point = {key: rung["result"][key] for key in ("mean", "low", "high", "n")}
                point |= {"rows": self.rungs[rung["rung"]]["train"], "run": rung["run"]}
                self.learning.append({"method": row["name"], "model": row["model"], **point})
        losses = {(row["trained"], row["model"]): row["tests"][0]["text"] for row in tested if row["tests"][0]["text"]}
        for row in tested:
            before, after = losses.get((False, row["model"])), row["tests"][0]["text"]
            rise = after["loss"] - before["loss"] if before and after else None
            row["forgetting"] = rise if row["trained"] else 0.0
        if self.spent["flops"]:
            self.prices[-1]["seconds_per_flop"] = self.spent["seconds"] / self.spent["flops"]

    def save(self, out: Path) -> None:
        self.count()
        files.write_json(out / NAME, files.plain({"format": FORMAT} | dataclasses.asdict(self)))

    def count(self) -> None:
        """Adds up the FLOPs, seconds and dollars spent on training, on measuring validation and test rows, and on the
        index."""
        total = {"flops": 0.0, "seconds": 0.0, "usd": 0.0}
        for method in self.methods:
            mine = [c for c in self.candidates if (c["method"], c["model"]) == (method["name"], method["model"])]
            parts = [part for c in mine for rung in c["rungs"] for part in (rung, rung["result"])]
            for test in method["tests"]:
                parts += [test["result"], test["text"] or {}, {} if test["trained_before"] else test]
            method["spent"] = {key: sum(part.get(key) or 0.0 for part in parts) for key in total}
            total = {key: total[key] + method["spent"][key] for key in total}
        if self.index:
            total = {key: total[key] + self.index[key] for key in total}
        self.spent = total
        flops = self.budget["flops"]
        self.unspent = {"flops": None if flops is None else flops - total["flops"]}


def load(out: Path) -> Record | None:
    """Loads the record of a folder, or returns None if the folder has no record. Raises UserError if the record has
    another version of the format."""
    if not (out / NAME).exists():
        return None
    found = files.load_json(out / NAME)
    names = {field.name for field in dataclasses.fields(Record)}
    if found.pop("format", None) != FORMAT or found.keys() != names:
        raise UserError("the record was written by a different version", str(out / NAME), "choose a new folder: --out")
    return Record(**found)


def resumed(asked: Record, out: Path) -> Record:
    """Returns the folder's record, with its prices and requests replaced by those of `asked`. If the folder has no
    record, returns `asked`. Raises UserError if any other inputs of the two records differ.
    """
    found = load(out)
    if found is None:
        return asked
    for name in ASKED:
        ours, theirs = getattr(asked, name), getattr(found, name)
        if name in ("task", "budget"):
            keys = ("name", "hash", "content") if name == "task" else ("asked",)
            ours, theirs = ([value[key] for key in keys] for value in (ours, theirs))
        if ours != theirs:
            known = f"with {name.replace('_asked', '')} {theirs}"
            if name == "task":
                known = f"of the task {theirs[0]!r}" if ours[0] != theirs[0] else "of other rows: the file has changed"
            what = f"the folder has another comparison, {known}"
            raise UserError(what, str(out), "choose a new folder: --out")
    if [x["id"] for x in asked.candidates] != [x["id"] for x in found.candidates]:
        raise UserError(
            "the folder was made with other settings for the methods", str(out), "choose a new folder: --out"
        )
    found.prices, found.requests = asked.prices, asked.requests
    return found
