"""Computes y = x W on an NVIDIA GPU, in Triton, where W is quantized to at most 8 bits per weight.

The kernel reads the codes of W (its quantized weights) directly, whereas XLA would first convert W to floats in memory.

Each program handles one block of columns of W, and all or some of its rows. In a decoding step, W has too few blocks of
columns to keep a GPU busy, so the rows are also split over programs, and XLA adds the partial sums of these programs.
The speed depends on the number of bytes in flight, that is, on how many loads from memory are pending at the same time.

The tensor cores get the transposed W as their first operand, because this operand is kept in registers. If W were the
second operand, it would pass through shared memory byte by byte. On the tensor cores, multiplying a few rows of x takes
no longer than multiplying one row. Without tensor cores, an H100 multiplies one row in the same time, but needs 1.6
times as long for four rows.

For the gradient, and if x has more than MOST rows, XLA computes the product. It then converts W to floats in memory,
but this takes little time compared with such a large product.
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

MOST = 256  # largest number of rows of x that the kernel accepts

# A function that converts packed bytes to a list of bfloat16 arrays, one for each of the rows of W that share a byte.
# Its second argument is a function that looks up NF4 levels.
Form = Callable[[Array, Callable], list[Array]]


def plain(codes: Array, _: Callable) -> list[Array]:
    """Converts int8 or 8-bit floats to bfloat16."""
    return [codes.astype(jnp.bfloat16)]


def int4(codes: Array, _: Callable) -> list[Array]:
    """Converts 4-bit integers to bfloat16 without a conversion instruction, which would be slow on a GPU.

    The four bits, with the sign bit flipped, become the lowest mantissa bits of 128. This gives 128 + 8 + value, so 136
    is subtracted.
    """
    number = lambda nibbles: jax.lax.bitcast_convert_type(nibbles.astype(jnp.uint16) ^ 0x4308, jnp.bfloat16)
    return [number(nibbles) - jnp.bfloat16(136) for nibbles in (codes & 15, codes >> 4)]


def nf4(codes: Array, level: Callable) -> list[Array]:
    """Looks up the level of each 4-bit code in a table, which stays in the L1 cache."""
    return [level(nibbles.astype(jnp.int32)) for nibbles in (codes & 15, codes >> 4)]


FORMS = {"plain": plain, "int4": int4, "nf4": nf4}


def supported(form: str, rows: int, k: int, group: int, dtype: DTypeLike) -> bool:
    """Returns whether `matmul` accepts `rows` rows of x in this dtype, and a matrix W with `k` rows.

    A group of weights that share a scale must have 32, 64 or 128 rows, or be a whole column. `matmul` splits a float32
    x into three bfloat16 numbers, so that no precision is lost in products with int4 and 8-bit codes, which are exact
    in bfloat16. NF4 levels are not exact in bfloat16, so NF4 is only supported for a bfloat16 x.
    """
    few = rows <= MOST if dtype == jnp.bfloat16 else dtype == jnp.float32 and 3 * rows <= MOST and form != "nf4"
    return form in FORMS and few and (group in (32, 64, 128) or group >= k)


def matmul(
    x: Array, codes: Array, scale: Array, group: int, dtype: DTypeLike | None = None, form: Form = int4
) -> Array:
    """Multiplies x [M, K] by W [K, N], accumulates in float32, and returns [M, N] in `dtype` (by default, that of x).

    W is given as `codes` and `scale` [ceil(K / group), N]. `codes` is an array of bytes [K / R, N], and each byte has
    the codes of R rows.
    """
    dtype = dtype or x.dtype
    if x.dtype == jnp.bfloat16:
        return _call(x, codes, scale, group, dtype, form)
    rest, parts = x, []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(rest, 8, 7))  # XLA would optimize away a cast to bfloat16 and back
        rest = rest - parts[-1]
    y = _call(jnp.concatenate(parts).astype(jnp.bfloat16), codes, scale, group, jnp.float32, form)
    return y.reshape(3, len(x), -1).sum(0).astype(dtype)


def _call(x: Array, codes: Array, scale: Array, group: int, dtype: DTypeLike, form: Form) -> Array:
    """Runs one program for each combination of a block of rows of x, a block of columns of W and a part of the rows of
    W.

    Then adds the results over the parts of the rows of W.
    """
    (m, k), (height, n) = x.shape, codes.shape
    each = -(-k // height)
    tile = next(tile for rows, tile in blocks.CODES_TRITON.items() if m <= rows)
    depth = tile.depth if len(scale) == 1 else min(tile.depth, group // each)
    grid, steps = (pl.cdiv(m, tile.rows), pl.cdiv(n, tile.columns)), pl.cdiv(height, depth)
    wanted = round(tile.busy * blocks.PROCESSORS / (tile.warps * grid[0] * grid[1]))
    per = pl.cdiv(steps, max(min(wanted, steps // 4), 1))
    parts = pl.cdiv(steps, per)
    x = jnp.pad(x, [(0, 0), (0, height * each - k)]).reshape(m, height, each).transpose(2, 0, 1)
    y = pl.pallas_call(
        functools.partial(_body, form, (m, n, height), (group // each, depth, per)),
        grid=(*grid, parts),
        in_specs=[
            pl.BlockSpec((len(LEVELS),), lambda i, j, l: (0,)),
            pl.BlockSpec((each, tile.rows, height), lambda i, j, l: (0, i, 0)),
            pl.BlockSpec((height, tile.columns), lambda i, j, l: (0, j)),
            pl.BlockSpec((len(scale), tile.columns), lambda i, j, l: (0, j)),
        ],
        out_specs=pl.BlockSpec((None, tile.rows, tile.columns), lambda i, j, l: (l, i, j)),
        out_shape=jax.ShapeDtypeStruct((parts, m, n), jnp.float32 if parts > 1 else dtype),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=1),
    )(jnp.asarray(LEVELS, jnp.bfloat16), x, codes, scale)
    return y[0] if parts == 1 else y.sum(0).astype(dtype)


def _body(
    form: Form, shape: tuple[int, int, int], by: tuple[int, int, int],
    levels_ref: Ref, x_ref: Ref, w_ref: Ref, s_ref: Ref, y_ref: Ref,
) -> None:  # fmt: skip
    (m, n, height), (group, depth, per), (rows, columns) = shape, by, y_ref.shape  # group, depth: in rows of bytes
    i, j, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * per
    turns, one = jnp.minimum(per, pl.cdiv(height, depth) - first), len(s_ref) == 1
    there, inside = _inside(i * rows, rows, m, 0), _inside(j * columns, columns, n, 1)
    level = lambda index: triton.load(levels_ref.at[index])
    codes = lambda at: _load(w_ref, pl.ds(at * depth, depth), _inside(at * depth, depth, height, 0), inside)
    scale = lambda group: _load(s_ref, pl.ds(group, 1), inside).astype(jnp.float32)

    def step(turn: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        held, total = state
        at = first + turn
        coming = codes(first + jnp.minimum(turn + 1, turns - 1))  # loads the next codes while `held` is multiplied
        mask = _all(there, _inside(at * depth, depth, height, 1))
        x = lambda place: triton.load(x_ref.at[place, :, pl.ds(at * depth, depth)], mask=mask, other=_none(mask))
        # The products are all computed before they are added, because other orders spill registers.
        numbers = form(held, level)
        y = sum([jnp.dot(w.T, x(jnp.int32(p)).T, preferred_element_type=jnp.float32) for p, w in enumerate(numbers)])
        return coming, total + (y if one else y * scale(at * depth // group).reshape(columns, 1))

    _, total = jax.lax.fori_loop(0, turns, step, (codes(first), jnp.zeros((columns, rows), jnp.float32)))
    y = total.T * scale(0) if one else total.T
    triton.store(y_ref, y.astype(y_ref.dtype), mask=_all(there, inside))


def _inside(start: ArrayLike, size: int, total: int, axis: int) -> Array | None:
    """Returns a mask for `size` rows (axis 0) or columns (axis 1) from `start` on, which is True inside the array.

    If every block is full, no mask is needed, and the result is None.
    """
    if total % size == 0:
        return None
    return start + jax.lax.broadcasted_iota(jnp.int32, (1, size)[:: 1 if axis else -1], axis) < total


def _all(*masks: Array | None) -> Array | None:
    return functools.reduce(jnp.logical_and, found) if (found := [m for m in masks if m is not None]) else None


def _none(mask: Array | None) -> int | None:
    """Returns the value to load where the mask is False, or None if there is no mask."""
    return None if mask is None else 0


def _load(ref: Ref, rows: pl.Slice, *masks: Array | None) -> Array:
    """Loads rows of a block, with 0 for elements outside the array."""
    mask = _all(*masks)
    return triton.load(ref.at[rows, :], mask=mask, other=_none(mask))
