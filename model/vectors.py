"""Computes and combines task vectors, the weight changes due to fine-tuning (Ilharco et al. 2022, arXiv 2212.04089).

In this module, a task vector is called an update: a dict such as {"layers/attn/wq": float32 array} with the change of
each parameter.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError
from model import weights
from model.peft import lora
from model.peft.lora import LoRA
from model.weights import Params, Spec, Specs

Update = dict[str, np.ndarray]


def difference(after: Params, before: Params, specs: Specs) -> Update:
    """Returns `after` - `before` for every parameter, after merging adapters.

    Raises UserError for adapters that cannot be merged into weights.
    """
    named = lambda p: {weights.name(at): x for at, x in jax.tree.leaves_with_path(weights.dense(p, specs))}
    new, old = named(after), named(before)
    return {name: np.asarray(new[name], np.float32) - np.asarray(old[name], np.float32) for name in old}


def add(params: Params, update: Update) -> Params:
    """Adds an update to `params`, which must be plain arrays."""
    return weights.map_named(lambda name, x: (x + update[name]).astype(x.dtype), params)


def linear(updates: Sequence[Update], factors: Sequence[float]) -> Update:
    """Returns the sum of factor * update. A negative factor subtracts what a model has learned."""
    return {name: sum(np.float32(f) * u[name] for f, u in zip(factors, updates)) for name in updates[0]}


def trim(update: Update, density: float) -> Update:
    """Keeps a fraction `density` of all values, those with the largest magnitudes, and sets the others to 0."""
    sizes = np.concatenate([np.abs(x).ravel() for x in update.values()])
    kept = max(round(density * sizes.size), 1)
    least = np.partition(sizes, sizes.size - kept)[sizes.size - kept]
    return {name: np.where(np.abs(x) >= least, x, 0) for name, x in update.items()}


def ties(updates: Sequence[Update], factors: Sequence[float], density: float) -> Update:
    """Merges updates with TIES (Yadav et al. 2023, arXiv 2306.01708).

    Trims each update. Then merges each weight's values in the updates: their sum determines a sign, and the result is
    the mean of those values that have this sign.
    """
    updates = [linear([trim(u, density)], [f]) for u, f in zip(updates, factors)]

    def merge(*xs: np.ndarray) -> np.ndarray:
        x = np.stack(xs)
        agree = (np.sign(x) == np.sign(x.sum(0))) & (x != 0)
        return np.where(agree, x, 0).sum(0) / np.maximum(agree.sum(0), 1)

    return {name: merge(*(u[name] for u in updates)).astype(np.float32) for name in updates[0]}


def dare(updates: Sequence[Update], factors: Sequence[float], density: float, seed: int = 0) -> Update:
    """Merges updates with DARE (Yu et al. 2023, arXiv 2311.03099).

    In each update, keeps a random fraction `density` of the values, divides them by `density`, and sets the others to
    0. Adds the results.
    """
    rng = np.random.default_rng(seed)
    drop = lambda x: np.where(rng.random(x.shape) < density, x / np.float32(density), 0)
    return linear([{name: drop(x) for name, x in u.items()} for u in updates], factors)


def to_lora(params: Params, update: Update, specs: Specs, rank: int) -> tuple[Params, dict[str, tuple[float, float]]]:
    """Approximates the change dW of each matrix by the best LoRA with rank `rank`.

    Returns (new parameters, errors), where errors is {name: (||dW - A B||^2, ||dW||^2)}. LoRA does not change norms and
    biases, so their error is the whole change. If a matrix has fewer than `rank` rows or columns, the LoRA has the full
    rank of the matrix, and the error is 0. Raises UserError if the update is zero everywhere.
    """
    missed: dict[str, tuple[float, float]] = {}

    def wrap(name: str, base: jax.Array, spec: Spec) -> jax.Array | LoRA:
        whole = float(np.square(update[name], dtype=np.float64).sum())
        if not whole or not spec.eqn:
            missed[name] = (whole, whole)
            return base
        delta = jnp.asarray(update[name])
        r = min(rank, *lora.matrix(delta, spec).shape[-2:])
        a, b, values = lora.truncate(delta, spec, r)
        missed[name] = (float(jnp.square(values[..., r:]).sum()), whole)
        return LoRA(base, a, b, spec.eqn, 1.0)

    out = weights.replace(params, specs, wrap)
    if not any(whole for _, whole in missed.values()):
        raise UserError("the update is zero everywhere", "update", "are the base model and the tuned model the same?")
    return out, missed
