"""Many adapters in one batch against each alone: products, a bounded device, decoding."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UserError
from data.tokenizer import load as load_tokenizer
from infer.generate import generate
from infer.lm import LM
from infer.models import load, load_many
from infer.sample import Knobs
from infer.serving import Batcher, Full
from infer.store import Store
from kernels import paged_lora
from model import adapters_write, many, weights
from model.config import ModelConfig
from model.export import export_hf
from model.peft import dora, lora
from model.quant import int8, nf4
from model.transformer import Transformer
from tests.test_weights import rand

SMALL = ModelConfig(
    vocab_size=320, layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64, max_len=128, tied=True
)  # fmt: skip
RANKS = {"a": 3, "b": 17, "c": 8, "d": 1}
WHERE = {"a": r"layers/.*", "b": r"layers/attn/w[qv]|embed/table", "c": r"layers/mlp/.*", "d": r"layers/attn/wo"}
PROMPTS = [[5, 9, 2, 44, 17, 3, 8, 61], [12], [7, 7, 30], [4, 4], [300, 2, 9, 9, 1], [6]]
NAMES = ["a", None, "b", "c", "b", "d"]


@pytest.fixture(scope="module", params=["plain", "int8", "nf4"])
def served(request):
    """A model, its base, and the trees of four adapters of different ranks on different weights."""
    return make(request.param)


def make(kind="plain"):
    model = Transformer(SMALL)
    base = jax.jit(model.init)(jax.random.key(1))
    base["embed"]["table"] *= 4
    if kind != "plain":
        base = {"int8": int8, "nf4": nf4}[kind].make()(base, model.specs, jax.random.key(0))
    return model, base, {n: adapted(model, base, n) for n in RANKS}


def adapted(model, base, name):
    init = "pissa" if name == "a" and not weights.is_weight(base["layers"]["attn"]["wq"]) else "zero_b"
    wrap = lora.make(rank=RANKS[name], alpha=2.0 * RANKS[name], where=WHERE[name], init=init)
    out = wrap(base, model.specs, jax.random.key(len(name)))
    train, frozen = weights.partition(out, weights.trainable(out, "adapters"))
    return weights.combine(jax.tree.map(lambda x: x + 0.1 * rand(*x.shape, seed=ord(name)), train), frozen)


def store_of(model, base, trees, **kwargs):
    return Store(model, base, {n: many.factors_of(t, model.specs, n) for n, t in trees.items()}, **kwargs)


def stacked(params):
    return {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}


def alone(model, base, trees, names, prompts, n):
    out = [generate(model, trees.get(name, base), [p], max_new_tokens=n) for name, p in zip(names, prompts)]
    return [o.tokens[0] for o in out]


def test_by_hand():
    """Row 0 has rank rows 2 and 0, row 1 has none: x = 2, A = (1, 5, 3), B = (10, 7, 100): 2 * (3 * 100 + 1 * 10)."""
    pages = jnp.full((1, paged_lora.BLOCK), -1).at[0, :2].set(jnp.array([2, 0]))
    args = jnp.array([[1.0], [5.0], [3.0]]), jnp.array([[10.0], [7.0], [100.0]]), pages, jnp.array([0]), jnp.int32(1)
    x = jnp.full((2, 1, 1), 2.0)
    for product in (paged_lora.matmul, paged_lora.reference):
        np.testing.assert_array_equal(product(x, *args)[:, 0, 0], [620.0, 0.0])


@pytest.mark.parametrize("tokens", [1, 5])
def test_product_equals_its_reference(tokens):
    model, base, trees = make()
    store = store_of(model, base, trees)
    route = store.serving(NAMES, 7)["layers"][0]["attn"]["wq"].route
    leaf = store.stacks["layers/attn/wq"][0]
    a, b = (rand(len(w), w[0].size, seed=i) for i, w in enumerate(leaf))
    x = rand(7, tokens, a.shape[1], seed=5)
    ours = jax.jit(paged_lora.matmul)(x, a, b, *route)
    np.testing.assert_allclose(ours, paged_lora.reference(x, a, b, *route), atol=1e-4)
    assert not ours[1].any() and not ours[6].any() and ours[2].any()


def test_a_mixed_batch_has_the_logits_of_each_alone(served):
    model, base, trees = served
    store = store_of(model, base, trees)
    tokens = jax.random.randint(jax.random.key(3), (len(NAMES), 9), 0, 320)
    forward = jax.jit(model.__call__)
    unrolled = store.serving(NAMES, len(NAMES))
    for params in (unrolled, stacked(unrolled)):
        ours = forward(params, tokens)
        for i, name in enumerate(NAMES):
            np.testing.assert_allclose(ours[i], forward(trees.get(name, base), tokens)[i], atol=1e-5 * 40)


def test_the_device_holds_the_sum_of_the_adapters():
    model, base, trees = make()
    store = store_of(model, base, trees)
    own = lambda tree: sum(
        x.nbytes for x in jax.tree.leaves(weights.partition(tree, weights.trainable(tree, "adapters"))[0])
    )
    starts = sum(
        x.nbytes
        for x in jax.tree.leaves(
            [w.start for w in jax.tree.leaves(trees["a"], is_leaf=weights.is_weight) if isinstance(w, lora.LoRA)]
        )
    )
    assert sum(x.nbytes for x in jax.tree.leaves(store.stacks)) == sum(map(own, trees.values())) + starts


def test_decoding_a_mixed_batch_gives_the_tokens_of_each_alone(served):
    model, base, trees = served
    store = store_of(model, base, trees)
    ours = generate(model, store.serving(NAMES, 6), PROMPTS, max_new_tokens=12)
    assert ours.tokens == alone(model, base, trees, NAMES, PROMPTS, 12)
    assert len({tuple(t) for t in ours.tokens}) > 3
