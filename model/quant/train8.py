"""Training with 8-bit matrix products in the forward and the backward pass (as in AQT and FP8-LM, arXiv 2310.18313).

Weights stay float and are rounded at each use. A scale must not vary along a contracted axis, as the scales of the
forward pass would in the backward pass. So those scales are multiplied into the output's gradient before it is rounded:
the scales of W for the gradient of x, and the scales of x for the gradient of W. Both can then use the codes of the
forward pass.
"""

from functools import partial
from typing import ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model import weights
from model.quant._leaf import Quantizer
from model.quant._matrix import align, round_rows
from model.quant._multiply import product_of_codes
from model.weights import Spec, Weight


@flax.struct.dataclass
class QuantTrain(Weight):
    """A float weight that is rounded to `dtype` at each use. Inputs and gradients of outputs are rounded too."""

    w: Array
    eqn: str = flax.struct.field(pytree_node=False)
    dtype: str = flax.struct.field(pytree_node=False)
    stochastic: bool = flax.struct.field(pytree_node=False)
    key: Array | None = None  # keys [stack...] for stochastic rounding; set only in training
    trainable: ClassVar[tuple[str, ...]] = ("w",)

    def in_training(self, key: Array, step: Array) -> "QuantTrain":
        stack = self.w.shape[: self.w.ndim - len(weights.operands(self.eqn)[1])]
        return self.replace(key=jax.random.split(key, stack) if self.stochastic else None)

    def einsum(self, eqn: str, x: Array) -> Array:
        return _multiply(eqn, self.dtype, x, self.w, self.key)

    def take(self, ids: Array, dtype: DTypeLike) -> Array:
        return weights.take(self.w, ids, dtype)

    def dense(self, spec: Spec) -> Array:
        return self.w

    def axes(self, spec: Spec) -> "QuantTrain":
        return self.replace(w=spec.names)


def _product(eqn: str, a: Array, b: Array, floats: DTypeLike) -> Array:
    """The product of codes, float32. Float codes are cast to `floats`, which represents them exactly. A GPU's compiler
    turns the cast and product into an 8-bit product; other devices do not have 8-bit float products."""
    if jnp.issubdtype(a.dtype, jnp.integer):
        return product_of_codes(eqn, a, b)
    return weights.product(eqn, a.astype(floats), b.astype(floats), jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply(eqn: str, dtype: str, x: Array, w: Array, key: Array | None) -> Array:
    return _forward(eqn, dtype, x, w, key)[0]


def _forward(eqn: str, dtype: str, x: Array, w: Array, key: Array | None) -> tuple[Array, tuple]:
    (xs, ws, out), contracted = weights.operands(eqn), weights.split(eqn)[1]
    format = {"int8": "int8", "fp8": "e4m3"}[dtype]
    qx, sx = round_rows(x, xs, contracted, format)
    qw, sw = round_rows(w, ws, contracted, format)
    y = _product(eqn, qx, qw, x.dtype) * align(sx, xs, out) * align(sw, ws, out)
    like = jnp.empty(0, w.dtype)
    return y.astype(x.dtype), (qx, sx, qw, sw, like, key)


def _backward(eqn: str, dtype: str, residuals: tuple, g: Array) -> tuple:
    qx, sx, qw, sw, like, key = residuals
    xs, ws, out = weights.operands(eqn)
    format = {"int8": "int8", "fp8": "e5m2"}[dtype]
    k1, k2 = (None, None) if key is None else jax.random.split(key)
    produced = "".join(c for c in ws if c not in xs)
    tokens = "".join(c for c in xs if c not in ws)
    gx, s = round_rows(g * align(sw, ws, out), out, produced, format, k1)
    dx = _product(f"{out},{ws}->{xs}", gx, qw, g.dtype) * align(s, out, xs)
    gw, s = round_rows(g * align(sx, xs, out), out, tokens, format, k2)
    dw = _product(f"{xs},{out}->{ws}", qx, gw, g.dtype) * align(s, out, ws)
    return dx.astype(g.dtype), dw.astype(like.dtype), None


_multiply.defvjp(_forward, _backward)


def make(*, dtype: Literal["int8", "fp8"] = "int8", stochastic: bool = True, where: str = r"layers/.*") -> Quantizer:
    """A Transform. fp8 means e4m3 in the forward pass and e5m2 for gradients in the backward pass."""
    return Quantizer(lambda w, eqn: QuantTrain(w, eqn, dtype, stochastic), where)
