"""Two codes of four bits a byte."""

import jax.numpy as jnp
from jax import Array


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
