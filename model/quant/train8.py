"""Training with products of eight bits, forwards and backwards (as AQT and FP8-LM, arXiv 2310.18313, do).

Weights stay float and are rounded at each use. Scales must not stand inside a sum, so those that would are folded into
the gradient before it is rounded: W's for the gradient of x, which then takes the codes of the forward pass, and the
tokens' own for that of W.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model import weights
from model.quant._matrix import transform
from model.quant.fp8 import FORMATS, round_float
from model.weights import Spec, Weight


@flax.struct.dataclass
class QuantTrain(Weight):
    w: Array
    eqn: str = flax.struct.field(pytree_node=False)
    dtype: str = flax.struct.field(pytree_node=False)
    stochastic: bool = flax.struct.field(pytree_node=False)
    key: Array | None = None  # [stack...] of keys, for stochastic rounding; set in training alone
    trainable: ClassVar[tuple[str, ...]] = ("w",)

    def in_training(self, key: Array, step: Array) -> "QuantTrain":
        stack = self.w.shape[: self.w.ndim - len(weights.operands(self.eqn)[1])]
        return self.replace(key=jax.random.split(key, stack) if self.stochastic else None)

    def einsum(self, eqn: str, x: Array) -> Array:
        return _multiply(eqn, self.dtype, x, self.w, self.key)

    def take(self, ids: Array, dtype: Any) -> Array:
        return weights.take(self.w, ids, dtype)

    def dense(self, spec: Spec) -> Array:
        return self.w

    def axes(self, spec: Spec) -> "QuantTrain":
        return self.replace(w=spec.names)


def quantise(x: Array, own: str, summed: str, dtype: str, key: Array | None = None) -> tuple[Array, Array]:
    """(codes, float32 scales with ones in the axes `summed`) of an array whose axes are the letters `own`.

    With a key they are rounded up or down at random, so that the mean is exact.
    """
    x = x.astype(jnp.float32)
    peak = jnp.abs(x).max([own.index(c) for c in summed], keepdims=True)
    if dtype == "int8":
        scale = jnp.maximum(peak * (1 / 127), 1e-30)
        v = x / scale
        v = jnp.round(v) if key is None else jnp.floor(v + jax.random.uniform(key, v.shape))
        return jnp.clip(v, -127, 127).astype(jnp.int8), scale
    kind, *bits = FORMATS[dtype]
    scale = jnp.maximum(peak * (1 / bits[-1]), 1e-30)
    return round_float(x / scale, *bits, key).astype(kind), scale


def _product(eqn: str, a: Array, b: Array, floats: Any) -> Array:
    """Of codes. Those that are floats stand in the type `floats`, which holds them exactly: the compiler of a GPU makes
    a product of eight bits of that, and other devices have none."""
    if jnp.issubdtype(a.dtype, jnp.integer):
        return weights.product(eqn, a, b, jnp.int32).astype(jnp.float32)
    return weights.product(eqn, a.astype(floats), b.astype(floats), jnp.float32)


def _align(scale: Array, own: str, to: str) -> Array:
    """`scale`, whose axes are the letters `own`, against an array of the letters `to`; what `to` lacks has size 1."""
    size = dict(zip(own, scale.shape, strict=True))
    return scale.reshape([size.get(c, 1) for c in to])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply(eqn: str, dtype: str, x: Array, w: Array, key: Array | None) -> Array:
    return _forward(eqn, dtype, x, w, key)[0]


def _forward(eqn: str, dtype: str, x: Array, w: Array, key: Array | None) -> tuple[Array, tuple]:
    (xs, ws, out), contracted = weights.operands(eqn), weights.split(eqn)[1]
    format = {"int8": "int8", "fp8": "e4m3"}[dtype]
    qx, sx = quantise(x, xs, contracted, format)
    qw, sw = quantise(w, ws, contracted, format)
    y = _product(eqn, qx, qw, x.dtype) * _align(sx, xs, out) * _align(sw, ws, out)
    like = jnp.empty(0, w.dtype)
    return y.astype(x.dtype), (qx, sx, qw, sw, like, key)


def _backward(eqn: str, dtype: str, residuals: tuple, g: Array) -> tuple:
    qx, sx, qw, sw, like, key = residuals
    xs, ws, out = weights.operands(eqn)
    format = {"int8": "int8", "fp8": "e5m2"}[dtype]
    k1, k2 = (None, None) if key is None else jax.random.split(key)
    produced = "".join(c for c in ws if c not in xs)
    tokens = "".join(c for c in xs if c not in ws)
    gx, s = quantise(g * _align(sw, ws, out), out, produced, format, k1)
    dx = _product(f"{out},{ws}->{xs}", gx, qw, g.dtype) * _align(s, out, xs)
    gw, s = quantise(g * _align(sx, xs, out), out, tokens, format, k2)
    dw = _product(f"{xs},{out}->{ws}", qx, gw, g.dtype) * _align(s, out, ws)
    return dx.astype(g.dtype), dw.astype(like.dtype), None


_multiply.defvjp(_forward, _backward)


def make(*, dtype: Literal["int8", "fp8"] = "int8", stochastic: bool = True, where: str = r"layers/.*") -> Callable:
    """A Transform. fp8 is e4m3 forwards and e5m2 backwards."""
    return transform(where, lambda w, eqn: QuantTrain(w, eqn, dtype, stochastic))
