"""Products that need no kernel on a TPU, for the report to show why: XLA converts an 8-bit W inside its dot.

A decoding step takes what the bytes take, and a prefill what the MXU takes. Rounding rows of x to int8 takes what
reading and writing them takes, so that a kernel would gain nothing but by joining what writes x.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from jax import Array

from kernels.cases import Case, array


def plain(x: Array, w: Array) -> Array:
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def weight_only(x: Array, w: Array, scale: Array) -> Array:
    """x times an int8 or fp8 W with a scale a column."""
    return (jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32) * scale).astype(x.dtype)


def w8a8(x: Array, w: Array, per_row: Array, scale: Array) -> Array:
    """int8 times int8, with a scale a row of x and one a column of W."""
    return (jnp.dot(x, w, preferred_element_type=jnp.int32).astype(jnp.float32) * per_row * scale).astype(jnp.bfloat16)


def w8a8_gradient(g: Array, w: Array, per_row: Array) -> Array:
    """g of int8, into which the scales of W's columns were folded, times the transposed W."""
    return w8a8(g, w.T, per_row, jnp.ones(()))


def round_rows(x: Array) -> tuple[Array, Array]:
    """(int8 codes, float32 scale) of each row of x."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True) * (1 / 127), 1e-30)
    return jnp.round(x / scale).astype(jnp.int8), scale


def cases() -> Iterator[Case]:
    return (case._replace(platform=platform) for platform in ("tpu", "cuda") for case in _cases())


def _cases() -> Iterator[Case]:
    for m, k, n in ((16, 4096, 4096), (2048, 4096, 14336)):
        shape, flops, row, scale = (
            f"{m}x{k}x{n}",
            2 * m * k * n,
            array(m, 1, dtype="float32"),
            array(n, dtype="float32"),
        )
        yield Case("bf16", shape, None, plain, (array(m, k), array(k, n)), flops)
        for dtype in ("int8", "float8_e4m3fn"):
            args = array(m, k), array(k, n, dtype=dtype), scale
            yield Case(f"{dtype.split('_')[0]} weight only", shape, None, weight_only, args, flops)
        args = array(m, k, dtype="int8"), array(k, n, dtype="int8"), row, scale
        yield Case("w8a8", shape, None, w8a8, args, flops, "int8", quick=m == 16)
    args = array(m, n, dtype="int8"), array(k, n, dtype="int8"), row
    yield Case("w8a8 dx", shape, None, w8a8_gradient, args, flops, "int8")
    yield Case("round rows", f"{m}x{k}", None, round_rows, (array(m, k),))
