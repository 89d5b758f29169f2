"""y = x A B for a batch whose rows each have their own A and B, of any rank, out of one stack of rank rows.

Rank rows are found as a paged key-value cache finds its tokens: the stacks are cut into pages of BLOCK rows, each of
one adapter. Nothing is padded but an adapter's last page, with zeros (S-LoRA: Sheng et al. 2023, arXiv 2311.03285;
Punica: Chen et al. 2023, arXiv 2310.18547).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import blocks
from kernels.cases import Case, array

BLOCK = 16  # rank rows of a page: a tile of bfloat16
STEP = 8  # pages that the kernel multiplies at once: 128 rank rows fill an MXU


class Route(NamedTuple):
    """Which pages of the stacks each row of a batch uses, as pairs of a page and a row."""

    pages: Any  # [P] in use, each once, then -1; P is a multiple of STEP
    which: Any  # [P] of each pair the place in `pages`, in its order
    row: Any  # [P] of each pair, then -1
    count: Any  # [] of pairs


def route(pairs: list[tuple[int, int]], room: int) -> Route:
    """The Route of pairs of a page and a row, with room for so many, on the host."""
    size = -(-max(room, 1) // STEP) * STEP
    none = np.full(size, -1, np.int32)
    out = Route(none, np.zeros(size, np.int32), none.copy(), np.int32(len(pairs)))
    if pairs:
        pages, out.row[: len(pairs)] = np.array(sorted(pairs)).T
        used, out.which[: len(pairs)] = np.unique(pages, return_inverse=True)
        out.pages[: len(used)] = used
    return out


def reference(x: Array, a: Array, b: Array, route: Route) -> Array:
    """What `matmul` computes, at the price of all rank rows for every row of the batch."""
    a, b = a.astype(x.dtype), b.astype(x.dtype)
    return jnp.einsum("btc,cn->btn", jnp.einsum("btk,ck->btc", x, a) * owned(x, a, route)[:, None], b)


def owned(x: Array, a: Array, route: Route) -> Array:
    """[B,C]: 1 where a rank row belongs to a row of the batch."""
    page = jnp.where(route.row < 0, len(a), route.pages[route.which])
    one = jnp.zeros((len(x), len(a) // BLOCK), x.dtype).at[route.row, page].set(1, mode="drop")
    return jnp.repeat(one, BLOCK, 1)


def matmul(x: Array, a: Array, b: Array, route: Route) -> Array:
    """x [B,T,K], stacks a [C,K] and b [C,N] -> [B,T,N] in x's dtype, zero for rows without a page."""
    if x.shape[1] > 1 or not supported(x, a, b):
        return loop(x, a, b, route)
    return jax.lax.platform_dependent(x, a, b, route, tpu=decode, default=loop)


def loop(x: Array, a: Array, b: Array, route: Route) -> Array:
    """`matmul` by XLA. Pages are read B at a time for a token a row, and one at a time for more: then each is a product
    of two matrices."""
    width = len(x) if x.shape[1] == 1 else 1
    a, b = (w.reshape(-1, BLOCK, w.shape[1]) for w in (a, b))
    pages = route.pages[route.which]

    def some(i: Array, y: Array) -> Array:
        at = i * width + jnp.arange(width)
        page, who = (v.at[at].get(mode="clip") for v in (pages, route.row))
        low = jnp.einsum("wtk,wrk->wtr", x[who], a[page].astype(x.dtype), preferred_element_type=jnp.float32)
        low = jnp.where((at < route.count)[:, None, None], low, 0).astype(x.dtype)
        part = jnp.einsum("wtr,wrn->wtn", low, b[page].astype(x.dtype), preferred_element_type=jnp.float32)
        return y.at[who].add(part)

    start = jnp.zeros((*x.shape[:2], b.shape[2]), jnp.float32)
    return jax.lax.fori_loop(0, -(-route.count // width), some, start).astype(x.dtype)


def supported(x: Array, a: Array, b: Array) -> bool:
    """Whether `decode` takes these: XLA lays out stacks of whole registers as it reads them, and the VMEM is enough.

    TPUs have no float16.
    """
    rows, k, n = -(-len(x) // 16) * 16, a.shape[1], b.shape[1]
    memory = 2 * STEP * BLOCK * (k + n) * a.dtype.itemsize + rows * (2 * k * x.dtype.itemsize + 3 * n * 4)
    return a.dtype != jnp.float16 and k % 128 == n % 128 == 0 and memory < blocks.VMEM


def decode(x: Array, a: Array, b: Array, route: Route) -> Array:
    """`matmul` of a token a row on a TPU, summed in float32.

    A page is read once, whoever uses it, while those of the step before are multiplied: by all of x, since a product
    with 128 rows takes the MXU little longer than with one; then each row keeps what is its own.
    """
    rows, k, n, pairs = len(x), a.shape[1], b.shape[1], len(route.row)
    whole = lambda *shape: pl.BlockSpec(shape, lambda i: (0, 0))
    scalars, anywhere = (pl.BlockSpec(memory_space=space) for space in (pltpu.SMEM, pl.ANY))
    y = pl.pallas_call(
        _decode,
        grid=(len(route.pages) // STEP + 1,),
        in_specs=[scalars, whole(pairs, 1), whole(1, pairs), whole(rows, k), anywhere, anywhere],
        out_specs=whole(rows, n),
        out_shape=jax.ShapeDtypeStruct((rows, n), jnp.float32),
        scratch_shapes=[*(pltpu.VMEM((2, STEP * BLOCK, w), a.dtype) for w in (k, n)), pltpu.SemaphoreType.DMA((2,))],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=blocks.VMEM, disable_bounds_checks=True
        ),
    )(route.pages, route.which[:, None], route.row[None], x[:, 0], a, b)
    return y[:, None].astype(x.dtype)


def _decode(
    pages: Any, which_ref: Any, row_ref: Any, x_ref: Any, a_ref: Any, b_ref: Any, y_ref: Any,
    a_room: Any, b_room: Any, arrived: Any,
) -> None:  # fmt: skip
    """`pages` [P] of scalars; `which` [P,1] and `row` [1,P]; two rooms for the pages of a step of A and of B."""
    step = pl.program_id(0)
    within = lambda i: pl.ds(i * BLOCK, BLOCK)

    def each(step: Array, do: Callable) -> None:
        """`do(copy)` for both copies of each page of a step."""
        for i in range(STEP):
            page, into, done = pages[step * STEP + i], (step % 2, within(i)), arrived.at[step % 2]

            @pl.when(page >= 0)
            def _(page: Array = page, into: tuple = into, done: Any = done) -> None:
                rows = pl.ds(page * BLOCK, BLOCK)
                for stack, room in ((a_ref, a_room), (b_ref, b_room)):
                    do(pltpu.make_async_copy(stack.at[rows], room.at[into], done))

    @pl.when(step < pl.num_programs(0) - 1)
    def _() -> None:
        each(step, lambda copy: copy.start())

        @pl.when((pages[step * STEP] >= 0) & (pages[step * STEP + STEP - 1] < 0))
        def _() -> None:  # where no page comes lies anything, and no number times zero is none
            for i in range(STEP):

                @pl.when(pages[step * STEP + i] < 0)
                def _(i: int = i) -> None:
                    b_room[step % 2, within(i)] = jnp.zeros((BLOCK, b_room.shape[2]), b_room.dtype)

    @pl.when(step == 0)
    def _() -> None:
        y_ref[...] = jnp.zeros_like(y_ref)

    done = step - 1

    @pl.when((step > 0) & (pages[jnp.maximum(done, 0) * STEP] >= 0))
    def _() -> None:
        each(done, lambda copy: copy.wait())
        half = done % 2
        y_ref[...] += _product(x_ref[...], a_room[half], b_room[half], which_ref[...] - done * STEP, row_ref[...])


def _product(x: Array, a: Array, b: Array, which: Array, row: Array) -> Array:
    """x [B,K], the pages of a step in A [STEP BLOCK,K] and B [STEP BLOCK,N] -> [B,N], float32."""
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    iota = lambda shape, axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    one = lambda mask: jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)
    pairs, ranks = row.shape[1], len(a)
    from_row = one(iota((len(x), pairs), 0) == row)
    to_page = one(iota((pairs, ranks), 1) >> BLOCK.bit_length() - 1 == which)
    own = dot(from_row, to_page)  # [B, STEP BLOCK]
    low = jnp.where(own > 0, dot(x, a.astype(x.dtype).T), 0).astype(x.dtype)
    return dot(low, b.astype(x.dtype))


def cases() -> Iterator[Case]:
    """Decoding with an adapter of its own for each row, of ranks 8 to 64, their pages all that the stacks hold."""
    flat = lambda f: lambda x, a, b, *r: f(x[:, None], a, b, Route(*r))[:, 0]
    for rows, dtype in ((16, "bfloat16"), (64, "bfloat16"), (64, "float32")):
        pages = sum(-(-(8 + 13 * i % 57) // BLOCK) for i in range(rows))
        stack, pairs = array(pages * BLOCK, 4096, dtype=dtype), array(-(-pages // STEP) * STEP, dtype="int32")
        args = array(rows, 4096, dtype=dtype), stack, stack, pairs, pairs, pairs, array(dtype="int32")
        name = f"{rows} adapters, {pages} pages, 4096x4096 {dtype}"
        yield Case("paged lora", name, flat(decode), flat(loop), args, peak="", quick=rows == 16)
