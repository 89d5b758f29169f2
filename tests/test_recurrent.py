"""Recurrent layers: the recurrence by hand and by a loop, documents apart, decoding, and every method on them."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from configs import schema
from configs.models import SHAPES
from infer.generate import generate, unrolled
from infer.models import load
from model import weights
from model.config import ModelConfig
from model.io import peft_write, saved
from model.net.attention import context
from model.net.recurrent import DECAYS, SHARPNESS, Recurrent, root
from model.net.transformer import Transformer
from model.peft import oft
from tests.helpers.models import BESIDE, METHODS, everywhere

CONFIG = ModelConfig.from_dict({**SHAPES["tiny-griffin"], "windows": (6,) * 3})


def spread(model: Transformer, seed: int = 0) -> dict:
    """Parameters that are all random, biases too."""
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jax.jit(lambda key: jax.tree.map(noise, model.init(key)))(jax.random.key(seed))


@pytest.fixture(scope="module")
def griffin():
    model = Transformer(CONFIG)
    return model, spread(model)


def test_the_recurrence_by_hand():
    """Gates of 1/2, c softplus(L) = 2 ln 2: a = exp(-8 / 2 x ln 2 / 4) = 1/2. Of x = 1, 1 the first state is 1/2, since
    a document's first input is not scaled; the second is 1/2 x 1/2 + sqrt(3/4) x 1/2 = 0.683."""
    c = dataclasses.replace(CONFIG, heads=1, recurrent=1)
    zero = lambda *shape: jnp.zeros(shape)
    params = {f"{b}{name}": zero(1, 1) if b else zero(1, 1, 1) for b in ("", "b") for name in ("input", "recurrence")}
    params["decay"] = jnp.log(jnp.expm1(jnp.log(2) / 4 * jnp.ones(1)))
    x, age = jnp.ones((1, 2, 1)), jnp.arange(2)[None]
    h, last = Recurrent(c).apply({"params": params}, x, age, zero(1, 1), method="rg_lru")
    np.testing.assert_allclose(h[0, :, 0], [0.5, 0.25 + math.sqrt(0.75) / 2], rtol=1e-6)
    assert last[0, 0] == h[0, 1, 0]


def test_the_layer_equals_a_loop_over_tokens(griffin):
    """Griffin's equations 1 to 4 and a convolution, token by token in float64, over two documents in a row."""
    _, params = griffin
    p = jax.tree.map(lambda x: np.float64(x[0]), params["layers"]["recurrent"])
    x, age = np.random.default_rng(0).normal(size=(9, 64)), [0, 1, 2, 3, 4, 0, 1, 2, 3]
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    u = x @ p["in"] + p["bin"]
    h, out = np.zeros(64), []
    for t, n in enumerate(age):
        v = p["bconv"] + sum(p["conv"][3 - j] * u[t - j] for j in range(min(n, 3) + 1))
        gate = lambda name: sigmoid(np.einsum("ni,nij->nj", v.reshape(4, 16), p[name]) + p[f"b{name}"]).ravel()  # noqa: B023
        a = np.exp(-SHARPNESS * np.log1p(np.exp(p["decay"])) * gate("recurrence"))
        h = a * h + np.sqrt(1 - a**2) * gate("input") * v if n else gate("input") * v
        z = x[t] @ p["gate"] + p["bgate"]
        gelu = z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        out.append((h * gelu) @ p["out"] + p["bout"])
    ours = jax.tree.map(lambda x: x[0], params["layers"]["recurrent"])
    positions = jnp.asarray([age])
    seen = context(CONFIG, positions, jnp.ones_like(positions), None, "xla")
    y, _ = Recurrent(CONFIG).apply({"params": ours}, jnp.float32(x)[None], seen, None)
    np.testing.assert_allclose(y[0], out, atol=1e-5)


def test_documents_of_a_row_do_not_see_each_other(griffin):
    model, params = griffin
    tokens = jax.random.randint(jax.random.key(2), (1, 20), 0, 512)
    positions = jnp.concatenate([jnp.arange(13), jnp.arange(7)])[None]
    segments = jnp.asarray([[1] * 13 + [2] * 7])
    run = jax.jit(model)
    packed = run(params, tokens, positions, segments)
    np.testing.assert_allclose(packed[:, :13], run(params, tokens[:, :13]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 13:], run(params, tokens[:, 13:]), atol=1e-5)
    other = run(params, tokens.at[:, :13].add(1) % 512, positions, segments)
    np.testing.assert_array_equal(other[:, 13:], packed[:, 13:])


@pytest.mark.parametrize("layers,blocks", [(4, CONFIG.blocks), pytest.param(2, ("recurrent",), marks=pytest.mark.slow)])
def test_stacked_unrolled_and_cached_agree(layers, blocks):
    """A period and a rest, one kind alone; a cache that is filled in two calls."""
    model = Transformer(dataclasses.replace(CONFIG, layers=layers, windows=(6,) * layers, blocks=blocks))
    params, tokens = spread(model), jax.random.randint(jax.random.key(2), (2, 12), 0, 512)
    whole = jax.jit(model)(params, tokens)
    np.testing.assert_allclose(jax.jit(model)(unrolled(model, params), tokens), whole, atol=1e-5)
    cache, parts = model.cache(2, 16, unrolled=False), []
    call = jax.jit(model.hidden)
    for at in (slice(0, 5), slice(5, 12)):
        positions = jnp.broadcast_to(jnp.arange(12)[at], tokens[:, at].shape)
        x, cache, _ = call(params, tokens[:, at], positions, jnp.ones_like(positions), cache)
        parts.append(model.logits(params, x))
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


def test_decoding_keeps_a_state_and_equals_the_whole_pass(griffin):
    """Prompts of different lengths in one batch, padded on the right; the state does not grow with the tokens."""
    model, params = griffin
    prompts = [[5, 9, 2, 44, 17, 3, 8, 61], [12], [7, 7, 30]]
    found = generate(model, params, prompts, max_new_tokens=8).tokens
    run = jax.jit(model)
    for prompt, new in zip(prompts, found, strict=True):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(prompt + new)] = prompt + new
        logits = run(params, row)[0]
        assert [int(logits[len(prompt) - 1 + i].argmax()) for i in range(8)] == new
    shapes = lambda n: [x.shape for x in jax.tree.leaves(model.cache(2, n).layers[0])]
    assert shapes(64) == shapes(4096) == [(2, 3, 64), (2, 64)]


def test_a_gradient_where_nothing_decays_is_finite():
    np.testing.assert_allclose(jax.grad(root)(0.0), 1000.0, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(root)(0.25), 1.0)


def test_what_a_unit_forgets_is_spread_as_in_the_paper(griffin):
    drawn = jax.jit(Transformer(CONFIG).init)(jax.random.key(0))["layers"]["recurrent"]["decay"]
    a = np.exp(-SHARPNESS * np.log1p(np.exp(np.float64(drawn))))
    assert DECAYS[0] < a.min() < 0.91 and 0.99 < a.max() < DECAYS[1]


@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "lora")])
def test_methods_know_nothing_of_the_model(griffin, method):
    """Each starts as the base, has a gradient everywhere once it has moved, and merges where it can be merged."""
    model, params = griffin
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 512)
    make = oft.make(block=16, where=".*") if method == "oft" else everywhere(method)  # gates have 16 inputs
    if method == "prompt":
        with pytest.raises(ValueError, match="needs attention in every layer"):
            make(params, model.specs, jax.random.key(1))
        return
    adapted = make(params, model.specs, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, weights.base(adapted), params)
    if method != "prefix":
        np.testing.assert_allclose(jax.jit(model)(adapted, tokens), jax.jit(model)(params, tokens), atol=1e-5)
    train, frozen = weights.partition(adapted, weights.trainable(adapted, "adapters"))
    moved = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), train)
    loss = lambda t: jnp.square(model(weights.combine(t, frozen), tokens)).mean()
    grads = jax.jit(jax.grad(loss))(moved)
    assert all(bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    moved = weights.combine(moved, frozen)
    if method not in BESIDE:
        merged = weights.dense(moved, model.specs)
        np.testing.assert_allclose(jax.jit(model)(merged, tokens), jax.jit(model)(moved, tokens), atol=2e-4)


def test_prefix_needs_attention_and_peft_folders_are_refused(griffin, tmp_path):
    hawk = Transformer(dataclasses.replace(CONFIG, blocks=("recurrent",)))
    with pytest.raises(ValueError, match="needs an attention layer"):
        everywhere("prefix")(hawk.abstract, hawk.specs, jax.random.key(0))
    model, params = griffin
    adapted = everywhere("lora")(params, model.specs, jax.random.key(1))
    with pytest.raises(UserError, match="are not supported"):
        peft_write.write(tmp_path / "out", model, adapted)
    assert not (tmp_path / "out").exists()


def test_the_large_shape_has_the_published_size():
    """2.68 billion parameters, of which the embedding holds 0.66 (arXiv 2404.07839, table 1: 2.7B and 0.7B)."""
    sizes = {weights.name(p): x.size for p, x in jax.tree.leaves_with_path(shape("recurrentgemma-2b").abstract)}
    assert sizes["embed/table"] == 256000 * 2560
    assert round(sum(sizes.values()) / 1e9, 2) == 2.68


def shape(name: str) -> Transformer:
    return Transformer(ModelConfig.from_dict(SHAPES[name]))


@pytest.mark.slow
def test_trained_resumed_and_opened(tmp_path):
    """The example config: its adapter learns, a run that lost its last checkpoint ends in the same bits."""
    from train.main import run

    argv = ["--config=configs/peft/recurrent_tiny.py", f"--workdir={tmp_path / 'run'}", "--config.steps=6"]
    argv += ["--config.log_every=1", "--config.eval_batches=1", f"--config.data.cache={tmp_path}/cache"]
    argv += ["--config.samples=()", "--config.ckpt.every=3"]
    last = tmp_path / "run/ckpt/6"
    assert run(schema.load(argv)) == 0
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    leaves = saved.read_manifest(last)["leaves"]
    assert "params/policy/layers/recurrent/recurrence/a" in leaves and "params/policy/layers/attn/wq/b" in leaves
    assert not any(name.endswith("/base") for name in leaves)
    shutil.rmtree(last)
    assert run(schema.load(argv)) == 0
    assert saved.read_manifest(last)["leaves"] == leaves
    lm = load(tmp_path / "run")
    assert lm.config.kinds == ("recurrent", "recurrent", "attn")
    assert len(lm.generate(["2+3=", "12+3="], max_new_tokens=4)) == 2
