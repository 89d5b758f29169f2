"""Few rows times a matrix of codes on a CPU, which reads the codes alone: decoding takes the time of their bytes.

XLA's CPU backend gives a product the matrix as floats. In a loop over tokens it makes them once, before the loop, and
reads four to eight times the bytes at every step. What it does well is one loop over [parts, N] that adds up SUMMED
products at each place, converted as they are read; a product with ones adds up the parts, as XLA's own sum would take
the products out of that loop.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

ROWS = 4  # every row converts the codes again: from about 6 rows on the product with floats is the faster one
SUMMED = 16  # neighbourhood of a part along K: more gives programs that compile long, less gives more parts


@partial(jax.jit, static_argnums=(3, 4))  # traced once for all layers
def product(
    x: Array, codes: Array, scale: Array, tile: int, numbers: Callable[[Array], Sequence[Array]]
) -> Array:
    """Float32 [B,N] of x [B,K], codes [K / n, N], n rows of K in each, and a scale [K / tile, N] for every `tile` rows.

    `numbers` gives the n numbers of codes; `tile` is a multiple of SUMMED, and K of `tile`.
    """
    x, codes = jax.lax.optimization_barrier((x, codes))  # or the conversion leaves the loop over tokens
    (b, k), n, each = x.shape, codes.shape[1], x.shape[1] // len(codes)
    cut = max(2 // each, 1)  # XLA hands the sum of one array to a library
    groups, parts, steps = k // tile, tile // SUMMED, SUMMED // (each * cut)
    x = x.T.astype(jnp.float32).reshape(groups, cut, steps, parts, each, b, 1)
    codes = jnp.broadcast_to(codes.reshape(groups, cut, steps, parts, 1, n), (groups, cut, steps, parts, b, n))
    y = [a.astype(jnp.float32) * x[:, i, :, :, j] for i in range(cut) for j, a in enumerate(numbers(codes[:, i]))]
    zeros = [np.float32(0)] * len(y)
    y = sum(jax.lax.reduce(y, zeros, lambda a, b: [p + q for p, q in zip(a, b)], (1,)))  # [groups, parts, b, n]
    y *= scale.astype(jnp.float32)[:, None, None]
    return jnp.tile(jnp.eye(b), k // SUMMED) @ y.reshape(-1, n)
