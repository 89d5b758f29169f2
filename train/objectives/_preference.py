"""Code that the preference objectives share: log-probabilities of answers, and metrics of preference pairs."""

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
    """Converts a batch of B preference pairs into one batch of 2B rows: first the chosen answers, then the rejected
    answers."""
    return jax.tree.map(lambda c, r: jnp.concatenate([c, r]), batch["chosen"], batch["rejected"])


def reference(roles: Roles) -> Params:
    """The parameters of the reference model, which is the policy before the first step: a frozen copy or, if only new
    adapters train, the policy's base without adapters. These parameters get no gradient."""
    return jax.lax.stop_gradient(roles["ref"] if "ref" in roles else weights.base(roles["policy"]))


def lengths(batch: Batch) -> Array:
    """The number of targets in each row [B]. It is 1 for an empty row, because callers divide by it."""
    return jnp.maximum(batch["mask"].sum(-1), 1)


def has_pair(batch: Batch) -> Array:
    """A weight for each pair [B]: 1.0, or 0.0 for the empty pairs that fill up the last held-out batch."""
    return (batch["chosen"]["mask"] + batch["rejected"]["mask"]).any(-1).astype(jnp.float32)


def figures(chosen: Array, rejected: Array, policy: Array, batch: Batch) -> dict[str, Array]:
    """Metrics of each pair [B]: rewards, log-probabilities and lengths of its two answers. `policy` [2B] holds the
    log-probabilities of the chosen answers, then those of the rejected answers."""
    logp_chosen, logp_rejected = jnp.split(policy, 2)
    length_chosen, length_rejected = jnp.split(lengths(both(batch)), 2)
    return compared(chosen, rejected) | {
        "logp_chosen": logp_chosen,
        "logp_rejected": logp_rejected,
        "length_chosen": length_chosen,
        "length_rejected": length_rejected,
    }


def compared(chosen: Array, rejected: Array) -> dict[str, Array]:
    """Returns metrics of each pair [B], computed from the rewards of its two answers. These are either the implicit
    rewards of a policy, or the outputs of a reward model."""
    return {
        "accuracy": (chosen > rejected).astype(jnp.float32),
        "margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }


def divergence(model: Transformer, roles: Roles, rows: Batch) -> dict[str, Pair]:
    """KL(policy || reference) of the next-token distributions, in nats, averaged over the tokens of the answers in the
    data.

    The KL is exact at each token, but the answers are those in the data, not samples from the policy. For sampled
    answers, use tools.rank --kl.
    """

    def side(params: Params) -> tuple[Transformer, Params, Array]:
        return model, params, model.hidden(params, rows["tokens"], rows["positions"], rows["segments"]).x

    each = head.kl(side(roles["policy"]), side(reference(roles)), rows["mask"])
    return {"kl_per_token": (each.sum(), (rows["mask"] > 0).sum())}


def summed(values: dict[str, Array], weight: Array) -> dict[str, Pair]:
    """Turns metrics of rows [B] into (sum, weight) pairs, where `weight` [B] is the weight of each row."""
    total = weight.sum()
    return {name: ((value * weight).sum(), total) for name, value in values.items()}
