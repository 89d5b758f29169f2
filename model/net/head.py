"""Cross-entropy over a large vocabulary: the logits [rows, V] never exist whole, and only rows that count are computed.

Rows whose weight is 0 (prompts, padding) are sorted behind the others and the loop over chunks stops before them, so a
completion-only loss pays for the vocabulary on few rows. Under a mesh every shard of the batch and of the sequence
sorts its own rows: none leaves its device.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from model import weights
from model.net.layers import softcap

ROWS = ("data", "fsdp", "context")  # mesh axes that split the rows

# Of float32 logits at once on a shard, by platform; 341 rows at V = 49152 on a CPU. Every chunk reads the head and adds
# to its gradient: an accelerator, whose products outrun its memory, needs thousands of rows for that to be little.
CHUNK_BYTES = {"cpu": 64 * 2**20, "other": 512 * 2**20}

Unembed = Callable[[Any, Array], Array]  # (head parameters, [rows, D]) -> logits [rows, V]


def nll(model: Any, params: Any, x: Array, targets: Array, weight: Array) -> Array:
    """sum(weight * -log p(targets)), a scalar. x [B,T,D], targets and weight [B,T].

    The gradient is computed in the forward pass, chunk by chunk, since the logits are there: 2/3 of the products that
    recomputing them would take. For a loss that is not linear in the log-probabilities use `token_logps`.
    """
    unembed, head = _unembed(model, params)
    rows, _ = _count_first(x, targets, weight)
    return _nll(unembed, head, *rows)


def token_logps(model: Any, params: Any, x: Array, targets: Array, mask: Array) -> Array:
    """log p(targets) [B,T], 0 where mask is 0; differentiable with any cotangent. Logits are recomputed backwards."""
    unembed, head = _unembed(model, params)
    rows, undo = _count_first(x, targets, mask)
    return undo(_logps(unembed, head, *rows))


def _unembed(model: Any, params: Any) -> tuple[Unembed, Any]:
    eqn, table = model.head(params)
    return functools.partial(_logits, eqn, model.config.logit_cap), table


def _logits(eqn: str, cap: float, table: Any, x: Array) -> Array:
    return softcap(weights.einsum(eqn, x, table).astype(jnp.float32), cap)


def _count_first(x: Array, targets: Array, weight: Array) -> tuple[tuple[Array, Array, Array], Callable]:
    """Rows [S,R,...], one S a shard of the batch and sequence, those that count first; and the way back to [B,T]."""
    B, T = targets.shape
    S, C = weights.shards("data", "fsdp"), weights.shards("context")
    S, C = S if B % S == 0 else 1, C if T % C == 0 else 1

    def flat(a: Array) -> Array:
        a = a.reshape(S, B // S, C, T // C, *a.shape[2:]).swapaxes(1, 2).reshape(S * C, B * T // S // C, *a.shape[2:])
        return nn.with_logical_constraint(a, ("act_rows", *[None] * (a.ndim - 1)))

    x, targets, weight = flat(x), flat(targets), flat(weight.astype(jnp.float32))
    order = jnp.argsort(weight == 0, axis=1, stable=True)
    pick = lambda a: jnp.take_along_axis(a, order.reshape(order.shape + (1,) * (a.ndim - 2)), axis=1)

    def undo(rows: Array) -> Array:
        rows = jnp.take_along_axis(rows, jnp.argsort(order, axis=1), axis=1)
        return rows.reshape(S, C, B // S, T // C).swapaxes(1, 2).reshape(B, T)

    return (pick(x), pick(targets), pick(weight)), undo


def _copies(tree: Any, shards: int) -> Any:
    """A copy [S, ...] of each array for every shard of the rows, in which all of it but the vocabulary is whole.

    Without them the partitioner gathers the head, and sums up its gradient over the devices, in every turn of the loop.
    """

    def copy(a: Array) -> Array:
        a = jnp.broadcast_to(a, (shards, *a.shape))
        places = P(ROWS, *[P.UNCONSTRAINED] * (a.ndim - 1))
        split = shards > 1 and shards == weights.shards(*ROWS)
        return jax.lax.with_sharding_constraint(a, places) if split else a

    return jax.tree.map(copy, tree)


def _tables(moving: Any, fixed: Any, x: Array) -> Any:
    """Copies of the two parts of the head. A plain array is sent in the type of x where that is narrower."""
    narrow = lambda w: w.astype(min(w.dtype, x.dtype, key=lambda d: d.itemsize))
    sent = lambda part: part if part is None or weights.is_weight(part) else narrow(part)
    return _copies((sent(moving), sent(fixed)), x.shape[0])


def chunk_rows(rows: int, vocab: int) -> int:
    """Rows of a shard whose logits exist at once. Chunks are equal: a last one of few rows would cost a whole one."""
    most = CHUNK_BYTES["cpu" if weights.platform() == "cpu" else "other"]
    return -(-rows // -(-4 * rows * vocab // most))


def _loop(x: Array, weight: Array, vocab: int, body: Callable, carry: Any) -> Any:
    """`carry = body(start, rows, carry)` over chunks of rows, as many as the fullest shard needs."""
    R = weight.shape[1]
    size = chunk_rows(R, vocab)
    needed = -(-(weight != 0).sum(1).max() // size)

    def step(i: Array, carry: Any) -> Any:
        start = jnp.minimum(i * size, R - size)  # the last chunk overlaps the one before; `fresh` masks what was seen
        fresh = start + jnp.arange(size) >= i * size
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, axis=1)
        return body(cut, start, fresh, carry)

    return jax.lax.fori_loop(0, needed, step, carry)


def _pieces(unembed: Unembed, head: Any, x: Array, targets: Array, g: Array) -> tuple[Array, Any, Array]:
    """log p(targets) [S,C] of a chunk x [S,C,D], and the pullback of a cotangent g [S,C]: (d moving, d x).

    `head` is (moving, fixed), in a copy a shard.
    """

    def shard(moving: Any, fixed: Any, x: Array, targets: Array, g: Array) -> tuple[Array, Any, Array]:
        logits, pull = jax.vjp(lambda m, x: unembed(weights.combine(m, fixed), x[None])[0], moving, x)
        top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        unnormalised = jnp.exp(logits - top)
        total = unnormalised.sum(-1, keepdims=True)
        hit = jnp.arange(logits.shape[-1]) == targets[:, None]
        logps = jnp.where(hit, logits, 0).sum(-1) - (jnp.log(total) + top)[:, 0]
        return logps, *pull((hit - unnormalised / total) * g[:, None])

    return jax.vmap(shard)(*head, x, targets, g)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)


def _summed(copies: Any) -> Any:
    return jax.tree.map(lambda a: a.sum(0), copies)


def _write(out: Array, chunk: Array, start: Array, fresh: Array) -> Array:
    """`chunk` into `out` [S,R,...] at rows `start`.., except where the rows were written before."""
    old = jax.lax.dynamic_slice_in_dim(out, start, chunk.shape[1], axis=1)
    keep = fresh.reshape(1, -1, *(1,) * (chunk.ndim - 2))
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(keep, chunk, old), start, axis=1)


# --- sum of weighted negative log-likelihoods, gradient in the forward pass ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(unembed: Unembed, head: Any, x: Array, targets: Array, weight: Array) -> Array:
    vocab = jax.eval_shape(unembed, head, x).shape[-1]
    copies = _tables(None, head, x)

    def body(cut: Callable, start: Array, fresh: Array, total: Array) -> Array:
        logps, *_ = _pieces(unembed, copies, cut(x), cut(targets), cut(weight))
        return total - (logps * cut(weight) * fresh).sum()

    return _loop(x, weight, vocab, body, jnp.float32(0))


def _nll_forward(unembed: Unembed, head: Any, x: Any, targets: Any, weight: Any) -> tuple[Array, Any]:
    x, targets, weight = x.value, targets.value, weight.value
    moving, fixed = _by_perturbed(head)
    vocab = jax.eval_shape(unembed, weights.combine(moving, fixed), x).shape[-1]
    copies = _tables(moving, fixed, x)

    def body(cut: Callable, start: Array, fresh: Array, carry: Any) -> Any:
        total, d_head, d_x = carry
        w = cut(weight) * fresh
        logps, dm, dx = _pieces(unembed, copies, cut(x), cut(targets), -w)
        d_head = jax.tree.map(jnp.add, d_head, dm)
        return total - (logps * w).sum(), d_head, _write(d_x, dx, start, fresh)

    d_head = _copies(_zeros(moving), x.shape[0])
    total, d_head, d_x = _loop(x, weight, vocab, body, (jnp.float32(0), d_head, _zeros(x)))
    return total, (_summed(d_head), d_x)


def _nll_backward(unembed: Unembed, residuals: Any, g: Array) -> tuple:
    d_head, d_x = jax.tree.map(lambda a: (a * g).astype(a.dtype), residuals)
    return d_head, d_x, None, None


_nll.defvjp(_nll_forward, _nll_backward, symbolic_zeros=True)


def _by_perturbed(head: Any) -> tuple[Any, Any]:
    """The head's arrays that are differentiated, and the others (None in each other's places)."""
    primal = lambda p: hasattr(p, "perturbed")
    mask = jax.tree.map(lambda p: p.perturbed, head, is_leaf=primal)
    values = jax.tree.map(lambda p: p.value, head, is_leaf=primal)
    return weights.partition(values, mask)


# --- log-probabilities of the targets, logits recomputed in the backward pass ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logps(unembed: Unembed, head: Any, x: Array, targets: Array, mask: Array) -> Array:
    vocab = jax.eval_shape(unembed, head, x).shape[-1]
    copies = _tables(None, head, x)

    def body(cut: Callable, start: Array, fresh: Array, out: Array) -> Array:
        logps, *_ = _pieces(unembed, copies, cut(x), cut(targets), cut(mask))
        return _write(out, logps * (cut(mask) != 0), start, fresh)

    return _loop(x, mask, vocab, body, jnp.zeros(mask.shape))


def _logps_forward(unembed: Unembed, head: Any, x: Any, targets: Any, mask: Any) -> tuple[Array, Any]:
    moving, fixed = _by_perturbed(head)
    rest = (x.value, targets.value, mask.value)
    return _logps(unembed, weights.combine(moving, fixed), *rest), (moving, fixed, *rest)


def _logps_backward(unembed: Unembed, residuals: Any, g: Array) -> tuple:
    moving, fixed, x, targets, mask = residuals
    vocab = jax.eval_shape(unembed, weights.combine(moving, fixed), x).shape[-1]
    copies = _tables(moving, fixed, x)

    def body(cut: Callable, start: Array, fresh: Array, carry: Any) -> Any:
        d_head, d_x = carry
        _, dm, dx = _pieces(unembed, copies, cut(x), cut(targets), cut(g) * (cut(mask) != 0) * fresh)
        return jax.tree.map(jnp.add, d_head, dm), _write(d_x, dx, start, fresh)

    d_head, d_x = _loop(x, mask, vocab, body, (_copies(_zeros(moving), x.shape[0]), _zeros(x)))
    return _summed(d_head), d_x, None, None


_logps.defvjp(_logps_forward, _logps_backward, symbolic_zeros=True)
