"""Packs codes of two or four bits into bytes, and defines the values of the NF4 codes."""

import jax.numpy as jnp
from jax import Array

LANES = 128  # number of columns of a TPU register

# The levels of NF4, which are quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def pack(codes: Array, bits: int = 4) -> Array:
    """Packs codes [..., K, N] into uint8 [..., ceil(K / n), N].

    Each byte holds the codes of n = 8 / bits adjacent rows, with the first row in the lowest bits.
    """
    n = 8 // bits
    codes = codes.astype(jnp.int32) & (2**bits - 1)
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, -codes.shape[-2] % n), (0, 0)])
    return sum(codes[..., i::n, :] << bits * i for i in range(n)).astype(jnp.uint8)


def unpack(packed: Array, k: int, bits: int = 4) -> Array:
    """Reverses `pack`: returns the codes of the first k rows as uint8 [..., k, N]."""
    rows = jnp.stack([packed >> bits * i & (2**bits - 1) for i in range(8 // bits)], -2)
    return rows.reshape(*packed.shape[:-2], -1, packed.shape[-1])[..., :k, :]


def signed(nibbles: Array) -> Array:
    """Converts four-bit numbers in two's complement to int8, with values from -8 to 7."""
    return (nibbles ^ 8).astype(jnp.int8) - 8


def by_columns(rows: int, columns: int) -> bool:
    """Returns whether XLA stores bytes [rows, columns] column-major on a TPU.

    XLA does so if the 8 x 128 tiles need less padding in column-major order.
    """
    up = lambda size, tile: -(-size // tile) * tile
    return up(columns, 8) * up(rows, LANES) < up(rows, 8) * up(columns, LANES)
