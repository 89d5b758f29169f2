"""Trains a reward model on ratings of single answers, by regression or by ordinal regression on the rating scale."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import UserError
from data.rows.batch import Batch
from model.net.transformer import Transformer
from train.objectives import Objective, Pair, Role, Roles
from train.objectives._preference import summed
from train.objectives._reward import has_document, rewards

BATCH = "rated"
HEAD = "scalar"


def make(
    model: Transformer, *, loss: Literal["regression", "ordinal"] = "regression", low: float = 1.0, high: float = 5.0
) -> Objective:
    """The loss is averaged over rows. A reward of 0 stands for the middle of the rating scale, which ranges from `low`
    to `high`. A reward of 1 stands for one point above the middle.

    `regression`: the loss is (r - (rating - middle))^2.
    `ordinal`: the loss is the all-threshold logistic loss (Rennie and Srebro 2005, eq. 13). It is a sum over the
    thresholds between adjacent whole ratings: -log sigmoid(r - threshold) if the rating is above the threshold, else
    -log sigmoid(threshold - r).
    """
    middle = (low + high) / 2
    steps = np.arange(low, high) + np.float32(0.5 - middle)

    def compute(roles: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        reward, rating = rewards(model, roles["policy"], batch), batch["rating"] - middle
        off = reward - rating
        if loss == "ordinal":
            sign = jnp.where(rating[:, None] > steps, 1, -1)
            each = -jax.nn.log_sigmoid(sign * (reward[:, None] - steps)).sum(-1)
        else:
            each = off**2
        return summed({"loss": each, "mean_absolute_error": jnp.abs(off)}, has_document(batch))

    def check(columns: Mapping[str, np.ndarray]) -> None:
        found = columns["rating"]
        if len(found) and not low <= found.min() <= found.max() <= high:
            what = f"ratings from {found.min():g} to {found.max():g} do not fit a scale from {low:g} to {high:g}"
            raise UserError(what, "config.objective", "set config.objective.low and config.objective.high")

    return Objective(compute, BATCH, {"policy": Role("train", head=HEAD)}, check=check)
