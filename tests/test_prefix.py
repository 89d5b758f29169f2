"""A prefix that prompts share is computed once: the same answers and log-probabilities, and fewer tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import SHAPES
from data.text.formats import load as load_tokenizer
from infer.generate import generate, unrolled
from infer.lm import LM
from infer.prefix import Prefixes, Prompt, branches
from infer.serve.batcher import Batcher
from model import weights
from model.config import ModelConfig
from model.net.transformer import Transformer
from model.peft import prefix, prompt
from tests.helpers import adapters
from tests.helpers.models import TINY, rand

LLAMA = dataclasses.replace(TINY, layers=2, max_len=128)
CONFIGS = {
    "llama": LLAMA,
    "window": dataclasses.replace(LLAMA, layers=3, windows=(6, 0, 6)),
    "gpt2": dataclasses.replace(
        LLAMA, kv_heads=4, norm="layernorm", act="gelu_tanh", gated=False, position="learned", bias="all", tied=True
    ),
    "recurrent": ModelConfig.from_dict({**SHAPES["tiny-griffin"], "vocab_size": 272, "windows": (6,) * 3}),
    "prefix": LLAMA,
    "prompt": LLAMA,
}
EXAMPLES = [*range(40, 61)]  # 21 tokens
PROMPTS = [EXAMPLES + rest for rest in ([1, 2, 3, 4, 5, 6, 7], [9], [1, 2, 3, 4, 5, 8], [11, 12, 13])] + [[5, 4], [7]]


def quick(names, *chosen):
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


def made(name):
    model = Transformer(CONFIGS[name])

    @jax.jit
    def init(key):
        params = model.init(key)
        params["embed"]["table"] *= 4
        if name in ("prefix", "prompt"):
            params = {"prefix": prefix, "prompt": prompt}[name].make(tokens=3)(params, model.specs, key)
            train, frozen = weights.partition(params, weights.trainable(params, "adapters"))
            params = weights.combine(jax.tree.map(lambda x: x + 0.3 * rand(*x.shape), train), frozen)
        return params

    return model, init(jax.random.key(1))


@pytest.fixture(scope="module")
def tiny():
    return made("llama")


@pytest.fixture
def lm(tiny):
    model, params = tiny
    return LM(model, params, load_tokenizer("bytes"))


@pytest.fixture
def eager(monkeypatch):
    """Even few tokens are worth a prefix, so that several grow from each other."""
    worth(monkeypatch, 3)


def worth(monkeypatch, each, together=0):
    monkeypatch.setattr("infer.prefix.NODE", each)
    monkeypatch.setattr("infer.prefix.WORTH", together)


def alone(monkeypatch, f):
    with monkeypatch.context() as patch:
        worth(patch, 10**9)
        return f()


def test_branches_by_hand(monkeypatch):
    """Of abcx, abcy, abcdez twice and q, abc saves 3 x 3 tokens, and abcdez one time the 3 that follow."""
    worth(monkeypatch, 2)
    rows = [Prompt(None, tuple(map(ord, text))) for text in ("abcx", "abcdez", "q", "abcdez", "abcy")]
    assert branches(rows) == [[3], [3, 6], [], [3, 6], [3]]
    assert branches([Prompt("other", rows[0].ids), *rows[1:]]) == [[], [3, 6], [], [3, 6], [3]]
    worth(monkeypatch, 9)
    assert branches(rows) == [[3], [3], [], [3], [3]]
    worth(monkeypatch, 2, 13)
    assert branches(rows) == [[]] * 5
    assert branches([]) == [] and branches(rows[:1]) == [[]]


@pytest.mark.parametrize("name", quick(CONFIGS, "window", "recurrent"))
def test_answers_are_those_of_each_prompt_on_its_own(name, eager, monkeypatch):
    """The examples, and a beginning of two that grows from them, are computed once: 21 + 5 + 2 + 1 + 1 + 3 + 2 + 1."""
    model, params = made(name)
    params, prefixes = unrolled(model, params), Prefixes()
    ask = lambda **how: generate(model, params, PROMPTS, max_new_tokens=5, rows=3, **how)
    want, got = alone(monkeypatch, ask), ask(prefixes=prefixes)
    assert got.tokens == want.tokens
    np.testing.assert_allclose(np.concatenate(got.logps), np.concatenate(want.logps), atol=1e-5)
    assert prefixes.computed == 36
    assert ask(prefixes=prefixes).tokens == want.tokens and prefixes.computed == 36 + 10


@pytest.mark.parametrize("kind", quick(["int8", "fp8"], "int8"))
def test_caches_of_8_bits_hold_the_same_with_prefixes(kind, tiny, eager, monkeypatch):
    ask = lambda: generate(*tiny, PROMPTS, max_new_tokens=4, cache=kind)
    want, got = alone(monkeypatch, ask), ask()
    assert got.tokens == want.tokens
    np.testing.assert_allclose(np.concatenate(got.logps), np.concatenate(want.logps), atol=1e-5)


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch_size(lm, eager):
    """Rows leave and join; prompts of several lengths, each with samples of its own."""
    texts = ["Say a word. " * 3 + tail for tail in "abcdefgh"] + ["x", "12345 " * 4, "Say a word. "] * 2
    for knobs in ({}, {"temperature": 5.0, "top_p": 0.9}):
        one, three, sixteen = (lm.generate(texts, rows=n, max_new_tokens=7, **knobs) for n in (1, 3, 16))
        assert one == three == sixteen


def test_samples_of_one_prompt_read_it_once(tiny):
    ids = EXAMPLES[:17]
    prefixes = Prefixes()
    group = generate(*tiny, [ids] * 8, max_new_tokens=6, temperature=4.0, prefixes=prefixes)
    assert prefixes.computed == len(ids) and len({tuple(t) for t in group.tokens}) > 4
    assert generate(*tiny, [ids] * 2, max_new_tokens=6, temperature=4.0).tokens == group.tokens[:2]


def test_what_is_not_shared_is_not_kept(tiny, monkeypatch):
    """And the batch has no other cache than the one that the prompts were computed in."""
    prefixes = Prefixes()
    monkeypatch.setattr("infer.batch.insert", lambda *_: pytest.fail("a second cache"))
    generate(*tiny, [[1, 2, 3], [4, 5], [6]], max_new_tokens=4, prefixes=prefixes)
    assert not prefixes.bytes and not prefixes.kept


def test_a_store_is_bounded_and_forgets_the_least_recently_used(tiny, eager):
    """Beginnings of 80 tokens take 96 columns: 2 layers x 2 x 2 heads x 8 x 4 bytes each, and two numbers."""
    each = (96 * (2 * 2 * 2 * 8 + 2) + 1) * 4
    prefixes = Prefixes(2 * each)
    ask = lambda start, tail: generate(
        *tiny, [[start] * 80 + [tail + i] for i in range(2)], max_new_tokens=1, prefixes=prefixes
    )
    first = lambda: [prompt.ids[0] for _, prompt in prefixes.kept]
    for start, kept, computed in [(1, [1], 82), (2, [1, 2], 82), (1, [2, 1], 2), (3, [1, 3], 82), (2, [3, 2], 82)]:
        before = prefixes.computed
        ask(start, 100)
        assert first() == kept and prefixes.bytes <= prefixes.limit
        assert prefixes.computed - before == computed
    small = Prefixes(0)
    assert (
        generate(*tiny, PROMPTS, max_new_tokens=3, prefixes=small).tokens
        == generate(*tiny, PROMPTS, max_new_tokens=3).tokens
    )
    assert not small.kept and not small.bytes


@pytest.mark.slow
def test_a_prefix_belongs_to_an_adapter(eager, monkeypatch):
    model, base, trees = adapters.make()
    store, prefixes = adapters.store_of(model, base, trees), Prefixes()
    prompts, names = [[*EXAMPLES, i] for i in range(6)], ["a", None, "a", None, "c", "c"]
    ask = lambda **how: generate(model, None, prompts, adapters=names, store=store, max_new_tokens=5, **how).tokens
    want, got = alone(monkeypatch, ask), ask(prefixes=prefixes)
    assert got == want and len({tuple(tokens) for tokens in got}) > 2
    assert {p.adapter for _, p in prefixes.kept} == {"a", None, "c"}


@pytest.mark.parametrize("name", quick(["llama", "recurrent", "prefix"], "llama"))
def test_options_behind_one_question_read_it_once(name, eager, monkeypatch):
    """The examples once, each question once, and of every option its own tokens and the one before it."""
    lm = LM(*made(name), load_tokenizer("bytes"))
    questions, options = ["Q: 2+3? A:", "Q: 5+1? A:"], [" 5", " 6", " seven"]
    prompts = ["Some examples. " + q for q in questions for _ in options]
    score = lambda: lm.logps(prompts, options * 2)
    want = alone(monkeypatch, score)
    lm = dataclasses.replace(lm)
    got = score()
    assert [n for _, n in got] == [n for _, n in want] == [2, 2, 6] * 2
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], atol=1e-5 * 6)
    read = len("Some examples. Q: ") + 2 * len("2+3? A") + 2 * sum(1 + len(o) for o in options)
    assert lm.prefixes.computed == read
    assert score() == got and lm.prefixes.computed == read + 2 * sum(1 + len(o) for o in options)


def test_a_server_reads_instructions_once(lm, eager):
    """The second request finds that it begins as the first did; the third reads only what is new."""
    batcher = Batcher(lm, rows=2, length=120)
    read = lambda: batcher.batch.reader.prefixes.computed
    system, counts = "A long instruction to everybody. " * 2, []
    for tail in "abc":
        ids, before = lm.encode(system + tail), read()
        request = batcher.submit(ids, max_new_tokens=3)
        while any(batcher.rows) or batcher.waiting:
            batcher.step()
        counts.append(read() - before)
        assert request.tokens == generate(lm.model, lm.params, [ids], max_new_tokens=3).tokens[0]
    assert counts == [67, 67, 1]


@pytest.mark.parametrize("name", quick(["recurrent", "prefix"], "prefix"))
def test_models_with_a_state_or_virtual_tokens_are_served(name):
    model, params = made(name)
    lm = LM(model, params, load_tokenizer("bytes"))
    batcher = Batcher(lm, rows=2, length=24)
    asked = [([5, 9, 2, 44], 16), ([12], 9), ([7, 7, 30], 20)]
    requests = [batcher.submit(p, max_new_tokens=n) for p, n in asked]
    while any(batcher.rows) or batcher.waiting:
        batcher.step()
    ends = lm.tokenizer.eos_ids
    for request, (ids, n) in zip(requests, asked):
        assert request.tokens == generate(model, params, [ids], max_new_tokens=n, stop_ids=ends).tokens[0]


def test_frequencies_that_depend_on_the_length_are_not_shared(lm):
    scaled = {"rope_type": "dynamic", "factor": 2.0}
    config = ModelConfig.from_dict({**LLAMA.to_dict(), "rope_scaling": scaled, "max_len": 32})
    prefixes = Prefixes()
    generate(Transformer(config), lm.params, [[1] * 20 + [i] for i in range(5)], max_new_tokens=2, prefixes=prefixes)
    assert prefixes.computed == 5 * 21 and not prefixes.kept


def test_padding_keeps_the_state_of_recurrent_layers():
    """A row that is padded on the right leaves the state and the inputs of its last token."""
    model, params = made("recurrent")
    params, run = unrolled(model, params), jax.jit(model.hidden)
    tokens, positions = jnp.asarray([[5, 6, 7, 0, 0]]), jnp.asarray([[0, 1, 2, 0, 0]])
    padded = run(params, tokens, positions, jnp.asarray([[1, 1, 1, 0, 0]]), model.cache(1, 8)).cache
    exact = run(params, tokens[:, :3], positions[:, :3], jnp.ones((1, 3), jnp.int32), model.cache(1, 8)).cache
    for kind, a, b in zip(model.config.kinds, padded.layers, exact.layers):
        if kind == "recurrent":
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)
