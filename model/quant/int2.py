"""Two-bit codes, four per byte. Each group of weights along the contracted axis has one scale.

The four levels are -1.5, -0.5, 0.5 and 1.5 times the scale. There is no level 0, because a symmetric grid that contains
0 would use only three of the four codes. Quantizing a trained model to 2 bits ruins it. Quantization-aware training
(qat.py) preserves part of the model's quality (ParetoQ, Liu et al. 2025, arXiv 2502.02631).
"""

from functools import partial
from typing import Literal

import flax.struct
import jax.numpy as jnp
from jax import Array

from kernels.packing import pack, unpack
from model.quant._leaf import Quantized, Quantizer
from model.quant._matrix import Format

BITS = 2


@flax.struct.dataclass
class Int2(Quantized):
    def numbers(self, codes: Array) -> Array:
        return unpack(codes, self.kn[0], BITS).astype(jnp.float32) - 1.5

    @staticmethod
    def unpack_rows(codes: Array) -> list[Array]:
        wide = codes.astype(jnp.int32)
        return [(wide >> at & 3).astype(jnp.float32) - 1.5 for at in range(0, 8, BITS)]


def grid(v: Array) -> Array:
    return jnp.clip(jnp.floor(v) + 0.5, -1.5, 1.5)


def make(
    *, group: int = 64, calibration: Literal["absmax", "percentile", "mse"] = "mse", scaled: bool = False,
    where: str = r"layers/.*",
) -> Quantizer:  # fmt: skip
    """Returns a Transform that quantizes to 2 bits per weight, plus one 16-bit scale per group of `group` weights."""
    codes = lambda numbers: pack(numbers + 1.5, BITS)
    return Quantizer(partial(Int2.of, Format(grid, 1.5, (group, 1), calibration), codes), where, scaled)
