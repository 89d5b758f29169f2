"""Searches the ranges of a config with Optuna. Any number of tools.sweep processes can share the study in
OUT/study.journal.

If one of these processes is killed, another takes over its trial, whose run resumes from its checkpoint.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import exits, files
from common.errors import UserError
from configs.sweeps import Range
from tools.sweep import run as runs
from tools.sweep.run import Child, Point

try:
    import optuna
except ImportError as e:
    raise UserError("the package optuna is not installed", "--search", "pip install -r requirements/search.txt") from e

ETA = 3  # reduction factor of successive halving: at each rung, 1 / ETA of the trials continue


class Search:
    """A queue of flags["trials"] trials. `make` turns the values of a trial into a point, or raises UserError.

    Runs are stopped early by asynchronous successive halving (Li et al. 2020, A System for Massively Parallel
    Hyperparameter Tuning), with rungs at eval_every, ETA * eval_every, ... steps.
    """

    def __init__(self, space: dict[str, Range], make: Callable[[dict], Point], out: Path, flags: dict, config: Any):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", module="optuna")  # hides Optuna's warnings about experimental features
        self.space, self.make, self.out, self.metric = space, make, out, flags["metric"]
        self.sampler, self.trials, self.seed = flags["search"], flags["trials"], config.seed
        pruner = optuna.pruners.NopPruner()
        if config.eval_every:
            pruner = optuna.pruners.SuccessiveHalvingPruner(config.eval_every, reduction_factor=ETA)
        else:
            print("no trial is stopped early, because eval_every is 0")
        direction = "maximize" if flags["maximize"] else "minimize"
        name = f"{direction} {self.metric} over {sorted(space.items())}"  # searches with other ranges get another study
        with runs.alone(out):
            backend = optuna.storages.journal.JournalFileBackend(str(out / "study.journal"))
            storage = optuna.storages.JournalStorage(backend)
            known = dict(storage=storage, study_name=name, load_if_exists=True)
            self.study = optuna.create_study(**known, direction=direction, pruner=pruner)

    def take(self) -> Child | None:
        with runs.alone(self.out):  # without the lock, processes could draw too many trials or the same values
            for frozen in self._running():
                if child := self._start(optuna.trial.Trial(self.study, frozen._trial_id)):
                    return child
            while (drawn := len(self.study.get_trials(deepcopy=False))) < self.trials:
                self.study.sampler = _sampler(self.sampler, self.seed + drawn)
                if child := self._start(self.study.ask({k: _distribution(r) for k, r in self.space.items()})):
                    return child
        return None

    def _running(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING])

    def _start(self, trial: Any) -> Child | None:
        """Starts a trial. If the trial is invalid, or if its point has already ended, reports this to Optuna
        instead."""
        try:
            if trial.params.keys() != self.space.keys():
                raise UserError("Optuna has not sampled all values of the trial")
            point = self.make(trial.params)
        except UserError as e:
            print(f"trial {trial.number}: {e}", flush=True)
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return None
        runs.declare(point, self.out, trial.number)
        child = runs.start(point, self.out, (runs.WAITING, runs.STOPPED), trial)
        found = runs.state(self.out / point.id, point.config.steps)
        if found in runs.ENDED:
            self._tell(trial, point, found)
        return child

    def left(self) -> bool:
        return bool(self._running()) or len(self.study.get_trials(deepcopy=False)) < self.trials

    def hopeless(self, child: Child) -> bool:
        """Whether to stop the run early. Reports the metric's new values to Optuna one by one, because Optuna
        decides at each rung."""
        return self._report(child.trial, child.point)

    def close(self, child: Child, hopeless: bool) -> None:
        runs.finish(child, self.out / child.point.id, hopeless)

    def _report(self, trial: Any, point: Point) -> bool:
        seen = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for step, value in runs.curve(self.out / point.id, self.metric):
            if step > max(seen, default=0) and value is not None:  # at step 0 all trials have the same value
                trial.report(value, step)
                if step < point.config.steps and trial.should_prune():
                    return True
        return False

    def _tell(self, trial: Any, point: Point, state: str) -> None:
        """Reports the end of a trial to Optuna. A run that diverged or fell below a floor is reported as pruned. A run
        that crashed is reported as failed, so Optuna ignores it."""
        states = optuna.trial.TrialState
        self._report(trial, point)
        values = runs.curve(self.out / point.id, self.metric)
        if state == runs.DONE and values and values[-1][1] is not None:
            self.study.tell(trial, values[-1][1])
        else:
            code = files.read_json(self.out / point.id / "ended.json").get("code")
            worst = state in (runs.PRUNED, runs.BELOW) or code == exits.BROKEN
            self.study.tell(trial, state=states.PRUNED if worst else states.FAIL)


def _sampler(name: str, seed: int) -> Any:
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # spreads concurrent trials


def _distribution(r: Range) -> Any:
    kinds = optuna.distributions
    if r.choices:
        return kinds.CategoricalDistribution(r.choices)
    kind = kinds.IntDistribution if isinstance(r.low, int) else kinds.FloatDistribution
    return kind(r.low, r.high, log=r.log)
