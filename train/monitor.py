"""What a run measures of itself on the way: held-out figures, task scores, samples; and the floors that stop it."""

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
from infer.lm import LM
from train.init import Blueprint
from train.keep import hosts
from train.keep.metrics import Metrics, means
from train.objectives import Pair
from train.source import Batches
from train.state import Roles, TrainState

PASSAGES = 32  # of `eval_text`


class Monitor:
    """Writes the figures of a state, and says which of the config's `floors` they cross.

    Held-out figures are the objective's own metrics, of all its roles, as outside of training: without dropout or
    other noise. The loss of an objective that sets `nll` is called "nll", and "bits_per_byte" stands beside it.
    Samples are written before and after training.
    `verdicts` holds what each evaluation of the run found, those of earlier sessions too: {step: "" or a floor};
    `passed` the steps whose figures crossed none of the floors, where there are any.
    """

    def __init__(
        self, cfg: Config, blueprint: Blueprint, heldout: Batches | None, tokenizer: Tokenizer, metrics: Metrics
    ):
        self.cfg, self.model, self.tokenizer, self.metrics = cfg, blueprint.model, tokenizer, metrics
        kind = blueprint.objective.batch
        fits = heldout and batches.serves(heldout.loader.kind, kind)  # prompts are no rollouts
        self.heldout = heldout if fits else None
        self.texts = _texts(cfg.eval_text)
        self.measure = jax.jit(_measure(blueprint, tokenizer))
        self.first: dict[str, Any] = {}  # figures of step 0
        self.verdicts: dict[int, str] = {}
        self.passed: set[int] = set()
        for line in record.read(metrics.path):
            if line["kind"] == "eval" and all(_key(name) in line for name, _, _ in cfg.floors):
                self._judge(line["step"], line)

    def __call__(self, state: TrainState, step: int) -> str:
        """Measures a state; returns the floor that it crosses in one line, "" for none, the same on all processes.

        Raises UserError when a floor is set for a figure that is not measured.
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
                raise UserError(f"no evaluation gives {name!r}", "config.floors", f"those of this run: {known}")
        self._judge(step, figures)
        return self.verdict(step)

    def verdict(self, step: int) -> str:
        """The floor that an evaluation of this step, perhaps of an earlier session, found crossed; "" for none."""
        found = self.verdicts.get(step, "")
        if not hosts.from_first(bool(found)):
            return ""
        return found or "a floor is crossed"  # only the first process reads what earlier sessions wrote

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
            key = jax.random.fold_in(jax.random.key(self.cfg.seed), i)  # the same draws at every evaluation
            sums = self.measure(roles, self.heldout.batch(i)[0], key)
            total = jax.tree.map(jnp.add, total, sums) if total else sums
        return means(total)

    def _tasks(self, lm: LM, step: int) -> dict[str, float]:
        figures = {}
        for name in self.cfg.evals:
            result = evaluate(name, lm, n=self.cfg.eval_n, seed=self.cfg.seed)
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
    """The figures of a held-out batch as (sum, weight) pairs, to be jitted: the layers are computed once."""
    objective, model = blueprint.objective, blueprint.model

    def measure(roles: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        sums = objective.loss(roles, batch, key)
        if not objective.nll:
            return sums
        lengths = jnp.asarray(texts.byte_lengths(model, tokenizer))
        bits = texts.bits_per_byte(model, roles["policy"], batch, lengths)
        return {"nll" if name == "loss" else name: pair for name, pair in sums.items()} | {"bits_per_byte": bits}

    return measure


def crossed(floor: tuple[str, str, float], figures: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """The floor in one line when `figures` cross it, else "". `first` are those of step 0.

    A figure that is missing or not finite crosses every floor.
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
    """What the loss on general text is measured on. Raises UserError when the source has no long document."""
    if not source:
        return []
    if not (found := texts.passages(source, PASSAGES)):
        raise UserError(f"{source!r} has no text of {2 * texts.PASSAGE} characters", "config.eval_text")
    return found
