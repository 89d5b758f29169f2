"""Evaluates a run in progress (held-out metrics, task scores, samples) and stops it when a metric crosses a limit."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from common import record
from common.errors import UserError
from common.numbers import number
from common.types import Config
from data.rows import batch as batches
from data.rows.batch import Batch
from data.text.tokenizer import Tokenizer
from evals import heldout as texts
from evals.run import evaluate
from evals.task import Task
from infer.lm import LM
from train.init import Blueprint
from train.keep import hosts
from train.keep.metrics import Metrics, means
from train.objectives import Pair
from train.source import Batches
from train.state import Roles, TrainState

PASSAGES = 32  # number of passages that are taken from `eval_text`


class Monitor:
    """Evaluates states, writes their metrics, and reports which limits in the config's `floors` the metrics cross.

    Held-out metrics are the objective's metrics on held-out batches, without dropout or other noise. If the objective
    sets `nll`, its held-out loss is named "nll", and the metric "bits_per_byte" is added. Answers to the prompts in the
    config's `samples` are written before and after training.
    `verdicts` holds the result of each evaluation of the run, in this and earlier sessions: {step: the floor that was
    crossed, or "" if none was}. If the config has floors, `passed` holds the steps at which no floor was crossed.
    """

    def __init__(
        self,
        cfg: Config,
        blueprint: Blueprint,
        heldout: Batches | None,
        tokenizer: Tokenizer,
        metrics: Metrics,
        tasks: Mapping[str, Task],
    ):
        self.tasks = tasks
        self.cfg, self.model, self.tokenizer, self.metrics = cfg, blueprint.model, tokenizer, metrics
        kind = blueprint.objective.batch
        fits = heldout and batches.serves(heldout.loader.kind, kind)  # False if the data are prompts for sampling
        self.heldout = heldout if fits else None
        self.texts = _texts(cfg.eval_text)
        self.measure = jax.jit(_measure(blueprint, tokenizer))
        self.first: dict[str, Any] = {}  # the metrics of step 0
        self.verdicts: dict[int, str] = {}
        self.passed: set[int] = set()
        for line in record.read(metrics.path):
            if line["kind"] == "eval" and all(_key(name) in line for name, _, _ in cfg.floors):
                self._judge(line["step"], line)

    def __call__(self, state: TrainState, step: int) -> str:
        """Evaluates a state. Returns one line about the floor that was crossed, or "" if none was crossed. All
        processes agree on whether a floor was crossed.

        Raises UserError when a floor names a metric that is not measured.
        """
        with self.metrics.timer("eval"):
            lm = LM(self.model, state.role("policy"), self.tokenizer)
            figures = self._heldout(state) | self._tasks(lm, step) | self._general(lm)
            if figures:
                self.metrics.write(step, "eval", **figures)
            if step in (0, self.cfg.steps):
                self._samples(lm, step)
        for name, _, _ in self.cfg.floors:
            if _key(name) not in figures:
                known = ", ".join(f"eval/{key}" for key in figures) or "none"
                raise UserError(f"no evaluation measures {name!r}", "config.floors", f"measured: {known}")
        self._judge(step, figures)
        return self.verdict(step)

    def verdict(self, step: int) -> str:
        """Returns the floor that a metric crossed when this step was evaluated, in this or an earlier session, or "" if
        none was crossed."""
        found = self.verdicts.get(step, "")
        if not hosts.broadcast(bool(found)):
            return ""
        return found or "a floor was crossed"  # only the first process reads the metrics of earlier sessions

    def _judge(self, step: int, figures: dict[str, Any]) -> None:
        if step == 0:
            self.first = figures
        lines = (crossed(floor, figures, self.first) for floor in self.cfg.floors)
        self.verdicts[step] = next(filter(None, lines), "")
        if self.cfg.floors and not self.verdicts[step]:
            self.passed.add(step)

    def _heldout(self, state: TrainState) -> dict[str, float]:
        if self.heldout is None:
            return {}
        roles = state.roles
        total: dict[str, Pair] = {}
        for i in range(min(self.cfg.eval_batches, self.heldout.loader.num_batches)):
            key = jax.random.fold_in(jax.random.key(self.cfg.seed), i)  # the same noise at every evaluation
            sums = self.measure(roles, self.heldout.batch(i)[0], key)
            total = jax.tree.map(jnp.add, total, sums) if total else sums
        return means(total)

    def _tasks(self, lm: LM, step: int) -> dict[str, float]:
        figures = {}
        for name, task in self.tasks.items():
            result = evaluate(task, lm, n=self.cfg.eval_n, seed=self.cfg.seed, name=name)
            figures[name] = result.mean
            self.metrics.write(step, "task", **result.to_dict())
        return figures

    def _general(self, lm: LM) -> dict[str, float]:
        return {"text_nll": lm.loss(self.texts)[0]} if self.texts else {}

    def _samples(self, lm: LM, step: int) -> None:
        prompts = list(self.cfg.samples)
        for prompt, answer in zip(prompts, lm.answer(prompts) if prompts else [], strict=True):
            self.metrics.write(step, "sample", prompt=prompt, answer=answer)


def _measure(blueprint: Blueprint, tokenizer: Tokenizer) -> Callable[[Roles, Batch, Array], dict[str, Pair]]:
    """Returns a function that computes the metrics of a held-out batch as (sum, weight) pairs. If several metrics need
    the same forward pass, XLA runs it only once, since the function is jitted as a whole."""
    objective, model = blueprint.objective, blueprint.model

    def measure(roles: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        sums = objective.loss(roles, batch, key)
        if objective.heldout:
            sums |= objective.heldout(roles, batch)
        if not objective.nll:
            return sums
        lengths = jnp.asarray(texts.byte_lengths(model, tokenizer))
        bits = texts.bits_per_byte(model, roles["policy"], batch, lengths)
        return {"nll" if name == "loss" else name: pair for name, pair in sums.items()} | {"bits_per_byte": bits}

    return measure


def crossed(floor: tuple[str, str, float], figures: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """Returns one line about the floor if the metrics in `figures` cross it, else "". `first` holds the metrics of step
    0.

    A metric that is missing or not finite crosses every floor.
    """
    name, sign, bound = floor
    now, start = (_finite(values.get(_key(name))) for values in (figures, first))
    limit = {"drop": start - bound, "rise": start + bound}.get(sign, bound)
    low = sign in (">=", "drop")
    if now >= limit if low else now <= limit:
        return ""
    why = f": it was {number(start)} at step 0 and may {sign} by {number(bound)}" if sign in ("drop", "rise") else ""
    return f"{name} is {number(now)}, {'below' if low else 'above'} {number(limit)}{why}"


def _key(figure: str) -> str:
    return figure.removeprefix("eval/")


def _finite(x: float | None) -> float:
    return x if x is not None and math.isfinite(x) else math.nan


def _texts(source: str) -> list[str]:
    """Returns the passages on which the loss on general text is measured. Raises UserError if no text of the source is
    long enough."""
    if not source:
        return []
    if not (found := texts.passages(source, PASSAGES)):
        raise UserError(f"{source!r} has no text of at least {2 * texts.PASSAGE} characters", "config.eval_text")
    return found
