"""Runs the layers of a model. Parameters, caches and reports of the layers are stacked along a leading axis.

If a model has several kinds of layers, norms and MLPs are stacked over all layers, but the parameters in "attn" only
over attention layers, and those in "recurrent" only over recurrent layers. So parameters such as "layers/attn/wq" have
the same name in all models.
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
    """The type of functions that run one layer on x [B,T,D]. They return (new x, new cache, reports)."""

    def __call__(
        self, kind: str, x: Array, params: Params, cache: Tree, windowed: bool | Array, /
    ) -> tuple[Array, Tree, Reports]: ...


def join(stacks: dict[str, Params], config: ModelConfig) -> Params:
    """Merges the stacked parameters of all kinds of layers into one tree.

    Parameters that exist in every kind are merged into one stack, in layer order.
    """
    order = np.argsort(np.concatenate([config.stack(f"{LAYERS}/{kind}") for kind in stacks]))

    def whole(*each: Array) -> Array:
        return each[0] if len(each) < len(stacks) or len(stacks) == 1 else jnp.concatenate(each)[order]

    names = dict.fromkeys(part for stack in stacks.values() for part in stack)
    parts = {name: [stack[name] for stack in stacks.values() if name in stack] for name in names}
    return {name: jax.tree.map(whole, *trees) for name, trees in parts.items()}


def pick(stacked: Params, kinds: Sequence[str], i: int) -> Params:
    """Selects the parameters of layer i from the stacks. kinds[j] is the kind of layer j."""
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
    """Merges the dicts of all layers into one. For each key, stacks the values of the layers that have this key."""
    names = dict.fromkeys(name for one in each for name in one)
    values = {name: [one[name] for one in each if name in one] for name in names}
    return {name: jax.tree.map(lambda *xs: jnp.stack(xs), *trees) for name, trees in values.items()}


def unrolled(
    layer: Layer, x: Array, layers: Sequence[Params], caches: Sequence[Tree] | None, config: ModelConfig
) -> tuple[Array, tuple | None, Reports]:
    """Runs all layers without a scan. `layers` has one parameter tree per layer, so no stacks have to be sliced."""
    kept, reports = [], []
    for i, (kind, params, windowed) in enumerate(zip(config.kinds, layers, config.windowed, strict=True)):
        x, cache, report = layer(kind, x, params, caches and caches[i], windowed)
        kept.append(cache)
        reports.append(report)
    return x, tuple(kept) if caches else None, gather(reports)


def scan(layer: Layer, x: Array, layers: Params, caches: Tree, config: ModelConfig) -> tuple[Array, Tree, Reports]:
    """Runs stacked layers with `jax.lax.scan`.

    `caches` is None or one stack, or {kind: stack} for several kinds of layers. If there are several kinds of layers,
    each iteration runs one repetition of the pattern `config.blocks`. If the last repetition is incomplete, its layers
    run after the loop.
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
        """Runs layers of the given kinds, the first ones of a period. Returns (x, (new caches, reports))."""
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
    """Splits each stack into (layers for the loop [turns, layers per turn, ...], remaining layers). Each turn of the
    loop runs the pattern `period` once."""
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
