"""Kinds of layers, and their properties that the rest of the code depends on.

A new kind is a Block and an entry here. Its name is that of the part that only its layers have: "layers/attn/wq".
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from common.errors import UserError
from model.config import ModelConfig
from model.net import kv_cache, recurrent
from model.net.kv_cache import KV, Coded
from model.net.layers import Block

NORMS = ("pre", "post", "both")
LayerCache = KV | recurrent.Memory


class Kind(NamedTuple):
    """A kind of layer. `columns`: its cache holds a column of keys and values per token.

    Only such layers support virtual tokens, bidirectional models, and batches whose rows start at different steps.
    """

    block: type[Block]
    # (config, lead, batch, length, dtype, cache kind) -> an empty cache; `lead` is () or (stacked layers,)
    cache: Callable[[ModelConfig, tuple[int, ...], int, int, str, str], LayerCache]
    # (config, tokens per row, virtual tokens) -> mean number of keys per query
    keys: Callable[[ModelConfig, int, int], float]
    columns: bool


def _attention_cache(config: ModelConfig, lead: tuple[int, ...], batch: int, length: int, dtype: str, kind: str) -> KV:
    def empty() -> Array | Coded:
        shape = (*lead, batch * config.kv_heads, length, config.head_dim)
        return kv_cache.encode(jnp.zeros(shape, dtype), kind)

    return KV(empty(), empty())


def _attention_keys(config: ModelConfig, tokens: int, virtual: int) -> float:
    return ((tokens + 1) / 2 if config.causal else tokens) + virtual


def _recurrent_cache(
    config: ModelConfig, lead: tuple[int, ...], batch: int, length: int, dtype: str, kind: str
) -> recurrent.Memory:
    return recurrent.initial(config, (*lead, batch), dtype)


KINDS = {
    "attn": Kind(Block, _attention_cache, _attention_keys, columns=True),
    "recurrent": Kind(recurrent.RecurrentBlock, _recurrent_cache, lambda config, tokens, virtual: 0.0, columns=False),
}


def check(config: ModelConfig) -> None:
    """Raises UserError for unknown norms or layers, and for a bidirectional model with layers that cannot be."""
    if config.norms not in NORMS:
        raise UserError(f"norms={config.norms!r}", "model", f"known: {', '.join(NORMS)}")
    for name in config.blocks:
        if name not in KINDS:
            raise UserError(f"no layer of kind {name!r}", "model", f"known: {', '.join(KINDS)}")
    if not config.causal and (names := without_columns(config.blocks)):
        raise UserError(
            f"{names[0]} layers depend only on earlier tokens", "model", "a bidirectional model needs attn layers"
        )


def without_columns(parts: Iterable[str]) -> list[str]:
    """Those of the parts that belong to kinds of layers without a key and value per token."""
    return [part for part in parts if part in KINDS and not KINDS[part].columns]
