"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691) prepends trained embeddings to every document.

No tokens precede these embeddings, so their keys and values are the same for every document. They are computed once,
and then used like those of prefix tuning; see Transformer.cache.
"""

from typing import ClassVar

import flax.struct
import jax
from jax import Array

from model import weights
from model.net.kinds import without_columns
from model.weights import Extra, Params, Spec, Specs, Transform


@flax.struct.dataclass
class Prompt(Extra):
    """The trained embeddings [P, D] of P virtual tokens."""

    table: Array
    trainable: ClassVar[tuple[str, ...]] = ("table",)

    def axes(self, spec: Spec | None) -> "Prompt":
        return self.replace(table=(None, "embed"))

    def macs(self, stacked: int) -> "Prompt":
        return self.replace(table=0)  # 0, because the cost of attention already includes virtual tokens


def make(*, tokens: int = 20) -> Transform:
    """Returns a Transform that adds `tokens` virtual tokens. They are initialized with the embeddings of random tokens.

    Raises ValueError if the model has a layer that does not cache a key and a value for each token.
    """

    def transform(params: Params, specs: Specs, key: Array) -> Params:
        if without_columns(specs["layers"]):
            raise ValueError("prompt tuning needs attention in every layer")
        spec = specs["embed"]["table"]
        ids = jax.random.randint(key, (tokens,), 0, spec.shape[0])
        return {**params, "prompt": Prompt(weights.take(params["embed"]["table"], ids, spec.value.dtype))}

    return transform
