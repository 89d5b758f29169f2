"""Multiplies a few rows of x by a quantized matrix W on a CPU, in the time that it takes to read the codes of W.

XLA's CPU backend only multiplies floats. In a decoding loop, XLA would convert the codes to floats before the loop, and
then read four or eight times as many bytes in every step. This module therefore computes partial sums, each over SUMMED
rows of W, because XLA generates fast code for them that converts the codes while it reads them. The partial sums are
then added by a matrix product with ones, because XLA would fuse a plain sum and the partial sums into a slow library
routine.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

# Largest number of rows of x that `matmul` accepts. It converts the codes again for each row, so with more rows, it is
# faster to multiply by a W of floats.
MOST = 4
SUMMED = 16  # rows of W per partial sum; with more rows, XLA does not vectorize the sum


def supported(rows: int, k: int, group: int, transposed: bool) -> bool:
    """Returns whether `matmul` accepts an x with `rows` rows and a W with `k` rows, in groups of `group` rows."""
    return rows <= MOST and k % group == 0 and group % (64 if transposed else SUMMED) == 0


def matmul(
    x: Array, codes: Array, scale: Array, group: int, dtype: DTypeLike, *, unpack_rows: Callable, transposed: bool
) -> Array:
    """Multiplies x [M, K] by W [K, N], and returns [M, N]. W is given as bytes `codes` [K / R, N] and `scale` [K /
    group, N].

    Each byte has the codes of R adjacent rows of W. The function `unpack_rows` converts bytes to R arrays of numbers,
    one for each of these rows. If `transposed`, the codes are stored as [N, K / R].
    """
    each = x.shape[1] // len(codes)
    halves = max(2 // each, 1)  # summing two arrays at once keeps XLA from using a slow library routine
    stored = codes.T if transposed else codes
    # Without the barrier, XLA would dequantize W before the decoding loop.
    x, stored = jax.lax.optimization_barrier((x.astype(jnp.float32), stored))
    y = (_along if transposed else _down)(x, stored, scale.astype(jnp.float32), group, (each, halves), unpack_rows)
    return y.astype(dtype)


def _down(x: Array, codes: Array, scale: Array, group: int, by: tuple[int, int], unpack_rows: Callable) -> Array:
    (m, k), n, (each, halves) = x.shape, codes.shape[1], by
    shape = (k // group, halves, SUMMED // (each * halves), group // SUMMED)
    x = x.T.reshape(*shape, each, m, 1)
    codes = jnp.broadcast_to(codes.reshape(*shape, 1, n), (*shape, m, n))
    y = _sum([a * x[:, i, :, :, j] for i in range(halves) for j, a in enumerate(unpack_rows(codes[:, i]))], 1)
    y *= scale[:, None, None]  # [groups, parts, M, N]
    return jnp.tile(jnp.eye(m), k // SUMMED) @ y.reshape(-1, n)


def _along(x: Array, codes: Array, scale: Array, group: int, by: tuple[int, int], unpack_rows: Callable) -> Array:
    (m, k), n, (each, halves) = x.shape, codes.shape[0], by
    shape = (k // group, halves, group // (each * halves * SUMMED), SUMMED)
    x = x @ jnp.eye(k)  # without this product, XLA would compute x again for each column
    x, codes = x.reshape(m, 1, *shape, each), codes.reshape(1, n, *shape)
    y = _sum(
        [a * x[:, :, :, i, ..., j] for i in range(halves) for j, a in enumerate(unpack_rows(codes[:, :, :, i]))], 3
    )
    y *= scale.T[..., None]  # [M, N, groups, SUMMED]
    return (y.reshape(m * n, -1) @ jnp.ones(k // group * SUMMED)).reshape(m, n)


def _sum(parts: list[Array], axis: int) -> Array:
    zeros = [np.float32(0)] * len(parts)
    return sum(jax.lax.reduce(parts, zeros, lambda a, b: [p + q for p, q in zip(a, b)], (axis,)))
