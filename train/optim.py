"""Builds the optax optimizer of a config, with weight decay only on matrices, and learning rates that can be scaled by
parameter path."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from common.errors import UserError
from common.types import Config
from configs import schema
from model import weights
from model.io import saved
from model.weights import Spec, Specs, Tree, Weight
from train.state import Roles


def schedule(cfg: Config, steps: int) -> Callable:
    """Returns a function from step to learning rate: linear warm-up to `lr`, then a cosine, linear, constant or
    warmup-stable-decay (wsd) schedule."""
    warmup = int(cfg.warmup if cfg.warmup >= 1 else round(cfg.warmup * steps))
    rest, end = max(steps - warmup, 1), cfg.lr * cfg.final_lr
    match cfg.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(cfg.lr, rest, cfg.final_lr)
        case "linear":
            after = optax.linear_schedule(cfg.lr, end, rest)
        case "constant":
            after = optax.constant_schedule(cfg.lr)
        case "wsd":  # warmup, stable, decay (Hu et al. 2024, arXiv 2404.06395)
            decay = max(int(cfg.decay * steps), 1)
            after = optax.join_schedules(
                [optax.constant_schedule(cfg.lr), optax.linear_schedule(cfg.lr, end, decay)], [max(rest - decay, 0)]
            )
        case other:
            raise schema.unknown("optim.schedule", other)
    # `step + 1` instead of `step`, so that the learning rate of the first update is not 0
    ramp = lambda step: cfg.lr * (step + 1) / max(warmup, 1)
    return optax.join_schedules([ramp, after], [warmup]) if warmup else after


def optimizer(cfg: Config, steps: int, params: Roles, specs: Specs) -> optax.GradientTransformation:
    """Builds the optax transformation that a config's `optim` describes. `params` is {role: tree of trainable
    parameters, with None in place of frozen parameters}."""
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
            raise schema.unknown("optim.name", other)
    chain = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    chain.append(tx)
    if cfg.lr_scale:
        chain.append(scale_by_path(cfg.lr_scale, params))
    tx = optax.chain(*chain)
    return randomly_rounded(tx) if any(map(_is_narrow, jax.tree.leaves(params))) else tx


def randomly_rounded(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps `tx` for 16-bit parameters: updates are computed in float32 and stored with stochastic rounding.

    With rounding to nearest, every update below 1/512 of a bfloat16 weight would be lost. With stochastic rounding, the
    stored values are exact on average (Gupta et al. 2015, arXiv 1502.02551). Stochastic rounding takes no extra memory,
    whereas float32 copies of the weights take four bytes per parameter. Optimizer moments have the dtype of their
    parameter and are rounded in the same way. Moments of float16 parameters are float32, since squares of gradients
    underflow in float16. The returned `update` needs the random key of its step as the argument `key`.
    """

    def init(params: Tree) -> Tree:
        return tx.init(jax.tree.map(lambda p: _widened(p) if p.dtype == jnp.float16 else p, params))

    def update(updates: Tree, state: Tree, params: Tree = None, **extra: Array) -> tuple[Tree, Tree]:
        key = extra["key"]
        wide = jax.tree.map(_widened, params)
        updates, new = tx.update(jax.tree.map(_widened, updates), jax.tree.map(_widened, state), wide)

        def stored(path: str, old: Array, x: Array) -> Array:
            """Rounds the float32 array x to the precision of `old`."""
            return round_randomly(x, old.dtype, weights.key_for(key, path)) if _is_narrow(old) else x

        new = weights.map_named(lambda path, old, x: stored(f"state/{path}", old, x).astype(old.dtype), state, new)
        # The update is the new 16-bit value minus the old one, so adding it to the old value in float32 is exact.
        step = lambda path, old, p, u: stored(path, old, p + u) - p
        return weights.map_named(step, params, wide, updates), new

    return optax.GradientTransformationExtraArgs(init, update)


def round_randomly(x: Array, dtype: DTypeLike, key: Array) -> Array:
    """Rounds float32 numbers up or down to a 16-bit `dtype`, with probabilities such that the mean is x. The random
    bits of an element are a hash of its position, so they do not depend on the mesh. XLA fuses the hash into the
    rounding loop, whereas a random generator would write an extra array."""
    dropped = jnp.uint32(2 ** (jnp.finfo(jnp.float32).nmant - jnp.finfo(dtype).nmant) - 1)
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    noise = saved.scramble(saved.scramble(saved.positions(x.shape) ^ first) + second)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise & dropped)
    return jax.lax.bitcast_convert_type(bits & ~dropped, jnp.float32)


def _is_narrow(x: Array) -> bool:
    return x.dtype in (jnp.bfloat16, jnp.float16)


def _widened(x: Array) -> Array:
    return x.astype(jnp.float32) if _is_narrow(x) else x


def _decay(lr: Callable, rate: float) -> optax.GradientTransformation:
    """Decoupled weight decay, for use after a transformation that has already applied the learning rate."""

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        return jax.tree.map(lambda u, p: u - lr(state) * rate * p, updates, params), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def matrices(params: Roles, specs: Specs) -> Tree:
    """A mask for weight decay: True for matrices that multiply activations, False for norm scales and biases."""
    return _by_spec(params, specs, lambda x, spec, names: bool(spec and spec.eqn) and x.ndim - spec.stacked >= 2)


def muon_axes(params: Roles, specs: Specs) -> Tree:
    """The axes of each array that Muon treats as rows and columns; None for vectors and vocabulary tables, which Adam
    updates."""

    def numbers(x: Array, spec: Spec | None, names: tuple) -> optax.contrib.MuonDimensionNumbers | None:
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


def _by_spec(params: Roles, specs: Specs, f: Callable) -> Tree:
    """Applies `f(array, spec, logical axis names)` to every array of {role: tree}."""

    def leaf(_: str, w: Array | Weight, spec: Spec | None) -> Tree:
        names = weights.axes_of(w, spec)
        return jax.tree.map(lambda x, n: None if x is None else f(x, spec, n), w, names, is_leaf=lambda x: x is None)

    return {role: weights.replace(tree, specs[role], leaf) for role, tree in params.items()}


def scale_by_path(rules: tuple, params: Roles) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by the factor of the first (regex, factor) rule that matches its path.

    A path is a parameter's path in the model, without the role, such as "layers/attn/wq" or "embed/table". Raises
    UserError for a rule that applies to no parameter.
    """
    used = set()

    def factor(path: str, _: Array) -> float:
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
