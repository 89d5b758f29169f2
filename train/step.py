"""The optimizer step, which is the same for all objectives."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax import Array

from data.rows.batch import Batch
from train.init import Blueprint
from train.objectives import Pair
from train.state import Roles, TrainState


def make_step(
    loss: Callable[[Roles, Batch, Array], dict[str, Pair]], tx: optax.GradientTransformation, accum: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Pair]]]:
    """Returns a function (state, batch) -> (state, metrics), which the caller jits with the state donated.

    `loss` returns metrics as (sum, weight) pairs; the mean of metrics["loss"] is minimized. Gradients of the sum are
    accumulated over `accum` micro-batches and divided once by the total weight, so that the result does not depend on
    how tokens are distributed over micro-batches. A step whose loss or gradient is not finite changes only the
    counters. Whether it is finite is decided from values that are reduced over all hosts, so that all hosts agree.
    """
    optimizer = optax.with_extra_args_support(tx)

    def total(params: Roles, state: TrainState, batch: Batch, key: Array) -> tuple[Array, dict[str, Pair]]:
        metrics = loss(state.replace(params=params).in_training(key), batch, key)
        return metrics["loss"][0], metrics

    def gradients(state: TrainState, batch: Batch) -> tuple[Roles, dict[str, Pair]]:
        grad = jax.grad(total, has_aux=True)
        if accum == 1:
            return grad(state.params, state, batch, state.key)

        def micro(carry: tuple, xs: tuple) -> tuple[tuple, None]:
            index, part = xs
            new = grad(state.params, state, part, jax.random.fold_in(state.key, index))
            return jax.tree.map(jnp.add, carry, new), None

        parts = jax.tree.map(lambda x: _split_rows(x, accum), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(grad, state.params, state, first, state.key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(micro, zeros, (jnp.arange(accum), parts))[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Pair]]:
        grads, metrics = gradients(state, batch)
        loss_sum, weight = metrics["loss"]
        grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1e-9).astype(g.dtype), grads)
        norm = optax.global_norm(grads)
        ok = jnp.isfinite(loss_sum) & jnp.isfinite(norm)

        def update() -> tuple[Roles, optax.OptState]:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, key=state.key)
            return cast(Roles, optax.apply_updates(state.params, updates)), opt_state

        # Use `cond` because `where` makes XLA keep a second copy of the optimizer state: 1 GB for 135M parameters.
        params, opt_state = jax.lax.cond(ok, update, lambda: (state.params, state.opt_state))
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            bad=jnp.where(ok, 0, state.bad + 1),
            skipped=state.skipped + ~ok,
        )
        one = jnp.float32(1)
        return state, metrics | {"grad_norm": (norm, one), "bad": (state.bad, one), "skipped": (state.skipped, one)}

    return step


def compile_step(
    blueprint: Blueprint, accum: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Pair]]]:
    """Jits the step function of a run. The state is donated, and the new state has the shardings of the blueprint."""
    step = make_step(blueprint.objective.loss, blueprint.tx, accum)
    return jax.jit(step, donate_argnums=0, out_shardings=(blueprint.shardings, None))


def _split_rows(x: Array, parts: int) -> Array:
    """Reshapes [B, ...] to [parts, B / parts, ...]. Part i has the rows i, i + parts, i + 2 parts and so on, so that no
    row of a sharded batch moves to another device."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
