"""Multiplies activations by a quantized weight, with a custom kernel if a suitable one exists, and otherwise with XLA.

On each device, the kernel multiplies the device's rows of x by the device's part of the quantized matrix. If no kernel
is used, XLA converts the matrix to floats and multiplies by it. This is the case for experts, for weights with offsets,
and for formats that have no kernel. The kernels are described in `kernels/`.
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

ACTIVATIONS = {"B": "act_batch", "T": "act_seq"}  # {letter of an activation axis: logical axis}
Axes = tuple[str, ...]  # the mesh axes that shard a dimension
Kernel = Callable[..., Array]  # kernel(x [M,K], codes, scale, group=, dtype=) -> [M,N]


def einsum(eqn: str, x: Array, leaf: "Quantized") -> Array:
    """Computes `jnp.einsum` of x and a quantized weight. The caller must have multiplied x by `leaf.inverse`."""
    if weights.split(eqn)[1] != letters(leaf.eqn)[1]:  # a sum over N, which no kernel supports
        return weights.product(eqn, x, jax.lax.stop_gradient(leaf.floats(x.dtype)))
    return _product(eqn, x, leaf)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(eqn: str, x: Array, leaf: "Quantized") -> Array:
    return routed(eqn, x, leaf)


def _forward(eqn: str, x: Array, leaf: "Quantized") -> tuple[Array, "Quantized"]:
    return routed(eqn, x, leaf), leaf


def _backward(eqn: str, leaf: "Quantized", g: Array) -> tuple[Array, None]:
    """Dequantizes the matrix again, because the forward pass saves only its codes for the backward pass."""
    return routed(eqn, g, leaf, backward=True), None


_product.defvjp(_forward, _backward)


def routed(eqn: str, x: Array, leaf: "Quantized", backward: bool = False) -> Array:
    """Multiplies x by a quantized weight, with a kernel or with XLA.

    If `backward`, x is the gradient for the product, and the result is the gradient for the activation.
    """
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
    """Returns the kernels that can multiply `rows` rows of x per device by the quantized matrix, as {platform: kernel}.

    If `backward`, the kernels multiply by the transposed matrix.
    """
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
    """Returns whether a TPU kernel can dequantize the weight with a lookup table."""
    from kernels import nf4

    if leaf.kernel_format != "nf4" or dtype != jnp.bfloat16 or leaf.codes.ndim > 2 or transposed(leaf.eqn):
        return False
    return leaf.tile[0] < leaf.kn[0] and nf4.supported(*_part(leaf), leaf.tile[0])


def _split(leaf: "Quantized") -> tuple[Axes, Axes]:
    """Returns the mesh axes that shard the rows and the columns of the quantized matrix.

    Tiles are never split between devices, because their weights share a scale.
    """
    _, k, n = letters(leaf.eqn)
    tiles = [size // t if size % t == 0 else 1 for size, t in zip(leaf.kn, leaf.tile)]
    rows, columns = (a if len(a) == 1 else () for a in weights.mesh_axes((AXES[k[0]], AXES[n[0]]), tiles))
    return rows, columns


def _part(leaf: "Quantized") -> tuple[int, int]:
    """Returns the number of rows and columns of the quantized matrix on each device."""
    k, n = (size // weights.shards(*axes) for size, axes in zip(leaf.kn, _split(leaf)))
    return k, n


# --- products computed by XLA ---


def product(eqn: str, x: Array, leaf: "Quantized") -> Array:
    """Multiplies x by the dequantized matrix.

    If the format also quantizes activations (W8A8), each token of x is rounded with its own scale. The inputs of
    experts are not rounded. The gradient ignores the rounding (straight-through estimator).
    """
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
    """Returns the gradient for the input x of `product`, given the gradient g for its result."""
    xs, ws, out = weights.operands(eqn)
    w, scale = _factors(leaf, g.dtype)
    g = g if scale is None else (g * align(scale, letters(leaf.eqn)[2], out)).astype(g.dtype)
    return weights.product(f"{out},{ws}->{xs}", g, w, jnp.float32).astype(g.dtype)


def product_of_codes(eqn: str, a: Array, b: Array) -> Array:
    """Multiplies two int8 arrays with int32 accumulation, and returns float32."""
    return weights.product(eqn, a, b, jnp.int32).astype(jnp.float32)


def _factors(leaf: "Quantized", dtype: DTypeLike) -> tuple[Array, Array | None]:
    """Returns (array, scale per column), whose product is the weight.

    If the weight has several scales per column, returns (dequantized weight, None).
    """
    shared, _, n = letters(leaf.eqn)
    if leaf.tile[0] < leaf.kn[0] or leaf.offset is not None or shared:
        return _dequantized(leaf, dtype), None
    scale = spread(leaf.scales().astype(jnp.float32), leaf.tile, (1, leaf.kn[1]))
    array = leaf.shaped(leaf.numbers(leaf.in_order(leaf.codes))).astype(dtype)
    return array, jnp.broadcast_to(scale, (1, leaf.kn[1])).reshape(leaf.sizes_of(n))


def _dequantized(leaf: "Quantized", dtype: DTypeLike) -> Array:
    """Dequantizes the weight. On a TPU, uses a kernel if one exists for the format."""
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
    """Prepares a quantized weight of one layer for inference on one device.

    On a CPU, if no kernel is suitable, the weight is dequantized once, because otherwise every decoding step would
    dequantize all layers again. For a TPU kernel, the columns are padded to a multiple of 128 if XLA would otherwise
    store the bytes in column-major order. On a mesh, the weight stays unchanged, because NF4 scales may be quantized in
    blocks that span several devices.
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
