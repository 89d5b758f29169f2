"""Dequantizes a matrix W [K, N] of NF4 codes on a TPU, or computes x W directly if x has few rows.

If x has many rows, a kernel that multiplies by W directly would dequantize W again for every block of rows. So W is
dequantized first, and XLA multiplies. The dequantization kernel looks up the level (value) of each code in a table,
three times as fast as XLA does. Each 32-bit word of packed bytes has the codes of eight rows of a column. The sixteen
levels are split into two tables of eight, and each table fills a register with eight sublanes. A gather along sublanes
looks up all codes of a register at once. The fourth bit of a code selects one of the two tables.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels import blocks, tiled
from kernels.blocks import cut
from kernels.packing import LEVELS, by_columns

REGISTER = 64  # number of rows of W whose codes fit in a register of 32-bit words
FEW = 128  # largest number of rows of x that `matmul` accepts; for more rows, W is dequantized first


def supported(k: int, n: int, group: int) -> bool:
    """Returns whether `dequantize` accepts a matrix W [K, N].

    Groups must have 64, 128, 256 or 512 rows and divide K, and W must have at least 128 columns.
    """
    return k % group == 0 and group in (64, 128, 256, 512) and n >= 128


def dequantize(packed: Array, scale: Array, group: int) -> Array:
    """Dequantizes W to bfloat16 [K, N], from `packed` bytes [K / 2, N] and float32 `scale` [K / group, N]."""
    k, n = 2 * packed.shape[0], packed.shape[1]
    rows, columns = cut(k, blocks.NF4[0], 8 * group), blocks.NF4[1]
    at = lambda i, j: (i, j)
    codes, operand = tiled.codes(packed, rows, columns, at)
    return pl.pallas_call(
        functools.partial(_dequantize, group, by_columns(*packed.shape)),
        grid=(pl.cdiv(k, rows), pl.cdiv(n, columns)),
        in_specs=[codes, pl.BlockSpec((rows // group, columns), at)],
        out_specs=pl.BlockSpec((rows, columns), at),
        out_shape=jax.ShapeDtypeStruct((k, n), jnp.bfloat16),
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=blocks.VMEM
        ),
    )(operand, scale)


def matmul(x: Array, packed: Array, scale: Array, group: int, dtype: DTypeLike | None = None) -> Array:
    """Multiplies x [M, K] by W, sums in float32, and returns [M, N] in `dtype` (by default, that of x). M is at most
    FEW."""
    (m, k), n = x.shape, packed.shape[1]
    rows, columns = cut(k, blocks.NF4[0], 8 * group), blocks.NF4[1]
    block, at = (cut(m, FEW, 16), columns, rows), lambda i, j, l: (l, j)
    scratch = (pltpu.VMEM((rows, columns), jnp.float32),)
    return tiled.product(
        _multiply, x, packed, scale.astype(jnp.float32), group, n, block, (rows, columns), at, dtype, scratch
    )


def _multiply(w: tiled.W, x_ref: Ref, w_ref: Ref, s_ref: Ref, y_ref: Ref, sum_ref: Ref, rows_ref: Ref) -> None:
    def part() -> Array:
        x, scale = tiled.inside(x_ref[...], 1, w.total), tiled.inside(s_ref[...], 0, w.total // w.group)
        _look_up(w.group, w.by_columns, w_ref, scale, rows_ref)
        return jnp.dot(x, rows_ref[...].astype(x.dtype), preferred_element_type=jnp.float32)

    tiled.accumulate(part, y_ref, sum_ref)


def _dequantize(group: int, columnar: bool, w_ref: Ref, s_ref: Ref, y_ref: Ref, rows_ref: Ref) -> None:
    _look_up(group, columnar, w_ref, s_ref, rows_ref)
    y_ref[...] = rows_ref[...].astype(y_ref.dtype)


def _look_up(group: int, columnar: bool, w_ref: Ref, scale: Array | Ref, rows_ref: Ref) -> None:
    """Dequantizes a block of W to float32, and writes it to `rows_ref`."""
    columns = rows_ref.shape[1]
    tables = [_register(LEVELS[at : at + 8], columns) for at in (0, 8)]
    packed = w_ref[...].T if columnar else w_ref[...]
    for at in range(0, rows_ref.shape[0], REGISTER):
        words = pltpu.bitcast(packed[at // 2 : (at + REGISTER) // 2], jnp.int32)  # [8, columns], eight codes per word
        own = jnp.broadcast_to(scale[at // group : at // group + 1], words.shape)
        for j in range(8):
            codes = words >> 4 * j
            low, high = (jnp.take_along_axis(t, codes & 7, 0, mode="promise_in_bounds") for t in tables)
            rows_ref[pl.ds(at + j, 8, stride=8), :] = jnp.where(codes & 8, high, low) * own


def _register(values: tuple[float, ...], columns: int) -> Array:
    """Returns an array [8, columns] with one value per sublane.

    The array is built from iota, since a kernel cannot capture a constant array.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, (8, columns), 0)
    return sum(jnp.where(row == i, jnp.float32(v), 0) for i, v in enumerate(values))
