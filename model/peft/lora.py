"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W + (alpha / rank) x A B, with A and B trained and W frozen."""

import math
import re
from typing import ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from common.errors import UserError
from model import weights
from model.weights import AXES, Spec, Transform, Weight


@flax.struct.dataclass
class LoRA(Weight):
    """`base` plus scale * A B. A is [contracted..., R] and B is [R, produced...]; the base's shared axes precede.

    The same leaf also serves an equation that contracts the produced axes, as a tied unembedding does: the factor with
    the contracted axes is multiplied first. `used` says which uses of a tied table the adapter changes.
    """

    base: Array | Weight
    a: Array
    b: Array
    eqn: str = flax.struct.field(pytree_node=False)  # the equation that the weight was declared with
    scale: float = flax.struct.field(pytree_node=False)
    start: tuple[Array, Array] | None = None  # initial (A, B) if A B starts nonzero; its product is subtracted
    noise: Array | None = None  # key data for dropout, only in training
    dropout: float = flax.struct.field(default=0.0, pytree_node=False)
    used: str = flax.struct.field(default="both", pytree_node=False)  # | "lookup" | "head"
    trainable: ClassVar[tuple[str, ...]] = ("a", "b")
    derived: ClassVar[tuple[str, ...]] = ("a", "start")  # A is derived only for LoRA-FA, which keeps its initial A

    @property
    def letters(self) -> tuple[str, str]:
        return factors(self.eqn)

    def einsum(self, eqn: str, x: Array) -> Array:
        y = weights.einsum(eqn, x, self.base)
        if self.used == "lookup":
            return y
        if self.noise is not None:
            keep = jax.random.bernoulli(jax.random.wrap_key_data(self.noise), 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        change = self._product(eqn, x, self.a, self.b)
        return y + (change if self.start is None else change - self._product(eqn, x, *self.start))

    def _product(self, eqn: str, x: Array, a: Array, b: Array) -> Array:
        """scale * x A B."""
        xs, _, out = weights.operands(eqn)
        contracted = weights.split(eqn)[1]
        (first, f), (second, s) = zip((a, b), self.letters, strict=True)
        if not set(contracted) <= set(f):
            (first, f), (second, s) = (second, s), (first, f)
        low = xs.translate({ord(c): None for c in contracted}) + "R"  # [..., R]
        y = self.scale * weights.einsum(f"{xs},{f}->{low}", x, first)  # scales the smallest array, of rank R
        return weights.einsum(f"{low},{s}->{out}", y, second)

    def take(self, ids: Array, dtype: DTypeLike) -> Array:
        y = weights.take(self.base, ids, dtype)
        if self.used == "head":
            return y
        look = lambda a, b: weights.take(a, ids, dtype) @ b.astype(dtype)
        change = look(self.a, self.b) if self.start is None else look(self.a, self.b) - look(*self.start)
        return y + self.scale * change

    def dense(self, spec: Spec) -> Array:
        if self.used != "both":
            raise UserError(
                "an adapter for only one use of a tied table cannot be merged", "adapter", "keep it as an adapter"
            )
        base = weights.dense_of(self.base, spec)
        return (base + self.delta()).astype(base.dtype)

    def delta(self) -> Array:
        """scale * A B as one array of the weight's shape."""
        (a, b), w = self.letters, weights.operands(self.eqn)[1]
        whole = lambda x, y: jnp.einsum(f"...{a},...{b}->...{w}", x, y, precision="highest")
        return self.scale * (whole(self.a, self.b) - (0 if self.start is None else whole(*self.start)))

    def axes(self, spec: Spec) -> "LoRA":
        stacked = spec.names[: spec.stacked]
        a, b = (stacked + tuple(AXES[c] for c in letters) for letters in self.letters)
        start = None if self.start is None else (a, b)
        return self.replace(base=weights.axes_of(self.base, spec), a=a, b=b, start=start)

    def in_training(self, key: Array, step: Array) -> "LoRA":
        leaf = super().in_training(key, step)
        if not self.dropout:
            return leaf
        stack = self.a.shape[: self.a.ndim - len(self.letters[0])]
        return leaf.replace(noise=jax.random.key_data(jax.random.split(weights.key_for(key, "dropout"), stack)))


def factors(eqn: str) -> tuple[str, str]:
    """The einsum subscripts of A and of B for a weight with this equation: "BTD,DNH->BTNH" -> ("DR", "RNH")."""
    shared, contracted, produced = weights.split(eqn)
    return f"{shared}{contracted}R", f"{shared}R{produced}"


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def make(
    *,
    rank: int = 16,
    alpha: float = 32.0,
    where: str = r"layers/.*",
    rslora: bool = False,
    dropout: float = 0.0,
    ranks: tuple = (),
    alphas: tuple = (),
    init: Literal["zero_b", "pissa", "orthogonal"] = "zero_b",
) -> Transform:
    """A Transform that wraps every multiplied parameter whose name matches `where`.

    `ranks` and `alphas` override `rank` and `alpha` by name: (("layers/mlp/.*", 8), ...), the first match wins.
    `dropout` acts on the adapter's input. `init`: "zero_b" draws A from N(0, 1/fan_in) and sets B to zero, so that the
    transformed model equals the base bit for bit; "pissa" starts with the largest singular vectors of W (Meng et al.
    2024, arXiv 2404.02948) and adds only the change of A B since then; "orthogonal" draws A and B with A B = 0.
    Raises ValueError when `where` or a rule matches nothing, or when a rank is too large for `init`.
    """
    return transform(LoRA, rank, alpha, where, rslora, dropout, ranks, alphas, init)


def transform(
    leaf: type[LoRA], rank: int, alpha: float, where: str, rslora: bool, dropout: float, ranks: tuple, alphas: tuple,
    init: str,
) -> Transform:  # fmt: skip
    """`make` for LoRA and its subclasses."""

    def wrap(path: str, base: Array | Weight, spec: Spec, key: Array) -> LoRA:
        r = int(first_match(ranks, path, rank))
        scale = scale_of(first_match(alphas, path, alpha), r, rslora)
        size, stack = spec.sizes | {"R": r}, spec.shape[: spec.stacked]
        shapes = [stack + tuple(size[c] for c in letters) for letters in factors(spec.eqn)]
        key = weights.key_for(key, path)
        start = STARTS[init](weights.dense_of(base, spec) if init == "pissa" else None, spec, shapes, scale, key)
        start = [x.astype(spec.value.dtype) for x in start]
        kept = tuple(start) if init == "pissa" else None
        return leaf(base, *start, spec.eqn, scale, start=kept, dropout=dropout)

    return weights.wrapping(where, wrap)


def first_match(rules: tuple, path: str, default: float) -> float:
    """The value of the first (regex, value) whose regex matches the whole path."""
    return next((value for pattern, value in rules if re.fullmatch(pattern, path)), default)


def _zero_b(base: None, spec: Spec, shapes: list[tuple], scale: float, key: Array) -> tuple[Array, Array]:
    fan_in = math.prod(spec.sizes[c] for c in weights.split(spec.eqn)[1])
    return jax.random.normal(key, shapes[0]) / math.sqrt(fan_in), jnp.zeros(shapes[1])


def _orthogonal(base: None, spec: Spec, shapes: list[tuple], scale: float, key: Array) -> tuple[Array, Array]:
    """A from the even rows of a random orthogonal matrix, B from its odd rows, as in PEFT."""
    rank = shapes[0][-1]
    if rank % 2:
        raise ValueError(f"init='orthogonal' needs an even rank, not {rank}")
    lead = shapes[0][: spec.stacked + len(weights.split(spec.eqn)[0])]
    turn, left, right = jax.random.split(key, 3)
    q = jax.vmap(lambda k: jnp.linalg.qr(jax.random.normal(k, (rank, rank)))[0])
    q = q(jax.random.split(turn, math.prod(lead))).reshape(*lead, rank, rank)
    half = lambda k, n: jax.random.normal(k, (*lead, n, rank // 2)) / 10
    a = half(left, math.prod(shapes[0][len(lead) : -1])) @ q[..., 0::2, :]
    b = jnp.swapaxes(half(right, math.prod(shapes[1][len(lead) + 1 :])) @ q[..., 1::2, :], -1, -2)
    return a.reshape(shapes[0]), b.reshape(shapes[1])


def _pissa(base: Array, spec: Spec, shapes: list[tuple], scale: float, key: Array) -> tuple[Array, Array]:
    a, b, _ = truncate(base.astype(jnp.float32), spec, shapes[0][-1])
    return a / math.sqrt(scale), b / math.sqrt(scale)


STARTS = {"zero_b": _zero_b, "orthogonal": _orthogonal, "pissa": _pissa}


def truncate(w: Array, spec: Spec, rank: int) -> tuple[Array, Array, Array]:
    """(A, B, singular values [..., min(in, out)]) of the parameter w: A B is its best approximation of rank `rank`
    (Eckart & Young 1936), with the singular values split evenly between A and B.

    Raises ValueError if `rank` exceeds the smaller dimension of the matrix.
    """
    _, contracted, produced = weights.split(spec.eqn)
    m = matrix(w, spec)
    if rank > min(m.shape[-2:]):
        raise ValueError(f"rank {rank} exceeds that of a {m.shape[-2]} x {m.shape[-1]} matrix")
    u, s, v = jnp.linalg.svd(m, full_matrices=False)
    root, size, lead = jnp.sqrt(s[..., :rank]), spec.sizes, m.shape[:-2]
    a = (u[..., :rank] * root[..., None, :]).reshape(*lead, *(size[c] for c in contracted), rank)
    return a, (root[..., None] * v[..., :rank, :]).reshape(*lead, rank, *(size[c] for c in produced)), s


def matrix(w: Array, spec: Spec) -> Array:
    """A weight as [..., contracted, produced], one matrix per layer and expert."""
    shared, contracted, produced = weights.split(spec.eqn)
    letters = weights.operands(spec.eqn)[1]
    w = jnp.einsum(f"...{letters}->...{shared}{contracted}{produced}", w)
    lead = w.shape[: spec.stacked + len(shared)]
    return w.reshape(*lead, math.prod(w.shape[len(lead) : len(lead) + len(contracted)]), -1)
