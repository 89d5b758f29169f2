"""Two codes of four bits a byte, and the values of NF4's."""

import jax.numpy as jnp
from jax import Array

# Of NF4: quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def pack(codes: Array) -> Array:
    """Rows 2i (low) and 2i + 1 (high) of [..., K, N] share a byte -> uint8 [..., ceil(K / 2), N]."""
    codes = codes.astype(jnp.int32) & 15
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, codes.shape[-2] % 2), (0, 0)])
    return (codes[..., ::2, :] | codes[..., 1::2, :] << 4).astype(jnp.uint8)


def unpack(packed: Array, k: int) -> Array:
    """The inverse of `pack` on k rows: uint8 [..., k, N]."""
    pairs = jnp.stack([packed & 15, packed >> 4], -2)
    return pairs.reshape(*packed.shape[:-2], -1, packed.shape[-1])[..., :k, :]


def signed(nibbles: Array) -> Array:
    """-8 .. 7, int8, of four bits in two's complement."""
    return (nibbles ^ 8).astype(jnp.int8) - 8


def by_columns(rows: int, columns: int) -> bool:
    """Whether XLA lays bytes [rows, columns] out column after column on a TPU: where tiles of 8 x 128 pad that less."""
    up = lambda size, tile: -(-size // tile) * tile
    return up(columns, 8) * up(rows, 128) < up(rows, 8) * up(columns, 128)
