"""Builds the model that a run's config describes, and the transforms of its parameters, for training and inference."""

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
    """A function (params, key) that quantizes the base and then adds adapters. The config may leave out either step."""
    steps = [find(f"model.{kind}", cfg[kind])() for kind in ("quant", "peft") if cfg[kind].name]

    def apply(params: Params, key: jax.Array) -> Params:
        for f in steps:
            params = f(params, specs, key)
        return params

    return apply


class Shaped(Protocol):
    """An opened model: its shape is known before its weights are read."""

    @property
    def config(self) -> ModelConfig: ...


def network(
    config: ModelConfig, dtype: str | None = None, param_dtype: str | None = None, remat: str = "dots"
) -> Transformer:
    """The network of the shape `config`. Activations have `dtype` (None: float32), weights `param_dtype` (None: the
    same as `dtype`).

    Raises UserError for an unsupported shape.
    """
    kinds.check(config)
    dtype = dtype or "float32"
    return Transformer(config, dtype, param_dtype or dtype, remat)


def model(cfg: Config, pretrained: Shaped | None, vocab_size: int | None = None) -> Transformer:
    """The model of a config. It has the shape of `pretrained`, or a named shape with the config's overrides.

    `vocab_size` is the tokenizer's; a randomly initialized model rounds it up to a multiple of 64, for which every
    accelerator has fast tiles. Raises UserError when shape, `init` and tokenizer do not fit together.
    """
    c = cfg.model
    if not c.shape:
        if pretrained is None:
            raise UserError("neither a shape nor a pretrained init", "config.model.shape")
        shape = pretrained.config
    else:
        shape = _shape(c, vocab_size)
        if pretrained is not None and dataclasses.replace(shape, family=pretrained.config.family) != pretrained.config:
            raise UserError(
                f"shape {c.shape!r} differs from that of init {cfg.init!r}", "config.model.shape", "leave it empty"
            )
    if vocab_size and vocab_size > shape.vocab_size:
        what = f"the tokenizer has {vocab_size} tokens, the model only {shape.vocab_size}"
        raise UserError(what, "config.data.tokenizer")
    return network(shape, c.dtype, c.param_dtype, c.remat)


def _shape(c: Config, vocab_size: int | None) -> ModelConfig:
    changes = {k: c[k] for k in OVERRIDES if c[k] is not None}
    vocab = c.vocab_size or (-(-vocab_size // 64) * 64 if vocab_size else SHAPES[c.shape]["vocab_size"])
    return ModelConfig.from_dict(resized(c.shape, changes | {"vocab_size": vocab}))
