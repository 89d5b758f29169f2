"""y = x W on an NVIDIA GPU, by Triton, of a W of 8 bits or fewer as it lies; XLA would write the whole float W first.

A program has a block of columns and a share of the rows of W. A decoding step has too few columns to keep a GPU busy:
rows are shared out among programs, and XLA adds their sums. What bounds it is how many bytes are under way.

The transposed W is the first operand of the tensor core, which lies in registers: as the second one, a tile of bytes
would go through shared memory byte by byte. So few rows of x are no worse than one: multiplying without a tensor core
took an H100 as long with one row, and 1.6 times as long with four.

Behind MOST rows, and for the gradient, XLA does it all: what writing and reading a float W takes is then little beside
the product, which is the vendor's.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels import blocks, left_to_xla
from kernels.cases import Case, array
from kernels.packing import LEVELS

MOST = 256  # rows of x

# Codes as numbers of the first row of W in each byte, of the second, in bfloat16. `level` looks those of NF4 up.
Form = Callable[[Array, Callable], list[Array]]


def plain(codes: Array, _: Callable) -> list[Array]:
    """Of int8 and 8-bit floats."""
    return [codes.astype(jnp.bfloat16)]


def int4(codes: Array, _: Callable) -> list[Array]:
    """128 and seven bits is a bfloat16: no conversion, of which a GPU does few at a time."""
    number = lambda nibbles: jax.lax.bitcast_convert_type(nibbles.astype(jnp.uint16) ^ 0x4308, jnp.bfloat16)
    return [number(nibbles) - jnp.bfloat16(136) for nibbles in (codes & 15, codes >> 4)]


def nf4(codes: Array, level: Callable) -> list[Array]:
    """Looked up in the level-1 cache."""
    return [level(nibbles.astype(jnp.int32)) for nibbles in (codes & 15, codes >> 4)]


def supported(k: int, group: int) -> bool:
    """Whether `matmul` takes a W of K rows: groups that are whole tiles, or one for a column."""
    return group in (32, 64, 128) or group >= k


def reference(x: Array, codes: Array, scale: Array, group: int, dtype: Any = None, form: Form = int4) -> Array:
    """What `matmul` computes, of a W that is written."""
    w = _dense(codes, scale, group, form, x)
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


def _dense(codes: Array, scale: Array, group: int, form: Form, like: Array) -> Array:
    numbers = form(codes, lambda index: jnp.take(jnp.asarray(LEVELS, jnp.float32), index))
    w = jnp.stack(numbers, 1).reshape(-1, codes.shape[1]).astype(jnp.float32)
    w *= jnp.repeat(scale.astype(jnp.float32), group, 0)[: len(w)]
    return w[: like.shape[1]].astype(like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def matmul(x: Array, codes: Array, scale: Array, group: int, dtype: Any = None, form: Form = int4) -> Array:
    """x [M, K] times W [K, N] -> [M, N] of `dtype` or that of x, accumulated in float32. Only x has a gradient.

    `codes` are bytes [K / R, N] that R rows share, `scale` [ceil(K / group), N].
    """
    m, dtype = x.shape[0], dtype or x.dtype
    if x.dtype == jnp.bfloat16 and m <= MOST:
        return _call(x, codes, scale, group, dtype, form)
    # Three bfloat16 numbers hold a float32, and one a code, but for NF4's levels.
    if x.dtype == jnp.float32 and 3 * m <= MOST and form is not nf4:
        rest, parts = x, []
        for _ in range(3):
            parts.append(jax.lax.reduce_precision(rest, 8, 7))  # XLA drops a pair of casts, but never this
            rest = rest - parts[-1]
        y = _call(jnp.concatenate(parts).astype(jnp.bfloat16), codes, scale, group, jnp.float32, form)
        return y.reshape(3, m, -1).sum(0).astype(dtype)
    return reference(x, codes, scale, group, dtype, form)


def _forward(x: Array, codes: Array, scale: Array, group: int, dtype: Any, form: Form) -> tuple[Array, tuple]:
    return matmul(x, codes, scale, group, dtype, form), (codes, scale, x)


def _backward(group: int, dtype: Any, form: Form, kept: tuple, g: Array) -> tuple:
    codes, scale, x = kept
    w = _dense(codes, scale, group, form, x)
    return jnp.dot(g, w.T, preferred_element_type=jnp.float32).astype(x.dtype), None, None


matmul.defvjp(_forward, _backward)


def _call(x: Array, codes: Array, scale: Array, group: int, dtype: Any, form: Form) -> Array:
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
    levels_ref: Any, x_ref: Any, w_ref: Any, s_ref: Any, y_ref: Any,
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


def _inside(start: Any, size: int, total: int, axis: int) -> Array | None:
    """Which of `size` rows (axis 0) or columns there are; None where all always are."""
    if total % size == 0:
        return None
    return start + jax.lax.broadcasted_iota(jnp.int32, (1, size)[:: 1 if axis else -1], axis) < total


def _all(*masks: Array | None) -> Array | None:
    return functools.reduce(jnp.logical_and, found) if (found := [m for m in masks if m is not None]) else None


def _none(mask: Array | None) -> int | None:
    """What stands for what lies outside of an array."""
    return None if mask is None else 0


def _load(ref: Any, rows: Any, *masks: Array | None) -> Array:
    """Rows of a block, 0 for what lies outside of the array."""
    mask = _all(*masks)
    return triton.load(ref.at[rows, :], mask=mask, other=_none(mask))


FORMS = {  # with the type of the codes, and how many share a byte
    "int4": (int4, "uint8", 2),
    "nf4": (nf4, "uint8", 2),
    "int8": (plain, "int8", 1),
    "fp8": (plain, "float8_e4m3fn", 1),
}


def cases() -> Iterator[Case]:
    """Decoding of 7 B models, aligned and not, up to the most rows that a kernel takes; bfloat16 to compare it with."""
    wide = (4096, 11008)
    shapes = {
        "int4": [(1, 4096, 4096), (16, 4096, 4096), *((m, *wide) for m in (1, 16, 64, 256)), (16, *wide[::-1])],
        "int8": [(16, 4096, 4096), *((m, *wide) for m in (1, 16, 64, 256))],
        "nf4": [(16, *wide)],
        "fp8": [(16, *wide)],
    }
    listed = [(name, "bfloat16", *shape, 128) for name in shapes for shape in shapes[name]]
    listed += [
        ("int4", "bfloat16", *odd) for odd in ((5, 4096, 4100, 128), (16, 4000, 4096, 128), (16, 4096, 4096, 32))
    ]
    listed += [("int4", "float32", 16, 4096, 4096, 128)]
    for m in (1, 16, 64, 256):
        args = array(m, wide[0]), array(*wide)
        yield Case("bf16", f"{m}x4096x11008", None, left_to_xla.plain, args, 2 * m * math.prod(wide), platform="cuda")
    for name, dtype, m, k, n, group in listed:
        form, codes, each = FORMS[name]
        options = dict(group=group if each == 2 else k, form=form)
        args = array(m, k, dtype=dtype), array(k // each, n, dtype=codes), array(-(-k // options["group"]), n)
        yield Case(
            name if dtype == "bfloat16" else f"{name} f32", f"{m}x{k}x{n}" + (f" g{group}" if each == 2 else ""),
            functools.partial(matmul, **options), functools.partial(reference, **options), args, 2 * m * k * n,
            quick=(m, n, group) == (16, 4096, 128), platform="cuda",
        )  # fmt: skip
