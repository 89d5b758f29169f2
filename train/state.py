"""The state of a run: everything a step reads and writes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array


@flax.struct.dataclass
class TrainState:
    """`params` and `frozen` are {role: tree}: the same tree twice, with None in each other's places.

    Only `params` is differentiated, has optimizer state and goes into a checkpoint; `frozen` is derived again from the
    config. Every random number of step n comes from fold_in(seed, n).
    """

    step: Array  # int32
    params: Any
    frozen: Any
    opt_state: Any
    seed: Array  # uint32
    bad: Array  # int32: non-finite steps in a row, each skipped
    skipped: Array  # int32: all of them

    @classmethod
    def create(cls, params: Any, frozen: Any, tx: optax.GradientTransformation, seed: int) -> "TrainState":
        zero = lambda: jnp.zeros((), jnp.int32)
        return cls(zero(), params, frozen, tx.init(params), jnp.uint32(seed), zero(), zero())

    @property
    def key(self) -> Array:
        return jax.random.fold_in(jax.random.key(self.seed), self.step)
