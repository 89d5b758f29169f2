"""Few rows times a matrix of codes on a CPU, which reads the codes alone: decoding takes the time of their bytes.

XLA's CPU backend multiplies floats. In a loop over tokens it makes them of the codes once, before the loop, and reads
four or eight times the bytes at every step. What it does well is one loop over [K / SUMMED, N] that adds up SUMMED rows
at each place, and converts them as it reads them. Its own sum over what is left would draw that loop into a library's
slow one; a product with ones does not.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

ROWS = 4  # each converts the codes again: with more, the product with floats is faster
SUMMED = 16  # more are not vectorised, fewer leave more to add up


def supported(k: int, n: int, group: int) -> bool:
    """Whether `matmul` takes a W of these shapes."""
    return group % SUMMED == k % group == 0


@partial(jax.jit, static_argnames=("group", "dtype", "by_place"))  # traced once for all layers
def matmul(
    x: Array, codes: Array, scale: Array, group: int, dtype: Any = None, *, by_place: Callable[[Array], list[Array]]
) -> Array:
    """x [M, K] times W -> [M, N] of `dtype` or that of x, of bytes of codes, each of one or more rows of K, and scales
    [K / group, N]. `by_place` gives the numbers of each byte's first row, of its second, ..."""
    x, codes = jax.lax.optimization_barrier((x, codes))  # or the conversion leaves the loop over tokens
    (m, k), n, each = x.shape, codes.shape[1], x.shape[1] // len(codes)
    cut = max(2 // each, 1)  # sums of two arrays or more at once are none of the library's
    groups, parts, steps = k // group, group // SUMMED, SUMMED // (each * cut)
    rows = x.T.astype(jnp.float32).reshape(groups, cut, steps, parts, each, m, 1)
    codes = jnp.broadcast_to(codes.reshape(groups, cut, steps, parts, 1, n), (groups, cut, steps, parts, m, n))
    y = [a.astype(jnp.float32) * rows[:, i, :, :, j] for i in range(cut) for j, a in enumerate(by_place(codes[:, i]))]
    zeros = [np.float32(0)] * len(y)
    y = sum(jax.lax.reduce(y, zeros, lambda a, b: [p + q for p, q in zip(a, b)], (1,)))  # [groups, parts, m, n]
    y *= scale.astype(jnp.float32)[:, None, None]
    return (jnp.tile(jnp.eye(m), k // SUMMED) @ y.reshape(-1, n)).astype(dtype or x.dtype)
