"""Adapters on the host, of which a bounded number of rank rows lies on the device; the least recently used leave first.

One compiled program serves all of them: a row of a batch finds its pages of rank rows by number, so that to swap an
adapter in is to write pages of arrays that stay where they are.
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

RANK_ROWS = 4096  # of a weight on the device: 64 adapters of rank 64


class Store:
    """Adapters by name, on one base. Not for several threads at once."""

    def __init__(self, model: Transformer, base: Params, adapters: dict[str, Adapter], rank_rows: int = RANK_ROWS):
        """`base` is stacked and without adapters. `rank_rows` bounds what lies on the device for each weight, in whole
        pages.

        Raises UserError when an adapter is larger than that.
        """
        self.adapters = adapters
        count = lambda a, path: -(-a.shape[_axis(path)] // PAGE)
        self.pages = {n: {path: count(a, path) for path, (a, _) in x.items()} for n, x in adapters.items()}
        paths = sorted({path for x in adapters.values() for path in x})
        each = {path: [p.get(path, 0) for p in self.pages.values()] for path in paths}
        self.room = {path: min(sum(pages), rank_rows // PAGE) for path, pages in each.items()}
        for name, pages in self.pages.items():
            if (n := max(pages.values())) > rank_rows // PAGE:
                raise UserError(f"{n} pages of {PAGE} rank rows exceed the {rank_rows} rows on the device", name)
        self.most = {path: max(pages) for path, pages in each.items()}  # of a row of the batch
        self.free = {path: list(range(n))[::-1] for path, n in self.room.items()}
        self.held: OrderedDict[str, dict[str, list[int]]] = OrderedDict()  # pages; the least recently used first
        self.stacks: dict[str, list[tuple[Array, Array]]] = {path: [] for path in paths}  # of each layer in turn
        take = lambda path, leaf: (self.stacks[path].append((leaf.a, leaf.b)), leaf.replace(a=None, b=None))[1]
        dtypes = {x.dtype for factors in adapters.values() for pair in factors.values() for x in pair}
        room = paged.empty(base, model.specs, self.room, jnp.result_type(*dtypes or {jnp.float32}))
        self.params = paged.map_paged(take, unrolled(model, room))

    def fits(self, names: Sequence[str | None]) -> bool:
        """Whether these adapters can lie on the device together."""
        chosen = [self.pages[n] for n in set(names) if n]
        return all(sum(p.get(path, 0) for p in chosen) <= room for path, room in self.room.items())

    def serving(self, names: Sequence[str | None], rows: int) -> Params:
        """`route` for adapters that are put on the device first; see `hold` for what it raises."""
        self.hold(names)
        return self.route(names, rows)

    def hold(self, names: Sequence[str | None]) -> None:
        """Puts adapters on the device. Raises UserError for an unknown name, and for more than there is room for."""
        wanted = dict.fromkeys(n for n in names if n is not None)
        for name in wanted:
            if name not in self.adapters:
                raise UserError(f"no adapter {name!r}", fix=f"known: {', '.join(self.adapters)}")
        if not self.fits(names):
            raise UserError("more adapters in one batch than the device has rank rows for", fix="ask for fewer at once")
        for name in wanted:
            self._hold(name, wanted)

    def route(self, names: Sequence[str | None], rows: int) -> Params:
        """The unrolled parameters for a batch of `rows` rows, the first of which use these adapters; None is the base.

        They are of use until `hold` puts another adapter on the device.
        """
        routes = {path: self._route(path, names, rows) for path in self.room}
        turns = {path: iter(stacks) for path, stacks in self.stacks.items()}

        def place(path: str, leaf: PagedLoRA) -> PagedLoRA:
            a, b = next(turns[path])
            return leaf.replace(a=a, b=b, route=routes[path])

        return paged.map_paged(place, self.params)

    def _hold(self, name: str, wanted: Collection[str]) -> None:
        """Puts an adapter on the device, in the place of others if need be."""
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
        """A page of every layer, as one shape: behind an adapter's last rank row it is zero."""
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
    """Pages a and b [L,PAGE,...] at a row of the stacks of every layer."""
    put = lambda stack, new: jax.lax.dynamic_update_slice(stack, new.astype(stack.dtype), (start, 0))
    return [(put(s[0], a[i]), put(s[1], b[i])) for i, s in enumerate(stacks)]


def _axis(path: str) -> int:
    """Where rank lies in a factor: behind the layers, if there are any."""
    return int(in_layers(path))
