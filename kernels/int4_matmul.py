"""y = x W on a TPU, for a W of 4-bit integers with one scale per group of rows; XLA would write all of W as floats.

There are two regimes. With few rows of x, most of the time is spent reading the weights. So the partial product of
each group is scaled instead of the weights, which costs M N multiplications per group. With many rows, most of the time
is spent multiplying. So each block of W is dequantized in VMEM while the MXU multiplies.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels import blocks, tiled
from kernels.blocks import cut

FEW = 128  # largest number of rows of x for which partial products are scaled
UNPACKED = 256  # rows of W unpacked at once in this case; column-major bytes are also transposed


def supported(k: int, n: int, group: int) -> bool:
    """Whether `matmul` and `gradient` accept a W [K, N]: an even K, groups of 32, 64 or 128 rows, and at least 128
    columns."""
    return k % 2 == 0 and group in (32, 64, 128) and n >= 128


def matmul(x: Array, packed: Array, scale: Array, group: int, dtype: DTypeLike | None = None) -> Array:
    """x [M, K] times W [K, N] -> [M, N] of `dtype` (that of x by default), accumulated in float32.

    W is given as bytes [K / 2, N] and scales [ceil(K / group), N].
    """
    (m, k), n = x.shape, packed.shape[1]
    bm, bn, bk = blocks.INT4_FEW if m <= FEW else blocks.INT4
    block = cut(m, bm, 16), cut(n, bn, 256), _rows(k, bk, group)
    body = _scaled_parts if m <= FEW else functools.partial(_dequantized, False)
    return tiled.product(body, x, packed, scale, group, n, block, block[:0:-1], lambda i, j, l: (l, j), dtype)


def gradient(g: Array, packed: Array, scale: Array, group: int, dtype: DTypeLike | None = None) -> Array:
    """dx = g W' [M, K] for g [M, N], from the packed W, without a dequantized copy."""
    (m, n), k = g.shape, 2 * packed.shape[0]
    bm, bn, bk = blocks.INT4
    block = cut(m, bm, 16), _rows(k, bk, group), cut(n, bn, 256)
    body = functools.partial(_dequantized, True)
    return tiled.product(body, g, packed, scale, group, k, block, block[1:], lambda i, j, l: (j, l), dtype)


def _rows(k: int, limit: int, group: int) -> int:
    """Rows of W in a block: a multiple of eight groups, whose scales fill a tile, and of 128, a tile of x's columns."""
    return cut(k, limit, max(8 * group, 128))


def _int4(w: tiled.W, w_ref: Ref, at: int = 0, size: int | None = None) -> Array:
    """Rows of a block of W as int4: all rows, or `size` rows from row `at`. Two adjacent rows share a byte."""
    rows = slice(at // 2, None if size is None else (at + size) // 2)
    return pltpu.bitcast(w_ref[:, rows].T if w.by_columns else w_ref[rows], jnp.int4)


def _scaled_parts(w: tiled.W, x_ref: Ref, w_ref: Ref, s_ref: Ref, y_ref: Ref, sum_ref: Ref) -> None:
    def part() -> Array:
        x, total = tiled.inside(x_ref[...], 1, w.total), jnp.zeros(sum_ref.shape, jnp.float32)
        scale = tiled.inside(s_ref[...], 0, pl.cdiv(w.total, w.group)).astype(jnp.float32)
        for at in range(0, x.shape[1], w.group):
            if at % UNPACKED == 0:
                codes = _int4(w, w_ref, at, UNPACKED)
            mine = codes[at % UNPACKED : at % UNPACKED + w.group].astype(x.dtype)
            y = jnp.dot(x[:, at : at + w.group], mine, preferred_element_type=jnp.float32)
            total += y * scale[at // w.group : at // w.group + 1]
        return total

    tiled.accumulate(part, y_ref, sum_ref)


def _block(w: tiled.W, w_ref: Ref, scale: Array, dtype: DTypeLike) -> Array:
    """A dequantized block of W. The product of an int4 and a bfloat16 is exact in float32, so it is rounded only
    once, to `dtype`."""
    codes, scale = _int4(w, w_ref).astype(dtype), scale.astype(dtype)
    scale = jnp.broadcast_to(scale[:, None, :], (scale.shape[0], w.group, scale.shape[1])).reshape(-1, scale.shape[1])
    return codes * scale[: codes.shape[0]]


def _dequantized(transposed: bool, w: tiled.W, x_ref: Ref, w_ref: Ref, s_ref: Ref, y_ref: Ref, sum_ref: Ref) -> None:
    axis = int(transposed)  # the summed axis of W

    def part() -> Array:
        end = w.total if transposed else pl.cdiv(w.total, w.group)
        x, scale = tiled.inside(x_ref[...], 1, w.total), tiled.inside(s_ref[...], axis, end)
        dims = (((1,), (axis,)), ((), ()))
        return jax.lax.dot_general(x, _block(w, w_ref, scale, x.dtype), dims, preferred_element_type=jnp.float32)

    tiled.accumulate(part, y_ref, sum_ref)
