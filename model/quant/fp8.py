"""Eight-bit floats (Micikevicius et al. 2022, arXiv 2209.05433), one scale per tensor, output channel or block."""

from collections.abc import Callable
from functools import cache, partial
from typing import ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model.quant._leaf import Quantized, Quantizer
from model.quant._matrix import WHOLE, Format

FORMATS = {  # bits of the mantissa, smallest exponent, largest number
    "e4m3": (jnp.float8_e4m3fn, 3, -6, 448.0),
    "e5m2": (jnp.float8_e5m2, 2, -14, 57344.0),
}
BLOCK = 128  # both ways (DeepSeek-V3, arXiv 2412.19437)


@flax.struct.dataclass
class FP8(Quantized):
    form: ClassVar[str] = "plain"

    def numbers(self, codes: Array) -> Array:
        return codes.astype(jnp.float32)


def round_float(v: Array, mantissa: int, smallest: int, top: float, key: Array | None = None) -> Array:
    """To the nearest float of few bits, ties to even, clipped; with a key up or down at random, so that the mean is
    exact. By arithmetic: XLA drops a pair of casts."""
    exponent = jnp.maximum(jnp.frexp(v)[1] - 1, smallest)
    step = jnp.ldexp(jnp.float32(1), exponent - mantissa)
    steps = jnp.round(v / step) if key is None else jnp.floor(v / step + jax.random.uniform(key, v.shape))
    return jnp.clip(steps * step, -top, top)


@cache
def _grid(format: str) -> Callable[[Array], Array]:
    """One object per format: programs are compiled for it."""
    return lambda v: round_float(v, *FORMATS[format][1:])


def make(
    *, format: Literal["e4m3", "e5m2"] = "e4m3", scale: Literal["tensor", "channel", "block"] = "channel",
    calibration: Literal["absmax", "percentile", "mse"] = "absmax", where: str = r"layers/.*",
) -> Quantizer:  # fmt: skip
    """A Transform: 8 bits per weight, and 16 per tensor, output channel or block of 128 x 128."""

    tile = {"tensor": (WHOLE, WHOLE), "channel": (WHOLE, 1), "block": (BLOCK, BLOCK)}[scale]
    dtype, *_, top = FORMATS[format]
    form = Format(_grid(format), top, tile, calibration)
    return Quantizer(partial(FP8.of, form, lambda numbers: numbers.astype(dtype)), where)
