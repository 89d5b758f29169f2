"""Heads other than the unembedding: outputs computed from a model's hidden states. Each head is a file of this folder.

`find(name)` returns a function (config, key) that makes a head for a model of the shape `config`. The head is stored in
the parameters at "head", next to the layers; it is trained, sharded and saved like adapters.

    params["head"] = heads.find("scalar")(model.config, key)
    values = params["head"](model.hidden(params, tokens, positions, segments).x)  # [B,T]

Like a file of model/peft, each file defines `make`: `make(**settings) -> Callable[[ModelConfig, Array], Head]`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from common import methods
from model.config import ModelConfig
from model.weights import Extra, Spec


class Head(Extra):
    """Base class of the heads. Merging adapters leaves a head unchanged."""

    def __call__(self, x: Array) -> Array:
        """The head's output in float32 for hidden states x [B,T,D]; [B,T] for a scalar head."""
        raise NotImplementedError

    def dense(self, spec: Spec | None) -> "Head":
        return self


def find(name: str, **settings: Any) -> Callable[[ModelConfig, Array], Head]:
    """A function (config, random key) -> head. Raises UserError for an unknown name."""
    return methods.module("model.heads", name).make(**settings)


def at_end(head: Head, x: Array, segments: Array) -> Array:
    """The output of a scalar head at the last token of each row [B], for hidden states x [B,T,D] and segments [B,T].

    Each row is one document, which may have padding on either side.
    """
    return head(last_token(x, segments))[:, 0]


def last_token(x: Array, segments: Array) -> Array:
    """The hidden states [B,1,D] of each row's last token, from x [B,T,D]; padding (segment 0) may be on either side."""
    last = segments.shape[1] - 1 - (segments[:, ::-1] > 0).argmax(-1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)
