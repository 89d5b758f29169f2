"""Four-bit integers with a scale a group along the summed axis; two codes a byte.

Bytes and not `jnp.int4`: a CPU would give that a byte a code, in memory and on disk, and unpack it 1.5 to 2.5 times
slower. Neighbouring rows share a byte, so that no group and no shard is torn, and a TPU kernel reads the bytes as
`int4` rows without a shift.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from kernels.packing import pack, signed, unpack
from model import weights
from model.quant._matrix import Calibration, Format, Quantised, matrix, nearest, transform, transposed


@flax.struct.dataclass
class Int4(Quantised):
    def numbers(self, codes: Array) -> Array:
        return signed(unpack(codes, self.kn[0])).astype(jnp.float32)

    def forward(self, eqn: str, x: Array) -> Array:
        return self._on_tpu("matmul", eqn, x, super().forward)

    def backward(self, eqn: str, g: Array) -> Array:
        return self._on_tpu("gradient", eqn, g, super().backward)

    def _on_tpu(self, kernel: str, eqn: str, x: Array, plain: Callable) -> Array:
        """By a kernel on a TPU, where the product is one of two matrices on one device: a kernel is not partitioned."""
        from kernels import int4_matmul

        xs, _, out = weights.operands(eqn)
        _, contracted, produced = weights.split(eqn)
        kept = xs.removesuffix(contracted)
        one = (xs, out) == (kept + contracted, kept + produced) and not (transposed(self.eqn) or weights.sharded())
        rows = x.size // self.kn[0] if kernel == "matmul" else int4_matmul.FEW + 1
        fits = x.dtype == jnp.bfloat16 and self.offset is None and int4_matmul.supported(rows, *self.kn, self.tile[0])
        if not (one and fits):
            return plain(eqn, x)
        shape, width = jax.eval_shape(partial(plain, eqn), x).shape, self.kn[kernel == "gradient"]
        multiply = getattr(int4_matmul, kernel)
        tpu = lambda x, *w: multiply(x.reshape(-1, width), *w, self.tile[0]).reshape(shape)
        return jax.lax.platform_dependent(x, self.codes, self.scale, tpu=tpu, default=lambda x, *_: plain(eqn, x))


def grid(v: Array) -> Array:
    return jnp.clip(jnp.round(v), -8, 7)


def encode(
    w: Array, eqn: str, *, group: int = 64, symmetric: bool = True, calibration: Calibration = "absmax",
    solve: Callable = nearest,
) -> Int4:  # fmt: skip
    m = matrix(w, eqn)
    form = Format(grid, 7, (min(group, m.shape[-2]), 1), calibration, symmetric)
    r = solve(m, form)
    return Int4.of(r, pack(r.numbers), w, eqn, form)


def make(
    *, group: int = 64, symmetric: bool = True, calibration: Literal["absmax", "percentile", "mse"] = "absmax",
    scaled: bool = False, where: str = r"layers/.*",
) -> Callable:  # fmt: skip
    """A Transform: 4 + 16 / group bits a weight; without `symmetric` 4 + 32 / group."""
    return transform(where, partial(encode, group=group, symmetric=symmetric, calibration=calibration), scaled)
