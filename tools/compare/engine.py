"""Runs a comparison: successive halving on validation rows, then the test. Every job's result is in the record at once.

Each step asks the record first whether it is done, so a killed comparison takes the same way again and stops where it
was. The decisions follow from recorded scores and FLOPs.
"""

import sys
from pathlib import Path

from common import exits, numbers
from common.errors import UserError
from common.types import Json
from tools.compare import halving, plan, work
from tools.compare.halving import Drop
from tools.compare.inputs import Comparison
from tools.compare.method import Candidate
from tools.compare.plan import Prices
from tools.compare.record import Record
from tools.compare.work import Asked


class Engine:
    """`seconds`: a budget of time, which becomes FLOPs with the rate of the first jobs."""

    def __init__(self, c: Comparison, record: Record, found: list[Candidate], seconds: float | None):
        self.c, self.r, self.found, self.seconds = c, record, found, seconds
        self.flops = Prices(c, len(record.seeds))

    def run(self) -> int:
        try:
            return self._run()
        except work.Stopped:
            print("interrupted; run the same command to continue", file=sys.stderr)
            return exits.PREEMPTED

    def _run(self) -> int:
        if self.c.documents and not self.r.index:
            self.r.index = work.index(self.c)
            self._save()
        if self.seconds and self.r.budget["flops"] is None:
            self._probe()
        alive = self._survivors()
        for x in sorted(alive, key=lambda x: x.trained):
            self._test(x)
        self._learning()
        self._measured()
        self._save()
        return exits.DONE

    def _save(self) -> None:
        self.r.save(self.c.out)

    # --- choosing ---

    def _survivors(self) -> list[Candidate]:
        """One candidate per method that will be tested."""
        alive = [x for x in self.found if not self._failed(x)]
        if not self.r.rungs:
            return list({x.key: x for x in reversed(alive)}.values())[::-1]
        for number, rung in enumerate(self.r.rungs):
            known = next((d for d in self.r.decisions if d["rung"] == number), None)
            if known is None:
                alive, drops = self._afford(alive, number)
                self._rung([x for x in alive if not self._failed(x)], number)
                alive = [x for x in alive if not self._failed(x)]
                alive, more = self._decide(alive, number)
                known = self._decided(number, rung, alive, drops + more)
            alive = [x for x in alive if x.id in known["kept"]]
        return alive

    def _afford(self, alive: list[Candidate], number: int) -> tuple[list[Candidate], list[Drop]]:
        """Drops the methods that the budget cannot pay for. Raises UserError if there is none that it can."""
        budget, rung = self.r.budget["flops"], self.r.rungs[number]
        left = None if budget is None else budget - self.r.spent["flops"]
        score = lambda x: found["mean"] if (found := self._result(x, number - 1)) else -self.found.index(x)
        now = lambda x: 0.0 if self._result(x, number) else self.flops.rung(x, rung, self._result(x, number - 1))
        later = lambda x: self.flops.test(x, 0, self._result(x, number - 1))
        kept, drops = halving.affordable(alive, score, now, later, left)
        if not kept and not number:
            least = min(now(x) + later(x) for x in alive)
            what = (
                f"the budget of {numbers.flops(budget)} is too small: the cheapest method needs {numbers.flops(least)}"
            )
            raise UserError(what, "--budget", "raise it, or bring fewer test rows")
        return kept, drops

    def _decide(self, alive: list[Candidate], number: int) -> tuple[list[Candidate], list[Drop]]:
        last = number == len(self.r.rungs) - 1
        result = lambda x: self._result(x, number)
        if self.r.budget["asked"] == plan.ALL:
            return halving.settings(alive, result, last) if last else (alive, [])
        alive, one = halving.settings(alive, result, last)
        alive, two = halving.methods(alive, result, lambda x: self._result(x, number - 1), last)
        if not last:
            return alive, one + two
        budget = self.r.budget["flops"]
        left = None if budget is None else budget - self.r.spent["flops"]
        later = lambda x: self.flops.test(x, 1, result(x))
        alive, three = halving.affordable(alive, lambda x: result(x)["mean"], lambda x: later(x), lambda x: 0.0, left)
        return alive, one + two + three

    def _decided(self, number: int, rung: Json, alive: list[Candidate], drops: list[Drop]) -> Json:
        """Records a decision, and the reason for each method that has no candidate left."""
        found = {
            "rung": number, "rows": rung["rows"], "share": rung["share"], "kept": [x.id for x in alive],
            "dropped": [{"candidate": drop.candidate.id, "why": drop.why} for drop in drops],
        }  # fmt: skip
        self.r.decisions.append(found)
        for drop in drops:
            if not any(x.key == drop.candidate.key for x in alive):
                self._method(drop.candidate).update(status="stopped", why=drop.why)
            print(f"{drop.candidate.id} stops: {drop.why}", flush=True)
        self._save()
        return found

    # --- measuring ---

    def _rung(self, alive: list[Candidate], number: int) -> None:
        """Measures all candidates on a rung, those that share a command together."""
        groups: dict[tuple, list[Candidate]] = {}
        for x in alive:
            if not self._result(x, number):
                groups.setdefault(work.together(x), []).append(x)
        for group in groups.values():
            self._measure(group, number)

    def _measure(self, group: list[Candidate], number: int) -> None:
        rung, first = self.r.rungs[number], group[0]
        what = Asked("validation", rung["rows"])
        folder = self._folder(group, f"rung{number}")
        stages, commands = [], []
        try:
            if first.trained:
                stage, argv = work.train(self.c, first, rung["train"], self.r.seeds[0], folder)
                stages, commands = [stage], [argv]
            stage, argv = work.ask(self.c, group, what, folder)
            work.do(self.c, f"rung {number + 1} of {len(self.r.rungs)}: {_names(group)}", [*stages, stage])
        except work.Failed as e:
            self._fail(group, str(e))
            return
        flops, seconds = work.spent(folder) if first.trained else (0.0, 0.0)
        for x in group:
            self.r.candidate(x.id)["rungs"].append({
                "rung": number, "result": work.result(x, what, folder), "flops": flops, "seconds": seconds,
                "run": str(folder.relative_to(self.c.out)), "commands": [*commands, argv],
            })  # fmt: skip
        self._save()

    def _test(self, x: Candidate) -> None:
        """Trains a method with every seed, and scores it on the test rows."""
        row = self._method(x)
        row["candidate"] = x.id
        try:
            for seed in self.r.seeds if x.trained else self.r.seeds[:1]:
                if not any(test["seed"] == seed for test in row["tests"]):
                    self._test_seed(x, seed, row)
            row["status"] = "tested"
        except work.Failed as e:
            self._fail([x], str(e))
        self._save()

    def _test_seed(self, x: Candidate, seed: int, row: Json) -> None:
        rungs = self.r.candidate(x.id)["rungs"]
        final = seed == self.r.seeds[0]
        text = final and (x.trained or x.name == halving.BASELINE) and not self.c.bases[x.model].hosted
        what = Asked("test", len(self.c.task.scored["test"]), final, text)
        again = bool(final and rungs and x.trained)  # the last rung has trained on all rows with the first seed
        folder = self.c.out / rungs[-1]["run"] if again else self._folder([x], f"seed{seed}")
        stages, commands = [], []
        if x.trained:
            stage, argv = work.train(self.c, x, len(self.c.task.scored["train"]), seed, folder)
            stages, commands = [stage], [argv]
        stage, argv = work.ask(self.c, [x], what, folder)
        work.do(self.c, f"test: {x.id}, seed {seed}", [*stages, stage])
        found = work.result(x, what, folder) or {}
        flops, seconds = work.spent(folder) if x.trained else (0.0, 0.0)
        run = work.report.read(folder)
        row["tests"].append({
            "seed": seed, "result": found, "flops": flops, "seconds": seconds, "trained_before": again,
            "peak_bytes": run.done.get("peak_rss_bytes"), "run": str(folder.relative_to(self.c.out)),
            "store_bytes": work.report.stored(folder) if x.trained else 0, "text": work.loss(folder) if text else None,
            "commands": [*commands, argv],
        })  # fmt: skip
        if final:
            n = found["n"]
            row["request"] = {
                "flops": (found["flops"] or 0.0) / n,
                "prompt_tokens": found["prompt_tokens"],
                "completion_tokens": found["completion_tokens"],
                "usd": found["usd"] and found["usd"] / n,
                "latency": found["latency"],
            }
        self._save()

    # --- the rest of the record ---

    def _learning(self) -> None:
        """Validation scores of the tested candidates by the number of training rows: the rungs are a learning curve."""
        self.r.learning = []
        for row in (row for row in self.r.methods if row["status"] == "tested" and row["trained"]):
            for rung in self.r.candidate(row["candidate"])["rungs"]:
                point = {key: rung["result"][key] for key in ("mean", "low", "high", "n")}
                point |= {"rows": self.r.rungs[rung["rung"]]["train"], "run": rung["run"]}
                self.r.learning.append({"method": row["name"], "model": row["model"], **point})

    def _measured(self) -> None:
        """Forgetting, and this machine's seconds per FLOP."""
        texts = {
            (row["name"], row["model"]): row["tests"][0]["text"]["loss"]
            for row in self.r.methods
            if row["tests"] and row["tests"][0]["text"]
        }
        for row in self.r.methods:
            before, after = texts.get((halving.BASELINE, row["model"])), texts.get((row["name"], row["model"]))
            known = before is not None and after is not None
            row["forgetting"] = 0.0 if not row["trained"] else after - before if known else None
        if self.r.spent["flops"]:
            self.r.prices[-1]["seconds_per_flop"] = self.r.spent["seconds"] / self.r.spent["flops"]

    def _probe(self) -> None:
        """Turns a budget of time into FLOPs with the rate of the first jobs: prompting, and one training if there is
        one."""
        untrained = [x for x in self.found if not x.trained][:1]
        trained = [x for x in self.found if x.trained][:1]
        first = untrained + trained
        self._rung(first, 0)
        flops = seconds = 0.0
        for x in first:
            if rungs := self.r.candidate(x.id)["rungs"]:
                flops += rungs[0]["flops"] + rungs[0]["result"]["flops"]
                seconds += rungs[0]["result"]["seconds"]
                seconds += work.everything(self.c.out / rungs[0]["run"]) if x.trained else 0.0
        if not flops:
            raise UserError("the first jobs failed, so no rate is known", "--budget", "see the logs, or give FLOPs")
        rate = flops / seconds
        how = f"measured on {self.r.machine['name']}: {_names(first)}"
        self.r.budget |= {"flops": rate * (self.seconds or 0.0), "rate": rate, "rate_from": how}
        self._save()

    def _folder(self, group: list[Candidate], part: str) -> Path:
        key = work.together(group[0])
        name = work.slug("-".join(key) if len(key) == 1 else f"prompting-{'-'.join(key)}")
        folder = self.c.out / "runs" / name / part
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _result(self, x: Candidate, number: int) -> Json | None:
        return next((r["result"] for r in self.r.candidate(x.id)["rungs"] if r["rung"] == number), None)

    def _method(self, x: Candidate) -> Json:
        return next(row for row in self.r.methods if (row["name"], row["model"]) == x.key)

    def _failed(self, x: Candidate) -> bool:
        return "failed" in self.r.candidate(x.id)

    def _fail(self, group: list[Candidate], why: str) -> None:
        """Records a failure of candidates; a method without other candidates has failed."""
        for x in group:
            self.r.candidate(x.id)["failed"] = why
            if all(self._failed(y) for y in self.found if y.key == x.key) or self._method(x)["candidate"] == x.id:
                self._method(x).update(status="failed", why=why)
            print(f"{x.id} failed: {why}", flush=True)
        self._save()


def _names(group: list[Candidate]) -> str:
    return ", ".join(x.id for x in group)
