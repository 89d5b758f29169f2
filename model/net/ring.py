"""Ring attention (Liu et al. 2023, arXiv 2310.01889): exact attention when the mesh axis "context" shards sequences.

Each shard keeps its own queries. The blocks of keys and values are passed around the ring of shards, once in the
forward pass and once in the backward pass. A shard stores the attention scores of only one block at a time. So the
memory per shard for scores is inversely proportional to the square of the number of shards.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from model.net.attention import mask

FAR = 1 << 30  # a window size so large that the window has no effect
Ids = tuple[Array, Array]  # positions and segments [B,T]
Residuals = tuple[Array, Array, Array, Ids, Array, Array, Array, Array]  # q, k, v, ids, window, out, top, total
Carry = TypeVar("Carry")
Block = TypeVar("Block")


def ring_attention(
    q: Array, k: Array, v: Array, positions: Array, segments: Array, window: int | Array = FAR, causal: bool = True
) -> Array:
    """Computes `attention` for q [B,T,N,H], k and v [B,K,T,H].

    Positions [B,T], segments [B,T] and `window` define the mask. `window` may be a traced value. T must be a multiple
    of the size of the mesh axis "context". XLA's partitioner handles the other mesh axes.
    """
    rows, keys = P(None, "context"), P(None, None, "context")
    ring = functools.partial(_ring, causal)
    local = jax.shard_map(
        ring, in_specs=(rows, keys, keys, rows, rows, P()), out_specs=rows, axis_names={"context"}, check_vma=False
    )
    return local(q, k, v, positions, segments, jnp.int32(window))


def _grouped(x: Array, k: Array) -> Array:
    """Groups query heads by the key head that they share: [B,T,N,H] -> [B,K,G,T,H]."""
    B, T, N, H = x.shape
    return x.reshape(B, T, k.shape[1], N // k.shape[1], H).transpose(0, 2, 3, 1, 4)


def _flat(x: Array) -> Array:
    """The inverse of `_grouped`."""
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, q_ids: Ids, k_ids: Ids, window: Array, causal: bool) -> tuple[Array, Array]:
    """Returns (masked float32 scores [B,K,G,T,S], mask) for queries q [B,K,G,T,H] and a block of keys k [B,K,S,H]."""
    see = mask(*q_ids, *k_ids, window, causal)[:, None, None]
    return jnp.where(see, _dot("BKGTH,BKSH->BKGTS", q, k) * q.shape[-1] ** -0.5, -1e30), see


def _around(step: Callable[[Carry, Block], tuple[Carry, Block]], carry: Carry, block: Block) -> tuple[Carry, Block]:
    """Passes the blocks around the ring. Runs `carry, block = step(carry, block)` on each block that arrives.

    At the end, every block is back on its own shard.
    """
    n = jax.lax.axis_size("context")
    onward = [(i, (i + 1) % n) for i in range(n)]

    def turn(both: tuple[Carry, Block], _: None) -> tuple[tuple[Carry, Block], None]:
        carry, block = step(*both)
        return (carry, jax.tree.map(lambda x: jax.lax.ppermute(x, "context", onward), block)), None

    return jax.lax.scan(turn, (carry, block), None, length=n)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(causal: bool, q: Array, k: Array, v: Array, positions: Array, segments: Array, window: Array) -> Array:
    return _forward(causal, q, k, v, positions, segments, window)[0]


def _forward(
    causal: bool, q: Array, k: Array, v: Array, positions: Array, segments: Array, window: Array
) -> tuple[Array, Residuals]:
    """Computes an online softmax over all blocks. Whenever the running maximum `top` rises, the sums are rescaled."""
    ids, x = (positions, segments), _grouped(q, k)

    def step(carry: tuple[Array, Array, Array], block: tuple[Array, Array, Ids]) -> tuple:
        out, top, total = carry
        k, v, k_ids = block
        scores, _ = _scores(x, k, ids, k_ids, window, causal)
        new = jnp.maximum(top, scores.max(-1))
        probs, shrink = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
        out = out * shrink[..., None] + _dot("BKGTS,BKSH->BKGTH", probs.astype(v.dtype), v)
        return (out, new, total * shrink + probs.sum(-1)), block

    zero = jnp.zeros(x.shape, jnp.float32)
    (out, top, total), _ = _around(step, (zero, zero[..., 0] - 1e30, zero[..., 0]), (k, v, ids))
    out = _flat(out / total[..., None]).astype(q.dtype)
    return out, (q, k, v, ids, window, out, top, total)


def _backward(causal: bool, residuals: Residuals, g: Array) -> tuple:
    """Recomputes the attention probabilities from `top` and `total`.

    The gradients for a block of keys and values are passed around the ring together with the block.
    """
    q, k, v, ids, window, out, top, total = residuals
    x, g, out = (_grouped(a, k) for a in (q, g, out))
    delta = _dot("BKGTH,BKGTH->BKGT", g, out)

    def step(dx: Array, block: tuple[Array, Array, Ids, Array, Array]) -> tuple[Array, tuple]:
        k, v, k_ids, dk, dv = block
        scores, see = _scores(x, k, ids, k_ids, window, causal)
        probs = jnp.exp(scores - top[..., None]) / total[..., None]
        dv = dv + _dot("BKGTS,BKGTH->BKSH", probs.astype(g.dtype), g)
        ds = probs * (_dot("BKGTH,BKSH->BKGTS", g, v) - delta[..., None]) * x.shape[-1] ** -0.5
        ds = jnp.where(see, ds, 0).astype(k.dtype)
        dk = dk + _dot("BKGTS,BKGTH->BKSH", ds, x)
        return dx + _dot("BKGTS,BKSH->BKGTH", ds, k), (k, v, k_ids, dk, dv)

    def zeros(a: Array) -> Array:
        return jnp.zeros(a.shape, jnp.float32)

    dx, (*_, dk, dv) = _around(step, zeros(x), (k, v, ids, zeros(k), zeros(v)))
    return _flat(dx).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_ring.defvjp(_forward, _backward)
