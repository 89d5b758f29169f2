"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290)."""

import jax
import jax.numpy as jnp
from jax import Array

from data.rows.batch import Batch
from model import weights
from model.net import head
from model.net.transformer import Transformer
from model.weights import Params
from train.objectives import Objective, Pair, Role, Roles

BATCH = "pair"


def make(model: Transformer, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """Eq. 7: -log sigmoid(beta * (log-ratio of the chosen - log-ratio of the rejected)), a mean over pairs.

    The reference is the policy as training found it: the base under a fresh adapter, which costs no memory, else a
    frozen copy that the flow puts at params["ref"].
    `label_smoothing` is cDPO's eps: the share of pairs whose label is thought to be flipped.
    """

    def logps(params: Params, batch: Batch) -> Array:
        """Sum of log p over a row's masked targets [B]."""
        x = model.hidden(params, batch["tokens"], batch["positions"], batch["segments"]).x
        return head.token_logps(model, params, x, batch["targets"], batch["mask"]).sum(-1)

    def loss(params: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        policy = params["policy"]
        ref = jax.lax.stop_gradient(params["ref"] if "ref" in params else weights.base(policy))
        both = jax.tree.map(lambda c, r: jnp.concatenate([c, r]), batch["chosen"], batch["rejected"])
        ratio = logps(policy, both) - logps(ref, both)  # [2B] log pi/pi_ref
        chosen, rejected = jnp.split(ratio, 2)
        there = (batch["chosen"]["mask"] + batch["rejected"]["mask"]).any(-1)
        return preference_loss(chosen, rejected, beta, label_smoothing, there.astype(jnp.float32))

    return Objective(loss, BATCH, {"policy": Role("train"), "ref": Role("initial")})


def preference_loss(
    chosen: Array, rejected: Array, beta: float, label_smoothing: float = 0.0, weight: Array | float = 1.0
) -> dict[str, Pair]:
    """Metrics of log-ratios log(pi/pi_ref) [B] of the chosen and of the rejected answer.

    `weight` [B] is 0 for a row that holds no pair, whose log-ratios are 0.
    """
    margin = beta * (chosen - rejected)
    each = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
    n = jnp.broadcast_to(jnp.float32(weight), margin.shape).sum()
    return {
        "loss": ((each * weight).sum(), n),
        "accuracy": ((margin > 0).sum().astype(jnp.float32), n),
        "margin": (margin.sum(), n),
        "reward_chosen": (beta * chosen.sum(), n),
        "reward_rejected": (beta * rejected.sum(), n),
    }
