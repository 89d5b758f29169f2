"""Quantizes weights with GPTQ, AWQ or SmoothQuant, using calibration data. Only one layer is in memory at a time.

These methods do not store the inputs X [tokens, K] of a matrix. They need only X'X, and the sum and the maximum of |x|
in each column.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model import weights
from model.net.attention import context
from model.net.transformer import Transformer
from model.quant._leaf import Encode, Quantized
from model.quant._matrix import Format, Rounding, fit, letters, matrix, nearest, spread
from model.weights import Params, Spec, Weight

EXPONENTS = 20  # number of exponents in [0, 1) that AWQ tries
STEP = 128  # number of rows that GPTQ rounds before it updates the remaining rows
DAMPING = 0.01  # added to the diagonal of X'X, as a fraction of its mean diagonal entry


class Inputs(NamedTuple):
    """Statistics of a matrix's inputs X [tokens, K], over all tokens."""

    gram: Array  # X'X [K, K]
    size: Array  # sum of |x| [K]
    peak: Array  # max of |x| [K]


@flax.struct.dataclass
class Probe(Weight):
    """Multiplies by `w`. While JAX traces the layer, records the product's input in `seen`."""

    w: Array
    at: tuple[str, str] = flax.struct.field(pytree_node=False)  # path, equation
    seen: dict[tuple[str, str], Array] = flax.struct.field(pytree_node=False)

    def einsum(self, eqn: str, x: Array) -> Array:
        self.seen[self.at] = x
        return weights.einsum(eqn, x, self.w)


def _inputs(x: Array, k: int) -> Inputs:
    x = x.reshape(-1, k).astype(jnp.float32)
    size = jnp.abs(x)
    return Inputs(x.T @ x, size.sum(0), size.max(0))


# --- methods that round a matrix [K, N] based on statistics of its inputs ---


def factor(gram: Array) -> Array:
    """Adds damping to X'X and inverts it. Returns the upper Cholesky factor U of the inverse; the inverse is U'U."""
    h = np.asarray(gram, np.float64)
    h = h + DAMPING * (np.trace(h) / len(h) or 1.0) * np.eye(len(h))
    return jnp.asarray(np.linalg.cholesky(np.linalg.inv(h)).T, jnp.float32)


def gptq(upper: Array, m: Array, form: Format) -> Rounding:
    """Rounds a matrix with GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1).

    The K rows are rounded one after another. After each row, the remaining rows are changed to compensate for its
    error, as determined by X'X. The scale of a group is computed when its first row is reached.
    """
    m, k = m.astype(jnp.float32), m.shape[0]
    groups = form.tile[0] < k
    whole, step = None if groups else fit(m, form), form.tile[0] if groups else STEP
    numbers, scales = [], []
    for at in range(0, k, step):
        end = min(at + step, k)
        scale = fit(m[at:end], form) if groups else whole
        scales.append(scale)
        done, errors = _gptq_block(form, m[at:end], upper[at:end, at:end], *scale)
        numbers.append(done)
        m = m.at[end:].add(-upper[at:end, end:].T @ errors)
    scale, offset = (None if s[0] is None else jnp.concatenate(s) for s in zip(*scales))
    if not groups:
        scale, offset = whole
    return Rounding(jnp.concatenate(numbers), scale, offset)


@functools.partial(jax.jit, static_argnums=0)
def _gptq_block(form: Format, m: Array, upper: Array, scale: Array, offset: Array | None) -> tuple[Array, Array]:
    """Rounds a block of rows with GPTQ. Returns (rounded unscaled values, errors divided by the diagonal of U)."""
    scale = spread(scale, form.tile, m.shape)[0]
    offset = jnp.zeros(()) if offset is None else spread(offset, form.tile, m.shape)[0]

    def row(i: Array, carry: tuple) -> tuple:
        m, numbers, errors = carry
        n = form.grid((m[i] - offset) / scale)
        e = (m[i] - n * scale - offset) / upper[i, i]
        later = jnp.where(jnp.arange(len(m)) > i, upper[i], 0)
        return m - later[:, None] * e, numbers.at[i].set(n), errors.at[i].set(e)

    return jax.lax.fori_loop(0, len(m), row, (m, jnp.zeros_like(m), jnp.zeros_like(m)))[1:]


def rescaled(w: Array, eqn: str, factors: Array, encode: Encode) -> Quantized:
    """Multiplies the rows of `w` by `factors` [K] and quantizes the result.

    The returned weight divides its inputs by `factors`.
    """
    inverse = (1 / factors).astype(jnp.bfloat16)[:, None]
    return encode(w, eqn, solve=lambda m, form: nearest(m / inverse.astype(jnp.float32), form)).with_inverse(inverse)


def awq(w: Array, eqn: str, inputs: Inputs, encode: Encode) -> Quantized:
    """Quantizes a matrix with AWQ (Lin et al. 2023, arXiv 2306.00978, eq. 4-5).

    Multiplies row k by |x_k|^a, where |x_k| is the mean magnitude of input k. Chooses the exponent a with the smallest
    output error.
    """
    size = jnp.maximum(inputs.size / inputs.size.mean(), 1e-4)
    best, least = None, np.inf
    for i in range(EXPONENTS):
        factors = size ** (i / EXPONENTS)
        leaf = rescaled(w, eqn, factors / jnp.sqrt(factors.max() * factors.min()), encode)
        if (e := float(output_error(w, eqn, leaf, inputs.gram))) < least:
            best, least = leaf, e
    return best


def smoothquant(w: Array, eqn: str, inputs: Inputs, encode: Encode) -> Quantized:
    """Quantizes a matrix with SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, eq. 4 with alpha = 0.5).

    SmoothQuant scales down inputs with outliers, and scales up the weights that multiply these inputs.
    """
    rows = jnp.abs(matrix(w, eqn)).max(-1)
    factors = jnp.maximum(inputs.peak, 1e-5) ** 0.5 / jnp.maximum(rows, 1e-5) ** 0.5
    return rescaled(w, eqn, factors, encode)


def output_error(w: Array, eqn: str, leaf: Quantized, gram: Array) -> Array:
    """Returns the relative error |X W - X W'| / |X W|, where W' is the quantized W. The inputs X are not quantized."""
    m = matrix(w, eqn).astype(jnp.float32)
    e = m - matrix(leaf.floats(jnp.float32), eqn)
    square = lambda a: ((gram @ a) * a).sum()
    return jnp.sqrt(jnp.maximum(square(e), 0) / jnp.maximum(square(m), 1e-30))


def solve(method: str, w: Array, eqn: str, inputs: Inputs, upper: Callable[[], Array], encode: Encode) -> Quantized:
    """Quantizes one matrix with the given method. `upper()` returns the Cholesky factor that GPTQ needs."""
    if method == "rtn":  # round to nearest
        return encode(w, eqn)
    if method == "gptq":
        return encode(w, eqn, solve=functools.partial(gptq, upper()))
    return {"awq": awq, "smoothquant": smoothquant}[method](w, eqn, inputs, encode)


# --- layer by layer ---


def embed(model: Transformer, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Converts tokens [B,T] to the input [B,T,D] of the first layer."""
    x = weights.take(params["embed"]["table"], jnp.asarray(tokens), model.dtype)
    return np.asarray(model.embedded(params, x, jnp.arange(tokens.shape[1])))


def calibrate(
    model: Transformer, xs: list[np.ndarray], layer: Callable[[int], Params], method: str,
    encoder: Callable[[str], Encode], where: str,
) -> Iterator[tuple[Params, dict[str, float]]]:  # fmt: skip
    """Quantizes layer by layer, and yields (parameters, {path: relative output error}) for each layer.

    The calibration data are the batches `xs` of embedded tokens [B,T,D]. As in GPTQ, the inputs of a layer are computed
    with the quantized layers before it. `layer(i)` reads the float parameters of layer i; no other layer is in memory.
    `encoder(path)` returns the function that quantizes the matrix `path`. The regex `where` must not match experts,
    because each expert receives different tokens.
    """
    for i in range(model.config.layers):
        which, params = (model.config.kinds[i], model.config.windowed[i]), layer(i)
        seen = functools.reduce(_add, (_observe(model, which, where, params, x) for x in xs))
        leaves, errors = {}, {}
        for same, inputs in seen.items():
            upper = functools.cache(functools.partial(factor, inputs.gram))
            for path, eqn in same:
                w = weights.at(params, path)
                leaves[path] = solve(method, w, eqn, inputs, upper, encoder(f"layers/{path}"))
                errors[path] = float(output_error(w, eqn, leaves[path], inputs.gram))
        params = weights.map_named(lambda path, w, new=leaves: new.get(path, w), params)
        xs = [np.asarray(run_layer(model, which, params, x)) for x in xs]
        yield jax.tree.map(np.asarray, params), errors


def _add(a: dict[tuple, Inputs], b: dict[tuple, Inputs]) -> dict[tuple, Inputs]:
    joined = lambda x, y: Inputs(x.gram + y.gram, x.size + y.size, jnp.maximum(x.peak, y.peak))
    return {key: joined(a[key], b[key]) for key in a}


Which = tuple[str, bool]  # (kind of a layer, whether its attention has a sliding window)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_layer(model: Transformer, which: Which, params: Params, x: Array) -> Array:
    """Runs one layer on x [B,T,D] and returns its output."""
    return _layer(model, which, params, x)


def _layer(model: Transformer, which: Which, params: Params, x: Array) -> Array:
    (kind, windowed), shape = which, x.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    ctx = context(model.config, positions, jnp.ones_like(positions), None, model.attention)
    return model.layer(kind, x, params, None, windowed, ctx)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _observe(model: Transformer, which: Which, where: str, params: Params, x: Array) -> dict[tuple, Inputs]:
    """Returns the input statistics of a layer's matrices.

    Each key of the result is ((path, equation), ...), a tuple of all matrices that share an input.
    """
    seen: dict[tuple[str, str], Array] = {}

    def probe(path: str, spec: Spec, w: Array) -> Array | Probe:
        chosen = spec.eqn and re.fullmatch(where, f"layers/{path}")
        return Probe(w, (path, spec.eqn), seen) if chosen else w

    params = weights.map_named(probe, model.specs["layers"], params, is_leaf=weights.is_spec)
    _layer(model, which, params, x)
    same: dict[int, list] = {}
    for at, value in seen.items():
        same.setdefault(id(value), []).append(at)
    sizes = {tuple(ats): seen[ats[0]] for ats in same.values()}
    return {ats: _inputs(x, math.prod(x.shape[-len(letters(ats[0][1])[1]) :])) for ats, x in sizes.items()}
