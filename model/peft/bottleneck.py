"""Bottleneck adapters: small networks that run after a sublayer or in parallel to it.

Let x be the input and y the output of the sublayer. A sequential adapter (Houlsby et al. 2019, arXiv 1902.00751)
returns y + s relu(y D) U. A parallel adapter (He et al. 2021, arXiv 2110.04366) returns y + s relu(x D) U. The matrices
D and U are trained, s is a constant scale, and there are no biases.
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
    """An adapter with the weights `down` [layers, D, R] and `up` [layers, R, D]. A Block calls it after a sublayer."""

    down: Array
    up: Array
    parallel: bool = flax.struct.field(pytree_node=False)
    scale: float = flax.struct.field(pytree_node=False)
    trainable: ClassVar[tuple[str, ...]] = ("down", "up")

    def __call__(self, x: Array, y: Array) -> Array:
        """Returns the adapted output [B,T,D] of a sublayer whose input is x [B,T,D] and whose output is y [B,T,D]."""
        low = jax.nn.relu(weights.einsum("BTD,DR->BTR", x if self.parallel else y, self.down))
        return y + self.scale * weights.einsum("BTR,RD->BTD", low, self.up)

    def axes(self, spec: Spec | None) -> "Bottleneck":
        return self.replace(down=("layers", "embed", "rank"), up=("layers", "rank", "embed"))


def make(
    *, rank: int = 64, kind: Literal["sequential", "parallel"] = "sequential", scale: float = 1.0,
    where: str = "attn|mlp",
) -> Transform:  # fmt: skip
    """Returns a Transform that adds an adapter to each sublayer ("attn" or "mlp") whose name matches the regex `where`.

    `up` is initialized to 0, so a new adapter does not change the model. Raises ValueError if no sublayer matches.
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
