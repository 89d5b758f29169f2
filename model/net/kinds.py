"""Kinds of layers: what everything outside of the layers needs to know of them.

A new kind is a Block and an entry here. Its name is that of the part which only its layers have: "layers/attn/wq".
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from common.errors import UserError
from model.config import ModelConfig
from model.net import kv_cache, recurrent
from model.net.kv_cache import KV, Rounded
from model.net.layers import Block

NORMS = ("pre", "post", "both")


Kept = KV | recurrent.Memory  # what a layer keeps of earlier tokens


class Kind(NamedTuple):
    """`columns`: what a layer keeps of earlier tokens is a column of keys and values for each of them.

    Only then may it see virtual tokens and later ones, and share a batch whose rows begin at different steps.
    """

    block: type[Block]
    # (config, lead, batch, length, dtype, cache kind) -> what a layer keeps before the first token; `lead` is () or
    # the number of stacked layers.
    cache: Callable[[ModelConfig, tuple[int, ...], int, int, str, str], Kept]
    # (config, tokens of a row, virtual tokens) -> keys that a query is multiplied with, on average
    keys: Callable[[ModelConfig, int, int], float]
    columns: bool


def _attention_cache(config: ModelConfig, lead: tuple[int, ...], batch: int, length: int, dtype: str, kind: str) -> KV:
    def empty() -> Array | Rounded:
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
    """Raises UserError for norms or layers that are not known, and for layers that cannot look both ways."""
    if config.norms not in NORMS:
        raise UserError(f"norms={config.norms!r}", "model", f"known: {', '.join(NORMS)}")
    for name in config.blocks:
        if name not in KINDS:
            raise UserError(f"no layer of kind {name!r}", "model", f"known: {', '.join(KINDS)}")
    if not config.causal and (names := without_columns(config.blocks)):
        raise UserError(
            f"{names[0]} layers see earlier tokens only", "model", "a model that looks both ways needs attn"
        )


def without_columns(parts: Iterable[str]) -> list[str]:
    """Of the parts of layers, those of kinds whose layers have no key and value for each token."""
    return [part for part in parts if part in KINDS and not KINDS[part].columns]
