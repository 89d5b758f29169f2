"""Small models and their parameters."""

import dataclasses
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np

import model.peft
from configs.models import SHAPES
from model import weights
from model.config import ModelConfig
from model.net.transformer import Transformer

METHODS = [m.name for m in pkgutil.iter_modules(model.peft.__path__) if m.name != "saved"]  # it needs a folder
BESIDE = ("bottleneck", "prefix", "prompt")  # their parameters stand beside the weights: they cannot be merged


def everywhere(method: str):
    """The method's Transform on every parameter that it can wrap."""
    make = importlib.import_module(f"model.peft.{method}").make
    return make(**{"where": ".*"} if "where" in inspect.signature(make).parameters else {})


def tiny(**changes) -> Transformer:
    return Transformer(ModelConfig.from_dict({**SHAPES["tiny"], **changes}))


def rand(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def activation(eqn: str, w_shape: tuple[int, ...]):
    letters, w, _ = weights.operands(eqn)
    size = dict(zip(w, w_shape, strict=True)) | {"B": 2, "T": 5}
    return rand(*(size[c] for c in letters), seed=1)


TINY = ModelConfig(vocab_size=272, layers=3, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64, max_len=64)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
CONFIGS = {
    "llama": TINY,
    "yarn": ModelConfig.from_dict(TINY.to_dict() | dict(rope_scaling=YARN)),
    "llama3": ModelConfig.from_dict(TINY.to_dict() | dict(rope_scaling=LLAMA3, rope_theta=5e5, head_dim=64, tied=True)),
    "mistral": dataclasses.replace(TINY, family="mistral", windows=(8, 8, 8)),
    "qwen2": dataclasses.replace(TINY, family="qwen2", bias="qkv", windows=(0, 8, 8), tied=True),
    "qwen3": dataclasses.replace(TINY, family="qwen3", qk_norm=True, head_dim=16),
    "gpt2": dataclasses.replace(
        TINY, family="gpt2", kv_heads=4, norm="layernorm", act="gelu_tanh", gated=False, position="learned",
        bias="all", tied=True,
    ),
}  # fmt: skip


def random_model(config: ModelConfig):
    """A model with every parameter random, biases and scales too."""
    model, rng = Transformer(config), np.random.default_rng(0)
    draw = lambda spec: jnp.asarray(rng.normal(0, 0.3, spec.shape), jnp.float32)
    return model, jax.tree.map(draw, model.specs, is_leaf=weights.is_spec)


def distance(a, b):
    return jnp.sqrt(jnp.square(a - b).sum() / jnp.square(b).sum())


def relative(a, b):
    return float(distance(a, b))
