"""Eight-bit integers with one scale per output channel.

If `activations` is True, the inputs are also quantized to eight bits, with one scale per token. On a TPU, XLA's own
products are already limited only by memory bandwidth, with or without `activations`. So there is no TPU kernel for this
format. On a CPU, integer matrix products are the fast path.
"""

from typing import ClassVar, Literal

import flax.struct
import jax.numpy as jnp
from jax import Array

from model.quant._leaf import Quantized, Quantizer
from model.quant._matrix import WHOLE, Format, Solve, int8_grid, nearest


@flax.struct.dataclass
class Int8(Quantized):
    kernel_format: ClassVar[str] = "plain"
    activations: bool = flax.struct.field(default=False, pytree_node=False)

    def numbers(self, codes: Array) -> Array:
        return codes.astype(jnp.float32)

    @staticmethod
    def unpack_rows(codes: Array) -> list[Array]:
        return [codes]


def make(
    *, activations: bool = False, calibration: Literal["absmax", "percentile", "mse"] = "absmax",
    scaled: bool = False, where: str = r"layers/.*",
) -> Quantizer:  # fmt: skip
    """Returns a Transform that quantizes to 8 bits per weight, plus one 16-bit scale per output channel."""
    form = Format(int8_grid, 127, (WHOLE, 1), calibration)

    def encode(w: Array, eqn: str, solve: Solve = nearest) -> Int8:
        leaf = Int8.of(form, lambda numbers: numbers.astype(jnp.int8), w, eqn, solve)
        return leaf.replace(activations=activations)

    return Quantizer(encode, where, scaled)
