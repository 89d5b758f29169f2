"""Quantization-aware training (Jacob et al. 2018, arXiv 1712.05877).

The forward pass uses quantized weights. The gradient is computed as if the weights were not rounded (straight-through
estimator, Bengio et al. 2013, arXiv 1308.3432).
"""

import functools
from collections.abc import Callable
from typing import ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from common import methods
from model import weights
from model.quant._leaf import Quantizer
from model.weights import Params, Spec, Weight


@flax.struct.dataclass
class FakeQuant(Weight):
    """A float weight. From training step `start` on, its products are exactly those of its quantized version."""

    w: Array
    eqn: str = flax.struct.field(pytree_node=False)
    format: str = flax.struct.field(pytree_node=False)  # the quantization format, named like its file in this folder
    options: tuple[tuple[str, int | bool], ...] = flax.struct.field(pytree_node=False)  # arguments for its `make`
    start: int = flax.struct.field(pytree_node=False)
    live: Array | None = None  # one bool per layer: whether step `start` has been reached
    trainable: ClassVar[tuple[str, ...]] = ("w",)

    @property
    def encode(self) -> Callable[[Array], Weight]:
        """The function that quantizes a float weight."""
        make = methods.module("model.quant", self.format).make
        return functools.partial(make(**dict(self.options)).encode, eqn=self.eqn)

    def convert(self) -> Weight:
        return self.encode(self.w)

    def in_training(self, key: Array, step: Array) -> "FakeQuant":
        stack = self.w.shape[: self.w.ndim - len(weights.operands(self.eqn)[1])]
        return self.replace(live=jnp.broadcast_to(step >= self.start, stack) if self.start else None)

    def einsum(self, eqn: str, x: Array) -> Array:
        return _straight_through(functools.partial(weights.einsum, eqn), x, self.w, self.live, self.encode)

    def take(self, ids: Array, dtype: DTypeLike) -> Array:
        read = lambda ids, w: weights.take(w, ids, dtype)
        return _straight_through(read, ids, self.w, self.live, self.encode)

    def dense(self, spec: Spec) -> Array:
        return self.convert().dense(spec)

    def axes(self, spec: Spec) -> "FakeQuant":
        return self.replace(w=spec.names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _straight_through(use: Callable, x: Array, w: Array, live: Array | None, encode: Callable) -> Array:
    # Without the barrier, XLA may fuse the rounding with a sum, and the result may differ from the result in inference.
    quantized = lambda: use(x, jax.lax.optimization_barrier(encode(w)))
    return quantized() if live is None else jax.lax.cond(live, quantized, lambda: use(x, w))


def _forward(use: Callable, x: Array, w: Array, live: Array | None, encode: Callable) -> tuple[Array, tuple]:
    return _straight_through(use, x, w, live, encode), (x, w, live)


def _backward(use: Callable, encode: Callable, residuals: tuple, g: Array) -> tuple:
    """Returns the gradients for x and w. That for x uses the quantized weight, and that for w ignores the rounding."""
    x, w, live = residuals
    moves = jnp.issubdtype(x.dtype, jnp.inexact)
    by_x = lambda leaf: jax.vjp(lambda x: use(x, leaf), x)[1](g)[0]
    dx = None
    if moves:
        quantized = lambda: by_x(encode(w))
        dx = quantized() if live is None else jax.lax.cond(live, quantized, lambda: by_x(w))
    return dx, jax.vjp(lambda w: use(x, w), w)[1](g)[0], None


_straight_through.defvjp(_forward, _backward)


def converted(params: Params) -> Params:
    """Replaces every FakeQuant in `params` by a quantized weight, to save the model after training."""
    fake = lambda x: isinstance(x, FakeQuant)
    return jax.tree.map(lambda w: w.convert() if fake(w) else w, params, is_leaf=fake)


def make(
    *, format: Literal["int2", "int4", "int8", "nf4", "fp8"] = "int4", group: int | None = None,
    activations: bool | None = None, start: int = 0, where: str = r"layers/.*",
) -> Quantizer:  # fmt: skip
    """Returns a Transform for quantization-aware training.

    Raises ValueError for an option that the format does not have. Only int2, int4 and nf4 have the option `group`, and
    only int8 has the option `activations`.
    """
    options = {k: v for k, v in dict(group=group, activations=activations).items() if v is not None}
    takes = {"int2": {"group"}, "int4": {"group"}, "nf4": {"group"}, "int8": {"activations"}}.get(format, set())
    if wrong := options.keys() - takes:
        raise ValueError(f"quant.{min(wrong)} is not an option of format {format!r}")
    pairs = tuple(sorted(options.items()))
    return Quantizer(lambda w, eqn: FakeQuant(w, eqn, format, pairs, start), where)
