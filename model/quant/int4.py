"""Four-bit integers, two per byte. Each group of weights along the contracted axis has one scale.

The codes are packed into uint8 instead of stored as `jnp.int4`. On a CPU, `jnp.int4` takes a whole byte per code, in
memory and on disk, and unpacking it takes 1.5 to 2.5 times as long. Each byte contains codes from two adjacent rows. So
groups and shards consist of whole bytes, and a TPU kernel can read the bytes as `int4` rows without shifting bits.
"""

from functools import partial
from typing import ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from kernels.packing import pack, signed, unpack
from model.quant._leaf import Quantized, Quantizer
from model.quant._matrix import Format


@flax.struct.dataclass
class Int4(Quantized):
    kernel_format: ClassVar[str] = "int4"

    def numbers(self, codes: Array) -> Array:
        return signed(unpack(codes, self.kn[0])).astype(jnp.float32)

    @staticmethod
    def unpack_rows(codes: Array) -> list[Array]:
        # CPUs have no instructions that shift vectors of bytes
        wide = jax.lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.int32)
        return [wide << 28 >> 28, wide >> 4]


def grid(v: Array) -> Array:
    return jnp.clip(jnp.round(v), -8, 7)


def make(
    *, group: int = 64, symmetric: bool = True, calibration: Literal["absmax", "percentile", "mse"] = "absmax",
    scaled: bool = False, where: str = r"layers/.*",
) -> Quantizer:  # fmt: skip
    """Returns a Transform that quantizes to 4 bits per weight.

    Each group of `group` weights also has a 16-bit scale and, if not `symmetric`, a 16-bit offset.
    """
    form = Format(grid, 7, (group, 1), calibration, symmetric)
    return Quantizer(partial(Int4.of, form, pack), where, scaled)
