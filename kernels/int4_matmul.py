"""y = x W on a TPU, for a W of 4-bit integers with a scale a group of rows; XLA would write the whole float W there.

Two regimes. With few rows of x the weights' bytes are the time: each group's partial product is scaled, which costs
M N / group multiplications. With many the products are: a block of W is dequantised in VMEM, hidden under the MXU.
Elsewhere than on a TPU `reference` is what runs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.packing import signed, unpack

FEW = 128  # rows of x: up to here partial products are scaled
# Rows of x, columns of W and rows of W in a block, (few, many). Measured by the compiler's schedules for v5e and v6e:
# a decode step needs blocks of 2 M weights, a prefill on v6e 560 FLOPs a byte.
BLOCKS = ((FEW, 512, 4096), (1024, 2048, 1024))
VMEM = 60 * 2**20  # bytes


def reference(x: Array, packed: Array, scale: Array, group: int) -> Array:
    """x [M, K] times W [K, N], of bytes [K / 2, N] and scales [ceil(K / group), N]: what the kernels compute."""
    w = signed(unpack(packed, x.shape[1])) * jnp.repeat(scale.astype(jnp.float32), group, 0)[: x.shape[1]]
    return jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def supported(m: int, k: int, n: int, group: int) -> bool:
    """Whether `matmul` takes these shapes: whole bytes, and blocks that Mosaic can cut and VMEM hold. `gradient` takes
    what it takes of more than FEW rows."""
    rows = _rows(k, group, BLOCKS[m > FEW][2])
    return k % 2 == 0 and group % 32 == 0 and n >= 128 and rows <= (2**14 if m <= FEW else 2**11)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def matmul(x: Array, packed: Array, scale: Array, group: int, interpret: bool = False) -> Array:
    """x [M, K] times W [K, N] -> [M, N], accumulated in float32. Only x has a gradient: W is frozen."""
    (m, k), n = x.shape, packed.shape[1]
    bm, bn, bk = BLOCKS[m > FEW]
    rows = _rows(k, group, bk)
    block = (min(bm, m), min(bn, n, max(2**21 // rows // 128, 1) * 128), rows)
    at = lambda i, j, l: (l, j)
    return _call(
        _scaled_parts if m <= FEW else _dequantised, x, packed, scale, group, n, block, block[:0:-1], at, interpret
    )


def gradient(g: Array, packed: Array, scale: Array, group: int, interpret: bool = False) -> Array:
    """dx = g W' [M, K] of g [M, N], from the packed W: no dequantised copy is kept or made."""
    (m, n), k = g.shape, 2 * packed.shape[0]
    bm, bn, bk = BLOCKS[1]
    block = (min(bm, m), _rows(k, group, bk), min(bn, n))
    body, at = functools.partial(_dequantised_transposed, n), lambda i, j, l: (j, l)
    return _call(body, g, packed, scale, group, k, block, block[1:], at, interpret)


def _call(
    body: Callable, a: Array, packed: Array, scale: Array, group: int, width: int, block: tuple[int, int, int],
    w_block: tuple[int, int], w_at: Callable, interpret: bool,
) -> Array:  # fmt: skip
    """A grid over rows of `a` and columns [width] of the result, in blocks, that sums over the columns of `a` last.
    `w_block` is the block of W in rows and columns, and `w_at` which one a step takes."""
    (m, total), (bm, outer, inner) = a.shape, block
    rows, columns = w_block
    return pl.pallas_call(
        functools.partial(body, group),
        grid=(pl.cdiv(m, bm), pl.cdiv(width, outer), pl.cdiv(total, inner)),
        in_specs=[
            pl.BlockSpec((bm, inner), lambda i, j, l: (i, l)),
            pl.BlockSpec((rows // 2, columns), w_at),
            pl.BlockSpec((pl.cdiv(rows, group), columns), w_at),
        ],
        out_specs=pl.BlockSpec((bm, outer), lambda i, j, l: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, width), a.dtype),
        scratch_shapes=[pltpu.VMEM((bm, outer), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
    )(a, packed, scale)


matmul.defvjp(
    lambda x, packed, scale, group, interpret: (matmul(x, packed, scale, group, interpret), (packed, scale)),
    lambda group, interpret, residuals, g: (gradient(g, *residuals, group, interpret), None, None),
)


def _rows(k: int, group: int, limit: int) -> int:
    """Rows of W in a block: the most up to `limit` that divide K into whole tiles; K itself where none does."""
    step = max(8 * group, 128)  # eight scales are a tile, and 128 columns of x
    fits = [b for b in range(step, min(limit, k) + 1, step) if k % b == 0]
    return fits[-1] if fits and k > limit else k


def _accumulate(part: Callable[[], Array], y_ref: Any, sum_ref: Any) -> None:
    """Adds up over the last axis of the grid; the last step writes."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += part()

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _scaled_parts(group: int, x_ref: Any, w_ref: Any, s_ref: Any, y_ref: Any, sum_ref: Any) -> None:
    def part() -> Array:
        k, total = x_ref.shape[1], jnp.zeros(sum_ref.shape, jnp.float32)
        for i, at in enumerate(range(0, k, group)):
            rows = min(group, k - at)
            w = pltpu.bitcast(w_ref[at // 2 : (at + rows) // 2, :], jnp.int4).astype(x_ref.dtype)
            y = jnp.dot(x_ref[:, at : at + rows], w, preferred_element_type=jnp.float32)
            total += y * s_ref[i : i + 1, :].astype(jnp.float32)
        return total

    _accumulate(part, y_ref, sum_ref)


def _block(group: int, w_ref: Any, s_ref: Any, dtype: Any) -> Array:
    """A dequantised block of W. An int4 times a bfloat16 is exact in float32: either way it is rounded once."""
    w = pltpu.bitcast(w_ref[...], jnp.int4).astype(dtype)
    s = s_ref[...].astype(dtype)
    s = jnp.broadcast_to(s[:, None, :], (s.shape[0], group, s.shape[1])).reshape(-1, s.shape[1])
    return w * s[: w.shape[0]]


def _dequantised(group: int, x_ref: Any, w_ref: Any, s_ref: Any, y_ref: Any, sum_ref: Any) -> None:
    w = lambda: _block(group, w_ref, s_ref, x_ref.dtype)
    _accumulate(lambda: jnp.dot(x_ref[...], w(), preferred_element_type=jnp.float32), y_ref, sum_ref)


def _dequantised_transposed(n: int, group: int, g_ref: Any, w_ref: Any, s_ref: Any, y_ref: Any, sum_ref: Any) -> None:
    def part() -> Array:
        g, w = g_ref[...], _block(group, w_ref, s_ref, g_ref.dtype)
        if n % g.shape[1]:  # what lies behind the last column is not zero, nor even finite
            inside = pl.program_id(2) * g.shape[1] + jax.lax.broadcasted_iota(jnp.int32, (1, g.shape[1]), 1) < n
            g, w = jnp.where(inside, g, 0), jnp.where(inside, w, 0)
        return jax.lax.dot_general(g, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    _accumulate(part, y_ref, sum_ref)
