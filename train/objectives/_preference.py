"""Shared code of the preference objectives: log-probabilities of answers, and metrics of pairs."""

import jax
import jax.numpy as jnp
from jax import Array

from data.rows.batch import Batch
from model import weights
from model.net import head
from model.net.transformer import Transformer
from model.weights import Params
from train.objectives import Pair, Roles


def logps(model: Transformer, params: Params, batch: Batch) -> Array:
    """Sum of log p over the masked targets of each row [B]."""
    x = model.hidden(params, batch["tokens"], batch["positions"], batch["segments"]).x
    return head.token_logps(model, params, x, batch["targets"], batch["mask"]).sum(-1)


def both(batch: Batch) -> Batch:
    """A pair batch as one lm batch of 2B rows: the chosen answers, then the rejected ones."""
    return jax.tree.map(lambda c, r: jnp.concatenate([c, r]), batch["chosen"], batch["rejected"])


def reference(roles: Roles) -> Params:
    """The policy before the first step: a frozen copy, or the base with its adapters off. No gradient."""
    return jax.lax.stop_gradient(roles["ref"] if "ref" in roles else weights.base(roles["policy"]))


def lengths(batch: Batch) -> Array:
    """Number of targets in each row [B]; at least 1, since it is a divisor."""
    return jnp.maximum(batch["mask"].sum(-1), 1)


def present(batch: Batch) -> Array:
    """1.0 for rows of a pair batch that hold a pair, 0.0 for the empty rows of the last held-out batch [B]."""
    return (batch["chosen"]["mask"] + batch["rejected"]["mask"]).any(-1).astype(jnp.float32)


def summed(values: dict[str, Array], weight: Array) -> dict[str, Pair]:
    """(sum, weight) pairs of metrics [B]."""
    total = weight.sum()
    return {name: ((value * weight).sum(), total) for name, value in values.items()}
