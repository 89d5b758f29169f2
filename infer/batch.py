"""Continuous batching, as in Orca (Yu et al. 2022): requests join and leave a running batch, which has a fixed number
of rows.

All rows share one key-value cache, which is a ring buffer. Each decoding step writes one column of the cache, with one
entry for every row. The prompt of a new request is prefilled separately, and its keys and values are copied into the
columns just before the one that is written next. Attention is masked by the positions and segments that are stored in
the cache, not by the column numbers, so rows of different lengths share one compiled step.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from infer.prefix import BUDGET, Prefixes, Prompt, Reader, filled, insert
from infer.sample import Knobs, sample
from infer.shapes import bucket
from model.net.kv_cache import Cache
from model.net.transformer import Transformer
from model.weights import Params, Tree

if TYPE_CHECKING:  # only for type checkers: at run time, this import would load Pallas, which doubles the import time
    from infer.serve.store import Store

STEPS = 16  # maximum decoding steps before control returns to Python, where requests can join and leave
TOP = 20  # maximum number of alternatives per token whose log-probabilities are returned
JOIN = 8  # maximum number of prompts per prefill; a low limit keeps the number of compiled programs small


class Score(NamedTuple):
    """Log-probabilities of the sampled token and of the most likely tokens, at temperature 1 and without truncation by
    top-k, top-p or min-p."""

    token: int
    logp: float
    top: list[tuple[int, float]]  # the most likely first


class Request:
    """A prompt and its answer so far. `key` [2] is the raw data of the request's JAX random key. Any token in `ends`
    ends the answer.

    `top` is the number of most likely tokens whose scores are recorded at each step. If `top` is None, `scores` stays
    empty.
    """

    def __init__(
        self, prompt: Sequence[int], max_new_tokens: int, key: np.ndarray, *, adapter: str | None = None,
        knobs: Knobs | None = None, ends: Sequence[int] = (), top: int | None = None,
    ):  # fmt: skip
        self.prompt, self.adapter, self.max_new_tokens, self.key = list(prompt), adapter, max_new_tokens, key
        self.asked = Prompt(adapter, tuple(prompt))
        self.knobs, self.ends, self.top = knobs or Knobs(), ends, top
        self.plan: list[int] = []  # lengths of the shared prefixes to compute before the prompt
        self.tokens: list[int] = []
        self.logps: list[float] = []  # log-probabilities of `tokens`; see infer.sample.sample
        self.scores: list[Score] = []  # one Score per token, if requested
        self.stopped = False  # True if the caller or an end token, which `tokens` includes, ended the answer
        self.cancelled = False  # set this to True to make the request leave the batch

    def add(self, token: int, logp: float) -> bool:
        """Adds a token. Returns whether the answer is complete."""
        self.tokens.append(token)
        self.logps.append(logp)
        self.stopped = token in self.ends
        return self.stopped or self.cancelled or len(self.tokens) == self.max_new_tokens


class Rows(NamedTuple):
    """The inputs of a decoding step, with one entry per row of the batch [B]. The inputs are NumPy arrays until jax
    traces them."""

    live: Array | np.ndarray
    token: Array | np.ndarray  # the newest token, which is not yet in the cache
    position: Array | np.ndarray  # position of the newest token
    step: Array | np.ndarray  # number of tokens sampled so far
    most: Array | np.ndarray  # maximum number of tokens to sample
    key: Array | np.ndarray  # [B,2]
    scored: Array | np.ndarray  # whether a Score is computed for the row's tokens
    ends: Array | np.ndarray  # [B,E] tokens that end an answer, padded with -1
    knobs: Knobs


class Picked(NamedTuple):
    """Sampled tokens and their scores. All scores are zeros if no row needs scores."""

    tokens: Array  # [B]
    logps: Array  # [B] see infer.sample.sample
    scores: Array  # [B] log-probabilities at temperature 1
    best: Array  # [B,TOP] the most likely tokens
    best_scores: Array  # [B,TOP]


class Batch:
    """A batch of `rows` rows. The ring buffer of its cache has `length` columns, enough for any prompt plus its answer.

    `params` are unrolled parameters (see infer.generate.unrolled). If a `store` of adapters is given, its parameters
    are used instead. `kind` is the number format of the cache: "float", "int8" or "fp8".
    """

    def __init__(
        self, model: Transformer, params: Params, rows: int, length: int, *, store: "Store | None" = None,
        prefixes: Prefixes | None = None, kind: str = "float",
    ):  # fmt: skip
        self.model, self.store, self.length = model, store, length
        self.rows: list[Request | None] = [None] * rows
        self._all, self._params = params, None  # _params has the current rows' adapters, or is None if these changed
        self.reader = Reader(model, self._serving, prefixes or Prefixes(), kind)
        self.cache: Cache | None = None

    def _serving(self, names: Sequence[str | None], rows: int) -> Params:
        return self.store.route(names, rows) if self.store else self._all

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether each request can get a free row, and whether the requests' adapters fit on the device together with
        those already in use."""
        names = [r.adapter for r in [*self.rows, *requests] if r]
        return len(names) <= len(self.rows) and (not self.store or self.store.fits(names))

    def run(self, requests: Sequence[Request], stop: Callable[[list[int]], bool] | None = None) -> None:
        """Answers all requests. `stop(tokens)` is called at least every STEPS steps, and ends an answer by returning
        True."""
        self.plan(requests)
        waiting = deque(sorted(requests, key=_order))
        while waiting or any(self.rows):
            joining: list[Request] = []
            while waiting and self.fits([*joining, waiting[0]]):
                joining.append(waiting.popleft())
            self.join(joining)
            active = [r for r in self.rows if r]
            self.step(STEPS, min(len(waiting), JOIN, len(self.rows)))
            for request in active if stop else ():
                if not request.stopped and stop(request.tokens):
                    request.stopped = True
                    self.leave(request)

    def plan(self, requests: Sequence[Request]) -> None:
        """Finds the prefixes that the prompts of requests share with each other or with recent prompts, so that each
        prefix is computed only once."""
        for request, plan in zip(requests, self.reader.plan([r.asked for r in requests]), strict=True):
            request.plan = plan

    def join(self, requests: Sequence[Request]) -> None:
        """Prefills the prompts of requests, and samples the first token of each answer. There must be a free row for
        each request."""
        free = [row for row, r in enumerate(self.rows) if r is None]
        at = {id(request): row for request, row in zip(requests, free)}
        for request in requests:
            self.rows[at[id(request)]] = request  # from now on, the request's adapter must stay on the device
        if self.store:
            self.store.hold([r and r.adapter for r in self.rows])
        self._params = None
        for prompts, rows in self._groups(requests):
            mine = [r for r in requests if r.asked in prompts]
            sources = [prompts.index(r.asked) for r in mine]
            logits, part = self._read(prompts, rows, mine)
            size = max(rows, bucket(len(mine)))  # few different sizes, because each needs its own compiled programs
            if part is not None:
                places = filled([at[id(r)] for r in mine], size)
                self.cache = insert(self.cache, part, places, filled(sources, size), len(mine))
            self._add(mine, *_first(logits, filled(sources, size), arrays([*mine, *[None] * (size - len(mine))])))

    def _read(self, prompts: list[Prompt], rows: int, requests: list[Request]) -> tuple[Array, Cache | None]:
        """Prefills prompts. Returns the logits after each prompt, and a cache that the caller must copy into the cache
        of the batch. If nothing has to be copied, because the batch had no cache and now uses the new one, returns None
        instead of the cache."""
        plans = {r.asked: r.plan for r in requests}
        starts = self.reader.starts(prompts, [plans[p] for p in prompts])
        room = self.length - self.reader.columns(prompts, starts)
        alone = self.cache is None and rows == len(self.rows) and len(prompts) == len(requests)
        if alone and room >= max(r.max_new_tokens for r in requests):
            logits, self.cache = self.reader.extend(prompts, starts, rows, room)
            return logits, None
        if self.cache is None:
            self.cache = self.reader.ring(len(self.rows), self.length)
        return self.reader.extend(prompts, starts, rows)

    def _groups(self, requests: Sequence[Request]) -> Iterator[tuple[list[Prompt], int]]:
        """Yields (distinct prompts to prefill together, number of rows in the prefill's batch)."""
        prompts = list(dict.fromkeys(r.asked for r in requests))
        most = max(1, min(JOIN, len(self.rows), BUDGET // self.length))
        for i in range(0, len(prompts), most):
            some = prompts[i : i + most]
            yield some, 1 if len(some) == 1 else most

    def step(self, steps: int = 1, wanted: int = 0) -> None:
        """Samples up to `steps` tokens for every row. Stops early when `wanted` rows are free."""
        if not any(self.rows):
            return
        if self._params is None:
            self._params = self._serving([r and r.adapter for r in self.rows], len(self.rows))
        live = len(self.rows) - self.rows.count(None)
        busy = min(live - 1, len(self.rows) - wanted) if wanted else 0
        picked, counts, self.cache = _decode(self.model, self._params, self.cache, arrays(self.rows), steps, busy)
        self._add(self.rows, picked, counts)

    def leave(self, request: Request) -> None:
        if request in self.rows:
            self.rows[self.rows.index(request)], self._params = None, None

    def _add(self, requests: Sequence[Request | None], picked: Picked, counts: Array) -> None:
        """Adds sampled tokens to their requests, with scores if requested. A request whose answer is complete leaves
        the batch."""
        scored = any(r and r.top is not None for r in requests)
        tokens, logps, *scores = fetch(picked if scored else picked[:2])
        for i, (request, count) in enumerate(zip(list(requests), fetch(counts).tolist())):
            for j in range(count if request else 0):
                if request.top is not None:
                    score, best, best_scores = (x[i, j].tolist() for x in scores)
                    pairs = list(zip(best, best_scores))[: request.top]
                    request.scores.append(Score(int(tokens[i, j]), score, pairs))
                if request.add(int(tokens[i, j]), float(logps[i, j])):
                    self.leave(request)
                    break


def _order(request: Request) -> tuple:
    """A sort key that groups prompts by their shared prefix. In each group, the longest prompt comes first."""
    prompt, plan = request.asked, request.plan or [0]
    return prompt.adapter or "", prompt.ids[: plan[-1]], -len(prompt.ids)


def fetch(tree: Tree) -> Tree:
    """Copies whole arrays to the host, even if each of several processes holds only a part of them."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def arrays(rows: Sequence[Request | None]) -> Rows:
    """Makes the inputs of a decoding step from the requests in the rows of a batch. Rows without a request are marked
    as not live."""
    n = len(rows)
    knobs = Knobs(*(np.full(n, off, np.int32 if isinstance(off, int) else np.float32) for off in Knobs()))
    most = bucket(max((len(r.ends) for r in rows if r), default=0), 4)
    out = Rows(
        np.zeros(n, bool), *np.zeros((4, n), np.int32), np.zeros((n, 2), np.uint32), np.zeros(n, bool),
        np.full((n, most), -1, np.int32), knobs,
    )  # fmt: skip
    for i, r in enumerate(rows):
        if r:
            done = len(r.tokens)
            out.live[i], out.step[i], out.most[i], out.key[i] = True, done, r.max_new_tokens, r.key
            out.token[i] = r.tokens[-1] if done else 0
            out.scored[i] = r.top is not None
            out.position[i] = len(r.prompt) + done - 1
            out.ends[i, : len(r.ends)] = r.ends
            for knob, value in zip(out.knobs, r.knobs, strict=True):
                knob[i] = value
    return out


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    model: Transformer, params: Params, cache: Cache, rows: Rows, steps: int | Array, busy: int | Array
) -> tuple[Picked, Array, Cache]:
    """Decodes up to `steps` steps. Returns the tokens [B,STEPS], the number [B] of tokens in each row that belong to
    its answer, and the cache.

    Decoding stops early when at most `busy` rows have an unfinished answer. Each step writes the keys and values of the
    newest tokens to the next column of the cache.
    """
    size = len(rows.live)
    out = jax.eval_shape(_pick, jax.ShapeDtypeStruct((size, model.config.vocab_size), jnp.float32), rows)
    empty = jax.tree.map(lambda x: jnp.zeros((size, STEPS, *x.shape[1:]), x.dtype), out)

    def step(carry: tuple) -> tuple:
        i, rows, out, counts, cache = carry
        cache = cache._replace(index=cache.index % cache.positions.shape[1])
        columns = (rows.token, rows.position, rows.live.astype(jnp.int32))  # segment 0 is masked out
        hidden = model.hidden(params, *(c[:, None] for c in columns), cache)
        picked = _pick(model.logits(params, hidden.x)[:, 0], rows)
        out = jax.tree.map(lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, i, 1), out, picked)
        ended = (picked.tokens[:, None] == rows.ends).any(1) | (rows.step + 1 >= rows.most)
        counts = counts + rows.live
        rows = rows._replace(
            live=rows.live & ~ended, token=picked.tokens, position=rows.position + 1, step=rows.step + 1
        )
        return i + 1, rows, out, counts, hidden.cache

    def goes_on(carry: tuple) -> Array:
        i, rows, *_ = carry
        return (i < steps) & (rows.live.sum() > busy)

    start = jnp.int32(0), jax.tree.map(jnp.asarray, rows), empty, jnp.zeros(size, jnp.int32), cache
    _, _, out, counts, cache = jax.lax.while_loop(goes_on, step, start)
    return out, counts, cache


@jax.jit
def _first(logits: Array, sources: Array, rows: Rows) -> tuple[Picked, Array]:
    """Samples the first token of each answer. Returns tokens and counts in the same format as `_decode`."""
    picked = _pick(logits[sources], rows)
    return jax.tree.map(lambda x: x[:, None], picked), rows.live.astype(jnp.int32)


def _pick(logits: Array, rows: Rows) -> Picked:
    """Samples a token for each row of logits [B,V]."""
    top = min(TOP, logits.shape[-1])
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.key), rows.step)
    tokens, logps = sample(logits, keys, rows.knobs)

    def scores() -> tuple[Array, Array, Array]:
        scores = jax.nn.log_softmax(logits)
        best_scores, best = jax.lax.top_k(scores, top)
        return jnp.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0], best, best_scores

    def no_scores() -> tuple[Array, Array, Array]:
        shape = len(logits), top
        return jnp.zeros(len(logits), logits.dtype), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, logits.dtype)

    return Picked(tokens, logps, *jax.lax.cond(rows.scored.any(), scores, no_scores))
