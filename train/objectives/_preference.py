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


def figures(chosen: Array, rejected: Array, policy: Array, batch: Batch) -> dict[str, Array]:
    """Metrics [B] of pairs: their rewards, and log p [2B] and number of tokens of the answers."""
    logp_chosen, logp_rejected = jnp.split(policy, 2)
    length_chosen, length_rejected = jnp.split(lengths(both(batch)), 2)
    return compared(chosen, rejected) | {
        "logp_chosen": logp_chosen,
        "logp_rejected": logp_rejected,
        "length_chosen": length_chosen,
        "length_rejected": length_rejected,
    }


def compared(chosen: Array, rejected: Array) -> dict[str, Array]:
    """Metrics from the rewards [B] of the two answers, a policy's implicit ones or a reward model's."""
    return {
        "accuracy": (chosen > rejected).astype(jnp.float32),
        "margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }


def divergence(model: Transformer, roles: Roles, rows: Batch) -> dict[str, Pair]:
    """KL(policy || reference) of the next token, in nats, a mean over the tokens of the data's answers.

    Exact at these tokens, which are not the policy's own: tools.rank --kl samples those.
    """

    def side(params: Params) -> tuple[Transformer, Params, Array]:
        return model, params, model.hidden(params, rows["tokens"], rows["positions"], rows["segments"]).x

    each = head.kl(side(roles["policy"]), side(reference(roles)), rows["mask"])
    return {"kl_per_token": (each.sum(), (rows["mask"] > 0).sum())}


def summed(values: dict[str, Array], weight: Array) -> dict[str, Pair]:
    """(sum, weight) pairs of metrics [B]."""
    total = weight.sum()
    return {name: ((value * weight).sum(), total) for name, value in values.items()}
