"""What the quantised leaves share: a weight as a matrix of codes with a scale for each tile, and products with it.

Scales are bfloat16: a number of 8 bits and fewer times such a scale is exact in float32, so that no order of operations
and no fusion changes a dequantised value, and quantising it once more gives the same codes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model import weights
from model.weights import AXES, Spec, Transform, Weight

Calibration = Literal["absmax", "percentile", "mse"]
PERCENTILE = 99.9  # of the magnitudes of a tile
ACTIVATIONS = {"B": "act_batch", "T": "act_seq"}  # letter of an activation -> logical axis
RATIOS = [1 - i / 32 for i in range(17)]  # of the largest magnitude, tried by "mse"


def letters(eqn: str) -> tuple[str, str, str]:
    """The weight's letters by role: shared, K (summed), N. Of a table that is looked up K is the width of a row: a tied
    head sums over it, and a row is read with scales of its own."""
    shared, contracted, produced = weights.split(eqn)
    return (shared, produced, contracted) if "V" in contracted else (shared, contracted, produced)


def transposed(eqn: str) -> bool:
    """Whether the weight lies as [shared, N, K]. Raises ValueError where K or N is not in one piece."""
    (shared, k, n), w = letters(eqn), weights.operands(eqn)[1]
    if w not in (shared + k + n, shared + n + k):
        raise ValueError(f"a weight {w} of {eqn} is no matrix {k} by {n}")
    return w != shared + k + n


def matrix(w: Array, eqn: str) -> Array:
    """[..., K, N] of a weight, leading axes kept."""
    _, k, n = letters(eqn)
    swap = transposed(eqn)
    lead = w.shape[: w.ndim - len(k) - len(n)]
    rows = math.prod(w.shape[len(lead) :][: len(n if swap else k)])
    m = w.reshape(*lead, rows, -1)
    return m.swapaxes(-1, -2) if swap else m


def align(a: Array, own: str, to: str) -> Array:
    """An array with the axes `own` so that it broadcasts against one with the axes `to`; what `to` lacks has size 1."""
    size = dict(zip(own, a.shape, strict=True))
    return a.reshape([size.get(c, 1) for c in to])


class Format(NamedTuple):
    """A grid of numbers and how it is laid over a matrix."""

    grid: Callable[[Array], Array]  # to the nearest number
    top: float  # the largest one
    tile: tuple[int, int]  # rows of K and columns of N that share a scale
    calibration: Calibration = "absmax"
    symmetric: bool = True  # else the grid is moved by an offset a tile


class Rounded(NamedTuple):
    """m = numbers * scale + offset, [..., K, N] with scale and offset a tile."""

    numbers: Array
    scale: Array
    offset: Array | None


def bf16(x: Array) -> Array:
    """Rounded to bfloat16, in float32; XLA drops a pair of casts, but never this."""
    return jax.lax.reduce_precision(x, 8, 7)


def spread(scale: Array, tile: tuple[int, int], shape: tuple[int, int]) -> Array:
    """[..., K, N] of one value a tile."""
    for axis, n in ((-2, tile[0]), (-1, tile[1])):
        scale = scale if scale.shape[axis] == 1 else jnp.repeat(scale, n, axis)
    return scale[..., : shape[0], : shape[1]]


def _tiles(m: Array, tile: tuple[int, int]) -> Array:
    """[..., G, K / G, H, N / H]; ragged edges repeat the last row, which changes no extremum."""
    pad = [-n % t for n, t in zip(m.shape[-2:], tile, strict=True)]
    m = jnp.pad(m, [(0, 0)] * (m.ndim - 2) + [(0, p) for p in pad], mode="edge")
    k, n = m.shape[-2:]
    return m.reshape(*m.shape[:-2], k // tile[0], tile[0], n // tile[1], tile[1])


def fit(m: Array, form: Format) -> tuple[Array, Array | None]:
    """(scale, offset) of each tile of [..., K, N], in float32 but of bfloat16's precision."""
    t, over = _tiles(m.astype(jnp.float32), form.tile), (-3, -1)
    size = jnp.abs(t)
    half, middle, top = size.max(over), 0.0, form.top
    if form.calibration == "percentile":
        half = jnp.quantile(size, PERCENTILE / 100, over)
    if not form.symmetric:
        half, middle, top = (t.max(over) - t.min(over)) / 2, (t.max(over) + t.min(over)) / 2, top + 0.5

    def at(ratio: float) -> tuple[Array, Array | None]:
        scale = bf16(half * (ratio / top))  # a division by a constant rounds otherwise when it is not compiled
        scale = jnp.where(scale == 0, 1, scale)
        return scale, None if form.symmetric else bf16(middle + scale / 2)

    if form.calibration != "mse":
        return at(1.0)
    best = (*at(1.0), jnp.full(half.shape, jnp.inf))
    for ratio in RATIOS:
        scale, offset = at(ratio)
        a, b = (x if x is None else x[..., :, None, :, None] for x in (scale, offset))
        error = jnp.square(_number(t, a, b, form.grid) * a + (0 if b is None else b) - t).sum(over)
        better = error < best[2]
        best = jax.tree.map(lambda new, old, c=better: jnp.where(c, new, old), (scale, offset, error), best)
    return best[:2]


def _number(m: Array, scale: Array, offset: Array | None, grid: Callable) -> Array:
    return grid((m if offset is None else m - offset) / scale)


def nearest(m: Array, form: Format) -> Rounded:
    """Every value to the nearest number of its tile's grid."""
    m = m.astype(jnp.float32)
    scale, offset = fit(m, form)
    a, b = (x if x is None else spread(x, form.tile, m.shape[-2:]) for x in (scale, offset))
    return Rounded(_number(m, a, b, form.grid), scale, offset)


@flax.struct.dataclass
class Quantised(Weight):
    """A frozen weight as numbers * scale + offset, of a matrix [..., K, N], or [..., N, K] as `transposed` says.

    The backward pass holds the codes alone: it multiplies by the dequantised matrix once more.
    """

    codes: Array
    scale: Array  # a tile
    offset: Array | None  # a tile
    inverse: Array | None  # [..., K, 1]: inputs are multiplied by it first (AWQ, SmoothQuant)
    eqn: str = flax.struct.field(pytree_node=False)  # the equation that the weight was declared with
    sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)  # of its letters
    tile: tuple[int, int] = flax.struct.field(pytree_node=False)
    whole: ClassVar[bool] = True
    by_place: ClassVar[Callable | None] = None  # codes -> numbers of the first row in each byte, of the second, ...
    form: ClassVar[str] = ""  # what reads the codes in kernels/codes_triton.py

    def numbers(self, codes: Array) -> Array:
        """Numbers of codes in matrix order, float32 [..., K, N]."""
        raise NotImplementedError

    @classmethod
    def of(cls, r: Rounded, codes: Array, w: Array, eqn: str, form: Format) -> "Quantised":
        """A leaf in place of the weight `w`, which `r` and its `codes` stand for."""
        swap = (lambda a: a.swapaxes(-1, -2)) if transposed(eqn) else lambda a: a
        small = lambda a: None if a is None else swap(a.astype(jnp.bfloat16))
        sizes = w.shape[w.ndim - len(weights.operands(eqn)[1]) :]
        return cls(swap(codes), small(r.scale), small(r.offset), None, eqn, sizes, form.tile)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it stands for."""
        return self.codes.shape[: self.codes.ndim - 2 - len(letters(self.eqn)[0])] + self.sizes

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def _sizes(self, side: str) -> list[int]:
        size = dict(zip(weights.operands(self.eqn)[1], self.sizes, strict=True))
        return [size[c] for c in side]

    def macs(self, stacked: int) -> "Quantised":
        """The codes stand for the whole matrix."""
        none = {f: 0 for f in weights.fields(self) if getattr(self, f) is not None}
        return self.replace(**none | {"codes": self.size})

    @property
    def kn(self) -> tuple[int, int]:
        _, k, n = letters(self.eqn)
        return math.prod(self._sizes(k)), math.prod(self._sizes(n))

    def with_inverse(self, inverse: Array) -> "Quantised":
        """The leaf of a matrix whose rows were divided by `inverse` [..., K, 1]."""
        return self.replace(inverse=self._swap(inverse).astype(jnp.bfloat16))

    def _swap(self, a: Array) -> Array:
        return a.swapaxes(-1, -2) if transposed(self.eqn) else a

    def _scale(self) -> Array:
        return self._swap(self.scale)

    def _array(self, m: Array) -> Array:
        """[..., K, N] in the shape of the weight."""
        return self._swap(m).reshape(self.shape)

    def _matrix(self) -> Array:
        """Dequantised float32 [..., K, N], without `inverse`."""
        codes = self._swap(self.codes)[..., : self.kn[1]]  # `settled` may have put more behind them
        m = self.numbers(codes) * spread(self._scale().astype(jnp.float32), self.tile, self.kn)
        if self.offset is not None:
            m = m + spread(self._swap(self.offset).astype(jnp.float32), self.tile, self.kn)
        return m

    def _factors(self, dtype: Any) -> tuple[Array, Array | None]:
        """The weight as an array times a scale [N letters], which is None where a column has several."""
        shared, _, n = letters(self.eqn)
        if self.tile[0] < self.kn[0] or self.offset is not None or shared:
            return self._array(self._matrix()).astype(dtype), None
        scale = spread(self._scale().astype(jnp.float32), self.tile, (1, self.kn[1]))
        array = self._array(self.numbers(self._swap(self.codes))).astype(dtype)
        return array, jnp.broadcast_to(scale, (1, self.kn[1])).reshape(self._sizes(n))

    def split(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The mesh axis that the rows of its matrix lie over, and that of its columns; only where whole tiles do."""
        _, k, n = letters(self.eqn)
        tiles = [size // t if size % t == 0 else 1 for size, t in zip(self.kn, self.tile)]
        return tuple(a if len(a) == 1 else () for a in weights.mesh_axes((AXES[k[0]], AXES[n[0]]), tiles))

    def forward(self, eqn: str, x: Array) -> Array:
        w, scale = self._factors(x.dtype)
        y = weights.product(eqn, x, w, jnp.float32)
        y = y if scale is None else y * align(scale, letters(self.eqn)[2], weights.operands(eqn)[2])
        return y.astype(x.dtype)

    def backward(self, eqn: str, g: Array) -> Array:
        """The gradient of `forward` by x."""
        xs, ws, out = weights.operands(eqn)
        w, scale = self._factors(g.dtype)
        g = g if scale is None else (g * align(scale, letters(self.eqn)[2], out)).astype(g.dtype)
        return weights.product(f"{out},{ws}->{xs}", g, w, jnp.float32).astype(g.dtype)

    def part(self) -> tuple[int, int]:
        """Rows and columns of its matrix that a device has."""
        return tuple(size // weights.shards(*axes) for size, axes in zip(self.kn, self.split()))

    def kernels(self, rows: int, dtype: Any, backward: bool) -> dict[str, Callable]:
        """By platform what multiplies `rows` of a device by the matrix, or by the transposed one; XLA does the others.

        `kernel(x [M, K], codes, scale, group=, dtype=)`: see kernels/codes_triton.py.
        """
        from kernels import codes_triton, few_rows

        found, (k, _), group, turned = {}, self.part(), self.tile[0], transposed(self.eqn)
        if backward:
            return found
        if self.by_place and rows <= few_rows.ROWS and few_rows.supported(k, group, turned):
            found["cpu"] = partial(few_rows.matmul, by_place=self.by_place, turned=turned)
        by_column = not turned and self.tile[1] == 1
        if self.form and rows <= codes_triton.MOST and by_column and codes_triton.supported(k, group):
            found["cuda"] = partial(codes_triton.matmul, form=getattr(codes_triton, self.form))
        return found

    def multiplied(self, eqn: str, x: Array, backward: bool = False) -> Array:
        """`forward` or `backward`, by a kernel where the product is one of two matrices; experts are left to XLA."""
        from kernels import partition

        plain = partial(self.backward if backward else self.forward, eqn)
        xs, _, out = weights.operands(eqn)
        _, contracted, produced = weights.split(eqn)
        kept = xs.removesuffix(contracted)
        if (xs, out) != (kept + contracted, kept + produced) or self.codes.ndim > 2 or self.offset is not None:
            return plain(x)
        lead, shape = x.shape[: len(kept)], jax.eval_shape(plain, x).shape
        rows = weights.mesh_axes([ACTIVATIONS.get(c) for c in kept], lead)
        own = math.prod(lead) // weights.shards(*(axis for axes in rows for axis in axes))

        def run(kernel: Callable, x: Array, *w: Array) -> Array:
            kernel = partial(kernel, group=self.tile[0])
            y = partition.product(kernel, x.reshape(*lead, -1), w, rows, self.split(), backward)
            return y[..., : self.kn[0 if backward else 1]].reshape(shape)

        routes = {platform: partial(run, kernel) for platform, kernel in self.kernels(own, x.dtype, backward).items()}
        if not routes:
            return plain(x)
        w = self._swap(self.codes), self._scale()
        return jax.lax.platform_dependent(x, *w, default=lambda x, *_: plain(x), **routes)

    def einsum(self, eqn: str, x: Array) -> Array:
        if weights.split(eqn)[1] != letters(self.eqn)[1]:  # the other side is summed: no format is made for that
            return weights.product(eqn, x, jax.lax.stop_gradient(self._dense(x.dtype)))
        if self.inverse is not None:
            shared, k, _ = letters(self.eqn)
            inverse = self._swap(self.inverse).reshape(self._sizes(shared + k))
            x = x * align(inverse, shared + k, weights.operands(eqn)[0]).astype(x.dtype)
        return _multiply(eqn, x, self)

    def take(self, ids: Array, dtype: Any) -> Array:
        rows = lambda a, n: None if a is None else a if a.shape[0] == 1 else weights.take(a, ids.ravel() // n, a.dtype)
        plain = self._plain()
        fine = plain.replace(
            codes=rows(self.codes, 1), scale=rows(plain.scale, self.tile[1]),
            offset=rows(self.offset, self.tile[1]), sizes=(ids.size, self.sizes[1]), tile=(self.tile[0], 1),
        )  # fmt: skip
        return fine._dense(dtype).reshape(*ids.shape, -1)

    def _plain(self) -> "Quantised":
        """With one scale a tile."""
        return self

    def _dense(self, dtype: Any) -> Array:
        m = self._matrix()
        m = m if self.inverse is None else m * self._swap(self.inverse).astype(jnp.float32)
        return self._array(m).astype(dtype)

    def dense(self, spec: Spec) -> Array:
        return self._dense(spec.value.dtype)

    def settled(self) -> "Quantised":
        """Of a TPU's kernel with whole registers of columns, where XLA would lay the bytes out column after column."""
        from kernels import packing

        plain, n = self._plain(), self.kn[1]
        alone = weights.platform() == "tpu" and not weights.sharded() and self.codes.ndim == 2 and self.offset is None
        if not alone or "tpu" not in self.kernels(1, jnp.bfloat16, False) or not packing.by_columns(*self.codes.shape):
            return self
        wide = lambda a: jnp.pad(a, ((0, 0), (0, -n % packing.LANES)))
        return plain.replace(codes=wide(plain.codes), scale=wide(plain.scale))

    def axes(self, spec: Spec) -> "Quantised":
        shared, k, n = letters(self.eqn)
        last = (AXES[k[0]], AXES[n[0]])
        names = spec.names[: spec.stacked + len(shared)] + (last[::-1] if transposed(self.eqn) else last)
        return self.replace(**{f: names for f in weights.fields(self) if getattr(self, f) is not None})


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(eqn: str, x: Array, w: Quantised) -> Array:
    return w.multiplied(eqn, x)


_multiply.defvjp(lambda eqn, x, w: (w.multiplied(eqn, x), w), lambda eqn, w, g: (w.multiplied(eqn, g, True), None))


def transform(where: str, encode: Callable[[Array, str], Weight], scaled: bool = False) -> Transform:
    """A Transform that replaces every multiplied parameter whose name matches `where` by `encode(w, eqn)`.

    With `scaled` a leaf has room for the factors on its inputs that AWQ and SmoothQuant find; here they are 1.
    Raises ValueError when `where` matches nothing.
    """

    def one(path: str, w: Array, spec: Spec, key: Array) -> Weight:
        leaf = encode(w, spec.eqn)
        return leaf.with_inverse(jnp.ones((*leaf.codes.shape[:-2], leaf.kn[0], 1))) if scaled else leaf

    return weights.wrapping(where, one)
