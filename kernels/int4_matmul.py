"""y = x W on a TPU, for a W of 4-bit integers with a scale a group of rows; XLA would write the whole float W there.

Two regimes. With few rows of x the weights' bytes are the time: each group's partial product is scaled, which costs
M N / group multiplications. With many the products are: a block of W is dequantized in VMEM, hidden under the MXU.
"""

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels import blocks, tiled
from kernels.blocks import cut

FEW = 128  # rows of x: up to here partial products are scaled
UNPACKED = 256  # rows of W that are then unpacked at once; those of bytes stored column-major are transposed whole


def supported(k: int, n: int, group: int) -> bool:
    """Whether `matmul` and `gradient` take a W of these shapes: whole bytes and registers, a tile of scales a block."""
    return k % 2 == 0 and group in (32, 64, 128) and n >= 128


def matmul(x: Array, packed: Array, scale: Array, group: int, dtype: DTypeLike | None = None) -> Array:
    """x [M, K] times W [K, N] -> [M, N] of `dtype` or that of x, accumulated in float32.

    W is of bytes [K / 2, N] and scales [ceil(K / group), N]."""
    (m, k), n = x.shape, packed.shape[1]
    bm, bn, bk = blocks.INT4_FEW if m <= FEW else blocks.INT4
    block = cut(m, bm, 16), cut(n, bn, 256), _rows(k, bk, group)
    body = _scaled_parts if m <= FEW else _dequantized
    return tiled.product(body, x, packed, scale, group, n, block, block[:0:-1], lambda i, j, l: (l, j), dtype)


def gradient(g: Array, packed: Array, scale: Array, group: int, dtype: DTypeLike | None = None) -> Array:
    """dx = g W' [M, K] of g [M, N], from the packed W: no dequantized copy is kept or made."""
    (m, n), k = g.shape, 2 * packed.shape[0]
    bm, bn, bk = blocks.INT4
    block = cut(m, bm, 16), _rows(k, bk, group), cut(n, bn, 256)
    return tiled.product(_transposed, g, packed, scale, group, k, block, block[1:], lambda i, j, l: (j, l), dtype)


def _rows(k: int, limit: int, group: int) -> int:
    """Rows of W in a block: eight scales are a tile, and 128 columns of x."""
    return cut(k, limit, max(8 * group, 128))


def _int4(w: tiled.W, w_ref: Ref, at: int = 0, size: int | None = None) -> Array:
    """Rows of a block of W, all or `size` from `at`; two neighbors are a byte."""
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
    """A dequantized block of W. An int4 times a bfloat16 is exact in float32: either way it is rounded once."""
    codes, scale = _int4(w, w_ref).astype(dtype), scale.astype(dtype)
    scale = jnp.broadcast_to(scale[:, None, :], (scale.shape[0], w.group, scale.shape[1])).reshape(-1, scale.shape[1])
    return codes * scale[: codes.shape[0]]


def _dequantized(w: tiled.W, x_ref: Ref, w_ref: Ref, s_ref: Ref, y_ref: Ref, sum_ref: Ref) -> None:
    def part() -> Array:
        x, scale = tiled.inside(x_ref[...], 1, w.total), tiled.inside(s_ref[...], 0, pl.cdiv(w.total, w.group))
        return jnp.dot(x, _block(w, w_ref, scale, x.dtype), preferred_element_type=jnp.float32)

    tiled.accumulate(part, y_ref, sum_ref)


def _transposed(w: tiled.W, g_ref: Ref, w_ref: Ref, s_ref: Ref, y_ref: Ref, sum_ref: Ref) -> None:
    def part() -> Array:
        g, scale = tiled.inside(g_ref[...], 1, w.total), tiled.inside(s_ref[...], 1, w.total)
        dims = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(g, _block(w, w_ref, scale, g.dtype), dims, preferred_element_type=jnp.float32)

    tiled.accumulate(part, y_ref, sum_ref)
