"""What is learned. Each file exposes `make(model, **config) -> Objective`; the keyword arguments are its schema."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

Pair = tuple[Array, Array]  # (sum, weight)


class Objective(NamedTuple):
    """`loss(params, batch, key)` returns metrics as (sum, weight) pairs and minimises the mean of metrics["loss"].

    `params` is {role: tree} for the `roles`: "train" follows the config's `trainable`; "initial" is
    the policy as it was before the first step. When only fresh adapters train, that is `weights.base(policy)`, and the
    role is left out of `params`.
    `batch` names the kind of batch that the loss reads (data.rows.batch.KINDS). An objective's file assigns it to its
    constant BATCH, which the config's rules read too.
    """

    loss: Callable[[Any, dict, Array], dict[str, Pair]]
    batch: str
    roles: dict[str, str] = {"policy": "train"}
