"""Bottleneck adapters: small networks after a sublayer or parallel to it.

A sequential adapter (Houlsby et al. 2019, arXiv 1902.00751) returns y + s f(y D) U, where y is the output of the
sublayer. A parallel adapter (He et al. 2021, arXiv 2110.04366) returns y + s f(x D) U, where x is the input of the
sublayer. There are no biases.
"""

import math
import re
from typing import ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model import weights
from model.weights import Extra, Params, Spec, Specs, Transform

SUBLAYERS = ("attn", "mlp")


@flax.struct.dataclass
class Bottleneck(Extra):
    """The weights `down` [layers, D, R] and `up` [layers, R, D] of an adapter, which a Block calls after a sublayer."""

    down: Array
    up: Array
    parallel: bool = flax.struct.field(pytree_node=False)
    scale: float = flax.struct.field(pytree_node=False)
    trainable: ClassVar[tuple[str, ...]] = ("down", "up")

    def __call__(self, x: Array, y: Array) -> Array:
        """Returns the adapted output [B,T,D] of a sublayer with the input x [B,T,D] and the output y [B,T,D]."""
        low = jax.nn.relu(weights.einsum("BTD,DR->BTR", x if self.parallel else y, self.down))
        return y + self.scale * weights.einsum("BTR,RD->BTD", low, self.up)

    def axes(self, spec: Spec | None) -> "Bottleneck":
        return self.replace(down=("layers", "embed", "rank"), up=("layers", "rank", "embed"))


def make(
    *, rank: int = 64, kind: Literal["sequential", "parallel"] = "sequential", scale: float = 1.0,
    where: str = "attn|mlp",
) -> Transform:  # fmt: skip
    """Returns a Transform that adds an adapter to each sublayer ("attn" or "mlp") that matches the regex `where`.

    The weight `up` starts at 0, so the adapter does not change the model at first. Raises ValueError if no sublayer
    matches.
    """
    chosen = [name for name in SUBLAYERS if re.fullmatch(where, name)]
    if not chosen:
        raise ValueError(f"peft.where={where!r} matches neither attn nor mlp")

    def transform(params: Params, specs: Specs, key: Array) -> Params:
        spec = specs["layers"]["attn_norm"]["scale"]
        layers, embed = spec.shape
        added = {}
        for name in chosen:
            noise = jax.random.normal(weights.key_for(key, name), (layers, embed, rank), spec.value.dtype)
            up = jnp.zeros((layers, rank, embed), spec.value.dtype)
            added[f"{name}_adapter"] = Bottleneck(noise / math.sqrt(embed), up, kind == "parallel", scale)
        return {**params, "layers": params["layers"] | added}

    return transform
