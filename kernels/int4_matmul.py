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


def supported(k: int, n: int, group: int) -> bool:
    """Whether the kernels take these shapes: whole bytes, and blocks that Mosaic can cut."""
    return k % 2 == 0 and group % 32 == 0 and n >= 128 and _rows(k, group, BLOCKS[0][2]) <= 2 * BLOCKS[0][2]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def matmul(x: Array, packed: Array, scale: Array, group: int, interpret: bool = False) -> Array:
    """x [M, K] times W [K, N] -> [M, N], accumulated in float32. Only x has a gradient: W is frozen."""
    (m, k), n = x.shape, packed.shape[1]
    bm, bn, bk = BLOCKS[m > FEW]
    bm, bn, bk = min(bm, m), min(bn, n), _rows(k, group, bk)
    return pl.pallas_call(
        functools.partial(_scaled_parts if m <= FEW else _dequantised, group),
        grid=(pl.cdiv(m, bm), pl.cdiv(n, bn), k // bk),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda i, j, l: (i, l)),
            pl.BlockSpec((bk // 2, bn), lambda i, j, l: (l, j)),
            pl.BlockSpec((pl.cdiv(bk, group), bn), lambda i, j, l: (l, j)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, l: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=_params(),
        interpret=interpret,
    )(x, packed, scale)


def gradient(g: Array, packed: Array, scale: Array, group: int, interpret: bool = False) -> Array:
    """dx = g W' [M, K] of g [M, N], from the packed W: no dequantised copy is kept or made."""
    (m, n), k = g.shape, 2 * packed.shape[0]
    bm, bk, bn = BLOCKS[1]
    bm, bk, bn = min(bm, m), _rows(k, group, bk), min(bn, n)
    return pl.pallas_call(
        functools.partial(_dequantised_transposed, group, n),
        grid=(pl.cdiv(m, bm), k // bk, pl.cdiv(n, bn)),
        in_specs=[
            pl.BlockSpec((bm, bn), lambda i, j, l: (i, l)),
            pl.BlockSpec((bk // 2, bn), lambda i, j, l: (j, l)),
            pl.BlockSpec((pl.cdiv(bk, group), bn), lambda i, j, l: (j, l)),
        ],
        out_specs=pl.BlockSpec((bm, bk), lambda i, j, l: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, k), g.dtype),
        scratch_shapes=[pltpu.VMEM((bm, bk), jnp.float32)],
        compiler_params=_params(),
        interpret=interpret,
    )(g, packed, scale)


matmul.defvjp(
    lambda x, packed, scale, group, interpret: (matmul(x, packed, scale, group, interpret), (packed, scale)),
    lambda group, interpret, residuals, g: (gradient(g, *residuals, group, interpret), None, None),
)


def _params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM)


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


def _dequantised_transposed(group: int, n: int, g_ref: Any, w_ref: Any, s_ref: Any, y_ref: Any, sum_ref: Any) -> None:
    def part() -> Array:
        g, w = g_ref[...], _block(group, w_ref, s_ref, g_ref.dtype)
        if n % g.shape[1]:  # what lies behind the last column is not zero, nor even finite
            inside = pl.program_id(2) * g.shape[1] + jax.lax.broadcasted_iota(jnp.int32, (1, g.shape[1]), 1) < n
            g, w = jnp.where(inside, g, 0), jnp.where(inside, w, 0)
        return jax.lax.dot_general(g, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    _accumulate(part, y_ref, sum_ref)
