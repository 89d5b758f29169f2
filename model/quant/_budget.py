"""Chooses a quantization format for each matrix, to minimize the total error within a size budget in bytes."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import UserError
from model import weights
from model.net.transformer import Transformer
from model.quant._calibrate import run_layer
from model.quant._leaf import Encode
from model.weights import Params, Spec

Options = dict[str, dict[str, tuple[int, float]]]  # {path: {format: (bytes, error)}}


def measure(
    model: Transformer, x: np.ndarray, layer: Callable[[int], Params], encoders: dict[str, Encode], where: str
) -> dict[str, dict[str, float]]:
    """Measures {path: {format: error}} on embedded tokens x [B,T,D], for the matrices that match the regex `where`.

    Only one matrix is quantized at a time. If this changes the output of its layer from y to y', the error is |y' -
    y|^2 / |y|^2, averaged over tokens and summed over layers. As these errors are relative, they are comparable between
    matrices. `layer(i)` reads the parameters of layer i.
    """
    errors: dict[str, dict[str, Array]] = {}
    chosen = lambda path, spec: spec.eqn and re.fullmatch(where, f"layers/{path}")
    for i in range(model.config.layers):
        which, params = (model.config.kinds[i], model.config.windowed[i]), layer(i)
        y = run_layer(model, which, params, x)
        for path, spec in jax.tree.leaves_with_path(model.specs["layers"], is_leaf=weights.is_spec):
            if not chosen(path := weights.name(path), spec):
                continue
            for format, encode in encoders.items():
                rounded = functools.partial(_rounded, path, spec.eqn, encode)
                other = run_layer(model, which, weights.map_named(rounded, params), x)
                total = errors.setdefault(f"layers/{path}", {})
                total[format] = total.get(format, 0) + float(_relative(other, y))
        x = np.asarray(y)
    return errors


def _rounded(path: str, eqn: str, encode: Encode, name: str, w: Array) -> Array:
    return encode(w, eqn).floats(w.dtype) if name == path else w


@jax.jit
def _relative(a: Array, b: Array) -> Array:
    square = lambda x: jnp.square(x.astype(jnp.float32)).sum(-1)
    return (square(a - b) / square(b)).mean()


def choose(options: Options, budget: int) -> dict[str, str]:
    """Returns the {path: format} with the smallest sum of errors among those that fit into `budget` bytes.

    Solves this knapsack problem exactly, by dynamic programming over the Pareto front of (bytes, error). Raises
    UserError if the matrices do not fit even in their smallest formats.
    """
    front: list[tuple[int, float, tuple[str, ...]]] = [(0, 0.0, ())]
    for formats in options.values():
        pairs = ((state, one) for state in front for one in formats.items())
        grown = sorted((b + more, e + worse, (*names, name)) for (b, e, names), (name, (more, worse)) in pairs)
        front = []
        for state in grown:
            if state[0] <= budget and (not front or state[1] < front[-1][1]):
                front.append(state)
    if not front:
        least = sum(min(size for size, _ in formats.values()) for formats in options.values())
        raise UserError(f"{budget:,} bytes are left for matrices that need at least {least:,} bytes", "--budget")
    return dict(zip(options, front[-1][2], strict=True))


def size(spec: Spec, encode: Encode) -> int:
    """Returns the size in bytes of a parameter that `encode` has quantized."""
    leaf = jax.eval_shape(lambda w: encode(w, spec.eqn), spec.value)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaf))
