"""Sampling with a key-value cache: prefill, then one token per row and step until every row is done.

Prompts of different lengths share a batch by padding on the left. Lengths and batch sizes are rounded up to a few
shapes and everything else is traced, so a process compiles only a handful of programs.
"""

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from common.errors import UserError
from infer.sample import Knobs, sample
from model import weights
from model.config import ModelConfig
from model.net.kv_cache import KINDS, Cache
from model.net.transformer import Transformer, unstack, virtual_tokens
from model.weights import Params, Tree

PREFILL = 512  # prompt tokens per forward pass; bounds the attention scores and the number of shapes
CHECK_EVERY = 16  # steps between calls of `stop`

Prompts = Sequence[Sequence[int]]  # token ids
Padded = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, positions and segments [B,T] int32


class Samples(NamedTuple):
    """The generated tokens, one entry per prompt."""

    tokens: list[list[int]]  # including the stop token, if one was sampled
    logps: list[np.ndarray]  # log-probabilities of these tokens; see infer.sample.sample
    finished: list[bool]  # ended by a stop token or `stop`; False: cut off at max_new_tokens


@flax.struct.dataclass
class State:
    """A batch during decoding. The newest token of each row is sampled, but not yet in the cache."""

    if TYPE_CHECKING:  # flax.struct adds it

        def replace(self, **changes: object) -> "State": ...

    cache: Cache
    tokens: Array  # [B,N] sampled so far
    logps: Array  # [B,N]
    step: Array  # [] tokens sampled so far, equal for all rows
    length: Array  # [B] tokens sampled before the row was done
    position: Array  # [B] of the last token in the cache
    done: Array  # [B]
    keys: Array  # [B]


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
    cache: str = "float",
) -> Samples:
    """Continues prompts, B rows of token ids of any lengths, by at most `max_new_tokens` each; greedy at temperature 0.
    `cache`: "float", or "int8" or "fp8" for less memory.

    A row's sample depends only on the seed, its prompt, and the number of equal prompts before it, not on the rest of
    the batch. `stop(tokens)` is called every CHECK_EVERY steps and ends a row by returning True; tokens sampled in
    between are still returned.
    """
    if not prompts:
        return Samples([], [], [])
    knobs = Knobs(temperature, top_k, top_p, min_p)
    params = unrolled(model, params)
    ends = _stop_ids(stop_ids)
    state = _start(model, params, prompts, max_new_tokens, seed, knobs, ends, cache)
    rows = len(prompts)
    while int(state.step) < max_new_tokens and not bool(state.done.all()):
        until = min(max_new_tokens, int(state.step) + CHECK_EVERY) if stop else max_new_tokens
        state = _decode(model, params, state, until, knobs, ends)
        if stop:
            texts = _rows(state, rows)[0]
            state = state.replace(done=state.done.at[:rows].set([d or stop(t) for d, t in zip(state.done, texts)]))
    return Samples(*_rows(state, rows), _fetch(state.done)[:rows].tolist())


def stream(
    model: Transformer, params: Params, prompt: Sequence[int], *, max_new_tokens: int, seed: int = 0,
    stop_ids: Sequence[int] = (), cache: str = "float", **knobs: float,
) -> Iterator[int]:  # fmt: skip
    """The tokens of `generate` for one prompt, as they are sampled."""
    params, ends, how = unrolled(model, params), _stop_ids(stop_ids), Knobs(**cast(dict[str, Any], knobs))
    state = _start(model, params, [prompt], max_new_tokens, seed, how, ends, cache)
    for i in range(max_new_tokens):
        if i:
            state = _decode(model, params, state, i + 1, how, ends)
        _check_numbers(state.logps[0, i])
        yield int(state.tokens[0, i])
        if state.done[0]:
            return


def unrolled(model: Transformer, params: Params) -> Params:
    """The layers as a tuple, which decodes 1.5 times as fast on a CPU, since a scan copies each layer out of the stack.

    Values that depend only on the weights are computed once: the matrices of DoRA and OFT and, on a CPU, bfloat16
    weights as float32.
    """
    widen = model.dtype == "float32" and jax.default_backend() == "cpu"
    return params if isinstance(params["layers"], tuple) else _unroll(params, model.config, widen)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _unroll(params: Params, config: ModelConfig, widen: bool) -> Params:
    params = weights.for_inference(unstack(params, config))

    def wide(w: Array | weights.Weight) -> Array | weights.Weight:
        return w if isinstance(w, weights.Weight) or w.dtype != jnp.bfloat16 else w.astype(jnp.float32)

    return jax.tree.map(wide, params, is_leaf=weights.is_weight) if widen else params


def bucket(n: int, least: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n."""
    power = least
    while power < n:
        if power * 3 // 2 >= n and power > 1:
            return power * 3 // 2
        power *= 2
    return power


def pad(prompts: Prompts) -> Padded:
    """Prompts as tokens, positions and segments [B,T] int32, padded on the left to a rounded shape.

    Widths above PREFILL are multiples of it. Rows added to fill the batch are all padding.
    """
    longest = max(map(len, prompts))
    width = bucket(longest, 16) if longest <= PREFILL else -(-longest // PREFILL) * PREFILL
    tokens, positions, segments = np.zeros((3, bucket(len(prompts)), width), np.int32)
    for i, prompt in enumerate(prompts):
        at = width - len(prompt)
        tokens[i, at:] = prompt
        positions[i, at:] = np.arange(len(prompt))
        segments[i, at:] = 1
    return tokens, positions, segments


def row_keys(prompts: Prompts, rows: int, seed: int) -> Array:
    """One key per row [rows], from the seed, the row's prompt, and the number of equal prompts before it."""
    seen: dict[int, int] = {}
    data = np.zeros((rows, 2), np.uint32)
    for i, prompt in enumerate(prompts):
        digest = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
        data[i] = digest, seen.get(digest, 0)
        seen[digest] = data[i, 1] + 1
    fold = jax.vmap(lambda d: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), d[0]), d[1]))
    return fold(data)


def _start(
    model: Transformer, params: Params, prompts: Prompts, n: int, seed: int, knobs: Knobs, ends: Array, kind: str
) -> State:
    """Runs the prefill and samples the first token of every row."""
    check(model, params, prompts, n)
    if kind not in KINDS:
        raise UserError(f"cache={kind!r}", fix=f"one of {', '.join(KINDS)}")
    batch = pad(prompts)
    rows, room = len(batch[0]), bucket(n, 64)  # similar lengths share a compiled program
    x, cache = prefill(model, params, batch, room, kind)
    state = State(
        cache=cache,
        tokens=jnp.zeros((rows, room), jnp.int32),
        logps=jnp.zeros((rows, room), jnp.float32),
        step=jnp.int32(0),
        length=jnp.zeros(rows, jnp.int32),
        position=jnp.asarray(batch[1][:, -1]),
        done=jnp.arange(rows) >= len(prompts),
        keys=row_keys(prompts, rows, seed),
    )
    return _first(model, params, state, x, knobs, ends)


def prefill(model: Transformer, params: Params, batch: Padded, room: int, kind: str = "float") -> tuple[Array, Cache]:
    """Hidden states [B,1,D] of the last column of padded prompts, and their cache with `room` for more tokens."""
    rows, width = batch[0].shape
    cache = _cache(model, params, rows, width + room, kind)
    for start in range(0, width, PREFILL):
        tokens, positions, segments = (a[:, start : start + PREFILL] for a in batch)
        x, cache = _prefill(model, params, tokens, positions, segments, cache)
    return x, cache


def check(model: Transformer, params: Params, prompts: Prompts, n: int) -> None:
    """Raises UserError if the prompts cannot be continued by `n` tokens."""
    needs_causal(model)
    limit, vocab = model.config.context - virtual_tokens(params), model.config.vocab_size
    if n < 1:
        raise UserError(f"max_new_tokens={n}", fix="at least 1")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError("the prompt is empty: there is no token to continue", f"prompt {i}")
        if len(prompt) + n > limit:
            what = f"{len(prompt)} prompt tokens + max_new_tokens={n} exceed the model's context of {limit}"
            raise UserError(what, f"prompt {i}", "shorten the prompt or lower max_new_tokens")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise UserError(f"token id outside the vocabulary of {vocab}", f"prompt {i}", "use the model's tokenizer")


def needs_causal(model: Transformer) -> None:
    """Raises UserError for a bidirectional model, which sees the tokens it would have to predict."""
    if not model.config.causal:
        raise UserError("a bidirectional model cannot predict the next token", "model", "load a causal model")


def _stop_ids(ids: Sequence[int]) -> Array:
    """The ids as an array of a rounded length, filled with -1, which matches no token."""
    return jnp.asarray([*ids, *[-1] * (bucket(len(ids), 4) - len(ids))], jnp.int32)


def _fetch(tree: Tree) -> Tree:
    """Complete arrays on the host: in a run of several processes each holds only a part."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def _rows(state: State, rows: int) -> tuple[list[list[int]], list[np.ndarray]]:
    tokens, logps, length = _fetch((state.tokens, state.logps, state.length))
    cut = lambda a: [a[i, : length[i]] for i in range(rows)]
    for row in cut(logps):
        _check_numbers(row)
    return [row.tolist() for row in cut(tokens)], cut(logps)


def _check_numbers(logps: np.ndarray | Array) -> None:
    """Raises UserError if a log-probability is NaN: the token is then not the model's choice."""
    if np.isnan(logps).any():
        raise UserError("the logits are NaN: the weights or the activations overflow", "model", "dtype=float32")


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _cache(model: Transformer, params: Params, rows: int, length: int, kind: str) -> Cache:
    return model.cache(rows, length, params=params, kind=kind)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _prefill(
    model: Transformer, params: Params, tokens: Array, positions: Array, segments: Array, cache: Cache
) -> tuple[Array, Cache]:
    """Hidden states [B,1,D] of the last column, and the cache."""
    out = model.hidden(params, tokens, positions, segments, cache)
    return out.x[:, -1:], cast(Cache, out.cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _first(model: Transformer, params: Params, state: State, x: Array, knobs: Knobs, ends: Array) -> State:
    return _emit(state, model.logits(params, x)[:, 0], knobs, ends)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(model: Transformer, params: Params, state: State, until: int | Array, knobs: Knobs, ends: Array) -> State:
    """Decodes until `until` tokens are sampled or every row is done."""

    def step(state: State) -> State:
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        position = state.position + 1
        out = model.hidden(params, token, position[:, None], jnp.ones_like(token), state.cache)
        state = state.replace(cache=out.cache, position=position)
        return _emit(state, model.logits(params, out.x)[:, 0], knobs, ends)

    return jax.lax.while_loop(lambda s: (s.step < until) & ~s.done.all(), step, state)


def _emit(state: State, logits: Array, knobs: Knobs, ends: Array) -> State:
    """Samples a token for every row from logits [B,V]."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    token, logp = sample(logits, keys, knobs)
    write = lambda a, column: jax.lax.dynamic_update_slice(a, column[:, None], (0, state.step))
    return state.replace(
        tokens=write(state.tokens, token),
        logps=write(state.logps, logp),
        step=state.step + 1,
        length=state.length + ~state.done,
        done=state.done | jnp.isin(token, ends),
    )
