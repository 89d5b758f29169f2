"""Builds the model that a run's config describes, and the function that quantizes it and adds adapters."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax

from common.errors import UserError
from common.methods import find
from common.types import Config
from configs.models import SHAPES, resized
from model.config import ModelConfig
from model.net import kinds
from model.net.transformer import Transformer
from model.weights import Params, Specs

OVERRIDES = ("layers", "embed", "heads", "kv_heads", "mlp")


def transform(cfg: Config, specs: Specs) -> Callable[[Params, jax.Array], Params]:
    """Returns a function (params, key) -> params that quantizes parameters and adds adapters as configured."""
    steps = [find(f"model.{kind}", cfg[kind])() for kind in ("quant", "peft") if cfg[kind].name]

    def apply(params: Params, key: jax.Array) -> Params:
        for f in steps:
            params = f(params, specs, key)
        return params

    return apply


class Shaped(Protocol):
    """An opened checkpoint. Its ModelConfig is known, but its weights may not have been read yet."""

    @property
    def config(self) -> ModelConfig: ...


def network(
    config: ModelConfig, dtype: str | None = None, param_dtype: str | None = None, remat: str = "dots"
) -> Transformer:
    """Returns the model that `config` describes. Raises UserError if `config` is not supported.

    `dtype` is the dtype of activations; None means float32. `param_dtype` is the dtype of weights; None means the dtype
    of activations.
    """
    kinds.check(config)
    dtype = dtype or "float32"
    return Transformer(config, dtype, param_dtype or dtype, remat)


def model(cfg: Config, pretrained: Shaped | None, vocab_size: int | None = None) -> Transformer:
    """Returns the model that a run's config describes.

    Its sizes are those of `pretrained`, or of a known model such as "llama3-8b". The config may override individual
    sizes of a known model. `vocab_size` is the size of the tokenizer's vocabulary. For a randomly initialized model, it
    is rounded up to a multiple of 64, because matrices of such sizes are multiplied fast on all accelerators. Raises
    UserError if the shape, the config's `init` and the tokenizer do not fit together.
    """
    c = cfg.model
    if not c.shape:
        if pretrained is None:
            raise UserError("the config sets neither a model shape nor a pretrained `init`", "config.model.shape")
        shape = pretrained.config
    else:
        shape = _shape(c, vocab_size)
        if pretrained is not None and dataclasses.replace(shape, family=pretrained.config.family) != pretrained.config:
            raise UserError(
                f"shape {c.shape!r} differs from the shape of init {cfg.init!r}", "config.model.shape", "leave it empty"
            )
    if vocab_size and vocab_size > shape.vocab_size:
        what = f"the tokenizer has {vocab_size} tokens, but the model only {shape.vocab_size}"
        raise UserError(what, "config.data.tokenizer")
    return network(shape, c.dtype, c.param_dtype, c.remat)


def _shape(c: Config, vocab_size: int | None) -> ModelConfig:
    changes = {k: c[k] for k in OVERRIDES if c[k] is not None}
    vocab = c.vocab_size or (-(-vocab_size // 64) * 64 if vocab_size else SHAPES[c.shape]["vocab_size"])
    return ModelConfig.from_dict(resized(c.shape, changes | {"vocab_size": vocab}))
