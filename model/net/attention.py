"""Rotary position embeddings, attention masks and grouped-query attention."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from model.net.kv_cache import Cache

Angles = tuple[Array, Array]  # cos and sin [B,T,1,H/2]


class Context(NamedTuple):
    """The inputs that all layers share. They describe the tokens [B,T] and the keys [B,S] that these tokens attend to.

    If there is no cache, the tokens attend only to each other, and S = T. If there is a cache, S is its number of
    columns. Each column stores the key of one token.
    """

    age: Array  # [B,T] number of earlier tokens in the token's document; -1 for padding
    positions: Array  # [B,S] position of each key within its document
    segments: Array  # [B,S] document number of each key
    index: Array  # cache column to which the first token is written
    see: Array  # [B,T,S] bool: the attention mask of layers without a sliding window
    # [B,T,S] bool: the attention mask of layers with a sliding window; None if no layer has one
    see_window: Array | None
    angles: Angles | None  # for rotary positions
    backend: str  # "cache" if a cache is used, and otherwise a backend of model/net/backends.py
    windows: tuple[int, ...]  # the window size of each layer
    causal: bool
    windowed: bool | Array = False  # whether the current layer has a sliding window
    report: tuple[str, ...] = ()  # names of intermediate values that layers should return


def rope_frequencies(config: ModelConfig, length: int | Array) -> tuple[Array, float]:
    """Returns (rotation frequencies [H/2], factor for cos and sin), as defined by `config.rope_scaling`.

    The supported types are named as in Hugging Face configs: default, linear (Chen et al. 2023, arXiv 2306.15595),
    dynamic (NTK-aware scaling of sequences whose `length` exceeds `max_len`), llama3 (Llama 3.1), and yarn (Peng et al.
    2023, arXiv 2309.00071). Raises ValueError for any other type.
    """
    dim, theta = int(config.head_dim * config.rotary), config.rope_theta
    scaling = dict(config.rope_scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    freq = theta**-exponent
    factor = scaling.get("factor", 1.0)
    match kind:
        case "default":
            return freq, 1.0
        case "linear":
            return freq / factor, 1.0
        case "dynamic":
            ratio = jnp.maximum(length / config.max_len, 1.0)
            base = theta * (factor * ratio - (factor - 1)) ** (dim / (dim - 2))
            return base**-exponent, 1.0
        case "llama3":
            return _llama3(freq, factor, scaling), 1.0
        case "yarn":
            return _yarn(freq, factor, scaling, config)
    raise ValueError(f"unknown rope_type {kind!r}; known: default, linear, dynamic, llama3, yarn")


def _llama3(freq: Array, factor: float, scaling: dict) -> Array:
    """Multiplies long wavelengths by `factor`, keeps short ones unchanged, and interpolates in between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # numbers of rotations within the original context length
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    smooth = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return freq * (smooth + (1 - smooth) / factor)


def _yarn(freq: Array, factor: float, scaling: dict, config: ModelConfig) -> tuple[Array, float]:
    """Returns (frequencies, factor for cos and sin) of YaRN (eq. 23 of its paper). Multiplying cos and sin by the
    factor scales the attention logits."""
    dim = config.head_dim
    original = scaling.get("original_max_position_embeddings") or config.max_len
    factor = factor or config.max_len / original

    # the dimension that makes `turns` rotations within the original context length
    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / max(high - low, 0.001), 0.0, 1.0)

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    temperature = scaling.get("attention_factor")
    if temperature is None:
        m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        temperature = mscale(m) / mscale(m_all) if m and m_all else mscale(1.0)
    return freq / factor * ramp + freq * (1 - ramp), float(temperature)


def rope_angles(config: ModelConfig, positions: Array) -> Angles:
    """Returns the cosines and sines of the rotary angles, float32 [B,T,1,H/2] each, for positions [B,T]."""
    freq, scale = rope_frequencies(config, positions.max() + 1)
    angle = positions[..., None, None].astype(jnp.float32) * freq
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x: Array, angles: Angles) -> Array:
    """Applies rotary position embeddings (RoPE) to x [B,T,N,H].

    With n angles per token, only the first 2 n dimensions of each head are rotated. As in Hugging Face models,
    dimensions i and i + n form a pair.
    """
    cos, sin = angles
    n = cos.shape[-1]
    a, b, still = jnp.split(x.astype(jnp.float32), (n, 2 * n), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, still], axis=-1).astype(x.dtype)


def mask(
    q_pos: Array, q_seg: Array, k_pos: Array, k_seg: Array, window: int | Array | None = None, causal: bool = True
) -> Array:
    """Returns the attention mask [B,T,S], which is True where a query may attend to a key.

    A query attends to the keys of its own document. If `causal`, it does not attend to later keys. If `window` is not
    None, it only attends to keys less than `window` positions away. Positions and segments (document numbers) are [B,T]
    for queries and [B,S] for keys. Segment 0 marks padding, whose keys are masked. Segment -1 marks virtual tokens,
    which belong to every document.
    """
    distance = q_pos[:, :, None] - k_pos[:, None, :]
    see = (q_seg[:, :, None] == k_seg[:, None, :]) & (k_seg[:, None, :] > 0)
    see = see | (k_seg[:, None, :] == -1)
    if causal:
        see = see & (distance >= 0)
    elif window is not None:
        distance = jnp.abs(distance)
    return see if window is None else see & (distance < window)


def context(
    config: ModelConfig,
    positions: Array,
    segments: Array,
    cache: Cache | None,
    backend: str,
    virtual: int = 0,
    report: Sequence[str] = (),
) -> Context:
    """Computes the inputs that all layers share, from positions [B,T], segments [B,T] and the cache.

    `virtual` is the number of virtual tokens before each document. Positions count virtual tokens, so the first real
    token of a document has position `virtual`.
    """
    k_pos, k_seg, index = positions, segments, jnp.int32(0)
    if cache is not None:
        index = cache.index
        k_pos = jax.lax.dynamic_update_slice(cache.positions, positions, (0, index))
        k_seg = jax.lax.dynamic_update_slice(cache.segments, segments, (0, index))
    age = jnp.where(segments != 0, positions - virtual, -1)
    columns = positions, segments, k_pos, k_seg
    see, see_window, angles = mask(*columns, causal=config.causal), None, None
    if any(config.windows):
        see_window = mask(*columns, max(config.windows), config.causal)
    if config.position == "rope":
        angles = rope_angles(config, positions)
    return Context(
        age=age,
        positions=k_pos,
        segments=k_seg,
        index=index,
        see=see,
        see_window=see_window,
        angles=angles,
        backend=backend if cache is None else "cache",
        windows=config.windows,
        causal=config.causal,
        report=tuple(report),
    )


def attention(q: Array, k: Array, v: Array, see: Array) -> Array:
    """Returns grouped-query attention [B,T,N,H] for queries q [B,T,N,H], k and v [B,K,S,H], and the mask `see` [B,T,S].

    The G query heads that share a key head are computed in one matrix product, so keys are never repeated. The softmax
    is computed in float32. For padding tokens, all keys are masked, so the result is the mean of v. This value is
    finite and not used. If k and v come from a cache, they have shape [B*K,S,H], because reshaping them would make
    XLA's CPU backend copy the cache four times per layer and token.
    """
    B, T, N, H = q.shape
    *lead, S, _ = k.shape
    K = math.prod(lead) // B
    G = N // K
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(*lead, G * T, H)
    scores = jnp.einsum("...XH,...SH->...XS", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, G, T, S) * H**-0.5
    probs = jax.nn.softmax(jnp.where(see[:, None, None], scores, -1e30), axis=-1).astype(v.dtype)
    out = jnp.einsum("...XS,...SH->...XH", probs.reshape(*lead, G * T, S), v)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
