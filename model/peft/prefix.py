"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190) prepends trained keys and values to every document.

They are the initial content of the key-value cache; see Transformer.cache.
"""

from typing import ClassVar

import flax.struct
import jax
from jax import Array

from model.weights import Extra, Params, Spec, Specs, Transform


@flax.struct.dataclass
class Prefix(Extra):
    """The keys and values [layers, P, K, H] of P virtual tokens. Rotary embeddings have already rotated the keys."""

    k: Array
    v: Array
    trainable: ClassVar[tuple[str, ...]] = ("k", "v")

    def axes(self, spec: Spec | None) -> "Prefix":
        names = ("layers", None, "kv_heads", "head_dim")
        return self.replace(k=names, v=names)

    def macs(self, stacked: int) -> "Prefix":
        return self.replace(k=0, v=0)  # 0, because the cost of attention already includes virtual tokens


def make(*, tokens: int = 20, deviation: float = 0.02) -> Transform:
    """Returns a Transform that adds `tokens` virtual tokens to each attention layer.

    The keys and values of virtual tokens are initialized from N(0, `deviation`^2). Raises ValueError if the model has
    no attention layer.
    """

    def transform(params: Params, specs: Specs, key: Array) -> Params:
        if "attn" not in specs["layers"]:
            raise ValueError("prefix tuning needs an attention layer")
        spec = specs["layers"]["attn"]["wk"]
        layers, _, heads, dim = spec.shape
        draw = lambda k: deviation * jax.random.normal(k, (layers, tokens, heads, dim), spec.value.dtype)
        return with_prefix(params, Prefix(*map(draw, jax.random.split(key))))

    return transform


def with_prefix(params: Params, prefix: Prefix) -> Params:
    attn = params["layers"]["attn"] | {"prefix": prefix}
    return {**params, "layers": {**params["layers"], "attn": attn}}
