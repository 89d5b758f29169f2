"""Runs a comparison: successive halving on validation rows, then a test of the candidates that are left.

The result of every job is recorded as soon as the job ends, and a job whose result is recorded is skipped. Decisions
depend only on recorded scores and FLOPs. An interrupted comparison can therefore be started again: it repeats its
decisions and resumes where it stopped.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from common import exits, numbers
from common.errors import UserError
from common.types import Json
from tools.compare import bundle, decide, halving, page, plan, work
from tools.compare.decide import Inputs
from tools.compare.halving import Drop
from tools.compare.inputs import Comparison
from tools.compare.method import Candidate
from tools.compare.plan import Prices
from tools.compare.record import Record
from tools.compare.work import Asked
from tools.sweep import emit as clusters
from tools.sweep.run import Point


class Engine:
    """Runs the jobs of a comparison. `seconds` is a time budget. It is converted to FLOPs at the speed that the first
    jobs reach."""

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
        self._index()
        if self.seconds and self.r.budget["flops"] is None:
            self._probe()
        alive = self._survivors()
        alive += [x for x in self._baselines() if x not in alive]
        for group in _groups(sorted(alive, key=lambda x: x.trained)):
            self._test(group)
        if not any(row["status"] == "tested" for row in self.r.methods):
            raise self._nothing()
        self.r.finish()
        self._save()
        self._show()
        return exits.DONE

    def _show(self) -> None:
        """Prints the outcome, and writes the page and the bundle. Raises UserError if nothing was tested."""
        for row in self.r.methods:
            if row["status"] != "tested":
                print(f"{row['label']} ({row['model']}) was {row['status']}: {row['why']}")
        whole = dataclasses.asdict(self.r)
        path = page.write(self.c.out, whole)
        best = decide.decide(whole, Inputs(self.r.requests)).best.record
        print((self.c.out / "decision.md").read_text("utf-8").partition("\n## ")[0].strip())
        print(f"\nthe page: {path}")
        try:
            made = bundle.write(self.c, self.r, next(x for x in self.found if x.id == best["candidate"]), best)
        except work.Failed as e:
            raise UserError(f"the bundle cannot be written: {e}", str(self.c.out)) from e
        if made:
            print(f"the winner: kungfu chat {made}")

    def emit(self, kind: str) -> list[Path]:
        """Writes files that run the next training jobs on a cluster. Once they have ended, `run` finds the trained
        models and scores them."""
        if self.seconds:
            raise UserError("--emit needs a budget in FLOPs", "--budget", "give FLOPs instead of a time")
        self._index()
        points = []
        for x, rows, seed, part in self._trainings():
            folder = self._folder([x], part)
            argv = work.train(self.c, x, rows, seed, folder)[1]
            points.append(Point(folder.name, {"candidate": x.id, "seed": seed}, argv[1:-1], None))
        if not points:
            raise UserError("no training job is due next", "--emit", "run the command without it")
        return clusters.write(kind, points, self.c.out / "runs")

    def _trainings(self) -> list[tuple[Candidate, int, int, str]]:
        """Returns one tuple (candidate, number of training rows, seed, suffix of the run folder's name) per training
        run of the next rung or, after the last rung, of the test."""
        alive, seeds = [x for x in self.found if not self._failed(x)], self.r.seeds
        for number, rung in enumerate(self.r.rungs):
            if number == len(self.r.decisions):
                self._enter(alive, number)
            decision = self.r.decisions[number]
            if decision["kept"] is None:
                entered = self._known(decision["entered"])
                left = [x for x in entered if x.trained and not self._result(x, number)]
                return [(x, rung["train"], seeds[0], f"rung{number}") for x in left]
            alive = self._known(decision["kept"])
        if self.r.rungs:
            seeds = seeds[1:]  # in the last rung, candidates were already trained with the first seed on all rows
        every = [x for x in (alive if self.r.rungs else halving.first(self.found)) if x.trained]
        return [(x, len(self.c.task.scored["train"]), seed, f"seed{seed}") for x in every for seed in seeds]

    def _index(self) -> None:
        if self.r.index:
            work.check_documents(self.c)
        elif self.c.documents:
            self.r.index = work.index(self.c)
            self._save()

    def _save(self) -> None:
        self.r.save(self.c.out)

    def _say(self, text: str) -> None:
        print(text, flush=True)

    # --- choosing ---

    def _survivors(self) -> list[Candidate]:
        """Runs all rungs, and returns the candidates that will be tested, one per method."""
        alive = [x for x in self.found if not self._failed(x)]
        if not self.r.rungs:
            return [x for x in halving.first(self.found) if not self._failed(x)]
        for number in range(len(self.r.rungs)):
            if number == len(self.r.decisions):
                self._enter(alive, number)
            decision = self.r.decisions[number]
            if decision["kept"] is None:
                alive = self._known(decision["entered"])
                self._rung(alive, number)
                self._decide([x for x in alive if not self._failed(x)], number)
            alive = self._known(decision["kept"])
        return alive

    def _known(self, names: list[str]) -> list[Candidate]:
        return [x for x in self.found if x.id in names and not self._failed(x)]

    def _enter(self, alive: list[Candidate], number: int) -> None:
        """Begins a rung: before any FLOPs are spent on it, records which candidates enter it."""
        rung = self.r.rungs[number]
        waiting = self._waiting(number)
        alive = [x for x in alive if x not in waiting]
        decision = {"rung": number, "rows": rung["rows"], "share": rung["share"], "dropped": []}
        if self._must_skip(alive, number):
            kept = [x.id for x in [*alive, *waiting]]
            self.r.decisions.append(decision | {"entered": [], "kept": kept})
            self._say(f"rung {number + 1} is skipped: the budget pays only for the last rung")
            self._save()
            return
        alive, drops = self._afford(alive, number)
        self.r.decisions.append(decision | {"entered": [x.id for x in alive], "kept": None})
        self._drop(alive, drops, number)

    def _waiting(self, number: int) -> list[Candidate]:
        """Returns the candidates that join only after a rung."""
        if self.r.budget["asked"] == plan.ALL:
            return []
        rungs = len(self.r.rungs)
        return [x for x in self.found if halving.joining(x, self.found, rungs) > number and not self._failed(x)]

    def _must_skip(self, alive: list[Candidate], number: int) -> bool:
        """Whether a rung between the first and the last is left out, because the candidate with the best score could
        otherwise not be trained on all rows."""
        left = self._left()
        if left is None or not 0 < number < len(self.r.rungs) - 1:
            return False
        cost = lambda x: self._now(x, number) + self._later(x, number)
        return cost(halving.leader(alive, lambda x: self._latest(x, number - 1), cost)) > left

    def _afford(self, alive: list[Candidate], number: int) -> tuple[list[Candidate], list[Drop]]:
        """Drops the methods for which the budget is too small. Raises UserError if the budget is too small for every
        method."""
        result = lambda x: self._latest(x, number - 1)
        now, later = (lambda x, f=f: f(x, number) for f in (self._now, self._later))
        share = 1 / (len(self.r.rungs) - number)  # each rung gets the same share of the budget
        kept, drops = halving.affordable(alive, result, now, later, self._left(), share, must=number > 0)
        if not kept:
            least = min(now(x) + later(x) for x in alive)
            cheapest, budget = numbers.flops(least), numbers.flops(self.r.budget["flops"])
            what = f"the budget of {budget} is too small: the cheapest method needs {cheapest}"
            raise UserError(what, "--budget", "raise it, or use fewer test rows")
        return kept, drops

    def _now(self, x: Candidate, number: int) -> float:
        """Returns the FLOPs that a candidate needs in a rung."""
        if self._result(x, number):
            return 0.0
        return self.flops.rung(x, self.r.rungs[number], self._latest(x, number - 1))

    def _later(self, x: Candidate, number: int) -> float:
        """Returns the FLOPs that a candidate needs after a rung: those of the last rung and of the test."""
        last = len(self.r.rungs) - 1
        test = self._test_flops(x, self._latest(x, number - 1))
        return test + (self._now(x, last) if number < last else 0.0)

    def _test_flops(self, x: Candidate, result: Json | None) -> float:
        """Returns the FLOPs to reserve for a candidate's test. For the baseline, `_left` reserves them."""
        return 0.0 if x.name == halving.BASELINE else self.flops.test(x, 1, result)

    def _decide(self, alive: list[Candidate], number: int) -> None:
        """Ends a rung: records which candidates are kept, and why the other candidates are dropped."""
        if not alive:
            raise self._nothing()
        last = number == len(self.r.rungs) - 1
        result = lambda x: self._result(x, number)
        one, two, three = [], [], []
        if self.r.budget["asked"] != plan.ALL or last:
            alive, one = halving.settings(alive, result, last)
        if self.r.budget["asked"] != plan.ALL:
            alive, two = halving.methods(alive, result, lambda x: self._latest(x, number - 1), last)
        if last:
            test = lambda x: self._test_flops(x, result(x))
            alive, three = halving.affordable(alive, result, test, lambda x: 0.0, self._left(), must=True)
        known = {x.key for x in alive}
        waiting = [x for x in self._waiting(number) if x.key in known]
        self.r.decisions[number]["kept"] = [x.id for x in [*alive, *waiting]]
        self._drop(alive, one + two + three, number)

    def _drop(self, alive: list[Candidate], drops: list[Drop], number: int) -> None:
        """Records why each candidate was dropped, and marks methods without remaining candidates as stopped."""
        self.r.decisions[number]["dropped"] += [{"candidate": drop.candidate.id, "why": drop.why} for drop in drops]
        for drop in drops:
            if not any(x.key == drop.candidate.key for x in alive):
                self._method(drop.candidate).update(status="stopped", why=drop.why)
            self._say(f"{drop.candidate.id} stops: {drop.why}")
        self._save()

    def _left(self) -> float | None:
        """Returns the FLOPs left in the budget for the search, or None if no budget is set. The FLOPs for testing the
        baselines are not counted as left."""
        left = self.r.unspent["flops"]
        test = lambda x: self.flops.test(x, 1, self._latest(x, len(self.r.rungs)))
        return None if left is None else left - sum(map(test, self._baselines()))

    def _baselines(self) -> list[Candidate]:
        """Returns one baseline per model, which is tested even if it is dropped from the search."""
        return [x for x in halving.first(self.found) if x.name == halving.BASELINE and not self._failed(x)]

    # --- measuring ---

    def _rung(self, alive: list[Candidate], number: int) -> None:
        """Trains and scores the candidates of a rung. Those that can share a command are scored together."""
        for group in _groups([x for x in alive if not self._result(x, number)]):
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
            self._failing(group, str(e), lambda x: self._measure([x], number))
            return
        flops, seconds = work.spent(folder) if first.trained else (0.0, 0.0)
        for x in group:
            self.r.candidate(x.id)["rungs"].append({
                "rung": number, "result": work.result(x, what, folder), "flops": flops, "seconds": seconds,
                "run": str(folder.relative_to(self.c.out)), "commands": [*commands, argv],
            })  # fmt: skip
        self._save()

    def _test(self, group: list[Candidate]) -> None:
        """Scores candidates on the test rows. A candidate that needs training shares its command with no other, and is
        tested once per seed. Other candidates can share a command."""
        first = group[0]
        for x in group:
            self._method(x)["candidate"] = x.id
        try:
            for seed in self.r.seeds if first.trained else self.r.seeds[:1]:
                left = [x for x in group if not any(test["seed"] == seed for test in self._method(x)["tests"])]
                if left:
                    self._test_seed(left, seed)
            for x in group:
                self._method(x).update(status="tested", why="")
        except work.Failed as e:
            self._failing(group, str(e), lambda x: self._test([x]))
        self._save()

    def _test_seed(self, group: list[Candidate], seed: int) -> None:
        first = group[0]
        rungs = self.r.candidate(first.id)["rungs"]
        final = seed == self.r.seeds[0]
        named = [x for x in group if final and not self.c.bases[x.model].hosted]
        text = [x.id for x in named if x.trained or x.name == halving.BASELINE]
        what = Asked("test", len(self.c.task.scored["test"]), final, bool(text))
        # In the last rung, the candidate was already trained with the first seed on all rows.
        again = bool(final and rungs and first.trained)
        folder = self.c.out / rungs[-1]["run"] if again else self._folder(group, f"seed{seed}")
        stages, commands = [], []
        if first.trained:
            stage, argv = work.train(self.c, first, len(self.c.task.scored["train"]), seed, folder)
            stages, commands = [stage], [argv]
        stage, argv = work.ask(self.c, group, what, folder)
        work.do(self.c, f"test: {_names(group)}, seed {seed}", [*stages, stage])
        flops, seconds = work.spent(folder) if first.trained else (0.0, 0.0)
        for x in group:
            found, row = work.result(x, what, folder) or {}, self._method(x)
            row["tests"].append({
                "seed": seed,
                "result": found,
                "flops": flops,
                "seconds": seconds,
                "trained_before": again,
                "peak_bytes": work.report.read(folder).done.get("peak_rss_bytes"),
                "store_bytes": work.report.stored(folder) if x.trained else 0,
                "text": work.loss(folder) if x.id in text else None,
                "run": str(folder.relative_to(self.c.out)),
                "commands": [*commands, argv],
            })  # fmt: skip
            row["request"] = row["request"] or _request(found)
        self._save()

    def _probe(self) -> None:
        """Converts a time budget to FLOPs. To measure the machine's speed, runs the first candidate that needs no
        training and the first that does, where they exist."""
        untrained = [x for x in self.found if not x.trained][:1]
        trained = [x for x in self.found if x.trained][:1]
        first = untrained + trained
        self._rung(first, 0)
        flops = seconds = 0.0
        for x in first:
            if rungs := self.r.candidate(x.id)["rungs"]:
                flops += rungs[0]["flops"] + (rungs[0]["result"]["flops"] or 0.0)
                seconds += rungs[0]["result"]["seconds"]
                seconds += work.everything(self.c.out / rungs[0]["run"]) if x.trained else 0.0
        if not flops:
            raise UserError("the first jobs failed, so the speed is unknown", "--budget", "see the logs, or give FLOPs")
        rate = flops / seconds
        how = f"measured on {self.r.machine['name']}: {_names(first)}"
        self.r.budget |= {"flops": rate * (self.seconds or 0.0), "rate": rate, "rate_from": how}
        self._save()

    def _folder(self, group: list[Candidate], part: str) -> Path:
        key = work.together(group[0])
        name = work.slug("-".join([*(["prompting"] if len(key) > 1 else []), *key, part]))
        folder = self.c.out / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _result(self, x: Candidate, number: int) -> Json | None:
        """Returns the candidate's result for a rung, or None if there is none yet. An untrained candidate answers the
        same in every rung, so a result of an earlier rung with the same validation rows also counts."""
        rows = lambda rung: self.r.rungs[rung]["rows"]
        same = lambda rung: rung == number or (not x.trained and rung < number and rows(rung) == rows(number))
        return next((r["result"] for r in self.r.candidate(x.id)["rungs"] if same(r["rung"])), None)

    def _latest(self, x: Candidate, number: int) -> Json | None:
        """Returns the candidate's newest result up to a rung, or None if there is none."""
        found = [r["result"] for r in self.r.candidate(x.id)["rungs"] if r["rung"] <= number]
        return found[-1] if found else None

    def _method(self, x: Candidate) -> Json:
        return next(row for row in self.r.methods if (row["name"], row["model"]) == x.key)

    def _failed(self, x: Candidate) -> bool:
        return "failed" in self.r.candidate(x.id)

    def _nothing(self) -> UserError:
        why = [x["failed"] for x in self.r.candidates if "failed" in x]
        return UserError(f"every method failed: {why[-1] if why else 'none was left'}", str(self.c.out), "see its logs")

    def _failing(self, group: list[Candidate], why: str, again: Callable[[Candidate], None]) -> None:
        """Handles a failed command. If several candidates shared it, retries them one by one. Otherwise records that
        the candidate failed. The method fails, too, if none of its candidates is left or if the candidate was the one
        chosen for the test."""
        if len(group) > 1:
            for x in group:
                again(x)
            return
        [x] = group
        self.r.candidate(x.id)["failed"] = why
        if all(self._failed(y) for y in self.found if y.key == x.key) or self._method(x)["candidate"] == x.id:
            self._method(x).update(status="failed", why=why)
        print(f"{x.id} failed: {why}", flush=True)
        self._save()


def _groups(found: list[Candidate]) -> list[list[Candidate]]:
    """Groups the candidates that can share a command."""
    groups: dict[tuple, list[Candidate]] = {}
    for x in found:
        groups.setdefault(work.together(x), []).append(x)
    return list(groups.values())


def _request(result: Json) -> Json:
    """Computes the average cost of a request from a test result."""
    n, usd = result["n"], result["usd"]
    return {
        "flops": (result["flops"] or 0.0) / n,
        "prompt_tokens": result["prompt_tokens"],
        "completion_tokens": result["completion_tokens"],
        "usd": None if usd is None else usd / n,
        "latency": result["latency"],
    }


def _names(group: list[Candidate]) -> str:
    return ", ".join(x.id for x in group)
