"""Simple preference optimization (Meng et al. 2024, arXiv 2405.14734), which needs no reference model."""

import jax
import jax.numpy as jnp
from jax import Array

from data.rows.batch import Batch
from model.net.transformer import Transformer
from train.objectives import Objective, Pair, Roles
from train.objectives._preference import both, figures, has_pair, lengths, logps, summed

BATCH = "pair"


def make(model: Transformer, *, beta: float = 2.0, gamma: float = 1.0) -> Objective:
    """The loss is (eq. 6) -log sigmoid(beta (mean log p of the chosen answer - mean log p of the rejected answer) -
    gamma), averaged over pairs.

    `gamma` is the target reward margin.
    """

    def compute(roles: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        rows = both(batch)
        policy = logps(model, roles["policy"], rows)
        chosen, rejected = jnp.split(beta * policy / lengths(rows), 2)
        values = {"loss": -jax.nn.log_sigmoid(chosen - rejected - gamma)} | figures(chosen, rejected, policy, batch)
        return summed(values, has_pair(batch))

    return Objective(compute, BATCH)
