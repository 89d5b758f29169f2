"""Computes y = x W on a TPU, where W consists of 4-bit integers with one scale per group of rows.

Without this kernel, XLA would convert all of W to floats in memory. If x has few rows, most of the time is spent
reading W. In this case, the kernel multiplies x by the codes of each group, and scales the product instead of the
weights, which only takes M * N multiplications per group. If x has many rows, most of the time is spent multiplying. In
this case, the kernel dequantizes blocks of W in VMEM while the MXU multiplies.
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

FEW = 128  # up to this number of rows of x, the products are scaled instead of the weights
UNPACKED = 256  # number of rows of W unpacked at once if the products are scaled


def supported(k: int, n: int, group: int) -> bool:
    """Returns whether `matmul` and `gradient` accept a matrix W [K, N].

    K must be even, groups must have 32, 64 or 128 rows, and W must have at least 128 columns.
    """
    return k % 2 == 0 and group in (32, 64, 128) and n >= 128


def matmul(x: Array, packed: Array, scale: Array, group: int, dtype: DTypeLike | None = None) -> Array:
    """Multiplies x [M, K] by W [K, N], accumulates in float32, and returns [M, N] in `dtype` (by default, that of x).

    W is given as `packed` bytes [K / 2, N] and `scale` [ceil(K / group), N].
    """
    (m, k), n = x.shape, packed.shape[1]
    bm, bn, bk = blocks.INT4_FEW if m <= FEW else blocks.INT4
    block = cut(m, bm, 16), cut(n, bn, 256), _rows(k, bk, group)
    body = _scaled_parts if m <= FEW else functools.partial(_dequantized, False)
    return tiled.product(body, x, packed, scale, group, n, block, block[:0:-1], lambda i, j, l: (l, j), dtype)


def gradient(g: Array, packed: Array, scale: Array, group: int, dtype: DTypeLike | None = None) -> Array:
    """Returns the gradient [M, K] for x: g [M, N] times the transposed W. Makes no dequantized copy of W."""
    (m, n), k = g.shape, 2 * packed.shape[0]
    bm, bn, bk = blocks.INT4
    block = cut(m, bm, 16), _rows(k, bk, group), cut(n, bn, 256)
    body = functools.partial(_dequantized, True)
    return tiled.product(body, g, packed, scale, group, k, block, block[1:], lambda i, j, l: (j, l), dtype)


def _rows(k: int, limit: int, group: int) -> int:
    """Returns the number of rows of W per block.

    It is a multiple of eight groups, so that their scales fill a tile, and a multiple of 128, so that the columns of x
    fill a tile.
    """
    return cut(k, limit, max(8 * group, 128))


def _int4(w: tiled.W, w_ref: Ref, at: int = 0, size: int | None = None) -> Array:
    """Unpacks a block of W to int4: all rows from `at` on, or `size` of them. Two adjacent rows share a byte."""
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
    """Dequantizes a block of W.

    The product of an int4 and a bfloat16 is exact in float32, so it is only rounded once, when it is cast to `dtype`.
    """
    codes, scale = _int4(w, w_ref).astype(dtype), scale.astype(dtype)
    scale = jnp.broadcast_to(scale[:, None, :], (scale.shape[0], w.group, scale.shape[1])).reshape(-1, scale.shape[1])
    return codes * scale[: codes.shape[0]]


def _dequantized(transposed: bool, w: tiled.W, x_ref: Ref, w_ref: Ref, s_ref: Ref, y_ref: Ref, sum_ref: Ref) -> None:
    axis = int(transposed)  # the axis of W that is summed over

    def part() -> Array:
        end = w.total if transposed else pl.cdiv(w.total, w.group)
        x, scale = tiled.inside(x_ref[...], 1, w.total), tiled.inside(s_ref[...], axis, end)
        dims = (((1,), (axis,)), ((), ()))
        return jax.lax.dot_general(x, _block(w, w_ref, scale, x.dtype), dims, preferred_element_type=jnp.float32)

    tiled.accumulate(part, y_ref, sum_ref)
