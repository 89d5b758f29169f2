"""Continuous batching (Orca: Yu et al. 2022): requests join and leave a running batch of fixed rows.

All rows share one key-value cache, which is a ring buffer: each step writes one column for every row. A joining prompt
is prefilled separately and copied into the columns before that one. Attention is masked by the positions and segments
stored in the cache, not by column, so rows at different lengths share one compiled step.
"""

import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import UserError
from infer.generate import check, pad, prefill, row_keys
from infer.lm import LM
from infer.sample import Knobs, sample
from model.net.kinds import without_columns
from model.net.kv_cache import Cache
from model.net.transformer import Transformer, virtual_tokens
from model.weights import Params

TOP = 20  # maximum alternatives per token with log-probabilities


class Full(Exception):
    """The queue of waiting requests is full."""


class Score(NamedTuple):
    """Log-probabilities of the sampled token and of the most likely ones, at temperature 1 before any truncation."""

    token: int
    logp: float
    top: list[tuple[int, float]]  # the most likely first


Item = int | BaseException | None  # a token; None after the last one; an error that ended the answer early


class Request:
    """A prompt and its answer. Iteration waits for the tokens, and raises the error if one ended the answer early.

    If `put` is given, it receives each item instead, in the batcher's thread. `top` alternatives of each token are
    scored; None: no scores.
    """

    def __init__(
        self, prompt: list[int], adapter: str | None, max_new_tokens: int, knobs: Knobs, seed: int,
        top: int | None = None, put: Callable[[Item], None] | None = None,
    ):  # fmt: skip
        self.prompt, self.adapter, self.max_new_tokens, self.knobs = prompt, adapter, max_new_tokens, knobs
        self.key = np.asarray(jax.random.key_data(row_keys([prompt], 1, seed)[0]))
        self.tokens: list[int] = []
        self.top = top
        self.scores: list[Score] = []  # one per token, if requested
        self.stopped = False  # by an end token, the last of `tokens`
        self.cancelled = False  # set to True to leave the batch
        self._out: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._put = put or self._out.put

    def __iter__(self) -> Iterator[int]:
        while (item := self._out.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def add(self, token: int, ends: tuple[int, ...]) -> bool:
        """Adds a token. Returns whether the answer is complete."""
        self.tokens.append(token)
        self.stopped = token in ends
        self._put(token)
        return self.stopped or self.cancelled or len(self.tokens) == self.max_new_tokens

    def end(self, error: BaseException | None = None) -> None:
        self._put(error)


class Rows(NamedTuple):
    """The inputs of a step for each row of the batch [B]; NumPy arrays until they are traced."""

    live: Array | np.ndarray
    token: Array | np.ndarray  # the newest, not yet in the cache
    position: Array | np.ndarray  # of that token
    step: Array | np.ndarray  # number of tokens sampled so far
    key: Array | np.ndarray  # [B,2]
    scored: Array | np.ndarray  # whether its tokens get a Score
    knobs: Knobs


class Picked(NamedTuple):
    """The outputs of a step; the scores are zeros if no row needs them."""

    tokens: Array  # [B]
    logps: Array  # [B]
    best: Array  # [B,TOP] the most likely tokens
    best_logps: Array  # [B,TOP]


class Batcher:
    """A batch of `rows` rows with room for `length` tokens each, prompt plus answer. Up to `waiting` requests may wait.

    `submit` may be called from any thread; `step`, or `run` in its own thread, does the work.
    """

    def __init__(self, lm: LM, rows: int = 8, length: int = 1024, waiting: int = 64):
        if virtual_tokens(lm.params):
            raise UserError("models with prefix or prompt tuning cannot share a batch", "model", "use tools.chat")
        if others := without_columns(lm.config.blocks):
            raise UserError(f"{others[0]} layers cannot be served in a shared batch", "model", "use tools.chat")
        self.lm, self.length, self.limit = lm, min(length, lm.config.context), waiting
        adapters = lm.store.adapters if lm.store else ()
        # Raises UserError for a model without a tokenizer.
        self.ends = {name: lm.speaking(name).tokenizer.eos_ids for name in (None, *adapters)}
        self.rows: list[Request | None] = [None] * rows
        self.waiting: deque[Request] = deque()
        self.changed = threading.Condition()
        self.closed = False
        # Jitted, so that no two of its arrays share a buffer.
        self.cache = jax.jit(lm.model.cache, static_argnums=(0, 1))(rows, self.length)
        self.params: Params = None  # for the current rows; None if these have changed

    def submit(
        self, prompt: list[int], *, max_new_tokens: int, adapter: str | None = None, knobs: Knobs | None = None,
        seed: int = 0, top: int | None = None, put: Callable[[Item], None] | None = None,
    ) -> Request:  # fmt: skip
        """Queues a request. Raises UserError if it cannot be answered, Full if too many are waiting."""
        check(self.lm.model, self.lm.params, [prompt], max_new_tokens)
        if len(prompt) + max_new_tokens > self.length:
            what = f"{len(prompt)} prompt tokens + {max_new_tokens} new tokens exceed the {self.length} of a row"
            raise UserError(what, "prompt", "shorten the prompt or ask for fewer tokens")
        if adapter is not None and adapter not in self.names:
            raise UserError(f"no adapter {adapter!r}", "adapter", f"known: {', '.join(self.names) or 'none'}")
        request = Request(prompt, adapter, max_new_tokens, knobs or Knobs(), seed, top, put)
        with self.changed:
            if self.closed or len(self.waiting) >= self.limit:
                raise Full("the server is closing" if self.closed else f"{self.limit} requests are waiting already")
            self.waiting.append(request)
            self.changed.notify()
        return request

    @property
    def names(self) -> list[str]:
        """The names of the adapters."""
        return list(self.lm.store.adapters) if self.lm.store else []

    def run(self) -> None:
        """Runs steps while there are requests, until `close`. An error ends every request."""
        error: BaseException | None = None
        try:
            while not self.closed:
                with self.changed:
                    self.changed.wait_for(lambda: self.closed or self.waiting or any(self.rows))
                self.step()
        except BaseException as e:
            error = e
            raise
        finally:
            self.close()
            for request in [r for r in self.rows if r] + list(self.waiting):
                request.end(error or Full("the server is closing"))

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()

    def step(self) -> None:
        """Admits waiting requests, then samples a token for every row."""
        while (request := self._next()) is not None:
            self._join(request, self.rows.index(None))
        if not any(self.rows):
            return
        if self.params is None:
            self.params = self._serving([r and r.adapter for r in self.rows])
        picked, self.cache = _step(self.lm.model, self.params, self.cache, arrays(self.rows))
        self._add(range(len(self.rows)), picked)

    def _next(self) -> Request | None:
        """The next request, if there is a free row and its adapter fits next to those in use."""
        with self.changed:
            for request in [r for r in self.waiting if r.cancelled]:
                self.waiting.remove(request)
                request.end()
            if not self.waiting or None not in self.rows:
                return None
            names = [r.adapter for r in [*self.rows, self.waiting[0]] if r]
            if self.lm.store and not self.lm.store.fits(names):
                return None
            return self.waiting.popleft()

    def _join(self, request: Request, row: int) -> None:
        self.rows[row] = request  # from now on its adapter stays on the device
        if self.lm.store:
            self.lm.store.hold([r and r.adapter for r in self.rows])
        params = self._serving([request.adapter])
        x, cache = prefill(self.lm.model, params, pad([request.prompt]), 0)
        self.cache = _insert(self.cache, cache, row)
        self._add([row], _first(self.lm.model, params, x, arrays([request])))
        self.params = None

    def _serving(self, names: list[str | None]) -> Params:
        return self.lm.store.route(names, len(names)) if self.lm.store else self.lm.unrolled

    def _add(self, rows: Sequence[int], picked: Picked) -> None:
        """Passes the tokens of a step, and scores if requested, to the requests in these rows."""
        requests = [self.rows[row] for row in rows]
        tokens = np.asarray(picked.tokens).tolist()
        if any(r and r.top is not None for r in requests):
            logps, best, best_logps = (np.asarray(x).tolist() for x in picked[1:])
        for i, (row, request) in enumerate(zip(rows, requests)):
            if not request:
                continue
            if request.top is not None:
                pairs = list(zip(best[i], best_logps[i]))[: request.top]
                request.scores.append(Score(tokens[i], logps[i], pairs))
            if request.add(tokens[i], self.ends[request.adapter]):
                request.end()
                self.rows[row], self.params = None, None


def arrays(rows: list[Request | None]) -> Rows:
    """The inputs of a step; a row without a request is not live."""
    n = len(rows)
    knobs = Knobs(*(np.full(n, off, np.int32 if isinstance(off, int) else np.float32) for off in Knobs()))
    out = Rows(np.zeros(n, bool), *np.zeros((3, n), np.int32), np.zeros((n, 2), np.uint32), np.zeros(n, bool), knobs)
    for i, r in enumerate(rows):
        if r:
            done = len(r.tokens)
            out.live[i], out.step[i], out.key[i] = True, done, r.key
            out.token[i] = r.tokens[-1] if done else 0
            out.scored[i] = r.top is not None
            out.position[i] = len(r.prompt) + done - 1
            for knob, value in zip(out.knobs, r.knobs, strict=True):
                knob[i] = value
    return out


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(model: Transformer, params: Params, cache: Cache, rows: Rows) -> tuple[Picked, Cache]:
    """Samples the next token of every row, and writes the newest ones to the next column of the cache."""
    cache = cache._replace(index=cache.index % cache.positions.shape[1])
    columns = (rows.token, rows.position, rows.live.astype(jnp.int32))  # segment 0 is masked
    out = model.hidden(params, *(c[:, None] for c in columns), cache)
    return _pick(model.logits(params, out.x)[:, 0], rows), out.cache


@functools.partial(jax.jit, static_argnums=0)
def _first(model: Transformer, params: Params, x: Array, rows: Rows) -> Picked:
    return _pick(model.logits(params, x)[:, 0], rows)


def _pick(logits: Array, rows: Rows) -> Picked:
    """Samples tokens from logits [B,V]: the same as `generate` with equal key and knobs."""
    top = min(TOP, logits.shape[-1])

    def one(logits: Array, key: Array, step: Array, knobs: Knobs) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        return sample(logits[None], key[None], knobs)[0][0]

    def best() -> Array:
        return jnp.argmax(logits, -1).astype(jnp.int32)

    def draw() -> Array:
        return jax.vmap(one)(logits, rows.key, rows.step, rows.knobs)

    def scores() -> tuple[Array, Array, Array]:
        logps = jax.nn.log_softmax(logits)
        best_logps, best = jax.lax.top_k(logps, top)
        return jnp.take_along_axis(logps, tokens[:, None], axis=-1)[:, 0], best, best_logps

    def no_scores() -> tuple[Array, Array, Array]:
        shape = len(logits), top
        return jnp.zeros(len(logits), logits.dtype), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, logits.dtype)

    tokens = jax.lax.cond((rows.knobs.temperature == 0).all(), best, draw)
    return Picked(tokens, *jax.lax.cond(rows.scored.any(), scores, no_scores))


@functools.partial(jax.jit, donate_argnums=0)
def _insert(cache: Cache, one: Cache, row: int | Array) -> Cache:
    """Copies a one-row cache into a row of `cache`, ending before the next column; clears the rest of the row."""
    length, index = cache.positions.shape[1], cache.index

    def insert(whole: Array, part: Array) -> Array:
        part = part[:, -length:]  # drops only padding
        width = part.shape[1]
        part = jnp.pad(part, ((0, 0), (0, length - width), *((0, 0),) * (part.ndim - 2)))
        part = jnp.roll(part, index - width, axis=1)
        return jax.lax.dynamic_update_slice(whole, part, (row * len(part), *(0,) * (part.ndim - 1)))

    layers = jax.tree.map(insert, cache.layers, one.layers)
    return Cache(index, layers, insert(cache.positions, one.positions), insert(cache.segments, one.segments))
