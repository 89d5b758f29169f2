"""Chunked cross-entropy against log_softmax of the whole logits: values and gradients."""

import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import weights
from model.net import head
from model.net.layers import unembed
from model.peft import lora
from tests.helpers.models import tiny
from tests.helpers.steps import mesh_of
from train import mesh

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
        def head(self, params):
            return functools.partial(unembed, "BTD,DV->BTV", 0.0), params

    x = jnp.ones((1, 2, 1))
    got = head.nll(Two(), jnp.array([[0.0, np.log(3.0)]]), x, jnp.array([[0, 1]]), jnp.array([[1.0, 2.0]]))
    np.testing.assert_allclose(got, np.log(4) + 2 * np.log(4 / 3), rtol=1e-6)


def test_entropy_and_kl_by_hand():
    """p = (1/4, 3/4): log 4 - 3/4 log 3 nats. To (1/2, 1/2) that is log 2 less the entropy; a masked row is 0."""
    p, q = ((head_of(jnp.log(jnp.array([row]))), None, jnp.ones((1, 2, 1))) for row in ([1.0, 3.0], [1.0, 1.0]))
    mask, want = jnp.array([[1.0, 0.0]]), np.log(4) - 0.75 * np.log(3)
    np.testing.assert_allclose(head.entropy(*p, mask), [[want, 0]], rtol=1e-6)
    np.testing.assert_allclose(head.kl(p, q, mask), [[np.log(2) - want, 0]], rtol=1e-5)
    np.testing.assert_allclose(head.token_logps(*p, jnp.array([[1, 1]]), mask, 0.5), [[np.log(0.9), 0]], rtol=1e-6)


def head_of(table):
    return SimpleNamespace(head=lambda _: (functools.partial(unembed, "BTD,DV->BTV", 0.0), table))


@pytest.mark.parametrize(
    "on",
    [pytest.param(None, marks=pytest.mark.slow), (2, 2), pytest.param((2, 1, 2, 2), marks=pytest.mark.slow)],
    ids=str,
)
def test_entropy_and_kl_equal_the_whole_logits(monkeypatch, on):
    """Values, and gradients by both networks and by an extra: a teacher of another width, LoRA on the student's tied
    table, several chunks, on one device and on meshes."""
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 1024 * 3)
    student, teacher = tiny(), tiny(embed=32, head_dim=8, tied=False)
    init = lambda model: jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(7)))
    params = lora.make(rank=4, where="embed/.*")(init(student), student.specs, jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.05, params)
    tree = {"student": params, "teacher": init(teacher), "scale": jax.random.uniform(jax.random.key(5), (2, 16))}
    out_of = lambda model, p: (model, p, model.hidden(p, TOKENS[:, :-1]).x)
    scaled = lambda logits, scale: (jax.nn.log_softmax(logits)[:, 0] * scale, logits[:, 1])

    def chunked(tree):
        s, t = out_of(student, tree["student"]), out_of(teacher, tree["teacher"])
        first = head.over_rows(scaled, [s], MASK, tree["scale"])[0]  # nothing uses the other
        return head.kl(t, s, MASK, 0.7), head.kl(s, t, MASK), head.entropy(*s, MASK), first

    def whole(tree):
        s, t = out_of(student, tree["student"]), out_of(teacher, tree["teacher"])
        s, t = (jax.nn.log_softmax(model.logits(p, x)) for model, p, x in (s, t))
        cool = lambda x: jax.nn.log_softmax(x / 0.7)
        kl = lambda a, b: (jnp.exp(a) * (a - b)).sum(-1)
        found = kl(cool(t), cool(s)), kl(s, t), -(jnp.exp(s) * s).sum(-1), s[..., 0] * tree["scale"]
        return tuple(x * (MASK != 0) for x in found)

    total = lambda f: lambda tree: sum((jnp.sin(x) * MASK).sum() for x in f(tree))
    with jax.set_mesh(mesh_of(*on or (1,))), nn.logical_axis_rules(mesh.RULES):
        got, want = jax.jit(chunked)(tree), jax.jit(whole)(tree)
        grads = [jax.jit(jax.grad(total(f)))(tree) for f in (chunked, whole)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-6, atol=2e-5), got, want)
    # Sums in another order move a KL of 75 nats by 1e-4 nats, and gradients are multiplied by such differences.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4 * float(jnp.abs(b).max())), *grads)


def test_logits_never_exist_whole():
    """Vocabulary 32k, 2048 rows: the logits would take 256 MiB; the step's temporaries stay below half of that."""
    model = tiny(vocab_size=32768)
    tokens = jnp.zeros((8, 256), jnp.int32)

    def loss(params, tokens):
        x = model.hidden(params, tokens).x
        return head.nll(model, params, x, tokens, jnp.ones(tokens.shape))

    compiled = jax.jit(jax.grad(loss)).lower(model.abstract, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 190 * 2**20
