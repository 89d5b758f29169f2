"""Training with 8-bit matrix products in both the forward and backward pass (as in AQT and FP8-LM, arXiv 2310.18313).

Weights are stored as floats, and quantized each time they are used. Two arrays of codes can only be multiplied directly
if their scales do not vary along the axis over which the product is summed. But the backward pass sums over other axes
than the forward pass, and along these axes, the scales of the forward pass do vary. The backward pass therefore
multiplies the output's gradient by these scales before it quantizes this gradient: by the scales of W to compute the
gradient for x, and by the scales of x to compute the gradient for W. This way, it can reuse the codes of the forward
pass.
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
    """A float weight.

    In each product, the weight, its inputs and the gradients for its outputs are quantized to `dtype`.
    """

    w: Array
    eqn: str = flax.struct.field(pytree_node=False)
    dtype: str = flax.struct.field(pytree_node=False)
    stochastic: bool = flax.struct.field(pytree_node=False)
    key: Array | None = None  # one random key per layer, for stochastic rounding; None outside of training
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
    """Multiplies codes, and returns float32.

    Float codes are first cast to the dtype `floats`, which represents them exactly. On a GPU, XLA fuses this cast and
    the product into one 8-bit product. Other devices cannot multiply 8-bit floats directly.
    """
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
    """Returns a Transform for 8-bit training. "fp8" means e4m3 in the forward pass and e5m2 for gradients."""
    return Quantizer(lambda w, eqn: QuantTrain(w, eqn, dtype, stochastic), where)
