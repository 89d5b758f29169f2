"""Multiplies a few rows by a matrix of codes on a CPU. Only the codes are read, so their size determines the time.

XLA's CPU backend multiplies floats. In a loop over tokens it would convert the codes once, before the loop, and then
read four or eight times as many bytes at every step. XLA does well on a loop over [K / SUMMED, N] that adds SUMMED rows
at each position and converts the codes as it reads them. The partial sums are then added by a product with ones,
because XLA would fuse a plain sum with that loop into a slow library routine.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

MOST = 4  # rows of x. Every row converts the codes again, so with more rows the product with floats is faster
SUMMED = 16  # rows of W per partial sum. With more, XLA does not vectorize; with fewer, there are more partial sums


def supported(rows: int, k: int, group: int, transposed: bool) -> bool:
    """Whether `matmul` accepts `rows` rows of x and a W of K rows, which must be whole groups of a suitable size."""
    return rows <= MOST and k % group == 0 and group % (64 if transposed else SUMMED) == 0


def matmul(
    x: Array, codes: Array, scale: Array, group: int, dtype: DTypeLike, *, unpack_rows: Callable, transposed: bool
) -> Array:
    """x [M, K] times W [K, N] -> [M, N] of `dtype`, from bytes of codes [K / R, N] and scales [K / group, N].

    `unpack_rows` converts bytes to R arrays of numbers: one for the first of the R rows that share a byte, one for the
    second, and so on. If `transposed`, the codes are stored as [N, K / R].
    """
    each = x.shape[1] // len(codes)
    halves = max(2 // each, 1)  # XLA does not use its slow library routine to reduce two or more arrays jointly
    stored = codes.T if transposed else codes
    # Without the barrier XLA hoists the dequantized floats out of the decoding loop.
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
    x = x @ jnp.eye(k)  # without this product XLA would compute x again for each column
    x, codes = x.reshape(m, 1, *shape, each), codes.reshape(1, n, *shape)
    y = _sum(
        [a * x[:, :, :, i, ..., j] for i in range(halves) for j, a in enumerate(unpack_rows(codes[:, :, :, i]))], 3
    )
    y *= scale.T[..., None]  # [M, N, groups, SUMMED]
    return (y.reshape(m * n, -1) @ jnp.ones(k // group * SUMMED)).reshape(m, n)


def _sum(parts: list[Array], axis: int) -> Array:
    zeros = [np.float32(0)] * len(parts)
    return sum(jax.lax.reduce(parts, zeros, lambda a, b: [p + q for p, q in zip(a, b)], (axis,)))
