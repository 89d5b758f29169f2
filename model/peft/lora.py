"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W + (alpha / rank) x A B. W is frozen; A and B are trained."""

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
    """A base weight plus scale * A B, where A is [contracted axes..., R] and B is [R, output axes...].

    Axes that the weight has in common with both x and the result, such as experts, come first in A and in B. When a
    tied embedding table is used as the output head, x is multiplied by B first, and then by A. `used` says whether the
    adapter of a tied table changes the lookup, the head, or both.
    """

    base: Array | Weight
    a: Array
    b: Array
    eqn: str = flax.struct.field(pytree_node=False)  # einsum equation from the weight's declaration
    scale: float = flax.struct.field(pytree_node=False)
    start: tuple[Array, Array] | None = None  # initial (A, B), whose product is subtracted from A B; None if it is 0
    noise: Array | None = None  # key data of the random key for dropout; None outside of training
    dropout: float = flax.struct.field(default=0.0, pytree_node=False)
    used: str = flax.struct.field(default="both", pytree_node=False)  # | "lookup" | "head"
    trainable: ClassVar[tuple[str, ...]] = ("a", "b")
    derived: ClassVar[tuple[str, ...]] = ("a", "start")  # LoRA-FA does not train A, but derives it from the seed

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
        """Returns scale * x A B."""
        xs, _, out = weights.operands(eqn)
        contracted = weights.split(eqn)[1]
        (first, f), (second, s) = zip((a, b), self.letters, strict=True)
        if not set(contracted) <= set(f):
            (first, f), (second, s) = (second, s), (first, f)
        low = xs.translate({ord(c): None for c in contracted}) + "R"  # [..., R]
        # apply the scale here, where the array is smallest
        y = self.scale * weights.einsum(f"{xs},{f}->{low}", x, first)
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
                "an adapter on only one use of a tied table cannot be merged", "adapter", "keep it as an adapter"
            )
        base = weights.dense_of(self.base, spec)
        return (base + self.delta()).astype(base.dtype)

    def delta(self) -> Array:
        """Returns scale * A B as one array that has the shape of the weight."""
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
    """Returns the einsum letters of A and B. For example, for the equation "BTD,DNH->BTNH", they are ("DR", "RNH")."""
    shared, contracted, produced = weights.split(eqn)
    return f"{shared}{contracted}R", f"{shared}R{produced}"


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """Returns alpha / rank, or alpha / sqrt(rank) if `rslora` (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732)."""
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
    """Returns a Transform that adds a LoRA to every matrix whose name matches the regex `where`.

    `ranks` and `alphas` override `rank` and `alpha` for some matrices. Each has pairs (regex, value), such as
    (("layers/mlp/.*", 8), ...). The first regex that matches a name determines the value. `dropout` is applied to the
    input of the adapter. `init` determines the initial values. With "zero_b", A is drawn from N(0, 1 / fan_in) and B is
    0, so the new model equals the base model exactly. With "pissa" (Meng et al. 2024, arXiv 2404.02948), A and B are
    initialized with the singular vectors of W that have the largest singular values, and only later changes of A B are
    added to W. With "orthogonal", A and B are random with A B = 0. Raises ValueError if `where` matches no name, or if
    a rank is too large for `init`.
    """
    return transform(LoRA, rank, alpha, where, rslora, dropout, ranks, alphas, init)


def transform(
    leaf: type[LoRA], rank: int, alpha: float, where: str, rslora: bool, dropout: float, ranks: tuple, alphas: tuple,
    init: str,
) -> Transform:  # fmt: skip
    """Implements `make` for LoRA and its subclasses; `leaf` is the class."""

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
    """Returns the value of the first rule (regex, value) whose regex matches the whole path; `default` if none does."""
    return next((value for pattern, value in rules if re.fullmatch(pattern, path)), default)


def _zero_b(base: None, spec: Spec, shapes: list[tuple], scale: float, key: Array) -> tuple[Array, Array]:
    fan_in = math.prod(spec.sizes[c] for c in weights.split(spec.eqn)[1])
    return jax.random.normal(key, shapes[0]) / math.sqrt(fan_in), jnp.zeros(shapes[1])


def _orthogonal(base: None, spec: Spec, shapes: list[tuple], scale: float, key: Array) -> tuple[Array, Array]:
    """As in PEFT, the rows of A are combinations of the even rows of a random orthogonal matrix, and the columns of B
    are combinations of its odd rows."""
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
    """Returns (A, B, all singular values of w), where A B is the best approximation of w with rank `rank`.

    It is the truncated singular value decomposition (Eckart & Young 1936). A and B are each scaled by the square roots
    of the singular values. Raises ValueError if `rank` exceeds the number of rows or columns of w.
    """
    _, contracted, produced = weights.split(spec.eqn)
    m = matrix(w, spec)
    if rank > min(m.shape[-2:]):
        raise ValueError(f"rank {rank} exceeds the largest possible rank of a {m.shape[-2]} x {m.shape[-1]} matrix")
    u, s, v = jnp.linalg.svd(m, full_matrices=False)
    root, size, lead = jnp.sqrt(s[..., :rank]), spec.sizes, m.shape[:-2]
    a = (u[..., :rank] * root[..., None, :]).reshape(*lead, *(size[c] for c in contracted), rank)
    return a, (root[..., None] * v[..., :rank, :]).reshape(*lead, rank, *(size[c] for c in produced)), s


def matrix(w: Array, spec: Spec) -> Array:
    """Reshapes a weight to [..., contracted size, output size]: one matrix per layer and expert."""
    shared, contracted, produced = weights.split(spec.eqn)
    letters = weights.operands(spec.eqn)[1]
    w = jnp.einsum(f"...{letters}->...{shared}{contracted}{produced}", w)
    lead = w.shape[: spec.stacked + len(shared)]
    return w.reshape(*lead, math.prod(w.shape[len(lead) : len(lead) + len(contracted)]), -1)
