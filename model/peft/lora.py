"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W + (alpha / rank) x A B, with A and B trained and W frozen."""

import math
import re
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model import weights
from model.weights import AXES, Params, Spec, Specs, Weight


@flax.struct.dataclass
class LoRA(Weight):
    """`base` plus scale * A B. A is [contracted..., R] and B is [R, produced...], both behind the base's shared axes.

    The same leaf serves an equation that contracts the other side (a tied unembedding): the factor that holds the
    contracted letters goes first.
    """

    base: Any
    a: Array
    b: Array
    eqn: str = flax.struct.field(pytree_node=False)  # the equation that the weight was declared with
    scale: float = flax.struct.field(pytree_node=False)
    trainable: ClassVar[tuple[str, ...]] = ("a", "b")

    @property
    def letters(self) -> tuple[str, str]:
        return factors(self.eqn)

    def einsum(self, eqn: str, x: Array) -> Array:
        xs, _, out = weights.operands(eqn)
        contracted = weights.split(eqn)[1]
        (first, f), (second, s) = zip((self.a, self.b), self.letters, strict=True)
        if not set(contracted) <= set(f):
            (first, f), (second, s) = (second, s), (first, f)
        low = xs.translate({ord(c): None for c in contracted}) + "R"  # [..., R]
        y = self.scale * weights.einsum(f"{xs},{f}->{low}", x, first)  # scaled where it is small, backwards too
        return weights.einsum(eqn, x, self.base) + weights.einsum(f"{low},{s}->{out}", y, second)

    def take(self, ids: Array, dtype: Any) -> Array:
        low = weights.take(self.a, ids, dtype)
        return weights.take(self.base, ids, dtype) + self.scale * (low @ self.b.astype(dtype))

    def dense(self, spec: Spec) -> Array:
        base = self.base.dense(spec) if isinstance(self.base, Weight) else self.base
        a, b = self.letters
        _, w, _ = weights.operands(self.eqn)
        delta = jnp.einsum(f"...{a},...{b}->...{w}", self.a, self.b, precision="highest")
        return (base + self.scale * delta).astype(base.dtype)

    def axes(self, spec: Spec) -> "LoRA":
        stacked = spec.names[: spec.stacked]
        a, b = (stacked + tuple(AXES[c] for c in letters) for letters in self.letters)
        base = self.base.axes(spec) if isinstance(self.base, Weight) else spec.names
        return self.replace(base=base, a=a, b=b)


def factors(eqn: str) -> tuple[str, str]:
    """Letters of A and of B for a weight of this equation: "BTD,DNH->BTNH" -> ("DR", "RNH")."""
    shared, contracted, produced = weights.split(eqn)
    return f"{shared}{contracted}R", f"{shared}R{produced}"


def make(*, rank: int = 16, alpha: float = 32.0, where: str = r"layers/.*", rslora: bool = False) -> Callable:
    """A Transform that wraps every multiplied parameter whose name matches `where`.

    A starts as N(0, 1/fan_in), B at zero, so that the transformed model equals the base bit for bit. The scale is
    alpha / rank, or alpha / sqrt(rank) with `rslora` (Kalajdzievski 2023, arXiv 2312.03732).
    Raises ValueError when `where` matches nothing.
    """
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank

    def transform(params: Params, specs: Specs, key: Array) -> Params:
        wrapped = []

        def wrap(path: str, leaf: Any, spec: Spec) -> Any:
            if not spec.eqn or not re.fullmatch(where, path):
                return leaf
            wrapped.append(path)
            a, b = factors(spec.eqn)
            size = dict(zip(weights.operands(spec.eqn)[1], spec.shape[spec.stacked :], strict=True)) | {"R": rank}
            stack = spec.shape[: spec.stacked]
            shape = lambda letters: stack + tuple(size[c] for c in letters)
            fan_in = math.prod(size[c] for c in weights.split(spec.eqn)[1])
            noise = jax.random.normal(weights.key_for(key, path), shape(a), spec.value.dtype)
            return LoRA(leaf, noise / math.sqrt(fan_in), jnp.zeros(shape(b), spec.value.dtype), spec.eqn, scale)

        out = weights.replace(params, specs, wrap)
        if not wrapped:
            raise ValueError(f"peft.where={where!r} matches no multiplied parameter")
        return out

    return transform
