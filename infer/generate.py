"""Samples from a model, using a key-value cache. After a forward pass over the prompts, each step adds one token to
every unfinished row.

Lengths and batch sizes are rounded up to a few values, and all other arguments are traced, so a process compiles only a
few programs.
"""

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import UserError
from infer.batch import Batch, Request
from infer.prefix import Prefixes
from infer.sample import Knobs
from infer.shapes import bucket, width
from model import weights
from model.config import ModelConfig
from model.net.kv_cache import KINDS
from model.net.transformer import Transformer, unstack, virtual_tokens
from model.weights import Params

if TYPE_CHECKING:  # not imported at run time: it imports Pallas, which would double the total import time
    from infer.serve.store import Store

Prompts = Sequence[Sequence[int]]  # token ids


class Samples(NamedTuple):
    """The generated tokens, with one entry per prompt in each list."""

    tokens: list[list[int]]  # including the stop token, if one was sampled
    logps: list[np.ndarray]  # log-probabilities of the generated tokens; see infer.sample.sample
    finished: list[bool]  # True: ended by a stop token or by `stop`; False: cut off at max_new_tokens


def generate(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    stop: Callable[[list[int]], bool] | None = None,
    adapters: Sequence[str | None] = (),
    **how: Any,
) -> Samples:
    """Continues each prompt by at most `max_new_tokens` tokens. Prompts may differ in length. At temperature 0,
    decoding is greedy. All other keyword arguments (`how`) are passed to `answer`. If a store of adapters is given,
    `params` is None, and `adapters` names an adapter for each prompt.

    Each answer depends only on the seed, its prompt, and the number of earlier prompts that are identical to it.
    Different prompts in the batch do not affect it. `stop` is called with the tokens of an unfinished answer, at least
    once every infer.batch.STEPS steps. If it returns True, the answer ends, and all tokens that were already sampled
    are returned.
    """
    knobs = Knobs(temperature, top_k, top_p, min_p)
    ends = [stop_ids] * len(prompts)
    asked = requests(model, params, prompts, max_new_tokens, seed, knobs, ends=ends, adapters=adapters)
    return answer(model, params and unrolled(model, params), asked, stop=stop, **how)


def answer(
    model: Transformer, params: Params, asked: Sequence[Request], *, rows: int = 0, cache: str = "float",
    stop: Callable[[list[int]], bool] | None = None, store: "Store | None" = None, prefixes: Prefixes | None = None,
) -> Samples:  # fmt: skip
    """Answers requests. The model uses either `params`, which must be unrolled (see `unrolled`), or parameters from a
    store of adapters.

    At most `rows` requests are decoded at a time (0: all of them). Further requests join when rows become free. `cache`
    is the number format of the key-value cache: "float", or "int8" or "fp8" to save memory. `prefixes` stores the
    caches of prefixes that prompts share, so that later calls can reuse them.
    """
    if cache not in KINDS:
        raise UserError(f"cache={cache!r}", fix=f"one of {', '.join(KINDS)}")
    if asked:
        longest, most = max(len(r.prompt) for r in asked), max(r.max_new_tokens for r in asked)
        length = virtual_tokens(params or {}) + width(longest) + bucket(most, 64)  # similar lengths share a program
        rows = bucket(min(rows or len(asked), len(asked)))
        batch = Batch(model, params, rows, length, store=store, prefixes=prefixes, kind=cache)
        batch.run(asked, stop)
    for request in asked:
        _check_numbers(request.logps)
    logps = [np.asarray(r.logps, np.float32) for r in asked]
    return Samples([r.tokens for r in asked], logps, [r.stopped for r in asked])


def stream(
    model: Transformer, params: Params, prompt: Sequence[int], *, max_new_tokens: int, seed: int = 0,
    stop_ids: Sequence[int] = (), adapter: str | None = None, cache: str = "float", store: "Store | None" = None,
    prefixes: Prefixes | None = None, **knobs: float,
) -> Iterator[int]:  # fmt: skip
    """Yields the tokens that `generate` would return for one prompt, each as soon as it is sampled."""
    how = Knobs(**cast(dict[str, Any], knobs))
    [request] = requests(model, params, [prompt], max_new_tokens, seed, how, ends=[stop_ids], adapters=[adapter])
    length = virtual_tokens(params or {}) + width(len(prompt)) + bucket(max_new_tokens, 64)
    params = params and unrolled(model, params)
    batch = Batch(model, params, 1, length, store=store, prefixes=prefixes, kind=cache)
    batch.plan([request])
    batch.join([request])
    for i in range(max_new_tokens):
        if i:
            batch.step()
        _check_numbers(request.logps[-1:])
        yield request.tokens[-1]
        if request.stopped:
            return


def requests(
    model: Transformer, params: Params, prompts: Prompts, n: int, seed: int, knobs: Knobs, *,
    ends: Sequence[Sequence[int]], adapters: Sequence[str | None] = (),
) -> list[Request]:  # fmt: skip
    """Makes one request per prompt. `ends` contains the end tokens for each prompt. Raises UserError if a prompt cannot
    be continued by `n` tokens."""
    check(model, params, prompts, n)
    each = zip(prompts, row_keys(prompts, seed), ends, adapters or [None] * len(prompts), strict=True)
    return [Request(p, n, key, adapter=adapter, knobs=knobs, ends=end) for p, key, end, adapter in each]


def unrolled(model: Transformer, params: Params) -> Params:
    """Returns the parameters with the layers as a tuple instead of stacked arrays. Decoding with a tuple of layers is
    1.5 times as fast on a CPU, since a scan would copy each layer out of the stacked arrays.

    Values that depend only on the weights are computed once here: the matrices of DoRA and OFT, and float32 copies of
    bfloat16 weights for a float32 model on a CPU.
    """
    widen = model.dtype == "float32" and jax.default_backend() == "cpu"
    return params if isinstance(params["layers"], tuple) else _unroll(params, model.config, widen)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _unroll(params: Params, config: ModelConfig, widen: bool) -> Params:
    params = weights.for_inference(unstack(params, config))

    def wide(w: Array | weights.Weight) -> Array | weights.Weight:
        return w if isinstance(w, weights.Weight) or w.dtype != jnp.bfloat16 else w.astype(jnp.float32)

    return jax.tree.map(wide, params, is_leaf=weights.is_weight) if widen else params


def row_keys(prompts: Prompts, seed: int) -> np.ndarray:
    """Returns the key data, uint32 [B,2], of one JAX random key per prompt. Each key is derived from the seed, the
    prompt, and the number of earlier prompts that are identical to it."""
    seen: dict[int, int] = {}
    data = np.zeros((bucket(len(prompts)), 2), np.uint32)
    for i, prompt in enumerate(prompts):
        digest = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
        data[i] = digest, seen.get(digest, 0)
        seen[digest] = data[i, 1] + 1
    fold = jax.vmap(lambda d: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), d[0]), d[1]))
    return np.asarray(jax.random.key_data(fold(data)))[: len(prompts)]


def check(model: Transformer, params: Params, prompts: Prompts, n: int) -> None:
    """Raises UserError if the prompts cannot be continued by `n` tokens."""
    needs_causal(model)
    limit, vocab = model.config.context - virtual_tokens(params or {}), model.config.vocab_size
    if n < 1:
        raise UserError(f"max_new_tokens={n}", fix="at least 1")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError("the prompt is empty: there is no token to continue from", f"prompt {i}")
        if len(prompt) + n > limit:
            what = f"{len(prompt)} prompt tokens + max_new_tokens={n} exceed the model's context of {limit}"
            raise UserError(what, f"prompt {i}", "shorten the prompt or lower max_new_tokens")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise UserError(
                f"token id outside the vocabulary of {vocab} tokens", f"prompt {i}", "use the model's tokenizer"
            )


def needs_causal(model: Transformer) -> None:
    """Raises UserError for a bidirectional model, since such a model would see the tokens that it has to predict."""
    if not model.config.causal:
        raise UserError("a bidirectional model cannot predict the next token", "model", "load a causal model")


def _check_numbers(logps: Sequence[float]) -> None:
    """Raises UserError if a log-probability is NaN, since the sampled token is then meaningless."""
    if np.isnan(logps).any():
        raise UserError("the logits are NaN: the weights or the activations overflow", "model", "dtype=float32")
