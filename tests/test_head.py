"""Chunked cross-entropy against log_softmax of the whole logits: values and gradients."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import weights
from model.net import head
from model.peft import lora
from tests.test_weights import tiny

TOKENS = jax.random.randint(jax.random.key(1), (2, 17), 0, 512)
MASK = (jax.random.uniform(jax.random.key(3), (2, 16)) > 0.5) * jax.random.uniform(jax.random.key(4), (2, 16))


def whole(model, params, mask):
    logps = jax.nn.log_softmax(model(params, TOKENS[:, :-1]))
    return -(jnp.take_along_axis(logps, TOKENS[:, 1:, None], 2)[..., 0] * mask).sum()


def chunked(model, params, mask):
    return head.nll(model, params, model.hidden(params, TOKENS[:, :-1])[0], TOKENS[:, 1:], mask)


def by_logps(model, params, mask):
    x = model.hidden(params, TOKENS[:, :-1])[0]
    return -(head.token_logps(model, params, x, TOKENS[:, 1:], mask) * mask).sum()


@pytest.fixture(params=[1, 5, 16, 1000], ids=lambda rows: f"{rows} rows a chunk")
def rows(request, monkeypatch):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 512 * request.param)


@pytest.mark.parametrize("f", [chunked, by_logps])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_whole_logits(rows, f, tied):
    model = tiny(tied=tied)
    params = model.init(jax.random.key(0))
    want, want_grad = jax.value_and_grad(lambda p: whole(model, p, MASK))(params)
    got, got_grad = jax.jit(jax.value_and_grad(lambda p: f(model, p, MASK)))(params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got_grad, want_grad)


@pytest.mark.parametrize("f", [chunked, by_logps])
def test_lora_on_the_head(f):
    model = tiny()
    params = lora.make(rank=4, where=".*")(model.init(jax.random.key(0)), model.specs, jax.random.key(1))
    train, frozen = weights.partition(params, weights.trainable(params, "adapters"))
    grad = lambda g: jax.jit(jax.grad(lambda t: g(model, weights.combine(t, frozen), MASK)))(train)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grad(f), grad(whole))


@pytest.mark.parametrize("f", [chunked, by_logps])
def test_nothing_counts(f):
    model = tiny()
    params = model.init(jax.random.key(0))
    value, grad = jax.value_and_grad(lambda p: f(model, p, jnp.zeros((2, 16))))(params)
    assert value == 0 and all((g == 0).all() for g in jax.tree.leaves(grad))


def test_by_hand():
    """Logits (0, log 3) give p = (1/4, 3/4): two targets cost log 4 and log 4/3; weights 1 and 2."""

    class Two:
        config = SimpleNamespace(logit_cap=0.0)

        def head(self, params):
            return "BTD,DV->BTV", params

    x = jnp.ones((1, 2, 1))
    got = head.nll(Two(), jnp.array([[0.0, np.log(3.0)]]), x, jnp.array([[0, 1]]), jnp.array([[1.0, 2.0]]))
    np.testing.assert_allclose(got, np.log(4) + 2 * np.log(4 / 3), rtol=1e-6)


def test_logits_never_exist_whole():
    """Vocabulary 32k, 2048 rows: the logits would take 256 MiB; the step's temporaries stay below half of that."""
    model = tiny(vocab_size=32768)
    tokens = jnp.zeros((8, 256), jnp.int32)

    def loss(params, tokens):
        x = model.hidden(params, tokens).x
        return head.nll(model, params, x, tokens, jnp.ones(tokens.shape))

    compiled = jax.jit(jax.grad(loss)).lower(model.abstract, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 190 * 2**20
