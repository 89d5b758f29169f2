"""DoRA (Liu et al. 2024, arXiv 2402.09353) trains a weight's direction with LoRA, and its magnitude as a vector m.

The adapted weight is W' = m (W + s A B) / ||W + s A B||, with one magnitude and one norm per output feature (eq. 5).
"""

from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model import weights
from model.peft import lora
from model.peft.lora import LoRA
from model.weights import Spec, Transform, Weight


@flax.struct.dataclass
class DoRA(LoRA):
    """A LoRA that also rescales each output feature of W + s A B. `magnitude` and `squares` have shape [outputs]."""

    magnitude: Array | None = None
    squares: Array | None = None  # ||W||^2 of the base
    cached: Array | None = None  # the precomputed result of `ratio`, for inference
    trainable: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")
    derived: ClassVar[tuple[str, ...]] = ("a", "start", "squares")

    def einsum(self, eqn: str, x: Array) -> Array:
        outputs = weights.split(self.eqn)[0] + weights.split(self.eqn)[2]
        if self.used == "lookup":
            return weights.einsum(eqn, x, self.base)
        if set(outputs) <= set(weights.operands(eqn)[2]):
            y = super().einsum(eqn, x)
            return y * self.ratio(y.shape[-len(outputs) :]).astype(y.dtype)
        return super().einsum(eqn, x * self.ratio(x.shape[-len(outputs) :]).astype(x.dtype))  # a tied unembedding

    def take(self, ids: Array, dtype: DTypeLike) -> Array:
        y = super().take(ids, dtype)
        return y if self.used == "head" else y * self.ratio(y.shape[-1:]).astype(dtype)

    def ratio(self, shape: tuple[int, ...]) -> Array:
        """Returns m / ||W + s A B|| per output feature. No gradient flows through the norm (section 4.3).

        The squared norm is computed as ||W||^2 + 2 s <A^T W, B> + s^2 <A^T A B, B>. This avoids a temporary matrix as
        large as W.
        """
        if self.cached is not None:
            return self.cached.reshape(shape)
        shared, contracted, produced = weights.split(self.eqn)
        letters, out = weights.operands(self.eqn)[1], f"{shared}R{produced}"
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        rows = jnp.einsum(f"{shared}{contracted}R->{shared}R{contracted}", a)
        projected = weights.einsum(f"{shared}R{contracted},{letters}->{out}", rows, self.base)
        gram = jnp.einsum(f"{shared}{contracted}R,{shared}{contracted}r->{shared}Rr", a, a)
        inner = 2 * projected + self.scale * jnp.einsum(f"{shared}Rr,{shared}r{produced}->{out}", gram, b)
        squares = self.squares + self.scale * (inner * b).sum(len(shared)).reshape(-1)
        norm = jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(squares, 1e-30)))
        return (1 + (self.magnitude - norm) / norm).reshape(shape)  # written such that the ratio is initially exactly 1

    def for_inference(self) -> "DoRA":
        return super().for_inference().replace(cached=self.ratio(self.squares.shape))

    def dense(self, spec: Spec) -> Array:
        w = super().dense(spec).astype(jnp.float32)
        shared, _, produced = weights.split(self.eqn)
        letters = weights.operands(self.eqn)[1]
        outputs = shared + produced
        shape = (*w.shape[: spec.stacked], *(spec.sizes[c] for c in outputs))
        ratio = (self.magnitude / norms(w, spec)).reshape(shape)
        return jnp.einsum(f"...{letters},...{outputs}->...{letters}", w, ratio).astype(spec.value.dtype)

    def axes(self, spec: Spec) -> "DoRA":
        flat = (*spec.names[: spec.stacked], None)
        return super().axes(spec).replace(magnitude=flat, squares=flat)


def norms(w: Array, spec: Spec) -> Array:
    """Returns the norms [stack..., outputs] of a weight, one per output feature."""
    m = lora.matrix(w.astype(jnp.float32), spec)
    return jnp.sqrt(jnp.square(m).sum(-2)).reshape(*spec.shape[: spec.stacked], -1)


def make(
    *,
    rank: int = 16,
    alpha: float = 32.0,
    where: str = r"layers/.*",
    rslora: bool = False,
    dropout: float = 0.0,
    ranks: tuple = (),
    alphas: tuple = (),
) -> Transform:
    """Returns a Transform that adds a DoRA to matrices. The arguments are those of `make` in model/peft/lora.py.

    The magnitudes are initialized to the norms of W, so the new model equals the base model.
    """
    wrap = lora.transform(DoRA, rank, alpha, where, rslora, dropout, ranks, alphas, "zero_b")
    return lambda params, specs, key: weights.replace(wrap(params, specs, key), specs, measure)


def measure(path: str, leaf: Array | Weight, spec: Spec | None) -> Array | Weight:
    """Sets `squares` of a DoRA, and `magnitude` if it is None, from its base weight. Returns other leaves unchanged."""
    if not isinstance(leaf, DoRA):
        return leaf
    squares = jnp.square(norms(weights.dense_of(leaf.base, spec), spec))
    magnitude = jnp.sqrt(squares).astype(spec.value.dtype) if leaf.magnitude is None else leaf.magnitude
    return leaf.replace(magnitude=magnitude, squares=squares)
