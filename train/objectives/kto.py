"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306), which learns from single answers labeled
good or bad."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import UserError
from data.rows.batch import Batch
from model.net.transformer import Transformer
from train.objectives import Objective, Pair, Role, Roles
from train.objectives._preference import divergence, lengths, logps, reference, summed

BATCH = "labelled"


def make(
    model: Transformer, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Objective:
    """The loss (eq. 7 and 8) is weight (1 - sigmoid(beta (r - z))) for a good answer (label 1) and weight (1 -
    sigmoid(beta (z - r))) for a bad answer (label 0), averaged over rows.

    r is a row's log-ratio log(pi / pi_ref). z estimates KL(policy || reference), without a gradient: it is the mean
    log-ratio of mismatched rows (each prompt with the answer of the previous row), or 0 if that mean is negative. z is
    computed per micro-batch, over all devices. Raises UserError for micro-batches of a single row, because they have no
    mismatched rows.
    """

    def compute(roles: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        if len(batch["label"]) < 2:
            what = "KTO estimates its KL on mismatched rows, but a micro-batch has only one row"
            raise UserError(what, "data.batch_size", "raise it, or lower accum")
        policy, ref = roles["policy"], reference(roles)
        other = mismatched(batch)
        shift = logps(model, jax.lax.stop_gradient(policy), other) - logps(model, ref, other)
        paired = other["mask"].any(-1)
        z = jnp.maximum(jnp.where(paired, shift, 0).sum() / jnp.maximum(paired.sum(), 1), 0)
        logp = logps(model, policy, batch)
        ratio = logp - logps(model, ref, batch)
        good, there = batch["label"] > 0, batch["mask"].any(-1).astype(jnp.float32)
        each = 1 - jax.nn.sigmoid(beta * jnp.where(good, ratio - z, z - ratio))
        values = {"loss": jnp.where(good, desirable_weight, undesirable_weight) * each, "kl": jnp.full_like(ratio, z)}
        found = summed(values, there)
        for side, weight in (("chosen", there * good), ("rejected", there * ~good)):
            each = {"reward": beta * ratio, "logp": logp, "length": lengths(batch)}
            found |= summed({f"{name}_{side}": value for name, value in each.items()}, weight)
        return found

    def heldout(roles: Roles, batch: Batch) -> dict[str, Pair]:
        return divergence(model, roles, batch)

    def check(columns: Mapping[str, np.ndarray]) -> None:
        good = int((columns["label"] > 0).sum())
        if good in (0, len(columns["label"])):
            what = f"all {len(columns['label'])} answers are labeled {'good' if good else 'bad'}"
            raise UserError(what, "data.source", "KTO learns from both labels: add answers with the other one")

    return Objective(compute, BATCH, {"policy": Role("train"), "ref": Role("initial")}, check=check, heldout=heldout)


def mismatched(batch: Batch) -> Batch:
    """Makes rows [B,T] in which each prompt is followed by the answer of the previous row, and the first prompt by the
    answer of the last row. Each row has one document.

    An answer begins at the first target that counts in the loss and ends with the document. An answer that does not fit
    into its new row is truncated.
    """
    width = batch["tokens"].shape[1]
    at = jnp.arange(width)
    here = jnp.where(batch["mask"].any(-1), batch["mask"].argmax(-1), width)[:, None]  # the prompt's last position
    there = jnp.roll(here, 1, axis=0)
    slot = at - here + there  # where each position is copied from: its position in the previous row
    fits = (at >= here) & (slot < width)

    def moved(x: Array, empty: int = 0) -> Array:
        other_row = jnp.take_along_axis(jnp.roll(x, 1, axis=0), jnp.clip(slot, 0, width - 1), axis=1)
        return jnp.where(fits, other_row, empty)

    prompt = at <= here  # the prompt's last position keeps its token, but its target is the new answer's first token
    segments = jnp.where(prompt, batch["segments"], moved(batch["segments"]))
    return batch | {
        "tokens": jnp.where(prompt, batch["tokens"], moved(batch["tokens"])),
        "targets": jnp.where(at < here, batch["targets"], moved(batch["targets"])),
        "mask": moved(batch["mask"]),
        "segments": segments,
        "positions": jnp.where(segments > 0, at, 0),
    }
