"""Reshapes weights to matrices, and rounds matrices to a grid of values with one scale per tile.

Scales are bfloat16, because the product of a bfloat16 and a value of at most 8 bits is exact in float32. So dequantized
values do not depend on the order of operations or on fusion, and quantizing them again gives the same codes.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from model import weights

PERCENTILE = 99.9  # calibration "percentile" clips each tile at this percentile of its magnitudes
# clipping thresholds that calibration "mse" tries, relative to the largest magnitude
RATIOS = [1 - i / 32 for i in range(17)]
FLOATS = {  # {name: (dtype, mantissa bits, smallest exponent, largest value)}
    "e4m3": (jnp.float8_e4m3fn, 3, -6, 448.0),
    "e5m2": (jnp.float8_e5m2, 2, -14, 57344.0),
}


def letters(eqn: str) -> tuple[str, str, str]:
    """Splits the letters of a weight into (shared axes such as experts, contracted axes K, output axes N).

    For an embedding table, K is the embedding axis, because a tied head sums over it. So every token has its own
    scales.
    """
    shared, contracted, produced = weights.split(eqn)
    return (shared, produced, contracted) if "V" in contracted else (shared, contracted, produced)


def transposed(eqn: str) -> bool:
    """Returns whether a weight has the axis order [shared, N, K] instead of [shared, K, N].

    Raises ValueError if the axes are in any other order.
    """
    (shared, k, n), w = letters(eqn), weights.operands(eqn)[1]
    if w not in (shared + k + n, shared + n + k):
        raise ValueError(f"the axes of the weight {w} of {eqn} cannot be merged into a matrix {k} by {n}")
    return w != shared + k + n


def matrix(w: Array, eqn: str) -> Array:
    """Reshapes a weight to a matrix [..., K, N]. Leading axes stay unchanged."""
    _, k, n = letters(eqn)
    swap = transposed(eqn)
    lead = w.shape[: w.ndim - len(k) - len(n)]
    rows = math.prod(w.shape[len(lead) :][: len(n if swap else k)])
    m = w.reshape(*lead, rows, -1)
    return m.swapaxes(-1, -2) if swap else m


def align(a: Array, own: str, to: str) -> Array:
    """Reshapes an array with the axes `own` such that it broadcasts against an array with the axes `to`.

    Axes of `own` that are not in `to` must have size 1.
    """
    size = dict(zip(own, a.shape, strict=True))
    return a.reshape([size.get(c, 1) for c in to])


WHOLE = 2**62  # a tile of this size covers the whole matrix


class Format(NamedTuple):
    """A quantization format: a grid of representable values, and the size of the tiles.

    The weights of a tile share a scale.
    """

    grid: Callable[[Array], Array]  # rounds values to the nearest grid points
    top: float  # the largest grid point
    tile: tuple[int, int]  # (rows, columns) of a tile
    calibration: Literal["absmax", "percentile", "mse"] = "absmax"
    symmetric: bool = True  # if False, each tile also has an offset


class Rounding(NamedTuple):
    """A quantized matrix [..., K, N], whose values are `numbers * scale + offset`.

    Each tile has its own scale and offset.
    """

    numbers: Array
    scale: Array
    offset: Array | None


Solve = Callable[[Array, Format], Rounding]  # function that rounds a matrix [..., K, N], such as `nearest` or `gptq`


def bf16(x: Array) -> Array:
    """Rounds to the precision of bfloat16, but returns float32.

    XLA may remove a cast to bfloat16 and back, but never removes `reduce_precision`.
    """
    return jax.lax.reduce_precision(x, 8, 7)


def spread(scale: Array, tile: tuple[int, int], shape: tuple[int, int]) -> Array:
    """Expands an array with one value per tile to a full matrix [..., K, N]."""
    for axis, n in ((-2, tile[0]), (-1, tile[1])):
        scale = scale if scale.shape[axis] == 1 else jnp.repeat(scale, n, axis)
    return scale[..., : shape[0], : shape[1]]


def _tiles(m: Array, tile: tuple[int, int]) -> Array:
    """Cuts a matrix into tiles: [..., tiles along K, rows per tile, tiles along N, columns per tile].

    Incomplete tiles are padded by repeating the last row or column, which leaves their minimum and maximum unchanged.
    """
    pad = [-n % t for n, t in zip(m.shape[-2:], tile, strict=True)]
    m = jnp.pad(m, [(0, 0)] * (m.ndim - 2) + [(0, p) for p in pad], mode="edge")
    k, n = m.shape[-2:]
    return m.reshape(*m.shape[:-2], k // tile[0], tile[0], n // tile[1], tile[1])


def fit(m: Array, form: Format) -> tuple[Array, Array | None]:
    """Returns (scale, offset) per tile of a matrix [..., K, N]. They are float32 with the precision of bfloat16."""
    t, over = _tiles(m.astype(jnp.float32), form.tile), (-3, -1)
    size = jnp.abs(t)
    half, middle, top = size.max(over), 0.0, form.top
    if form.calibration == "percentile":
        half = jnp.quantile(size, PERCENTILE / 100, over)
    if not form.symmetric:
        half, middle, top = (t.max(over) - t.min(over)) / 2, (t.max(over) + t.min(over)) / 2, top + 0.5

    def at(ratio: float) -> tuple[Array, Array | None]:
        scale = bf16(half * (ratio / top))  # not half * ratio / top, which compiled code rounds differently
        scale = jnp.where(scale == 0, 1, scale)
        return scale, None if form.symmetric else bf16(middle + scale / 2)

    if form.calibration != "mse":
        return at(1.0)

    def error(scale: Array, offset: Array | None) -> Array:
        """Returns the sum of squared rounding errors in each tile."""
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
    """Rounds each value to the nearest point of the grid, which is scaled for each tile."""
    m = m.astype(jnp.float32)
    scale, offset = fit(m, form)
    a, b = (x if x is None else spread(x, form.tile, m.shape[-2:]) for x in (scale, offset))
    return Rounding(_number(m, a, b, form.grid), scale, offset)


def int8_grid(v: Array) -> Array:
    return jnp.clip(jnp.round(v), -127, 127)


def round_float(v: Array, mantissa: int, smallest: int, top: float, key: Array | None = None) -> Array:
    """Rounds to the nearest low-precision float, with ties to even, and clips at `top`.

    If a random key is given, uses stochastic rounding, whose expected result equals the input. Computes in float32,
    because XLA may remove a cast to a narrower dtype and back.
    """
    exponent = jnp.maximum(jnp.frexp(v)[1] - 1, smallest)
    step = jnp.ldexp(jnp.float32(1), exponent - mantissa)
    steps = jnp.round(v / step) if key is None else jnp.floor(v / step + jax.random.uniform(key, v.shape))
    return jnp.clip(steps * step, -top, top)


def round_rows(x: Array, own: str, summed: str, dtype: str = "int8", key: Array | None = None) -> tuple[Array, Array]:
    """Quantizes an array with the axes `own`, and returns (codes, float32 scales).

    All values along the axes `summed` share one scale. `dtype` is "int8" or a key of FLOATS. If a random key is given,
    uses stochastic rounding, whose expected result equals the input.
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
