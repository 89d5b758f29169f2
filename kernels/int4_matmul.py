"""y = x W on a TPU, for a W of 4-bit integers with a scale a group of rows; XLA would write the whole float W there.

Two regimes. With few rows of x the weights' bytes are the time: each group's partial product is scaled, which costs
M N / group multiplications. With many the products are: a block of W is dequantised in VMEM, hidden under the MXU.
On a GPU `codes_triton` is what runs, and elsewhere `reference`.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import blocks, tiled
from kernels.blocks import cut
from kernels.cases import Case, array
from kernels.packing import signed, unpack

FEW = 128  # rows of x: up to here partial products are scaled
TURNED = 256  # rows of W that are then unpacked at once; where they lie along registers, these are turned whole


def reference(x: Array, packed: Array, scale: Array, group: int, dtype: Any = None) -> Array:
    """x [M, K] times W [K, N], of bytes [K / 2, N] and scales [ceil(K / group), N]: what the kernels compute."""
    return jnp.dot(x, _dense(packed, scale, group, x), preferred_element_type=jnp.float32).astype(dtype or x.dtype)


def reference_gradient(g: Array, packed: Array, scale: Array, group: int) -> Array:
    """g [M, N] times the transposed W."""
    return jnp.dot(g, _dense(packed, scale, group, g).T, preferred_element_type=jnp.float32).astype(g.dtype)


def _dense(packed: Array, scale: Array, group: int, like: Array) -> Array:
    k = min(2 * packed.shape[0], group * scale.shape[0])
    return (signed(unpack(packed, k)) * jnp.repeat(scale.astype(jnp.float32), group, 0)[:k]).astype(like.dtype)


def supported(k: int, n: int, group: int) -> bool:
    """Whether `matmul` and `gradient` take a W of these shapes: whole bytes and registers, a tile of scales a block."""
    return k % 2 == 0 and group in (32, 64, 128) and n >= 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def matmul(x: Array, packed: Array, scale: Array, group: int, dtype: Any = None) -> Array:
    """x [M, K] times W [K, N] -> [M, N] of `dtype` or that of x, accumulated in float32. Only x has a gradient."""
    (m, k), n = x.shape, packed.shape[1]
    bm, bn, bk = blocks.INT4_FEW if m <= FEW else blocks.INT4
    block = cut(m, bm, 16), cut(n, bn, 256), _rows(k, bk, group)
    body = _scaled_parts if m <= FEW else _dequantised
    return tiled.product(body, x, packed, scale, group, n, block, block[:0:-1], lambda i, j, l: (l, j), dtype)


def gradient(g: Array, packed: Array, scale: Array, group: int, dtype: Any = None) -> Array:
    """dx = g W' [M, K] of g [M, N], from the packed W: no dequantised copy is kept or made."""
    (m, n), k = g.shape, 2 * packed.shape[0]
    bm, bn, bk = blocks.INT4
    block = cut(m, bm, 16), _rows(k, bk, group), cut(n, bn, 256)
    return tiled.product(_transposed, g, packed, scale, group, k, block, block[1:], lambda i, j, l: (j, l), dtype)


def _forward(x: Array, packed: Array, scale: Array, group: int, dtype: Any) -> tuple[Array, tuple]:
    return matmul(x, packed, scale, group, dtype), (packed, scale, jnp.zeros((), x.dtype))


def _backward(group: int, dtype: Any, kept: tuple, g: Array) -> tuple:
    packed, scale, like = kept
    return gradient(g, packed, scale, group, like.dtype), None, None


matmul.defvjp(_forward, _backward)


def _rows(k: int, limit: int, group: int) -> int:
    """Rows of W in a block: eight scales are a tile, and 128 columns of x."""
    return cut(k, limit, max(8 * group, 128))


def _int4(w: tiled.W, w_ref: Any, at: int = 0, size: int | None = None) -> Array:
    """Rows of a block of W, all or `size` from `at`; two neighbours are a byte."""
    rows = slice(at // 2, None if size is None else (at + size) // 2)
    return pltpu.bitcast(w_ref[:, rows].T if w.by_columns else w_ref[rows], jnp.int4)


def _scaled_parts(w: tiled.W, x_ref: Any, w_ref: Any, s_ref: Any, y_ref: Any, sum_ref: Any) -> None:
    def part() -> Array:
        x, total = tiled.inside(x_ref[...], 1, w.total), jnp.zeros(sum_ref.shape, jnp.float32)
        scale = tiled.inside(s_ref[...], 0, pl.cdiv(w.total, w.group)).astype(jnp.float32)
        for at in range(0, x.shape[1], w.group):
            if at % TURNED == 0:
                codes = _int4(w, w_ref, at, TURNED)
            mine = codes[at % TURNED : at % TURNED + w.group].astype(x.dtype)
            y = jnp.dot(x[:, at : at + w.group], mine, preferred_element_type=jnp.float32)
            total += y * scale[at // w.group : at // w.group + 1]
        return total

    tiled.accumulate(part, y_ref, sum_ref)


def _block(w: tiled.W, w_ref: Any, scale: Array, dtype: Any) -> Array:
    """A dequantised block of W. An int4 times a bfloat16 is exact in float32: either way it is rounded once."""
    codes, scale = _int4(w, w_ref).astype(dtype), scale.astype(dtype)
    scale = jnp.broadcast_to(scale[:, None, :], (scale.shape[0], w.group, scale.shape[1])).reshape(-1, scale.shape[1])
    return codes * scale[: codes.shape[0]]


def _dequantised(w: tiled.W, x_ref: Any, w_ref: Any, s_ref: Any, y_ref: Any, sum_ref: Any) -> None:
    def part() -> Array:
        x, scale = tiled.inside(x_ref[...], 1, w.total), tiled.inside(s_ref[...], 0, pl.cdiv(w.total, w.group))
        return jnp.dot(x, _block(w, w_ref, scale, x.dtype), preferred_element_type=jnp.float32)

    tiled.accumulate(part, y_ref, sum_ref)


def _transposed(w: tiled.W, g_ref: Any, w_ref: Any, s_ref: Any, y_ref: Any, sum_ref: Any) -> None:
    def part() -> Array:
        g, scale = tiled.inside(g_ref[...], 1, w.total), tiled.inside(s_ref[...], 1, w.total)
        dims = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(g, _block(w, w_ref, scale, g.dtype), dims, preferred_element_type=jnp.float32)

    tiled.accumulate(part, y_ref, sum_ref)


def cases() -> Iterator[Case]:
    """Decoding and prefill of 7 B models, aligned and not, and the backward pass of QLoRA.

    A decoding loop has columns up to whole registers in memory (`Quantised.settled`): of 4,100 it reads 4,224.
    """
    few, many = (16, 4096, 4096), (2048, 4096, 14336)
    forward = [(*few, 128), (*few, 64), (1, 4096, 4096, 128), (16, 4096, 4100, 128), (16, 4096, 4224, 128)]
    forward += [(16, 11008, 4096, 64)]
    forward += [(*many, 64), (*many, 128), (2000, 4096, 14300, 64), (2048, 11008, 4096, 64)]
    for backward, shapes in enumerate((forward, [(*many, 64), (2048, 4096, 4096, 128), (2000, 4096, 14300, 64)])):
        kernel, xla = ((matmul, reference), (gradient, reference_gradient))[backward]
        for m, k, n, g in shapes:
            args = array(m, n if backward else k), array(k // 2, n, dtype="uint8"), array(-(-k // g), n)
            yield Case(
                "int4 dx" if backward else "int4", f"{m}x{k}x{n} g{g}",
                functools.partial(kernel, group=g), functools.partial(xla, group=g), args, 2 * m * k * n,
                quick=(m, k, n, g) in (forward[0], (*many, 64)),
            )  # fmt: skip
