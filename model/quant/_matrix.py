"""A weight as a matrix, and its rounding to a grid of numbers with a scale per tile.

Scales are bfloat16: a number of 8 bits and fewer times such a scale is exact in float32, so that no order of operations
and no fusion changes a dequantized value, and quantizing it once more gives the same codes.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from model import weights

PERCENTILE = 99.9  # of the magnitudes of a tile
RATIOS = [1 - i / 32 for i in range(17)]  # of the largest magnitude, tried by "mse"


def letters(eqn: str) -> tuple[str, str, str]:
    """The weight's letters by role: shared, K (summed), N. Of a table that is looked up K is the width of a row: a tied
    head sums over it, and a row is read with scales of its own."""
    shared, contracted, produced = weights.split(eqn)
    return (shared, produced, contracted) if "V" in contracted else (shared, contracted, produced)


def transposed(eqn: str) -> bool:
    """Whether the weight lies as [shared, N, K]. Raises ValueError where K or N is not in one piece."""
    (shared, k, n), w = letters(eqn), weights.operands(eqn)[1]
    if w not in (shared + k + n, shared + n + k):
        raise ValueError(f"a weight {w} of {eqn} is no matrix {k} by {n}")
    return w != shared + k + n


def matrix(w: Array, eqn: str) -> Array:
    """[..., K, N] of a weight, leading axes kept."""
    _, k, n = letters(eqn)
    swap = transposed(eqn)
    lead = w.shape[: w.ndim - len(k) - len(n)]
    rows = math.prod(w.shape[len(lead) :][: len(n if swap else k)])
    m = w.reshape(*lead, rows, -1)
    return m.swapaxes(-1, -2) if swap else m


def align(a: Array, own: str, to: str) -> Array:
    """An array with the axes `own` so that it broadcasts against one with the axes `to`; what `to` lacks has size 1."""
    size = dict(zip(own, a.shape, strict=True))
    return a.reshape([size.get(c, 1) for c in to])


WHOLE = 2**62  # of a tile: as far as the matrix goes


class Format(NamedTuple):
    """A grid of numbers and how it is laid over a matrix."""

    grid: Callable[[Array], Array]  # to the nearest number
    top: float  # the largest one
    tile: tuple[int, int]  # rows of K and columns of N that share a scale
    calibration: Literal["absmax", "percentile", "mse"] = "absmax"
    symmetric: bool = True  # else the grid is moved by an offset a tile


class Rounding(NamedTuple):
    """m = numbers * scale + offset, [..., K, N] with scale and offset a tile."""

    numbers: Array
    scale: Array
    offset: Array | None


Solve = Callable[[Array, Format], Rounding]  # how a matrix [..., K, N] is rounded: `nearest`, or GPTQ


def bf16(x: Array) -> Array:
    """Rounding to bfloat16, in float32; XLA drops a pair of casts, but never this."""
    return jax.lax.reduce_precision(x, 8, 7)


def spread(scale: Array, tile: tuple[int, int], shape: tuple[int, int]) -> Array:
    """[..., K, N] of one value a tile."""
    for axis, n in ((-2, tile[0]), (-1, tile[1])):
        scale = scale if scale.shape[axis] == 1 else jnp.repeat(scale, n, axis)
    return scale[..., : shape[0], : shape[1]]


def _tiles(m: Array, tile: tuple[int, int]) -> Array:
    """[..., G, K / G, H, N / H]; ragged edges repeat the last row, which changes no extremum."""
    pad = [-n % t for n, t in zip(m.shape[-2:], tile, strict=True)]
    m = jnp.pad(m, [(0, 0)] * (m.ndim - 2) + [(0, p) for p in pad], mode="edge")
    k, n = m.shape[-2:]
    return m.reshape(*m.shape[:-2], k // tile[0], tile[0], n // tile[1], tile[1])


def fit(m: Array, form: Format) -> tuple[Array, Array | None]:
    """(scale, offset) of each tile of [..., K, N], in float32 but of bfloat16's precision."""
    t, over = _tiles(m.astype(jnp.float32), form.tile), (-3, -1)
    size = jnp.abs(t)
    half, middle, top = size.max(over), 0.0, form.top
    if form.calibration == "percentile":
        half = jnp.quantile(size, PERCENTILE / 100, over)
    if not form.symmetric:
        half, middle, top = (t.max(over) - t.min(over)) / 2, (t.max(over) + t.min(over)) / 2, top + 0.5

    def at(ratio: float) -> tuple[Array, Array | None]:
        scale = bf16(half * (ratio / top))  # a division by a constant rounds otherwise when it is not compiled
        scale = jnp.where(scale == 0, 1, scale)
        return scale, None if form.symmetric else bf16(middle + scale / 2)

    if form.calibration != "mse":
        return at(1.0)

    def error(scale: Array, offset: Array | None) -> Array:
        """Summed squares over each tile."""
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
    """Every value to the nearest number of its tile's grid."""
    m = m.astype(jnp.float32)
    scale, offset = fit(m, form)
    a, b = (x if x is None else spread(x, form.tile, m.shape[-2:]) for x in (scale, offset))
    return Rounding(_number(m, a, b, form.grid), scale, offset)


def int8_grid(v: Array) -> Array:
    return jnp.clip(jnp.round(v), -127, 127)


def round_rows(x: Array, own: str, summed: str, key: Array | None = None) -> tuple[Array, Array]:
    """(int8 codes, float32 scales with ones in the axes `summed`) of an array whose axes are the letters `own`.

    With a key they are rounded up or down at random, so that the mean is exact.
    """
    x = x.astype(jnp.float32)
    peak = jnp.abs(x).max([own.index(c) for c in summed], keepdims=True)
    scale = jnp.maximum(peak * (1 / 127), 1e-30)
    v = x / scale
    v = v if key is None else jnp.floor(v + jax.random.uniform(key, v.shape))
    return int8_grid(v).astype(jnp.int8), scale
