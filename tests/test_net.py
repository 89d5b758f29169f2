"""The stack of layers against code written by hand: where norms stand, who sees whom, and what layers report."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from configs.models import SHAPES
from data.text.formats import load as load_tokenizer
from infer.generate import generate
from infer.lm import LM
from model import build, weights
from model.config import ModelConfig, in_layers
from model.families import llama
from model.net import kinds, stack
from model.net.attention import context
from model.net.transformer import Transformer
from model.peft import prefix, prompt
from train.cost import cost

TINY = ModelConfig(vocab_size=97, layers=3, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48, max_len=64, tied=True)
BOTH_WAYS = dataclasses.replace(TINY, causal=False)
BERT = dataclasses.replace(
    BOTH_WAYS, layers=2, kv_heads=4, norm="layernorm", norms="post", act="gelu", gated=False, position="learned",
    bias="all", types=2,
)  # fmt: skip
GRIFFIN = ModelConfig.from_dict({**SHAPES["tiny-griffin"], "vocab_size": 97, "layers": 5, "windows": (6,) * 5})
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 97)


def drawn(model: Transformer) -> dict:
    """Parameters that are all random, norms and biases too."""
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jax.jit(lambda key: jax.tree.map(noise, model.init(key)))(jax.random.key(0))


# --- where norms stand ---


def by_hand(params, c: ModelConfig, tokens, types) -> np.ndarray:
    """Hidden states [T,D] of one row, in float64: Vaswani et al. 2017 with LayerNorm, or Gemma 2's norms around."""
    p = jax.tree.map(np.float64, params)
    gelu = lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    def norm(x, n):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * n["scale"] + n["bias"]

    x = p["embed"]["table"][tokens] + p["position"]["table"][: len(tokens)] + p["types"]["table"][types]
    x = norm(x, p["embed_norm"]) if c.norms == "post" else x
    for i in range(c.layers):
        layer = jax.tree.map(lambda a: a[i], p["layers"])  # noqa: B023

        def attend(x):
            a = layer["attn"]  # noqa: B023
            q, k, v = (np.einsum("td,dnh->nth", x, a[f"w{n}"]) + a[f"b{n}"][:, None] for n in "qkv")
            scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(c.head_dim))
            return np.einsum("nts,nsh,nhd->td", scores / scores.sum(-1, keepdims=True), v, a["wo"]) + a["bo"]

        def feed(x):
            m = layer["mlp"]  # noqa: B023
            return gelu(x @ m["up"] + m["bup"]) @ m["down"] + m["bdown"]

        for f, name in ((attend, "attn"), (feed, "mlp")):
            if c.norms == "post":
                x = norm(x + f(x), layer[f"{name}_norm"])
            else:
                x = x + norm(f(norm(x, layer[f"{name}_norm"])), layer[f"{name}_out_norm"])
    return x if c.norms == "post" else norm(x, p["final_norm"])


@pytest.mark.parametrize("norms", ["post", "both"])
def test_norms_behind_a_sublayer(norms):
    model = build.network(dataclasses.replace(BERT, norms=norms))
    params, types = drawn(model), jnp.asarray([[0] * 5 + [1] * 7] * 2)
    got = jax.jit(lambda p: model.hidden(p, TOKENS, types=types).x)(params)
    for row in range(2):
        want = by_hand(params, model.config, TOKENS[row], types[row])
        np.testing.assert_allclose(got[row], want, rtol=0, atol=1e-4 * np.abs(want).max())
    other = jax.jit(lambda p: model.hidden(p, TOKENS).x)(params)  # types left out are 0
    assert float(jnp.abs(got - other).max()) > 1e-2


# --- who sees whom ---


@pytest.mark.parametrize(
    "config", [BOTH_WAYS, BERT, dataclasses.replace(BOTH_WAYS, windows=(4, 0, 4))], ids=lambda c: c.norms
)
def test_padding_is_never_seen(config):
    """Rows of 7 tokens: padding on either side, and what stands in it, moves no logit; a later token does."""
    model = build.network(config)
    params, run = drawn(model), jax.jit(model)
    want = run(params, TOKENS[:, :7])
    positions = jnp.clip(jnp.arange(12) - 2, 0) * jnp.ones((2, 1), jnp.int32)
    segments = ((jnp.arange(12) >= 2) & (jnp.arange(12) < 9)) * jnp.ones((2, 1), jnp.int32)
    for filler in (0, 5):
        padded = jnp.full((2, 12), filler).at[:, 2:9].set(TOKENS[:, :7])
        np.testing.assert_allclose(run(params, padded, positions, segments)[:, 2:9], want, atol=1e-4)
    changed = run(params, TOKENS[:, :7].at[:, 3].add(1) % 97)
    assert float(jnp.abs(changed - want)[:, 0].max()) > 1e-3


def test_documents_of_a_row_looked_at_both_ways():
    model = build.network(BOTH_WAYS)
    params, run = drawn(model), jax.jit(model)
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)]) * jnp.ones((2, 1), jnp.int32)
    segments = jnp.repeat(jnp.asarray([[1, 2]] * 2), jnp.asarray([5, 7]), axis=1, total_repeat_length=12)
    packed = run(params, TOKENS, positions, segments)
    np.testing.assert_allclose(packed[:, :5], run(params, TOKENS[:, :5]), atol=1e-4)
    np.testing.assert_allclose(packed[:, 5:], run(params, TOKENS[:, 5:]), atol=1e-4)


def test_what_a_model_that_looks_both_ways_cannot_do_is_one_line():
    model = build.network(BOTH_WAYS)
    params = model.init(jax.random.key(0))
    with pytest.raises(UserError, match="cannot predict the next token"):
        generate(model, params, [[1, 2]], max_new_tokens=2)
    with pytest.raises(UserError, match="cannot predict the next token"):
        LM(model, params, load_tokenizer("bytes")).loss("a text")
    with pytest.raises(UserError, match="needs a causal model"):
        model(prompt.make(tokens=3)(params, model.specs, jax.random.key(1)), TOKENS)
    with pytest.raises(UserError, match="recurrent layers depend only on earlier tokens"):
        build.network(dataclasses.replace(GRIFFIN, causal=False))
    with pytest.raises(UserError, match="is_causal=False"):
        llama.config({"is_causal": False, "num_attention_heads": 4})


def test_a_prefix_is_seen_by_every_token():
    model = build.network(BOTH_WAYS)
    params = drawn(model)
    tuned = prefix.make(tokens=3, deviation=1.0)(params, model.specs, jax.random.key(1))
    apart = jnp.abs(jax.jit(model)(tuned, TOKENS) - jax.jit(model)(params, TOKENS)).max((0, 2))
    assert float(apart.min()) > 1e-3


# --- kinds ---


def test_an_unknown_kind_is_an_error(monkeypatch):
    with pytest.raises(UserError, match="no layer of kind 'mamba' · known: attn, recurrent"):
        build.network(dataclasses.replace(TINY, blocks=("attn", "mamba")))
    with pytest.raises(UserError, match="norms='sandwich'"):
        build.network(dataclasses.replace(TINY, norms="sandwich"))
    model = build.network(GRIFFIN)
    mask = jax.tree.map(lambda _: True, model.abstract)
    monkeypatch.delitem(kinds.KINDS, "recurrent")
    with pytest.raises(KeyError):  # never priced at nothing
        cost(GRIFFIN, model.abstract, model.specs, mask, 64)


def test_a_model_that_looks_both_ways_multiplies_each_query_with_every_key():
    """T keys instead of (T + 1) / 2: 4 FLOPs each for 3 layers, 4 heads of 8."""
    model = build.network(TINY)
    price = lambda config: cost(config, model.abstract, model.specs, jax.tree.map(lambda _: True, model.abstract), 33)
    assert price(BOTH_WAYS).layer_flops - price(TINY).layer_flops == 4 * 3 * 4 * 8 * (33 - 17)


def test_configs_written_before_these_keys_open():
    old = json.loads(json.dumps(TINY.to_dict()))
    for key in ("causal", "norms", "types"):
        del old[key]
    assert ModelConfig.from_dict(old) == TINY
    assert ModelConfig.from_dict(json.loads(json.dumps(BERT.to_dict()))) == BERT


def test_a_stack_below_a_prefix():
    assert GRIFFIN.stack("encoder/layers/attn/wq") == GRIFFIN.stack("layers/attn/wq") == [2]
    assert in_layers("policy/layers/attn/wq") and not in_layers("embed/table")


# --- what layers report ---


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TINY, id="llama"),
        pytest.param(BERT, id="bert"),
        pytest.param(GRIFFIN, id="griffin", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_hidden_states_are_those_of_a_run_layer_by_layer(config, remat):
    """Scanned and unrolled; of a period and a rest; with a gradient that goes through them."""
    model = Transformer(config, remat=remat)
    params = drawn(model)
    asked = lambda p: model.hidden(p, TOKENS, report=["hidden"]).reports["hidden"]
    got = jax.jit(asked)(params)
    trees, want = [stack.pick(params["layers"], config.kinds, i) for i in range(config.layers)], []
    positions = jnp.broadcast_to(jnp.arange(12), TOKENS.shape)
    ctx = context(config, positions, jnp.ones_like(positions), None, "xla")
    x = model.embedded(params, weights.take(params["embed"]["table"], TOKENS, "float32"), positions)
    for kind, windowed, p in zip(config.kinds, config.windowed, trees, strict=True):
        x = model.layer(kind, x, p, None, windowed, ctx)[0]
        want.append(x)
    want = jnp.stack(want)
    unrolled = jax.jit(asked)({**params, "layers": tuple(trees)})
    for found in (got, unrolled):
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
    grads = jax.jit(jax.grad(lambda p: asked(p)[0].sum()))(params)["layers"]["mlp"]["up"]
    assert float(jnp.abs(grads[0]).max()) > 0 and float(jnp.abs(grads[1:]).max()) == 0


def test_what_is_not_asked_for_is_not_computed():
    model = build.network(TINY)
    plain = jax.make_jaxpr(model.hidden)(model.abstract, TOKENS)
    assert len(plain.out_avals) == 1 and model.hidden(model.init(jax.random.key(0)), TOKENS).reports == {}
    assert not any("[3,2,12,32]" in str(v.aval) for eqn in plain.eqns for v in eqn.outvars)
    with pytest.raises(UserError, match="no layer reports 'router' · known: hidden"):
        model.hidden(model.abstract, TOKENS, report=["router"])
