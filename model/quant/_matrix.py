"""A weight as a matrix, and its rounding to a grid of numbers with a scale per tile.

Scales are bfloat16, because a number of at most 8 bits times a bfloat16 is exact in float32. So neither the order of
operations nor fusion changes a dequantized value, and quantizing that value again gives the same codes.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from model import weights

PERCENTILE = 99.9  # of the magnitudes in a tile: "percentile" calibration clips there
RATIOS = [1 - i / 32 for i in range(17)]  # clipping thresholds that "mse" tries, relative to the largest magnitude
FLOATS = {  # {name: (dtype, bits of the mantissa, smallest exponent, largest number)}
    "e4m3": (jnp.float8_e4m3fn, 3, -6, 448.0),
    "e5m2": (jnp.float8_e5m2, 2, -14, 57344.0),
}


def letters(eqn: str) -> tuple[str, str, str]:
    """The weight's letters by role: shared, K (contracted), N (produced). For an embedding table, K is the width of a
    row, which a tied head contracts, so that every row has its own scales."""
    shared, contracted, produced = weights.split(eqn)
    return (shared, produced, contracted) if "V" in contracted else (shared, contracted, produced)


def transposed(eqn: str) -> bool:
    """Whether the weight is stored as [shared, N, K]. Raises ValueError if the axes of K or N are not adjacent."""
    (shared, k, n), w = letters(eqn), weights.operands(eqn)[1]
    if w not in (shared + k + n, shared + n + k):
        raise ValueError(f"the weight {w} of {eqn} is not a matrix {k} by {n}")
    return w != shared + k + n


def matrix(w: Array, eqn: str) -> Array:
    """A weight as [..., K, N], with its leading axes unchanged."""
    _, k, n = letters(eqn)
    swap = transposed(eqn)
    lead = w.shape[: w.ndim - len(k) - len(n)]
    rows = math.prod(w.shape[len(lead) :][: len(n if swap else k)])
    m = w.reshape(*lead, rows, -1)
    return m.swapaxes(-1, -2) if swap else m


def align(a: Array, own: str, to: str) -> Array:
    """An array with the axes `own`, reshaped to broadcast against an array with the axes `to`. Axes of `own` that `to`
    lacks must have size 1."""
    size = dict(zip(own, a.shape, strict=True))
    return a.reshape([size.get(c, 1) for c in to])


WHOLE = 2**62  # the size of a tile that stands for the whole matrix


class Format(NamedTuple):
    """A grid of numbers, and the tiles of a matrix that share a scale."""

    grid: Callable[[Array], Array]  # rounds to the nearest number of the grid
    top: float  # the largest number of the grid
    tile: tuple[int, int]  # rows of K and columns of N that share a scale
    calibration: Literal["absmax", "percentile", "mse"] = "absmax"
    symmetric: bool = True  # if False, each tile also has an offset


class Rounding(NamedTuple):
    """m = numbers * scale + offset, [..., K, N], with scale and offset per tile."""

    numbers: Array
    scale: Array
    offset: Array | None


Solve = Callable[[Array, Format], Rounding]  # rounds a matrix [..., K, N]: `nearest`, or GPTQ


def bf16(x: Array) -> Array:
    """Rounds to bfloat16 but stays float32. XLA may drop a cast and its inverse, but never `reduce_precision`."""
    return jax.lax.reduce_precision(x, 8, 7)


def spread(scale: Array, tile: tuple[int, int], shape: tuple[int, int]) -> Array:
    """Repeats values per tile to a full matrix [..., K, N]."""
    for axis, n in ((-2, tile[0]), (-1, tile[1])):
        scale = scale if scale.shape[axis] == 1 else jnp.repeat(scale, n, axis)
    return scale[..., : shape[0], : shape[1]]


def _tiles(m: Array, tile: tuple[int, int]) -> Array:
    """[..., tiles, rows of a tile, tiles, columns of a tile]. Incomplete tiles are filled by repeating the last row or
    column, which does not change the minimum and maximum."""
    pad = [-n % t for n, t in zip(m.shape[-2:], tile, strict=True)]
    m = jnp.pad(m, [(0, 0)] * (m.ndim - 2) + [(0, p) for p in pad], mode="edge")
    k, n = m.shape[-2:]
    return m.reshape(*m.shape[:-2], k // tile[0], tile[0], n // tile[1], tile[1])


def fit(m: Array, form: Format) -> tuple[Array, Array | None]:
    """(scale, offset) of each tile of [..., K, N], in float32 with the precision of bfloat16."""
    t, over = _tiles(m.astype(jnp.float32), form.tile), (-3, -1)
    size = jnp.abs(t)
    half, middle, top = size.max(over), 0.0, form.top
    if form.calibration == "percentile":
        half = jnp.quantile(size, PERCENTILE / 100, over)
    if not form.symmetric:
        half, middle, top = (t.max(over) - t.min(over)) / 2, (t.max(over) + t.min(over)) / 2, top + 0.5

    def at(ratio: float) -> tuple[Array, Array | None]:
        scale = bf16(half * (ratio / top))  # eager and compiled divisions by a constant round differently
        scale = jnp.where(scale == 0, 1, scale)
        return scale, None if form.symmetric else bf16(middle + scale / 2)

    if form.calibration != "mse":
        return at(1.0)

    def error(scale: Array, offset: Array | None) -> Array:
        """Sum of squared errors per tile."""
        a, b = (x if x is None else x[..., :, None, :, None] for x in (scale, offset))
        return jnp.square(_number(t, a, b, form.grid) * a + (0 if b is None else b) - t).sum(over)

    fits = [at(ratio) for ratio in RATIOS]
    best = jnp.argmin(jnp.stack([error(*found) for found in fits]), 0)
    chosen = lambda xs: jnp.choose(best, xs, mode="clip")
    scales, offsets = zip(*fits)
    return chosen(scales), None if form.symmetric else chosen(offsets)


def _number(m: Array, scale: Array, offset: Array | None, grid: Callable) -> Array:
    return grid((m if offset is None else m - offset) / scale)


def nearest(m: Array, form: Format) -> Rounding:
    """Rounds every value to the nearest number of its tile's grid."""
    m = m.astype(jnp.float32)
    scale, offset = fit(m, form)
    a, b = (x if x is None else spread(x, form.tile, m.shape[-2:]) for x in (scale, offset))
    return Rounding(_number(m, a, b, form.grid), scale, offset)


def int8_grid(v: Array) -> Array:
    return jnp.clip(jnp.round(v), -127, 127)


def round_float(v: Array, mantissa: int, smallest: int, top: float, key: Array | None = None) -> Array:
    """Rounds to the nearest float of few bits, ties to even, and clips. With a key, rounds up or down at random, so
    that the mean is exact. Uses arithmetic, since XLA may drop a cast to a narrower dtype and back."""
    exponent = jnp.maximum(jnp.frexp(v)[1] - 1, smallest)
    step = jnp.ldexp(jnp.float32(1), exponent - mantissa)
    steps = jnp.round(v / step) if key is None else jnp.floor(v / step + jax.random.uniform(key, v.shape))
    return jnp.clip(steps * step, -top, top)


def round_rows(x: Array, own: str, summed: str, dtype: str = "int8", key: Array | None = None) -> tuple[Array, Array]:
    """(codes, float32 scales of size 1 in the axes `summed`) of an array whose axes are the letters `own`.

    `dtype` is "int8" or a key of FLOATS. With a key, values are rounded up or down at random, with an exact mean.
    """
    kind, *bits = FLOATS.get(dtype, (jnp.int8, 127))
    x = x.astype(jnp.float32)
    peak = jnp.abs(x).max([own.index(c) for c in summed], keepdims=True)
    scale = jnp.maximum(peak * (1 / bits[-1]), 1e-30)
    v = x / scale
    if dtype in FLOATS:
        return round_float(v, *bits, key).astype(kind), scale
    v = v if key is None else jnp.floor(v + jax.random.uniform(key, v.shape))
    return int8_grid(v).astype(kind), scale
