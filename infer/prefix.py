"""Prefix caching: if several prompts begin with the same tokens, the model processes these tokens only once.

This works within a batch and across batches. The prefixes of prompts form a tree. If sharing a prefix saves enough
tokens, a cache with one row is computed for it from the cache of its parent in the tree. Each prompt continues from its
longest cached prefix. A key-value cache contains the virtual tokens of prefix tuning and prompt tuning, followed by the
tokens of the prefix. The cache of a recurrent layer contains the layer's state after the prefix. Prompts that use
different adapters share no prefixes.
"""

import functools
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from infer.shapes import PREFILL, batches, bucket, width
from model.net import kv_cache
from model.net.kv_cache import Cache
from model.net.transformer import Transformer, virtual_tokens
from model.weights import Params

BYTES = 512 << 20  # maximum bytes of all caches that are kept
RECENT = 64  # number of recent prompts with which new prompts are compared
NODE = 64  # minimum tokens that a prefix must save; otherwise computing the prefix separately costs more than it saves
WORTH = 512  # minimum tokens that all prefixes of a call must save in total; sharing needs more compiled programs
BUDGET = 4096  # maximum tokens, including padding, of prompts that are processed together

Serving = Callable[[Sequence[str | None], int], Params]  # (adapter of each row, number of rows) -> parameters


class Prompt(NamedTuple):
    adapter: str | None
    ids: tuple[int, ...]


class Prefix(NamedTuple):
    """A cache with one row. Its last filled columns contain the first `length` tokens of a prompt."""

    cache: Cache
    length: int

    @property
    def columns(self) -> int:
        return self.cache.positions.shape[1]

    @property
    def bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache))


class Prefixes:
    """Keeps up to `limit` bytes of cached prefixes for one model. The least recently used prefix is dropped first. This
    class is not thread-safe."""

    def __init__(self, limit: int = BYTES):
        self.limit, self.bytes = limit, 0
        self.kept: OrderedDict[tuple[str, Prompt], Prefix] = OrderedDict()
        self.recent: deque[Prompt] = deque(maxlen=RECENT)
        self.computed = 0  # number of prompt tokens computed so far, without padding

    def longest(self, kind: str, prompt: Prompt) -> Prefix | None:
        """The longest cached prefix of a prompt, among the caches of a given kind."""
        fits = [key for key in self.kept if key[0] == kind and begins(prompt, key[1])]
        best = max(fits, key=lambda key: len(key[1].ids), default=None)
        if best is None:
            return None
        self.kept.move_to_end(best)
        return self.kept[best]

    def keep(self, kind: str, prompt: Prompt, prefix: Prefix) -> None:
        self.kept[kind, prompt] = prefix
        self.bytes += prefix.bytes

    def trim(self) -> None:
        while self.bytes > self.limit:
            self.bytes -= self.kept.popitem(last=False)[1].bytes


class Reader:
    """Computes key-value caches for prompts. `kind` is the number format of the caches: "float", "int8" or "fp8".
    `stacked` says whether the parameters of the layers are stacked."""

    def __init__(
        self, model: Transformer, serving: Serving, prefixes: Prefixes, kind: str = "float", stacked: bool = False
    ):
        self.model, self.serving, self.prefixes, self.kind, self.stacked = model, serving, prefixes, kind, stacked
        self.key = f"{kind}, stacked" if stacked else kind

    @functools.cached_property
    def virtual(self) -> int:
        return virtual_tokens(self.serving([None], 1))

    def plan(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Returns, for each prompt, the lengths of the prefixes whose caches should be computed, in ascending order. A
        prefix never includes the last token of a prompt, since the logits after the last token are needed."""
        scaling = dict(self.model.config.rope_scaling)
        if scaling.get("rope_type", scaling.get("type")) == "dynamic":
            return [[] for _ in prompts]  # the RoPE frequencies depend on the length of the whole prompt
        now = set(prompts)
        others = [p for p in self.prefixes.recent if p not in now]
        found = branches([*(Prompt(p.adapter, p.ids[:-1]) for p in prompts), *others])
        self.prefixes.recent.extend(p for p in dict.fromkeys(prompts) if len(p.ids) > 1)
        return found[: len(prompts)]

    def shares(self, prompt: Prompt) -> bool:
        """Whether a prefix of the prompt is in the cache."""
        found = self.prefixes.longest(self.key, Prompt(prompt.adapter, prompt.ids[:-1]))
        return found is not None and found.length > 0

    def starts(self, prompts: Sequence[Prompt], plans: Sequence[list[int]]) -> list[Prefix]:
        """Computes the planned prefixes that are not yet cached, then returns the longest cached prefix of each
        prompt."""
        while missing := self._missing(prompts, plans):
            for group in batches([len(p.ids) for p in missing], BUDGET):
                some = [missing[i] for i in group]
                cache = self.extend(some, [self._longest(p) for p in some], bucket(len(some)))[1]
                for i, prompt in enumerate(some):
                    self.prefixes.keep(self.key, prompt, self._row(cache, i, len(prompt.ids)))
        found = [self._longest(p, 1) for p in prompts]
        self.prefixes.trim()
        return found

    def _missing(self, prompts: Sequence[Prompt], plans: Sequence[list[int]]) -> list[Prompt]:
        """The shortest planned prefix of each prompt that is not cached yet, without duplicates."""
        found = {}
        for prompt, lengths in zip(prompts, plans, strict=True):
            parts = (Prompt(prompt.adapter, prompt.ids[:n]) for n in lengths)
            if part := next((p for p in parts if (self.key, p) not in self.prefixes.kept), None):
                found[part] = None
        return list(found)

    def _longest(self, prompt: Prompt, without: int = 0) -> Prefix:
        """The longest cached prefix of a prompt that leaves out at least the last `without` tokens of the prompt. If no
        prefix is cached, returns a cache that contains only the virtual tokens."""
        prompt = Prompt(prompt.adapter, prompt.ids[: len(prompt.ids) - without])
        if found := self.prefixes.longest(self.key, prompt):
            return found
        if not self.virtual:
            return Prefix(self.ring(1, 0), 0)
        params = self.serving([prompt.adapter], 1)
        start = Prefix(_empty(self.model, params, 1, 0, self.kind, not self.stacked), 0)
        self.prefixes.keep(self.key, Prompt(prompt.adapter, ()), start)
        return start

    def _row(self, cache: Cache, row: int, length: int) -> Prefix:
        used = length + self.virtual
        ring = self.ring(1, bucket(used, 64), used)
        return Prefix(insert(ring, cache, np.zeros(1, np.int32), np.full(1, row, np.int32), 1), length)

    def ring(self, rows: int, columns: int, index: int = 0) -> Cache:
        """An empty cache, in which column `index` is the next column to be written."""
        empty = _empty(self.model, None, rows, columns, self.kind, not self.stacked)
        return empty._replace(index=jnp.int32(index))

    def begun(self, starts: Sequence[Prefix], rows: int, room: int) -> Cache:
        """Makes a cache with the given prefixes in its first rows, and with `room` empty columns after the prefixes."""
        columns = max(start.columns for start in starts)
        cache = self.ring(rows, columns + room, columns)
        for start in {id(start): start for start in starts if start.columns}.values():
            at = [i for i, other in enumerate(starts) if other is start]
            cache = insert(cache, start.cache, filled(at, rows), np.zeros(rows, np.int32), len(at))
        return cache

    def columns(self, prompts: Sequence[Prompt], starts: Sequence[Prefix]) -> int:
        """The number of columns in the cache that `extend` returns if `room` is 0."""
        rest = max(len(p.ids) - start.length for p, start in zip(prompts, starts, strict=True))
        return max(start.columns for start in starts) + width(rest)

    def extend(
        self, prompts: Sequence[Prompt], starts: Sequence[Prefix], rows: int, room: int = 0
    ) -> tuple[Array, Cache]:
        """Runs the model on prompts, starting from their cached prefixes. Returns the logits [rows,V] after each
        prompt, and the cache, with `room` empty columns at its end. If there are more rows than prompts, the last rows
        are padding."""
        params = self.serving([p.adapter for p in prompts], rows)
        rest = [p.ids[start.length :] for p, start in zip(prompts, starts, strict=True)]
        self.prefixes.computed += sum(map(len, rest))
        tokens, positions, segments = padded(rest, [start.length for start in starts], rows)
        cache, x = self.begun(starts, rows, tokens.shape[1] + room), None
        ends = filled([len(ids) - 1 for ids in rest], rows)
        for at in range(0, tokens.shape[1], PREFILL):
            parts = (a[:, at : at + PREFILL] for a in (tokens, positions, segments))
            last, cache = _prefill(self.model, params, *parts, ends - at, cache)
            x = last if x is None else jnp.where((ends >= at)[:, None, None], last, x)
        return _logits(self.model, params, cast(Array, x)), cache


def padded(rest: Sequence[Sequence[int]], starts: Sequence[int], rows: int) -> tuple[np.ndarray, ...]:
    """Pads token ids on the right. Returns the tokens, positions and segments, each int32 [rows,T]. The positions of a
    row begin at its value in `starts`."""
    out = np.zeros((3, rows, width(max(map(len, rest)))), np.int32)
    for i, (ids, start) in enumerate(zip(rest, starts, strict=True)):
        out[0, i, : len(ids)] = ids
        out[1, i, : len(ids)] = np.arange(start, start + len(ids))
        out[2, i, : len(ids)] = 1
    return tuple(out)


def branches(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Returns, for each prompt, the lengths of the prefixes that it shares with other prompts, in ascending order. The
    lists are empty if the prefixes would save too few tokens."""
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].adapter or "", prompts[i].ids))
    common = [_common(prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]
    found: list[list[int]] = [[] for _ in prompts]
    saved, spans = 0, [(0, len(prompts), 0)]  # (start in `order`, end in `order`, length of the common prefix)
    while spans:
        start, end, depth = spans.pop()
        if end - start < 2:
            continue
        least = min(common[start : end - 1])
        if (gain := (end - start - 1) * (least - depth)) >= NODE:
            saved += gain
            for i in order[start:end]:
                found[i].append(least)
            depth = least
        cuts = [start, *(i + 1 for i in range(start, end - 1) if common[i] == least), end]
        spans += [(a, b, depth) for a, b in itertools.pairwise(cuts)]
    return found if saved >= WORTH else [[] for _ in prompts]


def begins(prompt: Prompt, prefix: Prompt) -> bool:
    return prompt.adapter == prefix.adapter and prompt.ids[: len(prefix.ids)] == prefix.ids


def _common(a: Prompt, b: Prompt) -> int:
    """The length of the longest common prefix of two prompts, in tokens."""
    if a.adapter != b.adapter:
        return 0
    size = min(len(a.ids), len(b.ids))
    if a.ids[:size] == b.ids[:size]:
        return size
    return next(i for i, (x, y) in enumerate(zip(a.ids, b.ids)) if x != y)


def filled(values: Sequence[int], size: int) -> np.ndarray:
    """Pads values with zeros to a given size."""
    return np.asarray([*values, *[0] * (size - len(values))], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4, 5))
def _empty(model: Transformer, params: Params | None, rows: int, columns: int, kind: str, unrolled: bool) -> Cache:
    """A cache that contains only the virtual tokens in `params`."""
    return model.cache(rows, columns, unrolled, params, kind)


@functools.partial(jax.jit, donate_argnums=0)
def insert(cache: Cache, part: Cache, rows: Array, sources: Array, count: int | Array) -> Cache:
    return kv_cache.insert(cache, part, rows, sources, count)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=6)
def _prefill(
    model: Transformer, params: Params, tokens: Array, positions: Array, segments: Array, ends: Array, cache: Cache
) -> tuple[Array, Cache]:
    """Runs the model on a slice of the prompts' tokens. Returns the hidden states [B,1,D] at the columns `ends` [B],
    which are clipped to the slice, and the updated cache."""
    out = model.hidden(params, tokens, positions, segments, cache)
    at = jnp.clip(ends, 0, tokens.shape[1] - 1)
    return jnp.take_along_axis(out.x, at[:, None, None], axis=1), cast(Cache, out.cache)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Transformer, params: Params, x: Array) -> Array:
    return model.logits(params, x)[:, 0]
