"""Four adapters of different ranks on one small model."""

import functools

import jax

from infer.serve.store import Store
from model import paged, weights
from model.config import ModelConfig
from model.net.transformer import Transformer
from model.peft import lora
from model.quant import nf4
from tests.helpers.models import rand

SMALL = ModelConfig(
    vocab_size=320, layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64, max_len=128, tied=True
)  # fmt: skip
RANKS = {"a": 3, "b": 17, "c": 8, "d": 1}
WHERE = {"a": r"layers/.*", "b": r"layers/attn/w[qv]|embed/table", "c": r"layers/.*", "d": r"layers/attn/wo"}
PROMPTS = [[5, 9, 2, 44, 17, 3, 8, 61], [12], [7, 7, 30], [4, 4], [300, 2, 9, 9, 1], [6]]
NAMES = ["a", None, "b", "c", "b", "d"]


@functools.cache
def make(kind="plain"):
    model = Transformer(SMALL)
    base = jax.jit(model.init)(jax.random.key(1))
    base["embed"]["table"] *= 4
    if kind != "plain":
        base = nf4.make()(base, model.specs, jax.random.key(0))
    return model, base, {n: adapted(model, base, n) for n in RANKS}


def adapted(model, base, name):
    init = "pissa" if name == "a" and not weights.is_weight(base["layers"]["attn"]["wq"]) else "zero_b"
    wrap = lora.make(rank=RANKS[name], alpha=2.0 * RANKS[name], where=WHERE[name], init=init)

    @jax.jit
    def moved(base):
        out = wrap(base, model.specs, jax.random.key(len(name)))
        train, frozen = weights.partition(out, weights.trainable(out, "adapters"))
        return weights.combine(jax.tree.map(lambda x: x + 0.1 * rand(*x.shape, seed=ord(name)), train), frozen)

    return moved(base)


def store_of(model, base, trees, **kwargs):
    return Store(model, base, {n: paged.factors_of(t, model.specs, n) for n, t in trees.items()}, **kwargs)
