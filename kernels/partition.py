"""Runs kernels on the devices of a mesh. XLA cannot partition a kernel, so each device multiplies by its own part of
W."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

Axes = tuple[str, ...]  # the mesh axes over which a dimension is sharded


def product(
    kernel: functools.partial,
    x: Array,
    w: Sequence[Array],
    rows: Sequence[Axes],
    split: tuple[Axes, Axes],
    backward: bool,
) -> Array:
    """Multiplies x [..., K] by W [K, N], or if `backward`, x [..., N] by the transposed W.

    The leading dimensions of x are sharded over the mesh axes `rows`. `w` contains the codes and the scales of W. The
    two dimensions of both are sharded over the mesh axes `split`. If a mesh axis shards both x and W, the packed W is
    all-gathered over this axis. If a mesh axis only shards W, there are two cases. If it shards the dimension that is
    summed, the partial sums are all-reduced over it. If it shards the other dimension, it also shards the result. The
    function `kernel(x, *w, dtype=)` multiplies matrices on one device.
    """
    taken = {a for axes in rows for a in axes}
    left = [tuple(a for a in axes if a not in taken) for axes in split]
    summed, made = left[::-1] if backward else left

    def local(x: Array, *w: Array) -> Array:
        w = _gather(w, split, taken)
        to = functools.partial(kernel, dtype=jnp.float32 if summed else x.dtype)
        y = once(to, x.reshape(-1, x.shape[-1]), *w)
        y = y.reshape(*x.shape[:-1], -1)
        return jax.lax.psum(y, summed).astype(x.dtype) if summed else y

    if not sharded():
        return local(x, *w)
    specs = P(*rows, summed), *[P(*split)] * len(w)
    return jax.shard_map(local, in_specs=specs, out_specs=P(*rows, made), check_vma=False)(x, *w)


def elementwise(kernel: functools.partial, w: Sequence[Array], split: tuple[Axes, Axes], gathered: set[str]) -> Array:
    """Computes `kernel(*w)` [K, N], such as a dequantized matrix. `w` contains codes and scales, sharded over `split`.

    The packed codes and the scales are first all-gathered over the mesh axes `gathered`.
    """
    if not sharded():
        return once(kernel, *w)
    local = lambda *w: once(kernel, *_gather(w, split, gathered))
    left = P(*[tuple(a for a in axes if a not in gathered) for axes in split])
    return jax.shard_map(local, in_specs=(P(*split),) * len(w), out_specs=left, check_vma=False)(*w)


def once(kernel: functools.partial, *args: Array) -> Array:
    """Calls `kernel(*args)`. Layers of the same shape share one trace, because tracing the NF4 kernel takes 0.1 s."""
    return _once(kernel.func, tuple(kernel.keywords.items()), *args)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _once(kernel: Callable, options: tuple, *args: Array) -> Array:
    return kernel(*args, **dict(options))


def sharded() -> bool:
    """Returns whether the current mesh (`jax.set_mesh`) has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def _gather(w: Sequence[Array], split: tuple[Axes, Axes], over: set[str]) -> list[Array]:
    for dim, axes in enumerate(split):
        if axes := tuple(a for a in axes if a in over):
            w = [jax.lax.all_gather(a, axes, axis=dim, tiled=True) for a in w]
    return list(w)
