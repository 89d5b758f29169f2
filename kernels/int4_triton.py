"""y = x W on an NVIDIA GPU, by Triton, of the operands of `int4_matmul`; XLA would write the whole float W there, too.

A program has a block of the result and some of the groups. A decoding step has too few columns to keep a GPU busy: the
groups of a column are shared out among programs, and XLA adds their sums. Up to FEW rows of x each group's partial
product is scaled, beyond W itself, in registers.

Behind MOST rows, and for the gradient, XLA does it all. What it writes and reads of a bfloat16 W, 4 K N bytes, takes
590 / M of the time of the product at an H100's published rates, and its product is the vendor's.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels import blocks
from kernels.cases import Case, array
from kernels.int4_matmul import reference, reference_gradient

FEW, MOST = 64, 512  # rows of x
DEPTH = 64  # the most rows of W in a step: 128 would ask for more shared memory than GPUs of other kinds have, 99 KiB


def supported(k: int, n: int, group: int) -> bool:
    """Whether `matmul` takes a W of these shapes: whole bytes, and groups that are tiles of a product."""
    return k % 2 == 0 and group in (32, 64, 128)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def matmul(x: Array, packed: Array, scale: Array, group: int, dtype: Any = None) -> Array:
    """x [M, K] times W [K, N] -> [M, N] of `dtype` or that of x, accumulated in float32. Only x has a gradient."""
    m, dtype = x.shape[0], dtype or x.dtype
    if x.dtype == jnp.bfloat16 and m <= MOST:
        return _call(x, packed, scale, group, dtype)
    if x.dtype == jnp.float32 and 3 * m <= FEW:  # three bfloat16 numbers hold a float32, and integers are exact
        rest, parts = x, []
        for _ in range(3):
            parts.append(jax.lax.reduce_precision(rest, 8, 7))  # XLA drops a pair of casts, but never this
            rest = rest - parts[-1]
        y = _call(jnp.concatenate(parts).astype(jnp.bfloat16), packed, scale, group, jnp.float32)
        return y.reshape(3, m, -1).sum(0).astype(dtype)
    return reference(x, packed, scale, group, dtype)


def _forward(x: Array, packed: Array, scale: Array, group: int, dtype: Any) -> tuple[Array, tuple]:
    return matmul(x, packed, scale, group, dtype), (packed, scale, jnp.zeros((), x.dtype))


def _backward(group: int, dtype: Any, kept: tuple, g: Array) -> tuple:
    packed, scale, like = kept
    return reference_gradient(g, packed, scale, group).astype(like.dtype), None, None


matmul.defvjp(_forward, _backward)


def _call(x: Array, packed: Array, scale: Array, group: int, dtype: Any) -> Array:
    """A grid over rows of x, columns of W and shares of the groups, which the results are summed over."""
    (m, k), n, groups = x.shape, packed.shape[1], scale.shape[0]
    bm, bn, warps, ahead = next(tile for rows, tile in blocks.INT4_TRITON.items() if m <= rows)
    programs = pl.cdiv(m, bm) * pl.cdiv(n, bn)
    per = pl.cdiv(groups, max(min(round(blocks.WARPS / (warps * programs)), groups // 4), 1))
    shares = pl.cdiv(groups, per)
    y = pl.pallas_call(
        functools.partial(_body, (m, k, n), group),
        grid=(pl.cdiv(m, bm), pl.cdiv(n, bn), shares),
        in_specs=[
            pl.BlockSpec((bm, per * group), lambda i, j, l: (i, l)),
            pl.BlockSpec((per * group // 2, bn), lambda i, j, l: (l, j)),
            pl.BlockSpec((per, bn), lambda i, j, l: (l, j)),
        ],
        out_specs=pl.BlockSpec((None, bm, bn), lambda i, j, l: (l, i, j)),
        out_shape=jax.ShapeDtypeStruct((shares, m, n), jnp.float32 if shares > 1 else dtype),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1 + ahead * DEPTH // min(group, DEPTH)),
    )(x, packed, scale)
    return y[0] if shares == 1 else y.sum(0).astype(dtype)


def _body(shape: tuple[int, int, int], group: int, x_ref: Any, w_ref: Any, s_ref: Any, y_ref: Any) -> None:
    (m, k, n), (bm, bn), deep = shape, y_ref.shape, min(group, DEPTH)
    steps, each = pl.cdiv(k, deep), x_ref.shape[1] // deep  # of W, and of a share
    i, j, l = map(pl.program_id, range(3))
    rows, columns = _inside(i * bm, bm, m, 0), _inside(j * bn, bn, n, 1)

    def step(at: Array, total: Array) -> Array:
        first = (l * each + at) * deep  # row of W
        x = _load(x_ref, slice(None), pl.ds(at * deep, deep), rows, _inside(first, deep, k, 1))
        half = _inside(first // 2, deep // 2, k // 2, 0)
        w = _load(w_ref, pl.ds(at * (deep // 2), deep // 2), slice(None), half, columns)
        scale = _load(s_ref, pl.ds(at * deep // group, 1), slice(None), columns)
        nibbles = jnp.stack([w & 15, w >> 4], -1).swapaxes(1, 2).reshape(deep, bn)
        # 128 and seven bits is a bfloat16: no conversion, of which a GPU does few at a time.
        codes = jax.lax.bitcast_convert_type(nibbles.astype(jnp.uint16) ^ 0x4308, jnp.bfloat16) - jnp.bfloat16(136)
        if m <= FEW:
            return total + jnp.dot(x, codes, preferred_element_type=jnp.float32) * scale.astype(jnp.float32)
        return total + jnp.dot(x, codes * scale.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    turns = each if steps % each == 0 else jnp.minimum(each, steps - l * each)
    total = jax.lax.fori_loop(0, turns, step, jnp.zeros((bm, bn), jnp.float32))
    triton.store(y_ref, total.astype(y_ref.dtype), mask=_all(rows, columns))


def _inside(start: Any, size: int, total: int, axis: int) -> Array | None:
    """Which of `size` rows (axis 0) or columns there are; None where all always are."""
    if total % size == 0:
        return None
    return start + jax.lax.broadcasted_iota(jnp.int32, (1, size)[:: 1 if axis else -1], axis) < total


def _all(*masks: Array | None) -> Array | None:
    return functools.reduce(jnp.logical_and, found) if (found := [m for m in masks if m is not None]) else None


def _load(ref: Any, rows: Any, columns: Any, *masks: Array | None) -> Array:
    """A part of a block, 0 for what lies outside of the array."""
    mask = _all(*masks)
    return triton.load(ref.at[rows, columns], mask=mask, other=None if mask is None else 0)


def cases() -> Iterator[Case]:
    """Decoding of 7 B models, aligned and not, up to the most rows that a kernel takes."""
    few = [(16, 4096, 4096, 128), (1, 4096, 4096, 128), (16, 11008, 4096, 64), (16, 4096, 4096, 32)]
    more = [(5, 4096, 4100, 128), (16, 4000, 4096, 128), (64, 4096, 4096, 128), (512, 4096, 14336, 64)]
    for dtype, shapes in (("bfloat16", few + more), ("float32", few[:2])):
        for m, k, n, g in shapes:
            args = array(m, k, dtype=dtype), array(k // 2, n, dtype="uint8"), array(-(-k // g), n)
            yield Case(
                "int4" if dtype == "bfloat16" else "int4 f32", f"{m}x{k}x{n} g{g}",
                functools.partial(matmul, group=g), functools.partial(reference, group=g), args, 2 * m * k * n,
                quick=(m, k, n, g) == few[0], platform="cuda",
            )  # fmt: skip
