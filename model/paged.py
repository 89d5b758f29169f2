"""Serves many LoRA adapters on one frozen base model. Each row of a batch uses one of the adapters, or none.

For each weight, one array stores the factors A of all adapters, and another stores their factors B. Both arrays are
divided into pages. The kernel in kernels/paged_lora.py multiplies by these pages.
"""

import math
import re
from collections.abc import Callable

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from common.errors import UserError
from kernels import paged_lora
from kernels.paged_lora import PAGE, Route, route  # noqa: F401 (re-exported)
from model import weights
from model.peft.lora import LoRA
from model.weights import AXES, Extra, Params, Spec, Specs, Weight

# One adapter: {name of a weight: its LoRA factors as host arrays}. The factors are (A [stack..., R, contracted
# axes...], scale * B [stack..., R, output axes...]).
Adapter = dict[str, tuple[np.ndarray, np.ndarray]]


@flax.struct.dataclass
class PagedLoRA(Weight):
    """A base weight with the LoRA factors of many adapters. `route` maps each batch row to the pages that it uses."""

    base: Array | Weight
    a: Array  # [C, contracted]: C is the total rank of all pages; the contracted axes are merged
    b: Array  # [C, outputs]
    eqn: str = flax.struct.field(pytree_node=False)  # einsum equation from the weight's declaration
    route: Route | None = None  # None if no row uses an adapter

    def einsum(self, eqn: str, x: Array) -> Array:
        y = weights.einsum(eqn, x, self.base)
        if self.route is None:
            return y
        _, contracted, produced = weights.split(eqn)
        return y + self._product(x.reshape(*x.shape[:2], -1), contracted, produced, x.dtype).reshape(y.shape)

    def take(self, ids: Array, dtype: DTypeLike) -> Array:
        y = weights.take(self.base, ids, dtype)
        return y if self.route is None else y + self._product(ids, "V", "D", dtype)

    def _product(self, x: Array, contracted: str, produced: str, dtype: DTypeLike) -> Array:
        tied_head = contracted != weights.split(self.eqn)[1]
        a, b = (self.b, self.a) if tied_head else (self.a, self.b)
        rows = weights.mesh_axes(("act_batch", "act_seq"), x.shape[:2])
        split = weights.mesh_axes((AXES[contracted[0]], AXES[produced[0]]), (a.shape[1], b.shape[1]))
        return paged_lora.product(x, a, b, self.route, rows, split, dtype)

    def dense(self, spec: Spec) -> Array:
        raise UserError("several adapters cannot be merged into one weight", "adapters", "merge one of them")

    def axes(self, spec: Spec) -> "PagedLoRA":
        stacked = spec.names[: spec.stacked]
        _, contracted, produced = weights.split(self.eqn)
        a, b = ((*stacked, "rank", AXES[letters[0]]) for letters in (contracted, produced))
        pairs = self.route and Route(*((*stacked, *(None,) * n) for n in (1, 1, 1, 0)))
        return self.replace(base=weights.axes_of(self.base, spec), a=a, b=b, route=pairs)


def factors_of(params: Params, specs: Specs, where: str) -> Adapter:
    """Returns the LoRA factors in `params` as host arrays. `where` is the adapter's path for error messages.

    Raises UserError if `params` has no LoRA factors, or adapters of another kind.
    """
    found: Adapter = {}

    def read(path: str, leaf: Array | Weight, spec: Spec | None) -> Array | Weight:
        if isinstance(leaf, Extra) or (weights.is_weight(leaf) and weights.base(leaf) is not leaf):
            if type(leaf) is not LoRA or weights.base(leaf.base) is not leaf.base or leaf.used != "both":
                what = f"a {type(leaf).__name__} on {path} cannot share a batch with other adapters"
                raise UserError(what, where, "only LoRA on whole weights can; serve this adapter by itself")
            if weights.split(spec.eqn)[0]:
                fix = "serve this adapter by itself"
                what = f"an adapter on the blocks of {path} cannot share a batch with other adapters"
                raise UserError(what, where, fix)
            found[path] = _host(leaf, spec.stacked)
            # NaN in one adapter would affect the rows of other adapters
            if not all(np.isfinite(x.astype(np.float32)).all() for x in found[path]):
                raise UserError(f"the adapter for {path} has values that are not finite", where)
        return leaf

    weights.replace(params, specs, read)
    if not found:
        raise UserError("no LoRA adapter found", where)
    return found


def _host(leaf: LoRA, stacked: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.moveaxis(np.asarray(leaf.a), -1, stacked), np.asarray(leaf.b)
    if leaf.start is not None:  # subtracting the initial value of A B doubles the rank
        a = np.concatenate([a, np.moveaxis(np.asarray(leaf.start[0]), -1, stacked)], stacked)
        b = np.concatenate([b, -np.asarray(leaf.start[1])], stacked)
    b = (b * np.float32(leaf.scale)).astype(b.dtype)
    # Store the factors in 16 bits if this is lossless, which it is for adapters that were saved in 16 bits.
    same = lambda x, dtype: x.itemsize > 2 and np.array_equal(x.astype(dtype).astype(x.dtype), x)
    with np.errstate(over="ignore"):
        dtype = next((d for d in (jnp.bfloat16, np.float16) if same(a, d) and same(b, d)), a.dtype)
    return a.astype(dtype), b.astype(dtype)


def empty(params: Params, specs: Specs, pages: dict[str, int], dtype: DTypeLike) -> Params:
    """Wraps each weight whose name is in `pages` in a PagedLoRA with room for `pages[name]` pages.

    The arrays in `params` must be stacked over layers. The dtype of pages is `dtype` or that of the weight, whichever
    is narrower.
    """

    def wrap(path: str, base: Array | Weight, spec: Spec | None) -> Array | Weight:
        if path not in pages:
            return base
        kind = min(spec.value.dtype, jnp.dtype(dtype), key=lambda d: d.itemsize)
        lead, names = (*spec.shape[: spec.stacked], pages[path] * PAGE), (*spec.names[: spec.stacked], "rank")

        def room(letters: str) -> Array:
            shape = (*lead, math.prod(spec.sizes[c] for c in letters))
            return jnp.zeros(shape, kind, device=weights.place((*names, AXES[letters[0]]), shape))

        return PagedLoRA(base, *map(room, weights.split(spec.eqn)[1:]), spec.eqn)

    return weights.replace(params, specs, wrap)


def map_paged(f: Callable[[str, PagedLoRA], PagedLoRA], params: Params) -> Params:
    """Replaces every PagedLoRA in unstacked parameters by `f(name, leaf)`; `name` is its path without layer index."""
    at = lambda path, leaf: f(re.sub(r"\blayers/\d+/", "layers/", path), leaf) if isinstance(leaf, PagedLoRA) else leaf
    return weights.map_named(at, params, is_leaf=weights.is_weight)
