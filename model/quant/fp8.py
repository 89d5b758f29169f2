"""Eight-bit floats (Micikevicius et al. 2022, arXiv 2209.05433) with one scale per tensor, output channel or block."""

from collections.abc import Callable
from functools import cache, partial
from typing import ClassVar, Literal

import flax.struct
import jax.numpy as jnp
from jax import Array

from model.quant._leaf import Quantized, Quantizer
from model.quant._matrix import FLOATS, WHOLE, Format, round_float

BLOCK = 128  # number of rows and of columns per block, as in DeepSeek-V3 (arXiv 2412.19437)


@flax.struct.dataclass
class FP8(Quantized):
    kernel_format: ClassVar[str] = "plain"

    def numbers(self, codes: Array) -> Array:
        return codes.astype(jnp.float32)


@cache
def _grid(format: str) -> Callable[[Array], Array]:
    """Returns the rounding function of a format. The function is cached, so that jit compiles its callers only once."""
    return lambda v: round_float(v, *FLOATS[format][1:])


def make(
    *, format: Literal["e4m3", "e5m2"] = "e4m3", scale: Literal["tensor", "channel", "block"] = "channel",
    calibration: Literal["absmax", "percentile", "mse"] = "absmax", where: str = r"layers/.*",
) -> Quantizer:  # fmt: skip
    """Returns a Transform that quantizes to 8 bits per weight, plus one 16-bit scale per tensor, channel or block."""
    tile = {"tensor": (WHOLE, WHOLE), "channel": (WHOLE, 1), "block": (BLOCK, BLOCK)}[scale]
    dtype, *_, top = FLOATS[format]
    form = Format(_grid(format), top, tile, calibration)
    return Quantizer(partial(FP8.of, form, lambda numbers: numbers.astype(dtype)), where)
