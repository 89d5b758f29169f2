"""Heads beside the unembedding: what else a model says of its hidden states. A head is a file of this folder.

`find(name)(config, key)` makes a head for a model of the shape `config`, and `apply(head, x)` gives its answer for
hidden states x [B,T,D]. It stands in the parameters, at "head", beside the layers: a leaf that trains, shards and is
saved as the leaves of adapters are.

    params["head"] = heads.find("scalar")(model.config, key)
    values = heads.apply(params["head"], model.hidden(params, tokens, positions, segments).x)  # [B,T]

A file has `make(**settings) -> Callable[[ModelConfig, Array], Head]`, as those of model/peft have theirs.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax import Array

from common.errors import UserError
from model.config import ModelConfig
from model.weights import Extra, Spec


class Head(Extra):
    """Base of the heads. There is nothing to merge one into: merged, it is itself."""

    def __call__(self, x: Array) -> Array:
        """The head's answer for hidden states x [B,T,D], in float32."""
        raise NotImplementedError

    def dense(self, spec: Spec | None) -> "Head":
        return self


def known() -> list[str]:
    """Names of the files of this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("[!_]*.py"))


def find(name: str, **settings: Any) -> Callable[[ModelConfig, Array], Head]:
    """A function (config, random key) -> head. Raises UserError for a name that is no file of this folder."""
    if name not in known():
        raise UserError(f"no head {name!r}", "head", f"known: {', '.join(known())}")
    return importlib.import_module(f"model.heads.{name}").make(**settings)


def apply(head: Head, x: Array) -> Array:
    """What a head says of hidden states x [B,T,D]; a scalar one [B,T]."""
    return head(x)
