"""y = x W on an NVIDIA GPU, by Triton, of a W of 8 bits or fewer as it lies; XLA would write the whole float W first.

A program has a block of columns and a share of the rows of W. A decoding step has too few columns to keep a GPU busy:
rows are shared out among programs, and XLA adds their sums. Throughput is limited by the number of bytes in flight.

The transposed W is the first operand of the tensor core, which lies in registers: as the second one, a tile of bytes
would go through shared memory byte by byte. So few rows of x are no worse than one: multiplying without a tensor core
took an H100 as long with one row, and 1.6 times as long with four.

Behind MOST rows, and for the gradient, XLA does it all: what writing and reading a float W takes is then little beside
the product, which is the vendor's.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import ArrayLike, DTypeLike

from kernels import blocks
from kernels.packing import LEVELS

MOST = 256  # rows of x

# Codes as numbers of the first row of W in each byte, of the second, in bfloat16. `level` looks those of NF4 up.
Form = Callable[[Array, Callable], list[Array]]


def plain(codes: Array, _: Callable) -> list[Array]:
    """Of int8 and 8-bit floats."""
    return [codes.astype(jnp.bfloat16)]


def int4(codes: Array, _: Callable) -> list[Array]:
    """ORs the nibble into the mantissa of 128.0 and subtracts 136: conversions from int to float are slow on GPUs."""
    number = lambda nibbles: jax.lax.bitcast_convert_type(nibbles.astype(jnp.uint16) ^ 0x4308, jnp.bfloat16)
    return [number(nibbles) - jnp.bfloat16(136) for nibbles in (codes & 15, codes >> 4)]


def nf4(codes: Array, level: Callable) -> list[Array]:
    """Looked up in the level-1 cache."""
    return [level(nibbles.astype(jnp.int32)) for nibbles in (codes & 15, codes >> 4)]


FORMS = {"plain": plain, "int4": int4, "nf4": nf4}


def supported(form: str, rows: int, k: int, group: int, dtype: DTypeLike) -> bool:
    """Whether `matmul` takes so many rows of a type, and a W of K rows: groups are whole tiles, or one per column.

    Three bfloat16 numbers hold a float32, and one a code, except that of an NF4 level.
    """
    few = rows <= MOST if dtype == jnp.bfloat16 else dtype == jnp.float32 and 3 * rows <= MOST and form != "nf4"
    return form in FORMS and few and (group in (32, 64, 128) or group >= k)


def matmul(
    x: Array, codes: Array, scale: Array, group: int, dtype: DTypeLike | None = None, form: Form = int4
) -> Array:
    """x [M, K] times W [K, N] -> [M, N] of `dtype` or that of x, accumulated in float32.

    `codes` are bytes [K / R, N] that R rows share, `scale` [ceil(K / group), N].
    """
    dtype = dtype or x.dtype
    if x.dtype == jnp.bfloat16:
        return _call(x, codes, scale, group, dtype, form)
    rest, parts = x, []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(rest, 8, 7))  # XLA drops a pair of casts, but never this
        rest = rest - parts[-1]
    y = _call(jnp.concatenate(parts).astype(jnp.bfloat16), codes, scale, group, jnp.float32, form)
    return y.reshape(3, len(x), -1).sum(0).astype(dtype)


def _call(x: Array, codes: Array, scale: Array, group: int, dtype: DTypeLike, form: Form) -> Array:
    """A grid over rows of x, columns of W and shares of its rows, which the results are summed over."""
    (m, k), (height, n) = x.shape, codes.shape
    each = -(-k // height)
    tile = next(tile for rows, tile in blocks.CODES_TRITON.items() if m <= rows)
    depth = tile.depth if len(scale) == 1 else min(tile.depth, group // each)
    grid, steps = (pl.cdiv(m, tile.rows), pl.cdiv(n, tile.columns)), pl.cdiv(height, depth)
    wanted = round(tile.busy * blocks.PROCESSORS / (tile.warps * grid[0] * grid[1]))
    per = pl.cdiv(steps, max(min(wanted, steps // 4), 1))
    shares = pl.cdiv(steps, per)
    x = jnp.pad(x, [(0, 0), (0, height * each - k)]).reshape(m, height, each).transpose(2, 0, 1)
    y = pl.pallas_call(
        functools.partial(_body, form, (m, n, height), (group // each, depth, per)),
        grid=(*grid, shares),
        in_specs=[
            pl.BlockSpec((len(LEVELS),), lambda i, j, l: (0,)),
            pl.BlockSpec((each, tile.rows, height), lambda i, j, l: (0, i, 0)),
            pl.BlockSpec((height, tile.columns), lambda i, j, l: (0, j)),
            pl.BlockSpec((len(scale), tile.columns), lambda i, j, l: (0, j)),
        ],
        out_specs=pl.BlockSpec((None, tile.rows, tile.columns), lambda i, j, l: (l, i, j)),
        out_shape=jax.ShapeDtypeStruct((shares, m, n), jnp.float32 if shares > 1 else dtype),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=1),
    )(jnp.asarray(LEVELS, jnp.bfloat16), x, codes, scale)
    return y[0] if shares == 1 else y.sum(0).astype(dtype)


def _body(
    form: Form, shape: tuple[int, int, int], by: tuple[int, int, int],
    levels_ref: Ref, x_ref: Ref, w_ref: Ref, s_ref: Ref, y_ref: Ref,
) -> None:  # fmt: skip
    (m, n, height), (group, depth, per), (rows, columns) = shape, by, y_ref.shape  # group and depth in rows of bytes
    i, j, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * per
    turns, one = jnp.minimum(per, pl.cdiv(height, depth) - first), len(s_ref) == 1
    there, inside = _inside(i * rows, rows, m, 0), _inside(j * columns, columns, n, 1)
    level = lambda index: triton.load(levels_ref.at[index])
    codes = lambda at: _load(w_ref, pl.ds(at * depth, depth), _inside(at * depth, depth, height, 0), inside)
    scale = lambda group: _load(s_ref, pl.ds(group, 1), inside).astype(jnp.float32)

    def step(turn: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        held, total = state
        at = first + turn
        coming = codes(first + jnp.minimum(turn + 1, turns - 1))  # is under way while these are multiplied
        mask = _all(there, _inside(at * depth, depth, height, 1))
        x = lambda place: triton.load(x_ref.at[place, :, pl.ds(at * depth, depth)], mask=mask, other=_none(mask))
        numbers = form(held, level)  # both products before their sum: in another order registers spill
        y = sum([jnp.dot(w.T, x(jnp.int32(p)).T, preferred_element_type=jnp.float32) for p, w in enumerate(numbers)])
        return coming, total + (y if one else y * scale(at * depth // group).reshape(columns, 1))

    _, total = jax.lax.fori_loop(0, turns, step, (codes(first), jnp.zeros((columns, rows), jnp.float32)))
    y = total.T * scale(0) if one else total.T
    triton.store(y_ref, y.astype(y_ref.dtype), mask=_all(there, inside))


def _inside(start: ArrayLike, size: int, total: int, axis: int) -> Array | None:
    """Which of `size` rows (axis 0) or columns there are; None where all always are."""
    if total % size == 0:
        return None
    return start + jax.lax.broadcasted_iota(jnp.int32, (1, size)[:: 1 if axis else -1], axis) < total


def _all(*masks: Array | None) -> Array | None:
    return functools.reduce(jnp.logical_and, found) if (found := [m for m in masks if m is not None]) else None


def _none(mask: Array | None) -> int | None:
    """What stands for what lies outside of an array."""
    return None if mask is None else 0


def _load(ref: Ref, rows: pl.Slice, *masks: Array | None) -> Array:
    """Rows of a block, 0 for what lies outside of the array."""
    mask = _all(*masks)
    return triton.load(ref.at[rows, :], mask=mask, other=_none(mask))
