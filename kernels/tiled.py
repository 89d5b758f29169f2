"""Multiplies by a matrix W [K, N] of packed codes on a TPU, block by block. The kernels for several formats use it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels import blocks
from kernels.packing import by_columns


class W(NamedTuple):
    """Static properties of W."""

    group: int
    total: int  # length of the axis that is summed over
    by_columns: bool


def product(
    body: Callable, a: Array, packed: Array, scale: Array, group: int, width: int, block: tuple[int, int, int],
    w_block: tuple[int, int], w_at: Callable, dtype: DTypeLike, scratch: tuple = (),
) -> Array:  # fmt: skip
    """Runs the kernel `body` on a grid with three axes: blocks of rows of `a`, of columns of the result, and of columns
    of `a`.

    The innermost axis, the columns of `a`, is summed over. The result has `width` columns. `w_block` is the size (rows,
    columns) of a block of W, and `w_at` maps the indices of a grid step to the indices of its block of W.
    """
    (m, total), (bm, outer, inner) = a.shape, block
    rows, columns = w_block
    w = W(group, total, by_columns(*packed.shape))
    spec, packed = codes(packed, rows, columns, w_at)
    return pl.pallas_call(
        functools.partial(body, w),
        grid=(pl.cdiv(m, bm), pl.cdiv(width, outer), pl.cdiv(total, inner)),
        in_specs=[
            pl.BlockSpec((bm, inner), lambda i, j, l: (i, l)),
            spec,
            pl.BlockSpec((pl.cdiv(rows, group), columns), w_at),
        ],
        out_specs=pl.BlockSpec((bm, outer), lambda i, j, l: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, width), dtype or a.dtype),
        scratch_shapes=[pltpu.VMEM((bm, outer), jnp.float32), *scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.VMEM
        ),
    )(a, packed, scale)


def codes(packed: Array, rows: int, columns: int, at: Callable) -> tuple[pl.BlockSpec, Array]:
    """Returns a BlockSpec for blocks of `rows` x `columns` weights, and the packed codes to pass to the kernel.

    If XLA stores the bytes column-major, the codes are transposed, which needs no copy.
    """
    if by_columns(*packed.shape):
        return pl.BlockSpec((columns, rows // 2), lambda *ids: at(*ids)[::-1]), packed.T
    return pl.BlockSpec((rows // 2, columns), at), packed


def accumulate(part: Callable[[], Array], y_ref: Ref, sum_ref: Ref) -> None:
    """Adds `part()` to `sum_ref` in each step of the last grid axis. The last step writes the sum to `y_ref`."""
    step = pl.program_id(2)
    sum_ref[...] = jnp.where(step == 0, 0, sum_ref[...]) + part()

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def inside(a: Array, axis: int, total: int) -> Array:
    """Sets `a` to 0 beyond the end of the summed axis, where the last block may contain any values, even infinities."""
    size = a.shape[axis]
    if total % size == 0:
        return a
    at = pl.program_id(2) * size + jax.lax.broadcasted_iota(jnp.int32, [1, size][:: 1 if axis else -1], axis)
    return jnp.where(at < total, a, 0)
