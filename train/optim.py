"""The optimizer of a config: optax, with decay on matrices only and learning rates by path."""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from common.errors import UserError
from model import weights


def schedule(cfg: Any, steps: int) -> Callable:
    """Learning rate of an optimizer step: linear warm-up to `lr`, then cosine | linear | constant | wsd."""
    warmup = int(cfg.warmup if cfg.warmup >= 1 else round(cfg.warmup * steps))
    rest, end = max(steps - warmup, 1), cfg.lr * cfg.final_lr
    match cfg.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(cfg.lr, rest, cfg.final_lr)
        case "linear":
            after = optax.linear_schedule(cfg.lr, end, rest)
        case "constant":
            after = optax.constant_schedule(cfg.lr)
        case "wsd":  # warm up, stay, decay (Hu et al. 2024, arXiv 2404.06395)
            decay = max(int(cfg.decay * steps), 1)
            after = optax.join_schedules(
                [optax.constant_schedule(cfg.lr), optax.linear_schedule(cfg.lr, end, decay)], [max(rest - decay, 0)]
            )
        case other:
            raise UserError(f"unknown schedule {other!r}", "config.optim.schedule", "cosine, linear, constant or wsd")
    # step + 1: the first update already moves
    ramp = lambda step: cfg.lr * (step + 1) / max(warmup, 1)
    return optax.join_schedules([ramp, after], [warmup]) if warmup else after


def optimizer(cfg: Any, steps: int, params: Any, specs: Any) -> optax.GradientTransformation:
    """The transformation of a config's `optim` for the trainable `params` ({role: tree}, None where frozen)."""
    lr = schedule(cfg, steps)
    decay = dict(weight_decay=cfg.weight_decay, mask=matrices(params, specs))
    match cfg.name:
        case "adamw":
            tx = optax.adamw(lr, cfg.b1, cfg.b2, cfg.eps, **decay)
        case "lion":
            tx = optax.lion(lr, cfg.b1, cfg.b2, **decay)
        case "adafactor":
            tx = optax.chain(
                optax.adafactor(lr, multiply_by_parameter_scale=False, clipping_threshold=None),
                optax.masked(_decay(lr, cfg.weight_decay), decay["mask"]),
            )
        case "muon":
            tx = optax.contrib.muon(
                lr, weight_decay=cfg.weight_decay, weight_decay_mask=decay["mask"], adam_b1=cfg.b1, adam_b2=cfg.b2,
                adam_weight_decay=0.0, consistent_rms=0.2, muon_weight_dimension_numbers=muon_axes(params, specs),
            )  # fmt: skip
        case other:
            raise UserError(f"unknown optimizer {other!r}", "config.optim.name", "adamw, adafactor, lion or muon")
    chain = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    chain.append(tx)
    if cfg.lr_scale:
        chain.append(scale_by_path(cfg.lr_scale, params))
    return optax.chain(*chain)


def _decay(lr: Callable, rate: float) -> optax.GradientTransformation:
    """Decoupled weight decay after a transformation that already holds the learning rate."""

    def update(updates: Any, count: Any, params: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, p: u - lr(count) * rate * p, updates, params), count + 1

    return optax.GradientTransformation(lambda params: jax.numpy.zeros((), jax.numpy.int32), update)


def matrices(params: Any, specs: Any) -> Any:
    """True at arrays that multiply activations, as opposed to norm scales and biases: these decay."""
    return _by_spec(params, specs, lambda x, spec, names: bool(spec and spec.eqn) and x.ndim - spec.stacked >= 2)


def muon_axes(params: Any, specs: Any) -> Any:
    """How Muon reads each array as a matrix; None (Adam) for vectors and for tables over the vocabulary."""

    def numbers(x: Any, spec: Any, names: tuple) -> Any:
        if not (spec and spec.eqn) or "vocab" in names or x.ndim - spec.stacked < 2:
            return None
        shared, contracted, _ = weights.split(spec.eqn)
        inner = {"rank"} if names[-1] != "rank" else set(names[:-1])
        inner = inner if "rank" in names else {weights.AXES[c] for c in contracted}
        axes = range(spec.stacked + len(shared), x.ndim)
        reduction = tuple(i for i in axes if names[i] in inner)
        output = tuple(i for i in axes if names[i] not in inner)
        return optax.contrib.MuonDimensionNumbers(reduction, output)

    return _by_spec(params, specs, numbers)


def _by_spec(params: Any, specs: Any, f: Callable) -> Any:
    """`f(array, spec, logical names)` at every array of {role: tree}."""

    def leaf(_: str, w: Any, spec: Any) -> Any:
        names = w.axes(spec) if weights.is_weight(w) else spec.names
        return jax.tree.map(lambda x, n: None if x is None else f(x, spec, n), w, names, is_leaf=lambda x: x is None)

    return {role: weights.replace(tree, specs[role], leaf) for role, tree in params.items()}


def scale_by_path(rules: tuple, params: Any) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by the factor of the first (regex, factor) whose regex matches its path.

    Paths are those of the model ("layers/attn/wq", "embed/table"), without the role. Raises UserError for a rule that
    matches nothing.
    """
    used = set()

    def factor(path: str, _: Any) -> float:
        for i, (pattern, value) in enumerate(rules):
            if re.fullmatch(pattern, path.split("/", 1)[1]):
                used.add(i)
                return value
        return 1.0

    factors = weights.map_named(factor, params)
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            raise UserError(f"{pattern!r} matches no trainable parameter", "config.optim.lr_scale")
    scale = lambda updates, params=None: jax.tree.map(lambda u, f: u * f, updates, factors)
    return optax.stateless(scale)
