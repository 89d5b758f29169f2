"""Eight-bit integers, one scale an output channel; the activations too, one scale a token, as `activations` says.

XLA is at the memory limit of a TPU with both and needs no kernel; products of integers are the fast ones on a CPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model import weights
from model.quant._matrix import Calibration, Format, Quantised, align, letters, matrix, nearest, transform


@flax.struct.dataclass
class Int8(Quantised):
    form: ClassVar[str] = "plain"
    activations: bool = flax.struct.field(default=False, pytree_node=False)

    def numbers(self, codes: Array) -> Array:
        return codes.astype(jnp.float32)

    @staticmethod
    def by_place(codes: Array) -> list[Array]:
        return [codes]

    def kernels(self, rows: int, dtype: Any, backward: bool) -> dict[str, Callable]:
        return {} if self.activations else super().kernels(rows, dtype, backward)

    def forward(self, eqn: str, x: Array) -> Array:
        """W8A8: x is rounded too, token by token; its gradient is as if it were not. Experts take x as it is."""
        if not self.activations or weights.split(eqn)[0]:
            return super().forward(eqn, x)
        xs, _, out = weights.operands(eqn)
        q, per_token = round_rows(x, xs, weights.split(eqn)[1])
        w, scale = self._factors(jnp.int8)
        y = weights.product(eqn, q, w, jnp.int32).astype(jnp.float32)
        return (y * align(per_token, xs, out) * align(scale, letters(self.eqn)[2], out)).astype(x.dtype)


def grid(v: Array) -> Array:
    return jnp.clip(jnp.round(v), -127, 127)


def round_rows(x: Array, own: str, summed: str, key: Array | None = None) -> tuple[Array, Array]:
    """(int8 codes, float32 scales with ones in the axes `summed`) of an array whose axes are the letters `own`.

    With a key they are rounded up or down at random, so that the mean is exact.
    """
    x = x.astype(jnp.float32)
    peak = jnp.abs(x).max([own.index(c) for c in summed], keepdims=True)
    scale = jnp.maximum(peak * (1 / 127), 1e-30)
    v = x / scale
    v = v if key is None else jnp.floor(v + jax.random.uniform(key, v.shape))
    return grid(v).astype(jnp.int8), scale


def encode(
    w: Array, eqn: str, *, activations: bool = False, calibration: Calibration = "absmax", solve: Callable = nearest
) -> Int8:
    m = matrix(w, eqn)
    form = Format(grid, 127, (m.shape[-2], 1), calibration)
    r = solve(m, form)
    return Int8.of(r, r.numbers.astype(jnp.int8), w, eqn, form).replace(activations=activations)


def make(
    *, activations: bool = False, calibration: Literal["absmax", "percentile", "mse"] = "absmax",
    scaled: bool = False, where: str = r"layers/.*",
) -> Callable:  # fmt: skip
    """A Transform: 8 bits a weight and 16 an output channel."""
    return transform(where, partial(encode, activations=activations, calibration=calibration), scaled)
