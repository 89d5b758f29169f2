"""Serves many LoRA adapters on one frozen base model: each row of a batch uses one of the adapters, or none.

For each weight, the LoRA factors A and B of all adapters are stored in two arrays, which are divided into pages.
kernels/paged_lora.py multiplies by these pages.
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

# The type of one adapter, which has LoRA factors as host arrays, by the name of the weight that they adapt.
# Each value is (A [stack..., R, contracted axes...], scale * B [stack..., R, output axes...]).
Adapter = dict[str, tuple[np.ndarray, np.ndarray]]


@flax.struct.dataclass
class PagedLoRA(Weight):
    """A base weight with the LoRA factors of many adapters; `route` says which pages each batch row uses."""

    base: Array | Weight
    a: Array  # [C, contracted], where C is the total rank and the contracted axes are merged
    b: Array  # [C, outputs]
    eqn: str = flax.struct.field(pytree_node=False)  # the einsum equation with which the weight was declared
    route: Route | None = None  # None if no row has an adapter

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
    """Returns the LoRA factors in `params` as host arrays. Error messages name `where`, the adapter's path.

    Raises UserError if `params` has no LoRA factors, or has adapters of another kind.
    """
    found: Adapter = {}

    def read(path: str, leaf: Array | Weight, spec: Spec | None) -> Array | Weight:
        if isinstance(leaf, Extra) or (weights.is_weight(leaf) and weights.base(leaf) is not leaf):
            if type(leaf) is not LoRA or weights.base(leaf.base) is not leaf.base or leaf.used != "both":
                what = f"{type(leaf).__name__} on {path} cannot share a batch with other adapters"
                raise UserError(what, where, "only LoRA on a whole weight can: serve this adapter by itself")
            if weights.split(spec.eqn)[0]:
                fix = "serve this adapter by itself"
                raise UserError(f"adapters on the blocks of {path} cannot share a batch", where, fix)
            found[path] = _host(leaf, spec.stacked)
            if not all(np.isfinite(x.astype(np.float32)).all() for x in found[path]):  # NaN would spread to other rows
                raise UserError(f"the adapter of {path} has values that are not finite", where)
        return leaf

    weights.replace(params, specs, read)
    if not found:
        raise UserError("no LoRA adapter found", where)
    return found


def _host(leaf: LoRA, stacked: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.moveaxis(np.asarray(leaf.a), -1, stacked), np.asarray(leaf.b)
    if leaf.start is not None:  # A B minus its initial value needs factors of twice the rank
        a = np.concatenate([a, np.moveaxis(np.asarray(leaf.start[0]), -1, stacked)], stacked)
        b = np.concatenate([b, -np.asarray(leaf.start[1])], stacked)
    b = (b * np.float32(leaf.scale)).astype(b.dtype)
    # The factors are stored in 16 bits if that is exact, as it is for an adapter that was saved in 16 bits.
    same = lambda x, dtype: x.itemsize > 2 and np.array_equal(x.astype(dtype).astype(x.dtype), x)
    with np.errstate(over="ignore"):
        dtype = next((d for d in (jnp.bfloat16, np.float16) if same(a, d) and same(b, d)), a.dtype)
    return a.astype(dtype), b.astype(dtype)


def empty(params: Params, specs: Specs, pages: dict[str, int], dtype: DTypeLike) -> Params:
    """Wraps each weight whose name is in `pages` in a PagedLoRA with room for `pages[name]` pages.

    `params` are stacked over layers. Pages have either `dtype` or the dtype of the weight, whichever is narrower.
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
    """Replaces every PagedLoRA of unstacked parameters by `f(name, leaf)`, where `name` omits the layer's number."""
    at = lambda path, leaf: f(re.sub(r"\blayers/\d+/", "layers/", path), leaf) if isinstance(leaf, PagedLoRA) else leaf
    return weights.map_named(at, params, is_leaf=weights.is_weight)
