"""Four-bit integers with a scale a group along the summed axis; two codes a byte.

Bytes and not `jnp.int4`: a CPU would give that a byte a code, in memory and on disk, and unpack it 1.5 to 2.5 times
slower. Neighbouring rows share a byte, so that no group and no shard is torn, and a TPU kernel reads the bytes as
`int4` rows without a shift.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from kernels.packing import pack, signed, unpack
from model.quant._matrix import Calibration, Format, Quantised, matrix, nearest, transform, transposed


@flax.struct.dataclass
class Int4(Quantised):
    form: ClassVar[str] = "int4"

    def numbers(self, codes: Array) -> Array:
        return signed(unpack(codes, self.kn[0])).astype(jnp.float32)

    @staticmethod
    def by_place(codes: Array) -> list[Array]:
        wide = jax.lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.int32)  # a CPU shifts no vector of bytes
        return [wide << 28 >> 28, wide >> 4]

    def kernels(self, rows: int, dtype: Any, backward: bool) -> dict[str, Callable]:
        from kernels import int4_matmul

        found, bf16 = super().kernels(rows, dtype, backward), dtype == jnp.bfloat16
        if bf16 and not transposed(self.eqn) and int4_matmul.supported(*self.part(), self.tile[0]):
            found["tpu"] = int4_matmul.gradient if backward else int4_matmul.matmul
        return found


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
