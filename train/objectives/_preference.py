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
    """The log-probability [B] of each row's answer: the sum of log p over the targets that count in the loss."""
    x = model.hidden(params, batch["tokens"], batch["positions"], batch["segments"]).x
    return head.token_logps(model, params, x, batch["targets"], batch["mask"]).sum(-1)


def both(batch: Batch) -> Batch:
    """A pair batch as one lm batch of 2B rows: the chosen answers, then the rejected answers."""
    return jax.tree.map(lambda c, r: jnp.concatenate([c, r]), batch["chosen"], batch["rejected"])


def reference(roles: Roles) -> Params:
    """The policy before the first step: a frozen copy, or the base with its adapters off. It gets no gradient."""
    return jax.lax.stop_gradient(roles["ref"] if "ref" in roles else weights.base(roles["policy"]))


def lengths(batch: Batch) -> Array:
    """Number of targets in each row [B]; at least 1, since it is a divisor."""
    return jnp.maximum(batch["mask"].sum(-1), 1)


def present(batch: Batch) -> Array:
    """An array [B]: 1.0 for rows that hold a pair, 0.0 for the empty rows that the last held-out batch may have."""
    return (batch["chosen"]["mask"] + batch["rejected"]["mask"]).any(-1).astype(jnp.float32)


def figures(chosen: Array, rejected: Array, policy: Array, batch: Batch) -> dict[str, Array]:
    """Metrics [B] of pairs: the rewards, log-probabilities (`policy` [2B], chosen answers first) and lengths of both
    answers."""
    logp_chosen, logp_rejected = jnp.split(policy, 2)
    length_chosen, length_rejected = jnp.split(lengths(both(batch)), 2)
    return compared(chosen, rejected) | {
        "logp_chosen": logp_chosen,
        "logp_rejected": logp_rejected,
        "length_chosen": length_chosen,
        "length_rejected": length_rejected,
    }


def compared(chosen: Array, rejected: Array) -> dict[str, Array]:
    """Metrics [B] of pairs from the rewards of both answers: implicit rewards of a policy, or rewards of a reward
    model."""
    return {
        "accuracy": (chosen > rejected).astype(jnp.float32),
        "margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }


def divergence(model: Transformer, roles: Roles, rows: Batch) -> dict[str, Pair]:
    """KL(policy || reference) of the next-token distributions, in nats, averaged over the tokens of the data's answers.

    The KL is exact at each token, but the answers come from the data; tools.rank --kl samples answers from the policy.
    """

    def side(params: Params) -> tuple[Transformer, Params, Array]:
        return model, params, model.hidden(params, rows["tokens"], rows["positions"], rows["segments"]).x

    each = head.kl(side(roles["policy"]), side(reference(roles)), rows["mask"])
    return {"kl_per_token": (each.sum(), (rows["mask"] > 0).sum())}


def summed(values: dict[str, Array], weight: Array) -> dict[str, Pair]:
    """Turns metrics [B] into (sum, weight) pairs."""
    total = weight.sum()
    return {name: ((value * weight).sum(), total) for name, value in values.items()}
