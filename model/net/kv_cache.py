"""The key-value cache. Keys and values are stored as floats, or as 8-bit codes with one scale per token and head."""

import functools
from collections.abc import Callable
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
    """The cached keys and values of an attention layer: [B*K,S,H] each, or [layers,B*K,S,H] if layers are stacked."""

    k: Array | Coded
    v: Array | Coded


class Cache(NamedTuple):
    """The state of decoding. Each of the S columns stores one token per row.

    The next token is written to column `index`.
    """

    index: Array  # []
    layers: Tree  # a tuple with one cache per layer; if layers are stacked, one stacked cache or {kind: stacked cache}
    positions: Array  # [B,S] position of the token in each column
    segments: Array  # [B,S] document number of the token in each column; 0 for padding and empty columns


def encode(x: Array, kind: str) -> Array | Coded:
    """Converts keys or values x [...,S,H] to the storage format `kind`, which is a key of KINDS."""
    if kind == "float":
        return x
    axes = "abcdefgh"[: x.ndim]
    return Coded(*round_rows(x, axes, axes[-1], KINDS[kind]))


def write(cache: Array | Coded, new: Array, index: Array) -> Array | Coded:
    """Returns `cache` [B*K,S,H] after writing the keys or values `new` [B,K,T,H] at column `index`."""
    kind = "float"
    if isinstance(cache, Coded):
        kind = "int8" if cache.codes.dtype == jnp.int8 else "fp8"
    put = lambda old, x: jax.lax.dynamic_update_slice(old, x.astype(old.dtype), (0, index, 0))
    return jax.tree.map(put, cache, encode(new.reshape(-1, *new.shape[2:]), kind))


def read(cache: Array | Coded, dtype: DTypeLike) -> Array:
    """Returns the cached keys or values [B*K,S,H] as floats of `dtype`."""
    if isinstance(cache, Coded):
        return (cache.codes.astype(jnp.float32) * cache.scale).astype(dtype)
    return cache.astype(dtype)


def insert(cache: Cache, part: Cache, rows: Array, sources: Array, count: Array | int) -> Cache:
    """Replaces row rows[i] of `cache` by row sources[i] of `part`, for each i < count.

    `cache` is a ring buffer. A new row is placed so that its last token is in the column before `cache.index`. Its next
    token, which will be written to column `cache.index`, then follows directly. No row of `part` may span more columns
    than `cache` has.
    """
    width, room = part.positions.shape[1], cache.positions.shape[1]
    number = len(part.positions)
    ends = jnp.where(part.segments != 0, jnp.arange(1, width + 1), 0).max(1)

    def placed(x: Array, end: Array) -> Array:
        """Places a row of W columns in the S columns of the ring buffer. The row ends just before column
        `cache.index`."""
        x = jnp.concatenate([jnp.zeros((len(x), room, *x.shape[2:]), x.dtype), x], 1)
        x = jax.lax.dynamic_slice_in_dim(x, end, room, 1)
        return jax.lax.dynamic_slice_in_dim(jnp.concatenate([x, x], 1), -cache.index % room, room, 1)

    def one(i: Array, cache: Cache) -> Cache:
        def put(columns: bool, whole: Array, x: Array) -> Array:
            each = len(x) // number  # number of rows of x per row of the batch: 1 or the number of key heads
            x = jax.lax.dynamic_slice_in_dim(x, sources[i] * each, each)
            x = placed(x, ends[sources[i]]) if columns else x
            return jax.lax.dynamic_update_slice_in_dim(whole, x, rows[i] * each, 0)

        layers = _each(put, cache.layers, part.layers)
        positions, segments = (put(True, getattr(cache, k), getattr(part, k)) for k in ("positions", "segments"))
        return cache._replace(layers=layers, positions=positions, segments=segments)

    return jax.lax.fori_loop(0, count, one, cache)


def _each(f: Callable[..., Array], layers: Tree, *others: Tree) -> Tree:
    """Applies `f` to each layer's cache arrays [B*K,...]. The layers may be stacked.

    The first argument of `f` is True if the layer caches keys and values.
    """

    def of(layer: Tree, *rest: Tree) -> Tree:
        one = functools.partial(f, isinstance(layer, KV))
        return jax.tree.map(one if type(layers) is tuple else jax.vmap(one), layer, *rest)

    return jax.tree.map(of, layers, *others, is_leaf=lambda x: isinstance(x, KV))
