"""IA3 (Liu et al. 2022, arXiv 2205.05638) rescales keys, values and the inputs of the MLP's down projection."""

import math
import re
from typing import ClassVar

import flax.struct
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model import weights
from model.weights import Spec, Transform, Weight


@flax.struct.dataclass
class IA3(Weight):
    """A base weight whose inputs or outputs are multiplied by the vector `scale` [features].

    `letters` has the einsum letters of the axes that are rescaled.
    """

    base: Array | Weight
    scale: Array
    letters: str = flax.struct.field(pytree_node=False)
    trainable: ClassVar[tuple[str, ...]] = ("scale",)

    def einsum(self, eqn: str, x: Array) -> Array:
        n = len(self.letters)
        if set(self.letters) <= set(weights.operands(eqn)[2]):
            y = weights.einsum(eqn, x, self.base)
            return y * self.scale.reshape(y.shape[-n:]).astype(y.dtype)
        return weights.einsum(eqn, x * self.scale.reshape(x.shape[-n:]).astype(x.dtype), self.base)

    def take(self, ids: Array, dtype: DTypeLike) -> Array:
        y, scale = weights.take(self.base, ids, dtype), self.scale.astype(dtype)
        return y * (scale if self.letters == "D" else scale[ids][..., None])

    def dense(self, spec: Spec) -> Array:
        base, w = weights.dense_of(self.base, spec), weights.operands(spec.eqn)[1]
        scale = self.scale.reshape(*spec.shape[: spec.stacked], *(spec.sizes[c] for c in self.letters))
        return jnp.einsum(f"...{w},...{self.letters}->...{w}", base, scale).astype(base.dtype)

    def axes(self, spec: Spec) -> "IA3":
        return self.replace(base=weights.axes_of(self.base, spec), scale=(*spec.names[: spec.stacked], None))


def make(*, where: str = r"layers/attn/w[kv]|layers/mlp/down", inputs: str = r"layers/mlp/down") -> Transform:
    """Returns a Transform that adds scales to the matrices whose names match the regex `where`.

    They scale the inputs of a matrix if its name also matches the regex `inputs`, and its outputs otherwise. Raises
    ValueError if `where` matches no name.
    """

    def wrap(path: str, base: Array | Weight, spec: Spec, key: Array) -> IA3:
        shared, contracted, produced = weights.split(spec.eqn)
        letters = shared + (contracted if re.fullmatch(inputs, path) else produced)
        n = math.prod(spec.sizes[c] for c in letters)
        return IA3(base, jnp.ones((*spec.shape[: spec.stacked], n), spec.value.dtype), letters)

    return weights.wrapping(where, wrap)
