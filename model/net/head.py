"""Losses and other functions of the logits. To save memory, the logits [rows, V] are computed in chunks.

In this file, a row is one token position, and a chunk is a block of rows. Rows with weight 0 (prompts, padding) need no
logits. They are sorted to the end, and the loop over chunks stops before them. So a loss on completions computes only
the logits of completions. On a mesh, the rows of each shard of the batch and sequence axes are sorted separately, and
no row is sent to another device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import flax.linen.spmd as spmd
import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec as P

from model import weights
from model.weights import Params, Tree, Weight

T = TypeVar("T")

ROWS = ("data", "fsdp", "context")  # mesh axes that shard the rows

# Maximum bytes per chunk of float32 logits on one shard, by platform. On a CPU, a chunk has 341 rows if the vocabulary
# has 49152 tokens. For each chunk, the head's whole weight matrix is read, and the whole gradient of this matrix is
# updated. An accelerator computes faster than it reads memory, so its chunks need thousands of rows.
CHUNK_BYTES = {"cpu": 64 * 2**20, "other": 512 * 2**20}

# (parameters of the head, hidden states x [B,T,D]) -> float32 logits [B,T,V]
Unembed = Callable[[Params, Array], Array]


class Network(Protocol):
    def head(self, params: Params) -> tuple[Unembed, Params]: ...


Side = tuple[Network, Params, Array]  # a model, its parameters, and its hidden states [B,T,D]


def nll(model: Network, params: Params, x: Array, targets: Array, weight: Array) -> Array:
    """Returns sum(weight * -log p(targets)) in nats, given hidden states x [B,T,D], and targets and weight [B,T].

    The forward pass also computes the gradient, while the logits of a chunk are in memory. So the backward pass does
    not have to recompute them. For a loss that is not linear in the log-probabilities, use `token_logps`.
    """
    unembed, head = model.head(params)
    (x, targets, weight), _ = _count_first(weight, x, targets)
    return _nll(unembed, head, x, targets, weight)


def token_logps(
    model: Network, params: Params, x: Array, targets: Array, mask: Array, temperature: float = 1.0
) -> Array:
    """Returns the log-probabilities of `targets` [B,T], given hidden states x [B,T,D].

    The logits are divided by `temperature`. The result is 0 where `mask` [B,T] is 0.
    """

    def f(logits: Array, targets: Array) -> Array:
        return _log_softmax(logits / temperature, targets)[0]

    return over_rows(f, [(model, params, x)], mask, targets)


def entropy(model: Network, params: Params, x: Array, mask: Array) -> Array:
    """Returns the entropy [B,T] of the next-token distributions, in nats, given hidden states x [B,T,D].

    The result is 0 where `mask` [B,T] is 0.
    """

    def f(logits: Array) -> Array:
        logps = jax.nn.log_softmax(logits)
        return -(jnp.exp(logps) * logps).sum(-1)

    return over_rows(f, [(model, params, x)], mask)


def kl(of: Side, to: Side, mask: Array, temperature: float = 1.0) -> Array:
    """Returns KL(of || to) [B,T] = sum of p_of * (log p_of - log p_to) over the vocabulary, in nats.

    The result is 0 where `mask` [B,T] is 0. Distillation minimizes `kl(teacher, student, mask)`. Teacher and student
    must have the same vocabulary, but may otherwise differ.
    """

    def f(of: Array, to: Array) -> Array:
        a, b = jax.nn.log_softmax(of / temperature), jax.nn.log_softmax(to / temperature)
        return (jnp.exp(a) * (a - b)).sum(-1)

    return over_rows(f, [of, to], mask)


def over_rows(f: Callable[..., Tree], sides: Sequence[Side], mask: Array, *extra: Array) -> Tree:
    """Returns `f(logits, ..., *extra)` [B,T] where `mask` is not 0, and 0 where it is 0.

    Each item of `sides` is (a model, its parameters, its hidden states). `f` is called on R rows at a time. Its
    arguments are the logits [R,V] of each of these models, and the same rows [R,...] of each array [B,T,...] in
    `extra`. `f` must compute each row independently, and return an array [R] or a tree of such arrays. The result is
    differentiable with respect to the parameters of the heads, the hidden states and `extra`. The backward pass
    recomputes the logits.
    """
    unembeds, trees = zip(*(model.head(params) for model, params, _ in sides))
    (*rows, mask), undo = _count_first(mask, *(x for *_, x in sides), *extra)
    vocab = sum(jax.eval_shape(u, tree, x).shape[-1] for u, tree, x in zip(unembeds, trees, rows))

    def of_shard(trees: Sequence[Params], rows: Sequence[Array]) -> Tree:
        logits = [u(tree, x[None])[0] for u, tree, x in zip(unembeds, trees, rows)]
        return f(*logits, *rows[len(logits) :])

    return jax.tree.map(undo, _over(jax.vmap(of_shard), vocab, trees, tuple(rows), mask))


def _log_softmax(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Returns (log p(targets) [R], the gradient of log p(targets) with respect to `logits` [R,V])."""
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    unnormalized = jnp.exp(logits - top)
    total = unnormalized.sum(-1, keepdims=True)
    hit = jnp.arange(logits.shape[-1]) == targets[:, None]
    return jnp.where(hit, logits, 0).sum(-1) - (jnp.log(total) + top)[:, 0], hit - unnormalized / total


def _count_first(mask: Array, *arrays: Array) -> tuple[tuple[Array, ...], Callable[[Array], Array]]:
    """Reshapes arrays [B,T,...] and the mask to [S,R,...], for S shards with R rows each.

    Sorts the rows of each shard so that rows with a nonzero mask come first. Also returns a function that maps results
    [S,R] back to [B,T].
    """
    B, T = mask.shape
    S, C = weights.shards("data", "fsdp"), weights.shards("context")
    S, C = S if B % S == 0 else 1, C if T % C == 0 else 1

    def flat(a: Array) -> Array:
        a = a.reshape(S, B // S, C, T // C, *a.shape[2:]).swapaxes(1, 2).reshape(S * C, B * T // S // C, *a.shape[2:])
        return spmd.with_logical_constraint(a, ("act_rows", *[None] * (a.ndim - 1)))

    *rows, mask = map(flat, (*arrays, mask.astype(jnp.float32)))
    order = jnp.argsort(mask == 0, axis=1, stable=True)

    def first(a: Array) -> Array:
        return jnp.take_along_axis(a, order.reshape(order.shape + (1,) * (a.ndim - 2)), axis=1)

    def undo(rows: Array) -> Array:
        rows = jnp.take_along_axis(rows, jnp.argsort(order, axis=1), axis=1)
        return rows.reshape(S, C, B // S, T // C).swapaxes(1, 2).reshape(B, T)

    return tuple(map(first, (*rows, mask))), undo


def _copies(tree: Tree, shards: int) -> Tree:
    """Makes one copy of each array for each of the S shards of the rows, and stacks the copies in an array [S, ...].

    Without these copies, XLA's partitioner would gather the head's weight and reduce its gradient over devices once per
    chunk, instead of once in total.
    """

    def copy(a: Array) -> Array:
        a = jnp.broadcast_to(a, (shards, *a.shape))
        places = P(ROWS, *[P.UNCONSTRAINED] * (a.ndim - 1))
        split = shards > 1 and shards == weights.shards(*ROWS)
        return jax.lax.with_sharding_constraint(a, places) if split else a

    return jax.tree.map(copy, tree)


def _sent(tree: Tree, x: Array) -> Tree:
    """Repeats the parameters of a head for every shard of x [S,R,D].

    Plain arrays whose dtype is wider than that of x are cast to the dtype of x first.
    """

    def narrow(w: Array | Weight) -> Array | Weight:
        return w if isinstance(w, Weight) or x.dtype.itemsize >= w.dtype.itemsize else w.astype(x.dtype)

    return _copies(jax.tree.map(narrow, tree, is_leaf=weights.is_weight), x.shape[0])


def chunk_rows(rows: int, vocab: int) -> int:
    """Returns the number of rows per chunk on each shard.

    The rows are divided evenly over the chunks, because a nearly empty last chunk would take as long as a full one.
    """
    most = CHUNK_BYTES["cpu" if weights.platform() == "cpu" else "other"]
    return -(-rows // -(-4 * rows * vocab // most))


Cut = Callable[[Array], Array]


def _loop(weight: Array, vocab: int, body: Callable[[Cut, Array, Array, T], T], carry: T) -> T:
    """Runs `carry = body(cut, start, fresh, carry)` on chunk after chunk, until no row with a nonzero weight is left.

    `weight` [S,R] has the weight of each row. `cut(a)` is the chunk [S,C,...] of an array a [S,R,...] that begins at
    row `start`. `fresh` [C] is True for rows that were not in an earlier chunk.
    """
    R = weight.shape[1]
    size = chunk_rows(R, vocab)
    needed = -(-(weight != 0).sum(1).max() // size)

    def step(i: Array, carry: T) -> T:
        start = jnp.minimum(i * size, R - size)  # the last chunk may overlap the one before it
        fresh = start + jnp.arange(size) >= i * size

        def cut(a: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(a, start, size, axis=1)

        return body(cut, start, fresh, carry)

    return jax.lax.fori_loop(0, needed, step, carry)


def _pieces(unembed: Unembed, head: tuple[Tree, Tree], x: Array, targets: Array, g: Array) -> tuple[Array, Tree, Array]:
    """Processes one chunk with hidden states x [S,C,D].

    Returns (log p(targets) [S,C], gradient for the head's trained parameters, gradient for x). g [S,C] is the cotangent
    of the log-probabilities. `head` is (trained parameters, frozen parameters), where each array is repeated per shard.
    """

    def shard(trained: Tree, frozen: Tree, x: Array, targets: Array, g: Array) -> tuple[Array, Tree, Array]:
        logits, pull = jax.vjp(lambda m, x: unembed(weights.combine(m, frozen), x[None])[0], trained, x)
        logps, slope = _log_softmax(logits, targets)
        return logps, *pull(slope * g[:, None])

    trained, frozen = head
    return jax.vmap(shard)(trained, frozen, x, targets, g)


def _zeros(tree: Tree) -> Tree:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)


def _summed(copies: Tree) -> Tree:
    return jax.tree.map(lambda a: a.sum(0), copies)


def _write(out: Array, chunk: Array, start: Array, fresh: Array) -> Array:
    """Returns `out` [S,R,...] after writing `chunk` at row `start`. Only the rows that are `fresh` are written."""
    old = jax.lax.dynamic_slice_in_dim(out, start, chunk.shape[1], axis=1)
    keep = fresh.reshape(1, -1, *(1,) * (chunk.ndim - 2))
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(keep, chunk, old), start, axis=1)


# --- the weighted sum of negative log-likelihoods; the forward pass also computes its gradient ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(unembed: Unembed, head: Params, x: Array, targets: Array, weight: Array) -> Array:
    vocab = jax.eval_shape(unembed, head, x).shape[-1]
    copies = None, _sent(head, x)

    def body(cut: Cut, start: Array, fresh: Array, total: Array) -> Array:
        logps, *_ = _pieces(unembed, copies, cut(x), cut(targets), cut(weight))
        return total - (logps * cut(weight) * fresh).sum()

    return _loop(weight, vocab, body, jnp.float32(0))


def _nll_forward(unembed: Unembed, head: Tree, *rows: CustomVJPPrimal) -> tuple[Array, Tree]:
    x, targets, weight = (row.value for row in rows)
    trained, frozen = _by_perturbed(head)
    vocab = jax.eval_shape(unembed, weights.combine(trained, frozen), x).shape[-1]
    copies = _sent(trained, x), _sent(frozen, x)

    def body(cut: Cut, start: Array, fresh: Array, carry: tuple[Array, Tree, Array]) -> tuple[Array, Tree, Array]:
        total, d_head, d_x = carry
        w = cut(weight) * fresh
        logps, dm, dx = _pieces(unembed, copies, cut(x), cut(targets), -w)
        d_head = jax.tree.map(jnp.add, d_head, dm)
        return total - (logps * w).sum(), d_head, _write(d_x, dx, start, fresh)

    d_head = _copies(_zeros(trained), x.shape[0])
    total, d_head, d_x = _loop(weight, vocab, body, (jnp.float32(0), d_head, _zeros(x)))
    return total, (_summed(d_head), d_x)


def _nll_backward(unembed: Unembed, residuals: Tree, g: Array) -> tuple:
    d_head, d_x = jax.tree.map(lambda a: (a * g).astype(a.dtype), residuals)
    return d_head, d_x, None, None


_nll.defvjp(_nll_forward, _nll_backward, symbolic_zeros=True)


def _by_perturbed(tree: Tree) -> tuple[Tree, Tree]:
    """Splits a tree into (arrays that are differentiated, all other arrays).

    Each result has the structure of `tree`, with None in place of the arrays that are in the other result.
    """

    def primal(p: object) -> bool:
        return hasattr(p, "perturbed")

    def moves(p: CustomVJPPrimal) -> bool:
        return p.perturbed and jnp.issubdtype(p.value.dtype, jnp.inexact)

    mask = jax.tree.map(moves, tree, is_leaf=primal)
    values = jax.tree.map(lambda p: p.value, tree, is_leaf=primal)
    return weights.partition(values, mask)


# --- any function of one row's logits; the backward pass recomputes the logits ---

# the hidden states [S,R,D] of each model, followed by the other inputs [S,R,...] of the function
Rows = tuple[Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over(f: Callable[[tuple, Rows], Tree], vocab: int, trees: tuple, rows: Rows, mask: Array) -> Tree:
    """Computes f(heads, rows) chunk by chunk, and returns the results [S,R] for all rows.

    `vocab` is the number of logits per row.
    """
    copies = tuple(map(_sent, trees, rows))
    like = jax.eval_shape(f, copies, rows)

    def body(cut: Cut, start: Array, fresh: Array, out: Tree) -> Tree:
        counts = cut(mask) != 0
        new = f(copies, tuple(map(cut, rows)))
        return jax.tree.map(lambda o, n: _write(o, jnp.where(counts, n, 0), start, fresh), out, new)

    return _loop(mask, vocab, body, _zeros(like))


def _over_forward(f: Callable, vocab: int, trees: Tree, rows: Tree, mask: CustomVJPPrimal) -> tuple[Tree, tuple]:
    trained, frozen = _by_perturbed((trees, rows))
    trees, rows = weights.combine(trained, frozen)
    return _over(f, vocab, trees, rows, mask.value), (trained, frozen, mask.value)


def _over_backward(f: Callable, vocab: int, residuals: tuple, g: Tree) -> tuple:
    trained, frozen, mask = residuals
    _, xs = weights.combine(trained, frozen)
    heads, others = (tuple(map(_sent, part[0], xs)) for part in (trained, frozen))
    g = jax.tree.map(_instantiated, g, is_leaf=_is_symbolic)

    def body(cut: Cut, start: Array, fresh: Array, carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        d_heads, d_rows = carry
        counts = (cut(mask) != 0) & fresh
        rest = jax.tree.map(cut, frozen[1])
        chunk = lambda heads, rows: f(weights.combine(heads, others), weights.combine(rows, rest))
        _, pull = jax.vjp(chunk, heads, jax.tree.map(cut, trained[1]))
        more, new = pull(jax.tree.map(lambda a: jnp.where(counts, cut(a), 0), g))
        return jax.tree.map(jnp.add, d_heads, more), jax.tree.map(lambda d, n: _write(d, n, start, fresh), d_rows, new)

    zeros = (_copies(_zeros(trained[0]), mask.shape[0]), _zeros(trained[1]))
    d_heads, d_rows = _loop(mask, vocab, body, zeros)
    return _summed(d_heads), d_rows, None


_over.defvjp(_over_forward, _over_backward, symbolic_zeros=True)


def _is_symbolic(x: object) -> bool:
    return isinstance(x, SymbolicZero)


def _instantiated(g: Tree) -> Array:
    """Returns an output's cotangent as an array. JAX passes a symbolic zero for an unused output."""
    return jnp.zeros(g.shape, g.dtype) if _is_symbolic(g) else g
