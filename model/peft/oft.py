"""Orthogonal fine-tuning (OFT, Qiu et al. 2023, arXiv 2306.07280).

OFT computes y = (x R) W. W is frozen. R is trained, orthogonal and block-diagonal.
"""

import math
from typing import ClassVar

import flax.struct
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model import weights
from model.weights import Spec, Transform, Weight


@flax.struct.dataclass
class OFT(Weight):
    """A base weight whose input features are rotated. For an embedding table, the embedding axis is rotated.

    `letters` has the einsum letters of the rotated axes. R is defined by skew-symmetric blocks Q. `q` [blocks, b (b -
    1) / 2] has their entries above the diagonal.
    """

    base: Array | Weight
    q: Array
    letters: str = flax.struct.field(pytree_node=False)
    terms: int = flax.struct.field(pytree_node=False)
    cached: Array | None = None  # the precomputed result of `rotation`, for inference
    trainable: ClassVar[tuple[str, ...]] = ("q",)

    def rotation(self) -> Array:
        """Returns the blocks [..., blocks, b, b] of R, computed from Q.

        If `terms` is 0, R is the Cayley transform (I - Q)(I + Q)^-1. Otherwise, R is a truncated series for (I + Q)(I -
        Q)^-1, which has `terms` terms: I + 2 Q + 2 Q^2 + ... + Q^(terms - 1) (Qiu et al. 2025, arXiv 2506.19847). As in
        PEFT, these signs differ from those of the Cayley transform, and the coefficient of the last term is 1. A
        truncated series is close to orthogonal only if Q is small.
        """
        if self.cached is not None:
            return self.cached
        b = block_of(self.q.shape[-1])
        rows, columns = jnp.triu_indices(b, 1)
        q = jnp.zeros((*self.q.shape[:-1], b, b), jnp.float32).at[..., rows, columns].set(self.q.astype(jnp.float32))
        q, one = q - jnp.swapaxes(q, -1, -2), jnp.eye(b)
        if not self.terms:  # solve X (I + Q) = I - Q, where I - Q is the transpose of I + Q
            return jnp.swapaxes(jnp.linalg.solve(one - q, jnp.swapaxes(one - q, -1, -2)), -1, -2)
        total, power = one, one
        for i in range(1, self.terms):
            power = power @ q
            total = total + (1 if i == self.terms - 1 and i > 1 else 2) * power
        return total

    def einsum(self, eqn: str, x: Array) -> Array:
        n = len(self.letters)
        if set(self.letters) <= set(weights.split(eqn)[1]):
            return weights.einsum(eqn, self._turn(x, n, "...nc,nck->...nk"), self.base)
        return self._turn(weights.einsum(eqn, x, self.base), n, "...nk,nck->...nc")

    def for_inference(self) -> "OFT":
        return super().for_inference().replace(cached=self.rotation())

    def take(self, ids: Array, dtype: DTypeLike) -> Array:
        return self._turn(weights.take(self.base, ids, dtype), 1, "...nk,nck->...nc")

    def _turn(self, x: Array, n: int, eqn: str) -> Array:
        """Flattens the last `n` axes of x, cuts them into blocks, and multiplies these by the blocks of R."""
        r = self.rotation().astype(x.dtype)
        return jnp.einsum(eqn, x.reshape(*x.shape[:-n], *r.shape[:2]), r).reshape(x.shape)

    def dense(self, spec: Spec) -> Array:
        w, at = weights.dense_of(self.base, spec), weights.operands(spec.eqn)[1]
        others = "".join(c for c in at if c not in self.letters)
        moved = jnp.einsum(f"...{at}->...{others}{self.letters}", w)
        r = self.rotation()
        flat = moved.reshape(*w.shape[: spec.stacked], -1, *r.shape[-3:-1])
        moved = jnp.einsum("...onk,...nck->...onc", flat, r, precision="highest").reshape(moved.shape)
        return jnp.einsum(f"...{others}{self.letters}->...{at}", moved).astype(w.dtype)

    def axes(self, spec: Spec) -> "OFT":
        return self.replace(base=weights.axes_of(self.base, spec), q=(*spec.names[: spec.stacked], None, None))

    def macs(self, stacked: int) -> "OFT":
        b = block_of(self.q.shape[-1])
        return super().macs(stacked).replace(q=math.prod(self.q.shape[:-1]) * b * b)


def block_of(elements: int) -> int:
    """Returns the block size b, given `elements` = b (b - 1) / 2."""
    return (1 + math.isqrt(1 + 8 * elements)) // 2


def make(*, block: int = 32, where: str = r"layers/.*", terms: int = 5) -> Transform:
    """Returns a Transform that adds trainable rotations. Each of them rotates a block of `block` features.

    `terms` is the number of terms of the series that approximates a rotation; 0 means the exact rotation. Raises
    ValueError if `where` matches no parameter, or if `block` does not divide the number of features of a parameter.
    """

    def wrap(path: str, base: Array | Weight, spec: Spec, key: Array) -> OFT:
        _, letters, produced = weights.split(spec.eqn)
        letters = produced if letters == "V" else letters
        size = math.prod(spec.sizes[c] for c in letters)
        if size % block or block < 2:
            raise ValueError(f"peft.block={block} does not divide the {size} inputs of {path} into equal blocks")
        shape = (*spec.shape[: spec.stacked], size // block, block * (block - 1) // 2)
        return OFT(base, jnp.zeros(shape, spec.value.dtype), letters, terms)

    return weights.wrapping(where, wrap)
