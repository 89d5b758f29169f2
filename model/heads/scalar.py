"""A head with one output per token. In a reward model, the output at the last token is the reward. In a critic, the
outputs are the state values.

The head has no bias, because only differences between rewards matter. Hugging Face sequence classifiers have none
either.
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

TENSOR = "score.weight"  # name of the weight [1,D] in Hugging Face sequence classifiers with one label


@flax.struct.dataclass
class Scalar(Head):
    """Returns the dot products [B,T] of hidden states x [B,T,D] with a vector w [D]."""

    w: Array  # [D]
    trainable: ClassVar[tuple[str, ...]] = ("w",)

    def __call__(self, x: Array) -> Array:
        return weights.einsum("BTD,D->BT", x.astype(jnp.float32), self.w)

    def axes(self, spec: Spec | None) -> "Scalar":
        return self.replace(w=("embed",))

    def macs(self, stacked: int) -> "Scalar":
        return self.replace(w=self.w.size)


def make() -> Callable[[ModelConfig, Array], Scalar]:
    """Returns a function that creates a head with weights of 0, so that an untrained critic predicts 0."""

    def init(config: ModelConfig, key: Array) -> Scalar:
        return Scalar(jnp.zeros(config.embed))

    return init
