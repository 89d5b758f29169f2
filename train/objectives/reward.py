"""Trains a reward model on preference pairs (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1)."""

import jax
import jax.numpy as jnp
from jax import Array

from data.rows.batch import Batch
from model.net.transformer import Transformer
from train.objectives import Objective, Pair, Role, Roles
from train.objectives._preference import both, compared, summed
from train.objectives._reward import has_document, rewards

BATCH = "pair"
HEAD = "scalar"


def make(model: Transformer, *, center: float = 0.0) -> Objective:
    """The loss is -log sigmoid(r_chosen - r_rejected - margin), averaged over pairs.

    `margin` is a column of the data (Touvron et al. 2023, arXiv 2307.09288, eq. 2), or 0 if the data lack this column.
    A pair whose column `tie` is 1 counts as half a win and half a loss, and is left out of the accuracy. `center` times
    (r_chosen + r_rejected)^2 is added to the loss, which keeps rewards around 0 (Eisenstein et al. 2023, arXiv
    2312.09244, eq. 2).
    """

    def compute(roles: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        chosen, rejected = jnp.split(rewards(model, roles["policy"], both(batch)), 2)
        side = batch["chosen"]
        won = jnp.where(side.get("tie", jnp.zeros_like(chosen)) > 0, 0.5, 1.0)
        h = chosen - rejected - side.get("margin", 0.0)
        each = -won * jax.nn.log_sigmoid(h) - (1 - won) * jax.nn.log_sigmoid(-h)
        values = compared(chosen, rejected)
        there = has_document(side)
        decided = there * (won == 1)
        accuracy = summed({"accuracy": values.pop("accuracy")}, decided)
        return summed({"loss": each + center * (chosen + rejected) ** 2} | values, there) | accuracy

    return Objective(compute, BATCH, {"policy": Role("train", head=HEAD)})
