"""Heads that compute outputs other than logits from a model's hidden states. Each file in this folder defines one head.

Each file defines a function `make(**settings) -> Callable[[ModelConfig, Array], Head]`.

`find(name)` returns a function (config, key) that creates a head for a model with the given ModelConfig. The head is
stored as params["head"], next to params["layers"]. A head is trained, sharded and saved like an adapter. For example, a
scalar head is created and called like this:

    params["head"] = heads.find("scalar")(model.config, key)
    values = params["head"](model.hidden(params, tokens, positions, segments).x)  # [B,T]
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from common import methods
from model.config import ModelConfig
from model.weights import Extra, Spec


class Head(Extra):
    """Base class of all heads. Merging adapters leaves a head unchanged."""

    def __call__(self, x: Array) -> Array:
        """Returns the head's float32 output for hidden states x [B,T,D]. For a scalar head, its shape is [B,T]."""
        raise NotImplementedError

    def dense(self, spec: Spec | None) -> "Head":
        return self


def find(name: str, **settings: Any) -> Callable[[ModelConfig, Array], Head]:
    """Returns a function (config, random key) -> head. Raises UserError for an unknown name."""
    return methods.module("model.heads", name).make(**settings)


def at_end(head: Head, x: Array, segments: Array) -> Array:
    """Returns a scalar head's output [B] at the last token of each row, given hidden states x [B,T,D].

    Each row is one document, which may have padding (segment 0 in `segments` [B,T]) before or after it.
    """
    return head(last_token(x, segments))[:, 0]


def last_token(x: Array, segments: Array) -> Array:
    """Selects from x [B,T,D] the hidden state [B,1,D] of the last token in each row that is not padding."""
    last = segments.shape[1] - 1 - (segments[:, ::-1] > 0).argmax(-1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)
