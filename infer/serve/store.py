"""Keeps all adapters in host memory, and caches some of them on the device. The least recently used adapter is evicted
first.

For each weight, the device has space for LoRA factors up to a maximum total rank. This space is divided into pages. An
adapter of rank r occupies enough pages to hold the r rows of each of its LoRA factors. One compiled program serves all
adapters, since each row of a batch refers to the pages of its adapter by number. Loading an adapter therefore only
writes to pages of existing arrays.
"""

import functools
import math
from collections import OrderedDict
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from common.errors import UserError
from infer.generate import unrolled
from model import paged
from model.config import in_layers
from model.net.transformer import Transformer
from model.paged import PAGE, Adapter, PagedLoRA, Route
from model.weights import Params

RANK_ROWS = 4096  # maximum total rank per weight of all adapters on the device; enough for 64 adapters of rank 64


class Store:
    """The adapters of one base model, by name. This class is not thread-safe."""

    def __init__(self, model: Transformer, base: Params, adapters: dict[str, Adapter], rank_rows: int = RANK_ROWS):
        """`base` has stacked layers and no adapters. `rank_rows` is the maximum total rank per weight of the adapters
        on the device; it is rounded down to whole pages. Raises UserError if the rank of an adapter exceeds this
        maximum."""
        self.adapters = adapters
        count = lambda a, path: -(-a.shape[_axis(path)] // PAGE)
        self.pages = {n: {path: count(a, path) for path, (a, _) in x.items()} for n, x in adapters.items()}
        paths = sorted({path for x in adapters.values() for path in x})
        each = {path: [p.get(path, 0) for p in self.pages.values()] for path in paths}
        self.room = {path: min(sum(pages), rank_rows // PAGE) for path, pages in each.items()}
        for name, pages in self.pages.items():
            if (n := max(pages.values())) > rank_rows // PAGE:
                raise UserError(
                    f"the adapter needs space for rank {n * PAGE}; the device has space for rank {rank_rows}", name
                )
        self.most = {path: max(pages) for path, pages in each.items()}  # maximum pages per row of a batch
        self.free = {path: list(range(n))[::-1] for path, n in self.room.items()}
        # The pages of each adapter on the device, least recently used adapter first.
        self.held: OrderedDict[str, dict[str, list[int]]] = OrderedDict()
        self.stacks: dict[str, list[tuple[Array, Array]]] = {path: [] for path in paths}  # one (a, b) per layer
        take = lambda path, leaf: (self.stacks[path].append((leaf.a, leaf.b)), leaf.replace(a=None, b=None))[1]
        dtypes = {x.dtype for factors in adapters.values() for pair in factors.values() for x in pair}
        room = paged.empty(base, model.specs, self.room, jnp.result_type(*dtypes or {jnp.float32}))
        self.params = paged.map_paged(take, unrolled(model, room))

    def fits(self, names: Sequence[str | None]) -> bool:
        """Whether all of the given adapters fit on the device together."""
        chosen = [self.pages[n] for n in set(names) if n]
        return all(sum(p.get(path, 0) for p in chosen) <= room for path, room in self.room.items())

    def serving(self, names: Sequence[str | None], rows: int) -> Params:
        """Loads adapters with `hold`, then returns the result of `route`."""
        self.hold(names)
        return self.route(names, rows)

    def hold(self, names: Sequence[str | None]) -> None:
        """Loads adapters onto the device. Raises UserError for an unknown name, or if the adapters do not fit on the
        device."""
        wanted = dict.fromkeys(n for n in names if n is not None)
        for name in wanted:
            if name not in self.adapters:
                raise UserError(f"no adapter {name!r}", fix=f"known: {', '.join(self.adapters)}")
        if not self.fits(names):
            raise UserError(
                "the total rank of the adapters in one batch exceeds the space on the device",
                fix="use fewer adapters at a time",
            )
        for name in wanted:
            self._hold(name, wanted)

    def route(self, names: Sequence[str | None], rows: int) -> Params:
        """Returns the unrolled parameters for a batch of `rows` rows. The first rows use the adapters in `names`, where
        None means the base model.

        The returned parameters are valid until `hold` loads another adapter.
        """
        routes = {path: self._route(path, names, rows) for path in self.room}
        turns = {path: iter(stacks) for path, stacks in self.stacks.items()}

        def place(path: str, leaf: PagedLoRA) -> PagedLoRA:
            a, b = next(turns[path])
            return leaf.replace(a=a, b=b, route=routes[path])

        return paged.map_paged(place, self.params)

    def _hold(self, name: str, wanted: Collection[str]) -> None:
        """Loads an adapter onto the device, and evicts other adapters if necessary."""
        if name in self.held:
            self.held.move_to_end(name)
            return
        pages = self.pages[name]
        while any(len(self.free[path]) < n for path, n in pages.items()):
            oldest = next(n for n in self.held if n not in wanted)
            for path, at in self.held.pop(oldest).items():
                self.free[path] += at
        self.held[name] = {path: [self.free[path].pop() for _ in range(n)] for path, n in pages.items()}
        for path, at in self.held[name].items():
            for i, page in enumerate(at):
                self._write(path, page, self.adapters[name][path], i * PAGE)

    def _write(self, path: str, page: int, factors: tuple[np.ndarray, np.ndarray], start: int) -> None:
        """Writes one page of an adapter's LoRA factors, in every layer. If the factors do not fill the page, it is
        padded with zeros."""
        parts = []
        for x in factors:
            x = x if _axis(path) else x[None]
            rows = x[:, start : start + PAGE].reshape(len(x), -1, math.prod(x.shape[2:]))
            parts.append(np.pad(rows, ((0, 0), (0, PAGE - rows.shape[1]), (0, 0))))
        self.stacks[path] = _put(self.stacks[path], page * PAGE, *parts)

    def _route(self, path: str, names: Sequence[str | None], rows: int) -> Route:
        pairs = [(page, i) for i, name in enumerate(names) if name for page in self.held[name].get(path, ())]
        return Route(*map(jnp.asarray, paged.route(pairs, rows * self.most[path])))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacks: list[tuple[Array, Array]], start: ArrayLike, a: Array, b: Array) -> list[tuple[Array, Array]]:
    """Writes the pages a and b [L,PAGE,...] to the arrays of every layer, beginning at row `start`."""
    put = lambda stack, new: jax.lax.dynamic_update_slice(stack, new.astype(stack.dtype), (start, 0))
    return [(put(s[0], a[i]), put(s[1], b[i])) for i, s in enumerate(stacks)]


def _axis(path: str) -> int:
    """The index of the rank axis in a LoRA factor: 1 if the factor has a layer axis, else 0."""
    return int(in_layers(path))
