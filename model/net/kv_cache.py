"""The key-value cache: floats, or 8-bit codes with one scale per token and head."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model.quant._matrix import round_rows
from model.weights import Tree

KINDS = {"float": None, "int8": "int8", "fp8": "e4m3"}


@flax.struct.dataclass
class Coded:
    """Quantized keys or values: codes * scale."""

    codes: Array  # [...,S,H] int8 or e4m3
    scale: Array  # [...,S,1] float32


class KV(NamedTuple):
    """The keys and values that an attention layer caches: [B*K,S,H] each; of stacked layers [layers,B*K,S,H]."""

    k: Array | Coded
    v: Array | Coded


class Cache(NamedTuple):
    """The state of decoding: S columns for tokens, of which the next ones are written from `index` on."""

    index: Array  # []
    layers: Tree  # a tuple with the cache of each layer; for stacked layers one stack, or {kind: stack}
    positions: Array  # [B,S] of the token in each column
    segments: Array  # [B,S]; 0: an empty column, or padding


def encode(x: Array, kind: str) -> Array | Coded:
    """x [...,S,H] in the format of a cache of `kind`."""
    if kind == "float":
        return x
    axes = "abcdefgh"[: x.ndim]
    return Coded(*round_rows(x, axes, axes[-1], KINDS[kind]))


def write(cache: Array | Coded, new: Array, index: Array) -> Array | Coded:
    """The cache [B*K,S,H] with `new` [B,K,T,H] written at `index`."""
    kind = "float"
    if isinstance(cache, Coded):
        kind = "int8" if cache.codes.dtype == jnp.int8 else "fp8"
    put = lambda old, x: jax.lax.dynamic_update_slice(old, x.astype(old.dtype), (0, index, 0))
    return jax.tree.map(put, cache, encode(new.reshape(-1, *new.shape[2:]), kind))


def read(cache: Array | Coded, dtype: DTypeLike) -> Array:
    """The cached keys or values [B*K,S,H] in `dtype`."""
    if isinstance(cache, Coded):
        return (cache.codes.astype(jnp.float32) * cache.scale).astype(dtype)
    return cache.astype(dtype)
