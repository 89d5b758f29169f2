"""Runs the layers of a model. Parameters, caches and reports of the layers are stacked along a leading axis.

In a model with several kinds of layers, norms and MLPs are stacked over all layers, the parameters in "attn" over the
attention layers, and the parameters in "recurrent" over the recurrent layers. So the parameter "layers/attn/wq" has the
same name in every model.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.config import LAYERS, ModelConfig
from model.weights import Params, Tree

T = TypeVar("T")
Reports = dict[str, Array]  # name -> value


class Layer(Protocol):
    """The type of a function that runs one layer on x [B,T,D], and returns the new x, the new cache and the reports."""

    def __call__(
        self, kind: str, x: Array, params: Params, cache: Tree, windowed: bool | Array, /
    ) -> tuple[Array, Tree, Reports]: ...


def join(stacks: dict[str, Params], config: ModelConfig) -> Params:
    """Merges the stacked parameters of each kind of layer into one tree.

    Parameters that all kinds have are merged into one stack, in the order of the layers.
    """
    order = np.argsort(np.concatenate([config.stack(f"{LAYERS}/{kind}") for kind in stacks]))

    def whole(*each: Array) -> Array:
        return each[0] if len(each) < len(stacks) or len(stacks) == 1 else jnp.concatenate(each)[order]

    names = dict.fromkeys(part for stack in stacks.values() for part in stack)
    parts = {name: [stack[name] for stack in stacks.values() if name in stack] for name in names}
    return {name: jax.tree.map(whole, *trees) for name, trees in parts.items()}


def pick(stacked: Params, kinds: Sequence[str], i: int) -> Params:
    """Returns the parameters of layer i from the stacks, where kinds[j] is the kind of layer j."""
    out = {}
    for part, tree in stacked.items():
        if part not in kinds:
            out[part] = _at(tree, i)
        elif part == kinds[i]:
            out[part] = _at(tree, kinds[:i].count(part))
    return out


def _at(tree: T, i: int) -> T:
    return jax.tree.map(operator.itemgetter(i), tree)


def gather(each: Sequence[dict[str, Tree]]) -> dict[str, Tree]:
    """Converts a list with one dict per layer to one dict, which stacks each value over the layers that have it."""
    names = dict.fromkeys(name for one in each for name in one)
    values = {name: [one[name] for one in each if name in one] for name in names}
    return {name: jax.tree.map(lambda *xs: jnp.stack(xs), *trees) for name, trees in values.items()}


def unrolled(
    layer: Layer, x: Array, layers: Sequence[Params], caches: Sequence[Tree] | None, config: ModelConfig
) -> tuple[Array, tuple | None, Reports]:
    """Runs all layers without a scan. `layers` has one tree of parameters per layer, so no stack must be sliced."""
    kept, reports = [], []
    for i, (kind, params, windowed) in enumerate(zip(config.kinds, layers, config.windowed, strict=True)):
        x, cache, report = layer(kind, x, params, caches and caches[i], windowed)
        kept.append(cache)
        reports.append(report)
    return x, tuple(kept) if caches else None, gather(reports)


def scan(layer: Layer, x: Array, layers: Params, caches: Tree, config: ModelConfig) -> tuple[Array, Tree, Reports]:
    """Runs stacked layers in a `scan`. `caches` is one stack, or {kind: stack} for several kinds of layers, or None.

    With several kinds of layers, each iteration runs one period of the repeating pattern `config.blocks`. If the last
    period is incomplete, its layers run after the loop.
    """
    windowed = jnp.asarray(config.windowed)
    if len(set(config.kinds)) == 1:

        def one(x: Array, layer_i: tuple) -> tuple[Array, tuple]:
            x, cache, report = layer(config.kinds[0], x, *layer_i)
            return x, (cache, report)

        x, (caches, reports) = jax.lax.scan(one, x, (layers, caches, windowed))
        return x, caches, reports

    period, turns = config.blocks, config.layers // len(config.blocks)
    stacks = (layers, caches or {}, {"windowed": windowed})

    def some(x: Array, stacks: tuple, kinds: Sequence[str]) -> tuple[Array, tuple[dict, Reports]]:
        """Runs the first layers of a period, which have these `kinds`. Returns (x, (new caches, reports))."""
        layers, caches, flags = stacks
        kept, reports = [], []
        for i, kind in enumerate(kinds):
            before = pick(caches, period, i).get(kind)
            x, cache, report = layer(kind, x, pick(layers, period, i), before, flags["windowed"][i])
            kept.append({} if before is None else {kind: cache})
            reports.append(report)
        return x, (gather(kept), gather(reports))

    whole, rest = zip(*(_split(tree, period, turns) for tree in stacks))
    x, looped = jax.lax.scan(lambda x, turn: some(x, turn, period), x, whole)
    x, last = some(x, rest, period[: config.layers % len(period)])
    caches, reports = (_joined(a, b) for a, b in zip(looped, last))
    return x, caches or None, reports


def _split(stacked: dict[str, Tree], period: Sequence[str], turns: int) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """Splits each stack into the layers that the loop runs, [turns, layers per turn, ...], and the remaining layers."""
    looped, rest = {}, {}
    for part, tree in stacked.items():
        n = period.count(part) if part in period else len(period)
        looped[part] = jax.tree.map(functools.partial(_turned, turns, n), tree)
        rest[part] = jax.tree.map(operator.itemgetter(slice(turns * n, None)), tree)
    return looped, rest


def _turned(turns: int, n: int, a: Array) -> Array:
    return a[: turns * n].reshape(turns, n, *a.shape[1:])


def _joined(looped: dict[str, Tree], rest: dict[str, Tree]) -> dict[str, Tree]:
    """The inverse of `_split`."""
    out = {}
    for name, tree in looped.items():
        out[name] = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)
        if name in rest:
            out[name] = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out[name], rest[name])
    return out
