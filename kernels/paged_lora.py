"""y = x A B for a batch whose rows each have their own A and B, of any rank, out of one stack of rank rows.

Rank rows are found as a paged key-value cache finds its tokens: a page is BLOCK numbers of rows of the stack, in any
order, that belong to one row of the batch. Nothing is padded but a row's last page (S-LoRA: Sheng et al. 2023, arXiv
2311.03285; Punica: Chen et al. 2023, arXiv 2310.18547).
"""

import jax
import jax.numpy as jnp
from jax import Array

BLOCK = 16  # rank rows of a page


def reference(x: Array, a: Array, b: Array, pages: Array, row: Array, count: Array) -> Array:
    """What `matmul` computes, at the price of all rank rows for every row of the batch."""
    return jnp.einsum("btc,cn->btn", jnp.einsum("btk,ck->btc", x, a) * owned(x, a, pages, row, count)[:, None], b)


def owned(x: Array, a: Array, pages: Array, row: Array, count: Array) -> Array:
    """[B,C]: 1 where a rank row belongs to a row of the batch."""
    at = jnp.where((pages >= 0) & (jnp.arange(len(pages)) < count)[:, None], pages, len(a))
    return jnp.zeros((len(x), len(a)), x.dtype).at[row[:, None], at].set(1, mode="drop")


def matmul(x: Array, a: Array, b: Array, pages: Array, row: Array, count: Array) -> Array:
    """x [B,T,K], stacks a [C,K] and b [C,N] -> [B,T,N] in x's dtype, zero for rows without a page.

    `pages` [P,BLOCK] holds rank rows, -1 where it is not full; page i serves row[i] [P] of the batch, and those from
    `count` [] on serve nobody. Pages are read B at a time for a token a row, one at a time for more: on a CPU gathers
    of single vectors are as fast as memory, while a page and the tokens of a prompt make a product of two matrices.
    """
    width = len(x) if x.shape[1] == 1 else 1

    def some(i: Array, y: Array) -> Array:
        at = i * width + jnp.arange(width)
        page, who = pages.at[at].get(mode="clip"), row.at[at].get(mode="clip")
        live = (page >= 0) & (at < count)[:, None]
        low = jnp.einsum("wtk,wrk->wtr", x[who], a[page], preferred_element_type=jnp.float32) * live[:, None]
        part = jnp.einsum("wtr,wrn->wtn", low.astype(x.dtype), b[page], preferred_element_type=jnp.float32)
        return y.at[who].add(part)

    start = jnp.zeros((*x.shape[:2], b.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, -(-count // width), some, start).astype(x.dtype)
