"""The quantized leaf, which has codes and a scale per tile in place of a weight, and the Transform that makes it.

`_multiply.py` chooses how to multiply by such leaves.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import flax.struct
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model import weights
from model.quant import _multiply
from model.quant._matrix import Format, Solve, align, letters, matrix, nearest, spread, transposed
from model.weights import AXES, Params, Spec, Specs, Weight

Encode = Callable[..., Weight]  # (w, eqn) -> the leaf of a weight; encoders of Quantized leaves also take `solve`


@flax.struct.dataclass
class Quantized(Weight):
    """A frozen weight as numbers * scale + offset. It is a matrix [..., K, N], stored as [..., N, K] if it is
    `transposed` in its equation. A product with it is differentiable only with respect to the other operand."""

    codes: Array
    scale: Array  # one per tile
    offset: Array | None  # one per tile
    inverse: Array | None  # [..., K, 1]: inputs are multiplied by it first (AWQ, SmoothQuant)
    eqn: str = flax.struct.field(pytree_node=False)  # the equation that the weight was declared with
    sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)  # sizes of the weight's axes in `eqn`
    tile: tuple[int, int] = flax.struct.field(pytree_node=False)
    whole: ClassVar[bool] = True
    activations: ClassVar[bool] = False  # whether inputs are rounded too
    unpack_rows: ClassVar[Callable[[Array], list[Array]] | None] = (
        None  # bytes -> one array of numbers for each row that shares a byte
    )
    kernel_format: ClassVar[str] = ""  # name of the format of the codes in kernels/

    def numbers(self, codes: Array) -> Array:
        """The numbers, float32 [..., K, N], that the codes of a matrix [..., K, N] stand for."""
        raise NotImplementedError

    @classmethod
    def of(
        cls, form: Format, codes: Callable[[Array], Array], w: Array, eqn: str, solve: Solve = nearest
    ) -> "Quantized":
        """The leaf that replaces the weight `w`, rounded by `solve`; `codes` encodes the rounded numbers [..., K, N].
        Tiles are limited to the size of the matrix."""
        m = matrix(w, eqn)
        form = form._replace(tile=tuple(map(min, form.tile, m.shape[-2:])))
        r = solve(m, form)
        stored = lambda a: a.swapaxes(-1, -2) if transposed(eqn) else a
        small = lambda a: None if a is None else stored(a.astype(jnp.bfloat16))
        sizes = w.shape[w.ndim - len(weights.operands(eqn)[1]) :]
        return cls(stored(codes(r.numbers)), small(r.scale), small(r.offset), None, eqn, sizes, form.tile)

    def with_inverse(self, inverse: Array) -> "Quantized":
        """The leaf of a matrix whose rows were divided by `inverse` [..., K, 1]."""
        return self.replace(inverse=self.in_order(inverse).astype(jnp.bfloat16))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.codes.shape[: self.codes.ndim - 2 - len(letters(self.eqn)[0])] + self.sizes

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def kn(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        _, k, n = letters(self.eqn)
        return math.prod(self.sizes_of(k)), math.prod(self.sizes_of(n))

    def sizes_of(self, side: str) -> list[int]:
        """Sizes of the weight's axes with the letters `side`."""
        size = dict(zip(weights.operands(self.eqn)[1], self.sizes, strict=True))
        return [size[c] for c in side]

    def in_order(self, a: Array) -> Array:
        """A stored array in the order of the matrix [..., K, N], or the reverse, which is the same operation."""
        return a.swapaxes(-1, -2) if transposed(self.eqn) else a

    def scales(self) -> Array:
        """The scales, one per tile, in the order of the matrix."""
        return self.in_order(self.plain_scales().scale)

    def plain_scales(self) -> "Quantized":
        """This leaf with its scales decoded to floats, if the scales are stored as codes."""
        return self

    def matrix(self) -> Array:
        """Dequantized float32 [..., K, N], without `inverse`."""
        codes = self.in_order(self.codes)[..., : self.kn[1]]  # `for_inference` may have padded the columns
        m = self.numbers(codes) * spread(self.scales().astype(jnp.float32), self.tile, self.kn)
        if self.offset is not None:
            m = m + spread(self.in_order(self.offset).astype(jnp.float32), self.tile, self.kn)
        return m

    def shaped(self, m: Array) -> Array:
        """A matrix [..., K, N] in the shape of the weight."""
        return self.in_order(m).reshape(self.shape)

    def floats(self, dtype: DTypeLike) -> Array:
        """The plain array that this leaf represents."""
        m = self.matrix()
        m = m if self.inverse is None else m * self.in_order(self.inverse).astype(jnp.float32)
        return self.shaped(m).astype(dtype)

    def dense(self, spec: Spec) -> Array:
        return self.floats(spec.value.dtype)

    def einsum(self, eqn: str, x: Array) -> Array:
        if self.inverse is not None and weights.split(eqn)[1] == letters(self.eqn)[1]:
            shared, k, _ = letters(self.eqn)
            inverse = self.in_order(self.inverse).reshape(self.sizes_of(shared + k))
            x = x * align(inverse, shared + k, weights.operands(eqn)[0]).astype(x.dtype)
        return _multiply.einsum(eqn, x, self)

    def take(self, ids: Array, dtype: DTypeLike) -> Array:
        def rows(a: Array | None, n: int) -> Array | None:
            """The rows `ids` of an array with one row per `n` rows of the table; a single row serves all ids."""
            return a if a is None or a.shape[0] == 1 else weights.take(a, ids.ravel() // n, a.dtype)

        plain = self.plain_scales()
        fine = plain.replace(
            codes=rows(self.codes, 1), scale=rows(plain.scale, self.tile[1]),
            offset=rows(self.offset, self.tile[1]), sizes=(ids.size, self.sizes[1]), tile=(self.tile[0], 1),
        )  # fmt: skip
        return fine.floats(dtype).reshape(*ids.shape, -1)

    def for_inference(self) -> "Quantized | Array":
        return _multiply.for_inference(self)

    def macs(self, stacked: int) -> "Quantized":
        """The codes count as many multiply-adds as the whole matrix, the other arrays none."""
        none = {f: 0 for f in weights.fields(self) if getattr(self, f) is not None}
        return self.replace(**none | {"codes": self.size})

    def axes(self, spec: Spec) -> "Quantized":
        shared, k, n = letters(self.eqn)
        last = (AXES[k[0]], AXES[n[0]])
        names = spec.names[: spec.stacked + len(shared)] + (last[::-1] if transposed(self.eqn) else last)
        return self.replace(**{f: names for f in weights.fields(self) if getattr(self, f) is not None})


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A Transform that replaces every multiplied parameter whose name matches `where` by `encode(w, eqn)`.

    If `scaled`, leaves also have the input factors of AWQ and SmoothQuant, set to 1. A call raises ValueError if
    `where` matches nothing.
    """

    encode: Encode
    where: str
    scaled: bool = False

    def __call__(self, params: Params, specs: Specs, key: Array | None) -> Params:
        return weights.wrapping(self.where, self._leaf)(params, specs, key)

    def _leaf(self, path: str, w: Array, spec: Spec, key: Array | None) -> Weight:
        leaf = self.encode(w, spec.eqn)
        return leaf.with_inverse(jnp.ones((*leaf.codes.shape[:-2], leaf.kn[0], 1))) if self.scaled else leaf
