"""Decoding against the full forward pass, and the distributions it samples from."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UserError
from infer.generate import bucket, generate, pad, stream, unrolled
from infer.sample import Knobs, sample, truncate
from model.config import ModelConfig
from model.peft import lora
from model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=97, layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48, max_len=64, tied=True
)  # fmt: skip
CONFIGS = {
    "llama": TINY,
    "qwen": dataclasses.replace(TINY, tied=False, bias="qkv", qk_norm=True),
    "window": dataclasses.replace(TINY, layers=3, windows=(4, 0, 4)),
    "gpt2": dataclasses.replace(
        TINY, kv_heads=4, norm="layernorm", act="gelu_tanh", gated=False, position="learned", bias="all"
    ),
    "lora": TINY,
}
PROMPTS = [[5, 9, 2, 44, 17, 3, 8, 61], [12], [7, 7, 30]]


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """A model and its stacked parameters, spread so that attention and the argmax are not flat."""
    model = Transformer(CONFIGS[request.param])
    params = model.init(jax.random.key(1))
    params["embed"]["table"] *= 4
    if request.param == "lora":
        params = lora.make(rank=4)(params, model.specs, jax.random.key(2))
        params = jax.tree.map(lambda x: x + 0.05, params)  # B is zero at the start
    return model, params


@pytest.fixture(scope="module")
def tiny():
    model = Transformer(TINY)
    params = model.init(jax.random.key(1))
    params["embed"]["table"] *= 4
    return model, params


forward = jax.jit(lambda model, params, ids: model(params, ids), static_argnums=0)


def full_logits(model, params, ids):
    """[len(ids),V] by one forward pass without a cache; padded on the right, which a causal model does not see."""
    return np.asarray(forward(model, params, jnp.asarray([ids + [0] * (24 - len(ids))]))[0, : len(ids)])


def full_logps(model, params, prompt, tokens, temperature=1.0):
    logits = full_logits(model, params, prompt + tokens)[len(prompt) - 1 : -1] / temperature
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tokens)), tokens]


def test_cache_matches_full_forward_at_every_position(pair):
    model, params = pair
    params = unrolled(model, params)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 97, n).tolist() for n in (11, 20, 14)]
    prefill, T = 6, 20
    tokens, positions, segments = (a[:3, -T:] for a in pad(rows))

    @jax.jit
    def extend(params, cache, *columns):
        x, cache = model.hidden(params, *columns, cache)
        return model.logits(params, x), cache

    cache, steps = model.cache(3, T), []
    for start, end in [(0, prefill), *((t, t + 1) for t in range(prefill, T))]:
        logits, cache = extend(params, cache, *(a[:, start:end] for a in (tokens, positions, segments)))
        steps.append(logits)
    steps = jnp.concatenate(steps, axis=1)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(steps[i, T - len(row) :], full_logits(model, params, row), atol=2e-4)


def test_greedy_is_the_argmax_of_the_full_forward(pair):
    model, params = pair
    out = generate(model, params, PROMPTS, max_new_tokens=9)
    for prompt, tokens, logps in zip(PROMPTS, out.tokens, out.logps):
        assert len(tokens) == 9
        logits = full_logits(model, params, prompt + tokens)[len(prompt) - 1 : -1]
        assert tokens == logits.argmax(-1).tolist()
        np.testing.assert_allclose(logps, full_logps(model, params, prompt, tokens), atol=1e-4)


def test_logps_are_the_models_at_the_temperature_before_truncation(tiny):
    out = generate(*tiny, PROMPTS, max_new_tokens=8, temperature=0.7, top_k=5, top_p=0.9, seed=3)
    for prompt, tokens, logps in zip(PROMPTS, out.tokens, out.logps):
        np.testing.assert_allclose(logps, full_logps(*tiny, prompt, tokens, 0.7), atol=1e-4)


def test_a_row_does_not_depend_on_the_batch(tiny):
    ask = lambda prompts, seed=0: generate(*tiny, prompts, max_new_tokens=8, temperature=3.0, seed=seed).tokens
    together = ask(PROMPTS)
    assert [ask([p])[0] for p in PROMPTS] == together
    assert ask([*PROMPTS[::-1], [1] * 30])[:3] == together[::-1]
    assert ask(PROMPTS, seed=1) != together
    twice = ask([PROMPTS[1], PROMPTS[1]])
    assert twice[0] == together[1] and twice[1] != twice[0]  # equal prompts get samples of their own


def test_stop_tokens_end_a_row(tiny):
    free = generate(*tiny, PROMPTS, max_new_tokens=12, temperature=3.0).tokens
    ends = {free[0][3], free[2][5]}
    out = generate(*tiny, PROMPTS, max_new_tokens=12, temperature=3.0, stop_ids=tuple(ends))
    for row, tokens, finished in zip(free, out.tokens, out.finished):
        stop = next((i for i, t in enumerate(row) if t in ends), None)
        assert finished == (stop is not None)
        assert tokens == (row[: stop + 1] if finished else row)


def test_stop_function_is_asked_between_chunks(tiny):
    out = generate(*tiny, PROMPTS, max_new_tokens=40, stop=lambda tokens: len(tokens) >= 3)
    assert out.finished == [True] * 3
    assert {len(t) for t in out.tokens} == {17}  # one of the prefill, 16 of a chunk


def test_stream_is_generate(tiny):
    knobs = dict(max_new_tokens=10, temperature=0.8, top_p=0.9, seed=5)
    whole = generate(*tiny, PROMPTS[:1], **knobs)
    assert list(stream(*tiny, PROMPTS[0], **knobs)) == whole.tokens[0]
    end = whole.tokens[0][4]
    streamed = list(stream(*tiny, PROMPTS[0], stop_ids=(end,), **knobs))
    assert streamed == whole.tokens[0][: whole.tokens[0].index(end) + 1]


def test_prompts_longer_than_a_prefill_chunk(tiny, monkeypatch):
    whole = generate(*tiny, PROMPTS, max_new_tokens=6)
    monkeypatch.setattr("infer.generate.PREFILL", 4)  # 8 columns in two chunks; rows 1 and 2 start in the second
    assert generate(*tiny, PROMPTS, max_new_tokens=6).tokens == whole.tokens


def test_bad_prompts_are_told(tiny):
    for prompts, n, word in ([[[]], 4, "empty"], [[[1] * 61], 4, "context of 64"], [[[97]], 4, "vocabulary"]):
        with pytest.raises(UserError, match=word):
            generate(*tiny, prompts, max_new_tokens=n)
    assert generate(*tiny, [], max_new_tokens=4).tokens == []


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 7, 9, 13)] == [1, 2, 3, 4, 6, 8, 12, 16]
    assert [bucket(n, 16) for n in (1, 17, 25, 49)] == [16, 24, 32, 64]


# Four tokens of probabilities 0.5, 0.25, 0.2, 0.05, out of order.
PROBS = jnp.asarray([[0.2, 0.5, 0.05, 0.25]])


@pytest.mark.parametrize(
    "knobs, kept",
    [
        (dict(top_k=2), [1, 3]),
        (dict(top_p=0.5), [1]),  # 0.5 alone reaches it
        (dict(top_p=0.51), [1, 3]),
        (dict(top_p=0.94), [0, 1, 3]),
        (dict(top_p=1e-9), [1]),  # the best always stays
        (dict(min_p=0.45), [1, 3]),  # at least 0.225
        (dict(min_p=0.39), [0, 1, 3]),  # at least 0.195
        (dict(top_k=2, top_p=0.6), [1]),  # of the two, the best has 0.5 / 0.75 = 0.67
        (dict(), [0, 1, 2, 3]),
    ],
)
def test_truncation_by_hand(knobs, kept):
    out = truncate(jnp.log(PROBS), Knobs(temperature=1.0, **knobs))
    assert np.flatnonzero(np.isfinite(out[0])).tolist() == kept
    np.testing.assert_allclose(out[0, jnp.asarray(kept)], jnp.log(PROBS[0, jnp.asarray(kept)]), rtol=1e-6)


def test_temperature_by_hand():
    """At temperature 1/2 the probabilities are squared: 4 : 25 : 0.25 : 6.25."""
    keys = jax.random.split(jax.random.key(0), 4000)
    logits = jnp.broadcast_to(jnp.log(PROBS), (4000, 4))
    tokens, logps = sample(logits, keys, Knobs(temperature=0.5))
    squared = np.array([4, 25, 0.25, 6.25]) / 35.5
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 4000, squared, atol=0.03)
    np.testing.assert_allclose(logps, np.log(squared)[tokens], rtol=1e-5)
    assert sample(logits[:1], keys[:1], Knobs())[0].tolist() == [1]
    assert math.isclose(sample(logits[:1], keys[:1], Knobs())[1][0], math.log(0.5), rel_tol=1e-6)
