"""Products with a quantized leaf: by a kernel if the platform has a suitable one, else by XLA with a float matrix.

A kernel multiplies the rows of x on one device by that device's part of the matrix. XLA computes all other products:
with experts, with offsets, and with formats that have no kernel. The files in `kernels/` describe each kernel.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model import weights
from model.quant._matrix import align, letters, round_rows, spread, transposed
from model.weights import AXES

if TYPE_CHECKING:
    from model.quant._leaf import Quantized

ACTIVATIONS = {"B": "act_batch", "T": "act_seq"}  # letter of an activation -> logical axis
Axes = tuple[str, ...]  # mesh axes over which a dimension is sharded
Kernel = Callable[..., Array]  # (x [M,K], codes, scale, group=, dtype=) -> [M,N]


def einsum(eqn: str, x: Array, leaf: "Quantized") -> Array:
    """`jnp.einsum` of x and the weight that a leaf represents, without its `inverse`."""
    if weights.split(eqn)[1] != letters(leaf.eqn)[1]:  # N is contracted, which the formats do not support
        return weights.product(eqn, x, jax.lax.stop_gradient(leaf.floats(x.dtype)))
    return _product(eqn, x, leaf)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(eqn: str, x: Array, leaf: "Quantized") -> Array:
    return routed(eqn, x, leaf)


def _forward(eqn: str, x: Array, leaf: "Quantized") -> tuple[Array, "Quantized"]:
    return routed(eqn, x, leaf), leaf


def _backward(eqn: str, leaf: "Quantized", g: Array) -> tuple[Array, None]:
    """Only the codes are kept for the backward pass, which dequantizes the matrix again."""
    return routed(eqn, g, leaf, backward=True), None


_product.defvjp(_forward, _backward)


def routed(eqn: str, x: Array, leaf: "Quantized", backward: bool = False) -> Array:
    """The product; if `backward`, its gradient with respect to the activation, and x is the gradient of the result."""
    from kernels import partition

    by_xla = partial(gradient if backward else product, eqn)
    xs, _, out = weights.operands(eqn)
    _, contracted, produced = weights.split(eqn)
    kept = xs.removesuffix(contracted)
    if (xs, out) != (kept + contracted, kept + produced) or leaf.codes.ndim > 2 or leaf.offset is not None:
        return by_xla(x, leaf)
    lead, side = x.shape[: len(kept)], contracted if backward else produced
    rows = weights.mesh_axes([ACTIVATIONS.get(c) for c in kept], lead)
    found = kernels(leaf, math.prod(lead) // weights.shards(*sum(rows, ())), x.dtype, backward)
    if not found:
        return by_xla(x, leaf)

    def run(kernel: Kernel, x: Array, *w: Array) -> Array:
        kernel = partial(kernel, group=leaf.tile[0])
        y = partition.product(kernel, x.reshape(*lead, -1), w, rows, _split(leaf), backward)
        return y[..., : leaf.kn[0 if backward else 1]].reshape(*lead, *leaf.sizes_of(side))

    routes = {platform: partial(run, kernel) for platform, kernel in found.items()}
    default = lambda x, *_: by_xla(x, leaf)
    return jax.lax.platform_dependent(x, leaf.in_order(leaf.codes), leaf.scales(), default=default, **routes)


def kernels(leaf: "Quantized", rows: int, dtype: DTypeLike, backward: bool) -> dict[str, Kernel]:
    """{platform: kernel} to multiply `rows` rows of x per device by the matrix, or by its transpose if `backward`."""
    from kernels import codes_triton, few_rows, int4_matmul, nf4

    found: dict[str, Kernel] = {}
    if leaf.activations:
        return found
    (k, n), group, is_transposed = _part(leaf), leaf.tile[0], transposed(leaf.eqn)
    if not backward and leaf.unpack_rows and few_rows.supported(rows, k, group, is_transposed):
        found["cpu"] = partial(few_rows.matmul, unpack_rows=leaf.unpack_rows, transposed=is_transposed)
    if is_transposed:
        return found
    if not backward and leaf.tile[1] == 1 and codes_triton.supported(leaf.kernel_format, rows, k, group, dtype):
        found["cuda"] = partial(codes_triton.matmul, form=codes_triton.FORMS[leaf.kernel_format])
    if leaf.kernel_format == "int4" and dtype == jnp.bfloat16 and int4_matmul.supported(k, n, group):
        found["tpu"] = int4_matmul.gradient if backward else int4_matmul.matmul
    if _looked_up(leaf, dtype) and not backward and rows <= nf4.FEW:
        found["tpu"] = nf4.matmul
    return found


def _looked_up(leaf: "Quantized", dtype: DTypeLike) -> bool:
    """Whether there is a TPU kernel that dequantizes the leaf by looking up its levels."""
    from kernels import nf4

    if leaf.kernel_format != "nf4" or dtype != jnp.bfloat16 or leaf.codes.ndim > 2 or transposed(leaf.eqn):
        return False
    return leaf.tile[0] < leaf.kn[0] and nf4.supported(*_part(leaf), leaf.tile[0])


def _split(leaf: "Quantized") -> tuple[Axes, Axes]:
    """The mesh axes over which the rows and the columns of the leaf's matrix are sharded; tiles are never split."""
    _, k, n = letters(leaf.eqn)
    tiles = [size // t if size % t == 0 else 1 for size, t in zip(leaf.kn, leaf.tile)]
    rows, columns = (a if len(a) == 1 else () for a in weights.mesh_axes((AXES[k[0]], AXES[n[0]]), tiles))
    return rows, columns


def _part(leaf: "Quantized") -> tuple[int, int]:
    """The number of rows and of columns of the leaf's matrix per device."""
    k, n = (size // weights.shards(*axes) for size, axes in zip(leaf.kn, _split(leaf)))
    return k, n


# --- products computed by XLA ---


def product(eqn: str, x: Array, leaf: "Quantized") -> Array:
    """The product, with the matrix as an array. If the leaf has `activations` (W8A8), x is rounded too, per
    token, with a straight-through gradient, except for experts."""
    xs, _, out = weights.operands(eqn)
    shared, contracted, _ = weights.split(eqn)
    to_columns = lambda scale: align(scale, letters(leaf.eqn)[2], out)
    if leaf.activations and not shared:
        q, per_token = round_rows(x, xs, contracted)
        w, scale = _factors(leaf, jnp.int8)
        y = product_of_codes(eqn, q, w) * align(per_token, xs, out) * to_columns(scale)
        return y.astype(x.dtype)
    w, scale = _factors(leaf, x.dtype)
    y = weights.product(eqn, x, w, jnp.float32)
    return (y if scale is None else y * to_columns(scale)).astype(x.dtype)


def gradient(eqn: str, g: Array, leaf: "Quantized") -> Array:
    """The gradient of `product` with respect to x, where g is the gradient of the result of `product`."""
    xs, ws, out = weights.operands(eqn)
    w, scale = _factors(leaf, g.dtype)
    g = g if scale is None else (g * align(scale, letters(leaf.eqn)[2], out)).astype(g.dtype)
    return weights.product(f"{out},{ws}->{xs}", g, w, jnp.float32).astype(g.dtype)


def product_of_codes(eqn: str, a: Array, b: Array) -> Array:
    """The product of two int8 arrays, in float32."""
    return weights.product(eqn, a, b, jnp.int32).astype(jnp.float32)


def _factors(leaf: "Quantized", dtype: DTypeLike) -> tuple[Array, Array | None]:
    """(array, scale per column), whose product is the weight. If one scale per column does not suffice, it is None."""
    shared, _, n = letters(leaf.eqn)
    if leaf.tile[0] < leaf.kn[0] or leaf.offset is not None or shared:
        return _dequantized(leaf, dtype), None
    scale = spread(leaf.scales().astype(jnp.float32), leaf.tile, (1, leaf.kn[1]))
    array = leaf.shaped(leaf.numbers(leaf.in_order(leaf.codes))).astype(dtype)
    return array, jnp.broadcast_to(scale, (1, leaf.kn[1])).reshape(leaf.sizes_of(n))


def _dequantized(leaf: "Quantized", dtype: DTypeLike) -> Array:
    """The weight as an array, dequantized on a TPU by a kernel if there is one."""
    from kernels import nf4, partition

    plain = lambda *_: leaf.shaped(leaf.matrix()).astype(dtype)
    if not _looked_up(leaf, dtype):
        return plain()
    rows = {a for axes in weights.mesh_axes(list(ACTIVATIONS.values()), (0, 0)) for a in axes}
    kernel = partial(nf4.dequantize, group=leaf.tile[0])

    def by_kernel(codes: Array, scale: Array) -> Array:
        m = partition.elementwise(kernel, (codes, scale.astype(jnp.float32)), _split(leaf), rows)
        return leaf.shaped(m[:, : leaf.kn[1]])

    return jax.lax.platform_dependent(leaf.codes, leaf.scales(), tpu=by_kernel, default=plain)


def for_inference(leaf: "Quantized") -> "Quantized | Array":
    """The leaf of one layer, prepared for decoding on one device.

    A CPU without a suitable kernel multiplies floats. They are computed once, since otherwise every step would
    allocate and write the floats of all layers. For the TPU kernel, the columns are padded to a multiple of 128 if
    XLA would otherwise store the bytes column-major.
    On a mesh the leaf stays unchanged: a second-level scale may span shards, so decoding it would need collectives.
    """
    from kernels import packing, partition

    platform, plain = weights.platform(), leaf.codes.ndim == 2 and leaf.offset is None
    if partition.sharded():
        return leaf
    if platform == "cpu" and leaf.inverse is None and not leaf.activations:
        by_kernel = plain and "cpu" in kernels(leaf, 1, jnp.float32, False)
        return leaf if by_kernel else leaf.floats(jnp.float32)
    if platform != "tpu" or not plain or not packing.by_columns(*leaf.codes.shape):
        return leaf
    if "tpu" not in kernels(leaf, 1, jnp.bfloat16, False):
        return leaf
    leaf, n = leaf.plain_scales(), leaf.kn[1]
    wide = lambda a: jnp.pad(a, ((0, 0), (0, -n % packing.LANES)))
    return leaf.replace(codes=wide(leaf.codes), scale=wide(leaf.scale))
