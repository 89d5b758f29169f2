"""Computes y = x A B for a batch in which each row has its own LoRA factors A and B, of any rank.

The factors of all adapters are concatenated along the rank axis into two arrays, called stacks: A (transposed) of shape
[C,K] and B of shape [C,N]. Like a paged key-value cache, the stacks are divided into pages of PAGE rows. Each page
belongs to one adapter, and the last page of an adapter is padded with zeros (S-LoRA: Sheng et al. 2023, arXiv
2311.03285; Punica: Chen et al. 2023, arXiv 2310.18547).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from kernels import blocks, paged_lora_triton, partition
from kernels.partition import Axes

PAGE = 16  # number of rows of a stack per page; they fill one bfloat16 tile of a TPU
STEP = 8  # number of pages multiplied at once; their 128 rows fill an MXU

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


Indices = Array | np.ndarray | np.integer  # int32


class Route(NamedTuple):
    """The pages of LoRA factors that each row of a batch uses, stored as (page, row) pairs."""

    pages: Indices  # [P] the distinct pages in use, padded with -1; P is a multiple of STEP
    which: Indices  # [P] for each pair, the index of its page in `pages`, in ascending order
    row: Indices  # [P] for each pair, its row in the batch, padded with -1
    count: Indices  # [] (a scalar) the number of pairs


def route(pairs: list[tuple[int, int]], room: int) -> Route:
    """Builds a Route on the host from (page, row) pairs, and pads it to at least `room` pairs."""
    size = -(-max(room, 1) // STEP) * STEP
    none = np.full(size, -1, np.int32)
    out = Route(none, np.zeros(size, np.int32), none.copy(), np.int32(len(pairs)))
    if pairs:
        pages, out.row[: len(pairs)] = np.array(sorted(pairs)).T
        used, out.which[: len(pairs)] = np.unique(pages, return_inverse=True)
        out.pages[: len(used)] = used
    return out


def reference(x: Array, a: Array, b: Array, route: Route) -> Array:
    """Computes the same as `matmul` in a simple but slow way, as a reference for tests.

    Multiplies every batch row by the whole stacks, and sets the results to 0 for all pages that the row does not use.
    """
    page = jnp.where(route.row < 0, len(a), route.pages[route.which])
    one = jnp.zeros((len(x), len(a) // PAGE), x.dtype).at[route.row, page].set(1, mode="drop")
    own = jnp.repeat(one, PAGE, 1)[:, None]  # [B,1,C], a mask of the stack rows that each batch row uses
    a, b = a.astype(x.dtype), b.astype(x.dtype)
    return jnp.einsum("btc,cn->btn", jnp.einsum("btk,ck->btc", x, a) * own, b)


def product(
    x: Array, a: Array, b: Array, route: Route, rows: Sequence[Axes], split: Sequence[Axes], dtype: DTypeLike
) -> Array:
    """Multiplies each row of x [B,T,K] by its own pages of the stacks A [C,K] and B [C,N], and returns [B,T,N].

    If x is [B,T], it contains token ids, each of which selects a column of A. Under a mesh, the dimensions B and T are
    sharded over the mesh axes `rows`, and K and N over `split`. The stacks are not sent between devices. Each device
    first multiplies by its part of A, and then by its part of B. It processes only the batch rows that need this part,
    and reads only their pages. Between the two products, the small array x A is summed over the mesh axes that shard K,
    and over those that shard both N and the batch. If there are no such axes, one kernel computes both products, as on
    one device. Otherwise, a GPU runs one kernel per product, and a TPU runs loops in XLA.
    """
    if not partition.sharded():
        return matmul(x, a, b, route) if x.ndim == 3 else expand(lookup(x, a, route), b, route, len(x), dtype)
    (batch, tokens), (k, n) = rows, split
    first, last = (tuple(axis for axis in batch if axis not in taken) for taken in split)
    summed = (*k, *(axis for axis in batch if axis in n))
    size = len(x) // math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in last)

    def local(x: Array, a: Array, b: Array, route: Route) -> Array:
        here, _, back = own(route, first, len(x))
        if x.ndim == 3 and not summed:
            return matmul(x, a, b, here)
        low = shrink(x, a, here) if x.ndim == 3 else lookup(x - jax.lax.axis_index(k) * a.shape[1], a, here)
        low = jax.lax.psum(low.at[back].get(mode="fill", fill_value=0), summed)
        there, at, _ = own(route, last, size)
        return expand(low[at], b, there, size, dtype)

    at = P(first, tokens, k) if x.ndim == 3 else P(first, tokens)
    specs = at, P(None, k), P(None, n), P()
    return jax.shard_map(local, in_specs=specs, out_specs=P(last, tokens, n), check_vma=False)(x, a, b, route)


def own(route: Route, axes: Axes, rows: int) -> tuple[Route, Array | slice, Array | slice]:
    """Selects from `route` the pairs whose batch rows are on this device. Each device has `rows` batch rows.

    The batch is sharded over the mesh axes `axes`. Returns a Route of the selected pairs, and two index arrays [P]. The
    first array gives, for each selected pair, its index in `route`. The second array gives, for each pair in `route`,
    its index in the new Route, or P if the pair belongs to another device. Pairs are selected by comparisons, because
    sorting a few numbers would be slow on a device.
    """
    if not axes:
        return route, slice(None), slice(None)
    start, count = jax.lax.axis_index(axes) * rows, jnp.arange(len(route.row))

    def place(keep: Array) -> Array:
        """Numbers the kept elements 0, 1, 2, ... in order. All other elements get the number P."""
        return jnp.where(keep, jnp.cumsum(keep) - 1, len(count))

    def first(keep: Array) -> Array:
        """Returns the positions of the kept elements in ascending order."""
        return jnp.argmax(place(keep) == count[:, None], 1)

    mine = (route.row >= start) & (route.row < start + rows)
    used = (mine & (route.which == count[:, None])).any(1)
    at, there = first(mine), count < mine.sum()
    pages = jnp.where(count < used.sum(), route.pages[first(used)], -1)
    which = jnp.where(there, place(used)[route.which[at]], 0)
    row = jnp.where(there, route.row[at] - start, -1)
    return Route(pages, which, row, mine.sum(dtype=jnp.int32)), at, place(mine)


def matmul(x: Array, a: Array, b: Array, route: Route) -> Array:
    """Multiplies each row of x [B,T,K] by its own pages of the stacks a [C,K] and b [C,N], and returns [B,T,N].

    The result has the dtype of x, and is 0 for rows without a page.
    """
    if x.shape[1] > 1:
        return loop(x, a, b, route)
    cuda = lambda x, a, b, route: paged_lora_triton.matmul(x[:, 0], _pages(a), _pages(b), route)[:, None]
    kernels = {"cuda": cuda} | ({"tpu": decode} if supported(x, a, b) else {})
    return jax.lax.platform_dependent(x, a, b, route, default=loop, **kernels)


def loop(x: Array, a: Array, b: Array, route: Route) -> Array:
    """Computes `matmul` in XLA, with one loop that does the work of both `_shrink` and `_expand`.

    On a CPU, this is a few percent faster than two loops.
    """

    def some(at: Array, page: Array, who: Array, y: Array) -> Array:
        low = _einsum("wtk,wrk->wtr", x[who], _read(a, page, x.dtype))
        low = jnp.where((at < route.count)[:, None, None], low, 0).astype(x.dtype)
        return y.at[who].add(_einsum("wtr,wrn->wtn", low, _read(b, page, x.dtype)))

    return _fold(some, route, jnp.zeros((*x.shape[:2], b.shape[1]), jnp.float32), len(x)).astype(x.dtype)


def shrink(x: Array, a: Array, route: Route) -> Array:
    """For each of P pairs, multiplies its row of x by its page of A. Returns [P,T,PAGE] in float32, with 0 for unused
    pairs."""
    if x.shape[1] > 1:
        return _shrink(x, a, route)
    cuda = lambda x, a, route: paged_lora_triton.shrink(x[:, 0], _pages(a), route).sum(0)[:, None]
    return jax.lax.platform_dependent(x, a, route, cuda=cuda, default=_shrink)


def _shrink(x: Array, a: Array, route: Route) -> Array:
    def some(at: Array, page: Array, who: Array, low: Array) -> Array:
        part = _einsum("wtk,wrk->wtr", x[who], _read(a, page, x.dtype))
        return low.at[at].set(jnp.where((at < route.count)[:, None, None], part, 0))

    return _fold(some, route, jnp.zeros((len(route.row), x.shape[1], PAGE), jnp.float32), len(x))


def lookup(ids: Array, a: Array, route: Route) -> Array:
    """Computes `shrink` for one-hot vectors x, given as token `ids` [B,T].

    The result is 0 for ids outside the columns of A that this device has.
    """
    at, there = ids[route.row], (jnp.arange(len(route.row)) < route.count)[:, None]
    low = _pages(a).at[route.pages[route.which][:, None], :, at].get(mode="clip")
    return jnp.where((there & (at >= 0) & (at < a.shape[1]))[..., None], low, 0).astype(jnp.float32)


def expand(low: Array, b: Array, route: Route, rows: int, dtype: DTypeLike) -> Array:
    """Multiplies `low` [P,T,PAGE], the result of `shrink`, by B. Returns [B,T,N], the sum of the products for each
    batch row."""
    loop = lambda *args: _expand(*args, rows, dtype)
    if low.shape[1] > 1:
        return loop(low, b, route)
    cuda = lambda low, b, route: paged_lora_triton.expand(low[None, :, 0], _pages(b), route, rows, dtype)[:, None]
    return jax.lax.platform_dependent(low, b, route, cuda=cuda, default=loop)


def _expand(low: Array, b: Array, route: Route, rows: int, dtype: DTypeLike) -> Array:
    def some(at: Array, page: Array, who: Array, y: Array) -> Array:
        own = jnp.where((at < route.count)[:, None, None], low.at[at].get(mode="clip"), 0).astype(dtype)
        return y.at[who].add(_einsum("wtr,wrn->wtn", own, _read(b, page, dtype)))

    return _fold(some, route, jnp.zeros((rows, low.shape[1], b.shape[1]), jnp.float32), rows).astype(dtype)


def _pages(stack: Array) -> Array:
    return stack.reshape(-1, PAGE, stack.shape[1])


def _read(stack: Array, page: Array, dtype: DTypeLike) -> Array:
    """Reads pages of a stack. Without the barrier, XLA would convert the whole stack to float32 before the loop on a
    CPU."""
    stack, page = jax.lax.optimization_barrier((stack, page))
    return _pages(stack)[page].astype(dtype)


def _fold(some: Callable, route: Route, start: Array, rows: int) -> Array:
    """Loops over all pairs of a row and a page. Each step calls `some` with the numbers of some pairs, the pages and
    rows of these pairs, and the result so far; the call returns the new result.

    With one token per row, a step processes B pairs. With more tokens per row, a step processes one pair, as a product
    of matrices.
    """
    width, pages = rows if start.shape[1] == 1 else 1, route.pages[route.which]

    def step(i: Array, result: Array) -> Array:
        at = i * width + jnp.arange(width)
        page, who = (v.at[at].get(mode="clip") for v in (pages, route.row))
        return some(at, page, who, result)

    return jax.lax.fori_loop(0, -(-route.count // width), step, start)


def supported(x: Array, a: Array, b: Array) -> bool:
    """Returns whether `decode` accepts these arrays.

    K and N must be multiples of 128, so that XLA stores the stacks in the layout that the kernel reads. The blocks must
    fit in VMEM. The dtype must not be float16, because TPUs do not support it.
    """
    rows, k, n = -(-len(x) // 16) * 16, a.shape[1], b.shape[1]
    memory = 2 * STEP * PAGE * (k + n) * a.dtype.itemsize + rows * (2 * k * x.dtype.itemsize + 3 * n * 4)
    return a.dtype != jnp.float16 and k % 128 == n % 128 == 0 and memory < blocks.VMEM


def decode(x: Array, a: Array, b: Array, route: Route) -> Array:
    """Computes `matmul` on a TPU for one token per row, and sums in float32.

    Each page is read once, even if several rows use it. The kernel loads the pages of a step while it multiplies by the
    pages of the previous step. All rows of x are multiplied by each page, because the MXU takes little longer for 128
    rows than for one row. The product of a row and a page that it does not use is then set to 0.
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
        scratch_shapes=[*(pltpu.VMEM((2, STEP * PAGE, w), a.dtype) for w in (k, n)), pltpu.SemaphoreType.DMA((2,))],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=blocks.VMEM, disable_bounds_checks=True
        ),
    )(route.pages, route.which[:, None], route.row[None], x[:, 0], a, b)
    return y[:, None].astype(x.dtype)


def _decode(
    pages: Ref, which_ref: Ref, row_ref: Ref, x_ref: Ref, a_ref: Ref, b_ref: Ref, y_ref: Ref,
    a_room: Ref, b_room: Ref, arrived: Ref,
) -> None:  # fmt: skip
    """The kernel that `decode` runs. `pages` [P] is in scalar memory, `which` is [P,1], and `row` is [1,P].

    A and B have two buffers each: while one is being loaded, the kernel multiplies by the other.
    """
    step = pl.program_id(0)
    within = lambda i: pl.ds(i * PAGE, PAGE)

    def each(step: Array, do: Callable) -> None:
        """Calls `do` (start or wait) on the asynchronous copies of A and B for each page of a step."""
        for i in range(STEP):
            page, into, done = pages[step * STEP + i], (step % 2, within(i)), arrived.at[step % 2]

            @pl.when(page >= 0)
            def _(page: Array = page, into: tuple = into, done: Ref = done) -> None:
                rows = pl.ds(page * PAGE, PAGE)
                for stack, room in ((a_ref, a_room), (b_ref, b_room)):
                    do(pltpu.make_async_copy(stack.at[rows], room.at[into], done))

    @pl.when(step < pl.num_programs(0) - 1)
    def _() -> None:
        each(step, lambda copy: copy.start())

        @pl.when((pages[step * STEP] >= 0) & (pages[step * STEP + STEP - 1] < 0))
        def _() -> None:  # buffers without a page may contain NaN, and 0 * NaN is NaN
            for i in range(STEP):

                @pl.when(pages[step * STEP + i] < 0)
                def _(i: int = i) -> None:
                    b_room[step % 2, within(i)] = jnp.zeros((PAGE, b_room.shape[2]), b_room.dtype)

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
    """Multiplies x [B,K] by the pages of a step, A [STEP * PAGE,K] and B [STEP * PAGE,N], and returns [B,N].

    The product of a row and a page that it does not use is set to 0.
    """
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    iota = lambda shape, axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    one = lambda mask: jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)
    pairs, ranks = row.shape[1], len(a)
    from_row = one(iota((len(x), pairs), 0) == row)
    to_page = one(iota((pairs, ranks), 1) >> PAGE.bit_length() - 1 == which)
    own = dot(from_row, to_page)  # [B, STEP PAGE]
    low = jnp.where(own > 0, dot(x, a.astype(x.dtype).T), 0).astype(x.dtype)
    return dot(low, b.astype(x.dtype))
