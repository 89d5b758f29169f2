"""A number for each token: the reward of a sequence at its last one, or the value of a state.

Without a bias, as in Hugging Face's models for sequence classification: rewards are compared, never read alone.
"""

from collections.abc import Callable
from typing import ClassVar

import flax.struct
import jax.numpy as jnp
from jax import Array

from model import weights
from model.config import ModelConfig
from model.heads import Head
from model.weights import Spec


@flax.struct.dataclass
class Scalar(Head):
    """x w: hidden states [B,T,D] -> [B,T]."""

    w: Array  # [D]
    trainable: ClassVar[tuple[str, ...]] = ("w",)

    def __call__(self, x: Array) -> Array:
        return weights.einsum("BTD,D->BT", x.astype(jnp.float32), self.w)

    def axes(self, spec: Spec | None) -> "Scalar":
        return self.replace(w=("embed",))

    def macs(self, stacked: int) -> "Scalar":
        return self.replace(w=self.w.size)


def make() -> Callable[[ModelConfig, Array], Scalar]:
    """A head that starts at 0: a critic that has seen nothing expects nothing."""

    def init(config: ModelConfig, key: Array) -> Scalar:
        return Scalar(jnp.zeros(config.embed))

    return init
