"""The NF4 format with double quantization (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

Each weight is rounded to one of 16 levels, which are quantiles of a normal distribution. Each weight takes 4 bits. Each
group of 64 weights has a scale (the largest magnitude) of 8 bits, and each block of 256 scales shares a 32-bit step.
The total is 4.127 bits per weight. The paper stores scales as 8-bit floats after subtracting their mean. This module
stores them as integer multiples of the step, which is the block's largest scale divided by 255. The rounding error of
the scales (0.2 %) is small compared with that of the weights (9 %).
"""

from typing import ClassVar

import flax.struct
import jax.numpy as jnp
from jax import Array

from kernels.packing import LEVELS, pack, unpack
from model import weights
from model.quant._leaf import Quantized, Quantizer
from model.quant._matrix import Format, Solve, nearest
from model.weights import Spec

SHARED = 256  # number of scales per second-level scale


@flax.struct.dataclass
class NF4(Quantized):
    """A weight in NF4. If double quantization is used, `scale` is uint8, and otherwise bfloat16."""

    kernel_format: ClassVar[str] = "nf4"
    scale2: Array | None = None  # second-level scales, float32 [..., ceil(scales / 256), 1]

    def numbers(self, codes: Array) -> Array:
        return jnp.take(jnp.asarray(LEVELS, jnp.float32), unpack(codes, self.kn[0]), mode="clip")

    def plain_scales(self) -> "NF4":
        if self.scale2 is None:
            return self
        flat = self.scale.reshape(*self.scale.shape[:-2], -1)
        steps = jnp.repeat(self.scale2[..., 0], SHARED, -1)[..., : flat.shape[-1]]
        return self.replace(scale=(flat * steps).reshape(self.scale.shape), scale2=None)

    def axes(self, spec: Spec) -> "NF4":
        named = super().axes(spec)
        stack = spec.names[: spec.stacked] + (None,) * len(weights.split(self.eqn)[0])
        return named if self.scale2 is None else named.replace(scale2=(*stack, None, None))


def index(v: Array) -> Array:
    """Returns, for each value, the index of the nearest NF4 level."""
    middles = (jnp.asarray(LEVELS[1:], jnp.float32) + jnp.asarray(LEVELS[:-1], jnp.float32)) / 2
    return sum((v > m).astype(jnp.int32) for m in middles)


def grid(v: Array) -> Array:
    return jnp.take(jnp.asarray(LEVELS, jnp.float32), index(v))


def _double(leaf: NF4) -> NF4:
    """Quantizes the scales to uint8, with one float32 step per 256 scales."""
    s = leaf.scale.astype(jnp.float32).reshape(*leaf.scale.shape[:-2], -1)
    blocks = jnp.pad(s, [(0, 0)] * (s.ndim - 1) + [(0, -s.shape[-1] % SHARED)]).reshape(*s.shape[:-1], -1, SHARED)
    step = blocks.max(-1, keepdims=True) * (1 / 255)
    codes = jnp.round(blocks / step).astype(jnp.uint8).reshape(*s.shape[:-1], -1)[..., : s.shape[-1]]
    return leaf.replace(scale=codes.reshape(leaf.scale.shape), scale2=step)


def make(*, group: int = 64, double: bool = True, where: str = r"layers/.*") -> Quantizer:
    """Returns a Transform that quantizes to 4 bits per weight, plus 8.125 bits per group (16 bits if not `double`)."""
    form = Format(grid, 1, (group, 1))

    def encode(w: Array, eqn: str, solve: Solve = nearest) -> NF4:
        leaf = NF4.of(form, lambda numbers: pack(index(numbers)), w, eqn, solve)
        return _double(leaf) if double else leaf

    return Quantizer(encode, where)
