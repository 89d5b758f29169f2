"""Contrastive preference optimization (Xu et al. 2024, arXiv 2401.08417), which needs no reference model."""

import jax
import jax.numpy as jnp
from jax import Array

from data.rows.batch import Batch
from model.net.transformer import Transformer
from train.objectives import Objective, Pair, Roles
from train.objectives._preference import both, figures, has_pair, logps, summed

BATCH = "pair"


def make(model: Transformer, *, beta: float = 0.1, sft_weight: float = 1.0) -> Objective:
    """The loss is (eq. 5) -log sigmoid(beta (log p of the chosen answer - log p of the rejected answer)), averaged over
    pairs, plus `sft_weight` times the negative log-likelihood of the chosen answers, averaged over their tokens."""

    def compute(roles: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        policy = logps(model, roles["policy"], both(batch))
        chosen, rejected = jnp.split(policy, 2)
        there = has_pair(batch)
        # `nll` must be a mean over tokens, but `summed` divides by the number of pairs. Therefore multiply by that
        # number first.
        tokens = batch["chosen"]["mask"].sum()
        nll = -chosen * there.sum() / jnp.maximum(tokens, 1)
        values = {"loss": -jax.nn.log_sigmoid(beta * (chosen - rejected)) + sft_weight * nll, "nll": nll}
        return summed(values | figures(beta * chosen, beta * rejected, policy, batch), there)

    return Objective(compute, BATCH)
