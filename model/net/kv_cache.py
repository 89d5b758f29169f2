"""Keys and values of earlier tokens: floats, or codes of 8 bits with a scale for each token and head."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model.quant.train8 import quantize
from model.weights import Tree

KINDS = {"float": None, "int8": "int8", "fp8": "e4m3"}


@flax.struct.dataclass
class Rounded:
    codes: Array  # [...,S,H] int8 or e4m3
    scale: Array  # [...,S,1] float32


class KV(NamedTuple):
    """What a layer of attention keeps: [B*K,S,H] each, stacked layers [layers,B*K,S,H]."""

    k: Array | Rounded
    v: Array | Rounded


class Cache(NamedTuple):
    """What is kept of earlier tokens: S columns, of which the next tokens take those from `index` on."""

    index: Array  # []
    layers: Tree  # a tuple of what each layer keeps; of stacked layers one stack, or {kind: stack} of several kinds
    positions: Array  # [B,S] of the token of each column
    segments: Array  # [B,S]; 0: nothing is written there, or padding


def encode(x: Array, kind: str) -> Array | Rounded:
    """x [...,S,H] as a cache of `kind` holds it."""
    if kind == "float":
        return x
    axes = "abcdefgh"[: x.ndim]
    return Rounded(*quantize(x, axes, axes[-1], KINDS[kind]))


def write(cache: Array | Rounded, new: Array, index: Array) -> Array | Rounded:
    """`new` [B,K,T,H] into a cache [B*K,S,H] at `index`."""
    kind = "float" if not isinstance(cache, Rounded) else "int8" if cache.codes.dtype == jnp.int8 else "fp8"
    put = lambda old, x: jax.lax.dynamic_update_slice(old, x.astype(old.dtype), (0, index, 0))
    return jax.tree.map(put, cache, encode(new.reshape(-1, *new.shape[2:]), kind))


def read(cache: Array | Rounded, dtype: DTypeLike) -> Array:
    """[B*K,S,H] in `dtype`."""
    if isinstance(cache, Rounded):
        return (cache.codes.astype(jnp.float32) * cache.scale).astype(dtype)
    return cache.astype(dtype)
