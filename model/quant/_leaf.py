"""The class of quantized weights, which consist of codes and one scale per tile, and a Transform that creates them.

The module `_multiply.py` multiplies activations by quantized weights.
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

Encode = Callable[..., Weight]  # (weight, equation) -> quantized weight; most encoders also have a parameter `solve`


@flax.struct.dataclass
class Quantized(Weight):
    """A frozen quantized weight. Its values are `numbers(codes) * scale + offset`.

    The weight is treated as a matrix [..., K, N]. It is stored as [..., N, K] if N comes before K in the equation.
    Products with this weight are only differentiable with respect to the activation.
    """

    codes: Array
    scale: Array  # one per tile
    offset: Array | None  # one per tile
    inverse: Array | None  # [..., K, 1]: factors that inputs are multiplied by (AWQ, SmoothQuant)
    eqn: str = flax.struct.field(pytree_node=False)  # einsum equation from the weight's declaration
    sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)  # sizes of the axes that the weight has in `eqn`
    tile: tuple[int, int] = flax.struct.field(pytree_node=False)
    whole: ClassVar[bool] = True
    activations: ClassVar[bool] = False  # whether activations are also quantized before the product
    # splits bytes into a list of arrays, one for each of the matrix rows whose codes share a byte
    unpack_rows: ClassVar[Callable[[Array], list[Array]] | None] = None
    kernel_format: ClassVar[str] = ""  # this format's name in kernels/

    def numbers(self, codes: Array) -> Array:
        """Decodes the codes of a matrix to float32 values [..., K, N], before scales and offsets are applied."""
        raise NotImplementedError

    @classmethod
    def of(
        cls, form: Format, codes: Callable[[Array], Array], w: Array, eqn: str, solve: Solve = nearest
    ) -> "Quantized":
        """Quantizes the weight `w`.

        `solve` rounds the weight, and `codes` encodes the rounded, unscaled values [..., K, N]. If a tile is larger
        than the matrix, it is reduced to the size of the matrix.
        """
        m = matrix(w, eqn)
        form = form._replace(tile=tuple(map(min, form.tile, m.shape[-2:])))
        r = solve(m, form)
        stored = lambda a: a.swapaxes(-1, -2) if transposed(eqn) else a
        small = lambda a: None if a is None else stored(a.astype(jnp.bfloat16))
        sizes = w.shape[w.ndim - len(weights.operands(eqn)[1]) :]
        return cls(stored(codes(r.numbers)), small(r.scale), small(r.offset), None, eqn, sizes, form.tile)

    def with_inverse(self, inverse: Array) -> "Quantized":
        """Returns this weight with the input factors `inverse` [..., K, 1].

        The caller must have divided the weight's rows by these factors before quantization.
        """
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
        """The number of rows K and the number of columns N of the matrix."""
        _, k, n = letters(self.eqn)
        return math.prod(self.sizes_of(k)), math.prod(self.sizes_of(n))

    def sizes_of(self, side: str) -> list[int]:
        """Returns the sizes of those axes of the weight whose letters are in `side`, such as the output axes."""
        size = dict(zip(weights.operands(self.eqn)[1], self.sizes, strict=True))
        return [size[c] for c in side]

    def in_order(self, a: Array) -> Array:
        """Converts an array from its stored axis order to the order [..., K, N], or back.

        Both directions are the same operation: swap the last two axes, or do nothing.
        """
        return a.swapaxes(-1, -2) if transposed(self.eqn) else a

    def scales(self) -> Array:
        """Returns the scales, one per tile, in the axis order [..., K, N]."""
        return self.in_order(self.plain_scales().scale)

    def plain_scales(self) -> "Quantized":
        """Returns this weight with float scales. Subclasses whose scales are quantized override this method."""
        return self

    def matrix(self) -> Array:
        """Returns the dequantized float32 matrix [..., K, N], without the factors `inverse`."""
        codes = self.in_order(self.codes)[..., : self.kn[1]]  # drop columns that `for_inference` may have padded
        m = self.numbers(codes) * spread(self.scales().astype(jnp.float32), self.tile, self.kn)
        if self.offset is not None:
            m = m + spread(self.in_order(self.offset).astype(jnp.float32), self.tile, self.kn)
        return m

    def shaped(self, m: Array) -> Array:
        """Reshapes a matrix [..., K, N] to the shape of the weight."""
        return self.in_order(m).reshape(self.shape)

    def floats(self, dtype: DTypeLike) -> Array:
        """Returns the plain array that this quantized weight represents."""
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
            """Returns each id's row of `a`. One row of `a` is for `n` rows of the embedding table."""
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
        """Replaces the codes by the number of multiply-adds of the whole matrix, and all other arrays by 0."""
        none = {f: 0 for f in weights.fields(self) if getattr(self, f) is not None}
        return self.replace(**none | {"codes": self.size})

    def axes(self, spec: Spec) -> "Quantized":
        shared, k, n = letters(self.eqn)
        last = (AXES[k[0]], AXES[n[0]])
        names = spec.names[: spec.stacked + len(shared)] + (last[::-1] if transposed(self.eqn) else last)
        return self.replace(**{f: names for f in weights.fields(self) if getattr(self, f) is not None})


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A Transform that replaces each matrix whose name matches the regex `where` by `encode(w, eqn)`.

    If `scaled`, the quantized weights have input factors, as for AWQ and SmoothQuant, which are set to 1. Calls raise
    ValueError if `where` matches no name.
    """

    encode: Encode
    where: str
    scaled: bool = False

    def __call__(self, params: Params, specs: Specs, key: Array | None) -> Params:
        return weights.wrapping(self.where, self._leaf)(params, specs, key)

    def _leaf(self, path: str, w: Array, spec: Spec, key: Array | None) -> Weight:
        leaf = self.encode(w, spec.eqn)
        return leaf.with_inverse(jnp.ones((*leaf.codes.shape[:-2], leaf.kn[0], 1))) if self.scaled else leaf
