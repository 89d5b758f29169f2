"""Defines the cases of the report: the kernels of `kernels/`, and XLA's programs for the same operands.

XLA's programs multiply by the dequantized matrix W. The report also lists operations without a kernel, to show why they
do not need one. XLA converts an 8-bit W inside its matrix product, so the speed of a decoding step is limited by
reading W, and that of a prefill by the MXU. The speed of rounding the rows of x to int8 is limited by reading and
writing these rows.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels import codes_triton, int4_matmul, nf4, paged_lora, paged_lora_triton
from model import weights
from model.quant import _multiply, fp8, int4, int8
from model.quant import nf4 as nf4_leaves
from model.quant._leaf import Quantized, Quantizer
from model.quant._matrix import round_rows

EQN = "TD,DF->TF"  # x [M,K], W [K,N]


class Case(NamedTuple):
    """One operation with operands of one shape."""

    name: str
    shape: str
    kernel: Callable | None  # None if there is no kernel
    xla: Callable | None  # the same operation as compiled by XLA
    args: tuple[Any, ...]  # abstract arrays, or concrete arrays if their values matter
    flops: int = 0
    peak: str = "bfloat16"  # data type of the products, which determines the chip's peak rate
    quick: bool = False  # whether tests compile the case
    platform: str = "tpu"


def cases() -> list[Case]:
    plain = [case._replace(platform=platform) for platform in ("tpu", "cuda") for case in _without_kernel()]
    return [*_int4(), *_nf4(), *_codes_triton(), *_paged_lora(), *plain]


def array(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def by_xla(leaf: Quantized, backward: bool, x: Array, codes: Array, scale: Array) -> Array:
    """Computes the reference for the kernels: x times the dequantized W or, if `backward`, times the transposed W. The
    arrays `codes` and `scale` replace the arrays of the quantized `leaf`."""
    w = leaf.replace(codes=codes, scale=scale).floats(x.dtype)
    return weights.product("TF,DF->TD" if backward else EQN, x, w, jnp.float32).astype(x.dtype)


def _leaf(quantizer: Quantizer, k: int, n: int) -> Quantized:
    """Makes an abstract quantized matrix W [K, N], with scales in the layout that the kernels take."""
    encode = lambda w: quantizer.encode(w, EQN).plain_scales()
    return jax.eval_shape(encode, array(k, n, dtype="float32"))


def _product(name: str, quantizer: Quantizer, m: int, k: int, n: int, kernel: Callable, **options: Any) -> Case:
    """Makes a case that compares `kernel` with XLA. Both multiply M rows by W [K, N]. The rows are those of x or, if
    `backward`, those of the gradient with respect to the result."""
    leaf, dtype, backward = _leaf(quantizer, k, n), options.pop("dtype", "bfloat16"), options.pop("backward", False)
    group = leaf.tile[0]
    args = array(m, n if backward else k, dtype=dtype), leaf.codes, leaf.scale
    shape = f"{m}x{k}x{n}" + (f" g{group}" if group < k else "")
    kernel, xla = functools.partial(kernel, group=group), functools.partial(by_xla, leaf, backward)
    return Case(name, shape, kernel, xla, args, 2 * m * k * n, **options)


def _int4() -> Iterator[Case]:
    """Yields int4 cases: decoding and prefill of 7B models with aligned and unaligned shapes, and the backward pass of
    QLoRA.

    In decoding, `_multiply.for_inference` pads the columns to whole registers, so 4,100 columns become 4,224.
    """
    few, many = (16, 4096, 4096), (2048, 4096, 14336)
    forward = [(*few, 128), (*few, 64), (1, 4096, 4096, 128), (16, 4096, 4100, 128), (16, 4096, 4224, 128)]
    forward += [(16, 11008, 4096, 64)]
    forward += [(*many, 64), (*many, 128), (2000, 4096, 14300, 64), (2048, 11008, 4096, 64)]
    for *shape, g in forward:
        quick = (*shape, g) in (forward[0], (*many, 64))
        yield _product("int4", int4.make(group=g), *shape, int4_matmul.matmul, quick=quick)
    for *shape, g in [(*many, 64), (2048, 4096, 4096, 128), (2000, 4096, 14300, 64)]:
        quick = (*shape, g) == (*many, 64)
        yield _product("int4 dx", int4.make(group=g), *shape, int4_matmul.gradient, quick=quick, backward=True)


def _nf4() -> Iterator[Case]:
    """Yields NF4 cases: dequantization and decoding, with weights of a 7B model, and with a weight whose number of
    columns is not aligned."""
    for k, n in ((4096, 4096), (4096, 14336), (4096, 4100)):
        leaf = _leaf(nf4_leaves.make(), k, n)
        kernel = functools.partial(nf4.dequantize, group=64)
        xla = lambda codes, scale, leaf=leaf: leaf.replace(codes=codes, scale=scale).floats(jnp.bfloat16)
        yield Case("nf4 dequantize", f"{k}x{n} g64", kernel, xla, (leaf.codes, leaf.scale), quick=n == 4096)
        yield _product("nf4", nf4_leaves.make(), 16, k, n, nf4.matmul)


def _codes_triton() -> Iterator[Case]:
    """Yields GPU cases: decoding of 7B models with aligned and unaligned shapes, up to the largest number of rows that
    a kernel takes, and with bfloat16 weights for comparison."""
    wide, square = (4096, 11008), (16, 4096, 4096)
    rows = [(m, *wide) for m in (1, 16, 64, 256)]
    for m, k, n in rows:
        yield Case("bf16", f"{m}x{k}x{n}", None, _plain, (array(m, k), array(k, n)), 2 * m * k * n, platform="cuda")
    grouped = int4.make(group=128)
    listed = [("int4", grouped, shape) for shape in ((1, *square[1:]), square, *rows, (16, *wide[::-1]))]
    listed += [("int8", int8.make(), shape) for shape in (square, *rows)]
    listed += [("nf4", nf4_leaves.make(group=128, double=False), rows[1]), ("fp8", fp8.make(), rows[1])]
    listed += [("int4", grouped, (5, 4096, 4100)), ("int4", grouped, (16, 4000, 4096))]
    listed += [("int4", int4.make(group=32), square), ("int4 f32", grouped, square)]
    for name, quantizer, shape in listed:
        leaf, dtype = _leaf(quantizer, *shape[1:]), "float32" if "f32" in name else "bfloat16"
        kernel = functools.partial(codes_triton.matmul, form=codes_triton.FORMS[leaf.kernel_format])
        quick = (shape[0], shape[2]) == (16, 4096) and leaf.tile[0] > 32
        yield _product(name, quantizer, *shape, kernel, quick=quick, platform="cuda", dtype=dtype)


def _paged_lora() -> Iterator[Case]:
    """Yields cases of decoding in which each row has its own adapter, of rank 8 to 64. The adapter stacks hold only the
    pages of the adapters in use."""
    size, route = paged_lora.PAGE, paged_lora.Route
    flat = lambda f: lambda x, a, b, *r: f(x[:, None], a, b, route(*r))[:, 0]
    paged = lambda stack: stack.reshape(-1, size, stack.shape[1])
    for rows, dtype in ((16, "bfloat16"), (64, "bfloat16"), (64, "float32")):
        owner = [i for i in range(rows) for _ in range(-(-(8 + 13 * i % 57) // size))]  # owner[page]: row that uses it
        pages = len(owner)
        stack = array(pages * size, 4096, dtype=dtype)
        args = array(rows, 4096, dtype=dtype), stack, stack, *paged_lora.route(list(enumerate(owner)), pages)
        name = f"{rows} adapters, {pages} pages, 4096x4096 {dtype}"
        cuda = lambda x, a, b, *r: paged_lora_triton.matmul(x, paged(a), paged(b), route(*r))
        for kernel, platform in ((flat(paged_lora.decode), "tpu"), (cuda, "cuda")):
            xla, quick = flat(paged_lora.loop), rows == 16
            yield Case("paged lora", name, kernel, xla, args, peak="", quick=quick, platform=platform)


def _plain(x: Array, w: Array) -> Array:
    return weights.product(EQN, x, w, jnp.float32).astype(x.dtype)


def _w8a8(x: Array, w: Array, per_row: Array, scale: Array) -> Array:
    """Multiplies an int8 x by an int8 W, with one scale per row of x and one scale per column of W."""
    return (_multiply.product_of_codes(EQN, x, w) * per_row * scale).astype(jnp.bfloat16)


def _w8a8_gradient(g: Array, w: Array, per_row: Array) -> Array:
    """Multiplies the int8 gradient g, which includes the column scales of W, by the transposed W."""
    return (_multiply.product_of_codes("TF,DF->TD", g, w) * per_row).astype(jnp.bfloat16)


def _without_kernel() -> Iterator[Case]:
    for m, k, n in ((16, 4096, 4096), (2048, 4096, 14336)):
        shape, flops = f"{m}x{k}x{n}", 2 * m * k * n
        row, scale = array(m, 1, dtype="float32"), array(n, dtype="float32")
        yield Case("bf16", shape, None, _plain, (array(m, k), array(k, n)), flops)
        for name, quantizer in (("int8", int8.make()), ("float8", fp8.make())):
            leaf = _leaf(quantizer, k, n)
            xla = lambda x, codes, scale, leaf=leaf: _multiply.product(EQN, x, leaf.replace(codes=codes, scale=scale))
            yield Case(f"{name} weight only", shape, None, xla, (array(m, k), leaf.codes, leaf.scale), flops)
        args = array(m, k, dtype="int8"), array(k, n, dtype="int8"), row, scale
        yield Case("w8a8", shape, None, _w8a8, args, flops, "int8", quick=m == 16)
    args = array(m, n, dtype="int8"), array(k, n, dtype="int8"), row
    yield Case("w8a8 dx", shape, None, _w8a8_gradient, args, flops, "int8")
    yield Case("round rows", f"{m}x{k}", None, lambda x: round_rows(x, "TD", "D"), (array(m, k),))
