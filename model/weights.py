"""Parameters are the leaves of a tree. A leaf is an array, or a `Weight`: a pytree node in the array's place that
defines how activations are multiplied by it. The layers do not distinguish the two.

Layers call `einsum(eqn, x, w)` and `take(w, ids)`, where `w` is an array or a `Weight`. Methods (LoRA, quantization,
...) are functions from a tree to a tree that replace leaves.
"""

import dataclasses
import functools
import math
import operator
import re
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeGuard, TypeVar

import flax.linen as nn
import flax.linen.spmd as spmd
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey
from jax.typing import DTypeLike

from common.errors import UserError
from kernels.partition import sharded

T = TypeVar("T")
Params = dict[str, Any]  # nested dicts whose leaves are arrays or Weights
Specs = dict[str, Any]  # the same dicts, with a Spec at every parameter
Tree = Any  # any pytree of arrays, or of shapes, shardings or bools in their place
Transform = Callable[[Params, Specs, Array], Params]  # a method; the last argument is a random key

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]  # pairs (logical axis, mesh axes)

# Letter of an equation -> logical axis of a weight. train/mesh.py maps logical axes to mesh axes.
AXES = dict(
    B="batch", T="seq", S="seq", D="embed", F="mlp", N="heads", K="kv_heads", H="head_dim", V="vocab",
    E="experts", R="rank", W="recurrent", C="taps", X="taps", Y="taps", Z="taps", I="block_in", J="block_out",
)  # fmt: skip


@flax.struct.dataclass
class Spec(nn.LogicallyPartitioned):
    """The declaration of a parameter: abstract value, logical axes (`names`) and the equation that uses it.

    `eqn` is "" for parameters that no matrix product uses (norm scales, biases). Leading axes that are not in
    the equation, such as "layers", come from stacking.
    """

    eqn: str = flax.struct.field(default="", pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def stacked(self) -> int:
        """Number of leading axes that are not in the equation."""
        return len(self.shape) - len(operands(self.eqn)[1]) if self.eqn else 0

    @property
    def sizes(self) -> dict[str, int]:
        """{letter of the equation: size of that axis}."""
        return dict(zip(operands(self.eqn)[1], self.shape[self.stacked :], strict=True))


def operands(eqn: str) -> tuple[str, str, str]:
    """ "BTD,DF->BTF" -> ("BTD", "DF", "BTF")."""
    inputs, out = eqn.split("->")
    x, w = inputs.split(",")
    return x, w, out


def split(eqn: str) -> tuple[str, str, str]:
    """The weight's letters by role: (shared by x, w and out, such as experts; contracted; produced)."""
    x, w, out = operands(eqn)
    return (
        "".join(c for c in w if c in x and c in out),
        "".join(c for c in w if c in x and c not in out),
        "".join(c for c in w if c not in x),
    )


class Weight:
    """Base class of the leaves that are not plain arrays. Subclasses are `flax.struct.dataclass`es."""

    trainable: ClassVar[tuple[str, ...]] = ()  # fields that are trained if only adapters are trained
    derived: ClassVar[tuple[str, ...]] = ()  # fields that follow from other fields, so the fingerprint omits them
    whole: ClassVar[bool] = False  # counts as one array, with the `shape`, `ndim` and `size` of the replaced array

    if TYPE_CHECKING:  # flax.struct adds this method

        def replace(self, **changes: object) -> Self: ...

    def einsum(self, eqn: str, x: Array) -> Array:
        """`jnp.einsum(eqn, x, dense)` without building `dense`."""
        raise NotImplementedError

    def take(self, ids: Array, dtype: DTypeLike) -> Array:
        """Rows `ids` [...] of a table [V, D] -> [..., D] in `dtype`."""
        raise NotImplementedError

    def dense(self, spec: Spec | None) -> Array:
        """The plain array that this leaf represents: used to merge and export, and as the reference in tests."""
        raise NotImplementedError

    def axes(self, spec: Spec | None) -> "Weight":
        """This node with each array replaced by its logical axis names (a tuple), which shard it like the base."""
        raise NotImplementedError

    def in_training(self, key: Array, step: Array) -> "Weight":
        """This leaf prepared for a training step, for example with a random key for dropout or rounding.

        Outside of training, leaves use no randomness. By default, only the Weights inside this leaf are prepared.
        """
        inner = {f: getattr(self, f) for f in fields(self) if is_weight(getattr(self, f))}
        return self.replace(**{f: w.in_training(key_for(key, f), step) for f, w in inner.items()})

    def for_inference(self) -> "Weight | Array":
        """This leaf, of one layer, prepared for inference: values that depend only on its arrays are precomputed."""
        return self.replace(**{f: for_inference(getattr(self, f)) for f in fields(self) if is_weight(getattr(self, f))})

    def macs(self, stacked: int) -> "Weight":
        """This node with each array replaced by its multiply-adds per token: the size of a matrix, or 0 for a vector.

        `stacked` is the number of leading axes over which layers are stacked.
        """
        one = lambda x: x.macs(stacked) if is_weight(x) else x.size * (x.ndim - stacked >= 2)
        return self.replace(**{f: jax.tree.map(one, getattr(self, f), is_leaf=is_weight) for f in fields(self)})


class Extra(Weight):
    """Base class of nodes that are added to the declared parameters; a layer uses them if they are present.

    They cannot be merged into weights. Without them, the model is the base model.
    """

    def dense(self, spec: Spec | None) -> Array:
        raise UserError(f"{type(self).__name__} cannot be merged into weights", "adapter", "keep it as an adapter")


def einsum(eqn: str, x: Array, w: Array | Weight) -> Array:
    """`jnp.einsum` of an activation and a weight; the result has x's dtype. For example, "BTD,DF->BTF" multiplies
    x [B,T,D] by w [D,F] and returns [B,T,F].

    The result is tagged with the checkpoint name "product", so that remat policies can save it."""
    y = w.einsum(eqn, x) if isinstance(w, Weight) else product(eqn, x, cast(w, x.dtype))
    return checkpoint_name(y, "product")


def cast(w: Array, dtype: DTypeLike) -> Array:
    """`w.astype(dtype)` of one layer's slice.

    On a TPU mesh, XLA hoists a plain convert out of the layer loop and keeps a second copy of the whole stack: 2.1 GB
    per chip for 7B parameters on four chips. `reduce_precision` is not hoisted.
    """
    narrows = jnp.dtype(dtype).itemsize < w.dtype.itemsize and jnp.issubdtype(w.dtype, jnp.floating)
    return _rounded(w, dtype) if narrows else w.astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(w: Array, dtype: DTypeLike) -> Array:
    form = jnp.finfo(dtype)
    return jax.lax.reduce_precision(w, form.nexp, form.nmant).astype(dtype)


@_rounded.defjvp
def _(dtype: DTypeLike, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return _rounded(*primals, dtype), tangents[0].astype(dtype)  # a gradient is only cast


def take(w: Array | Weight, ids: Array, dtype: DTypeLike) -> Array:
    """Embedding lookup: rows `ids` [...] of a table [V, D] -> [..., D] in `dtype`."""
    if isinstance(w, Weight):
        return w.take(ids, dtype)
    # Else rows of a table that is sharded over embed are sharded the same way, and XLA rematerializes them whole.
    table: Any = spmd.with_logical_constraint(w, ("vocab", None))
    return jnp.take(table, ids, axis=0).astype(dtype)


def product(eqn: str, x: Array, w: Array, dtype: DTypeLike | None = None) -> Array:
    """`jnp.einsum` of two arrays, accumulated in `dtype`. On one device it is computed as a rank-2 matmul if possible.

    XLA's CPU backend is fast only on rank-2 products: with [B,T,D] activations the weight gradient contracts two axes
    and takes 1.65 times as long on an MLP. Under a mesh, dimensions are not merged, since the partitioner needs them.
    """
    xs, ws, out = operands(eqn)
    _, contracted, produced = split(eqn)
    kept = xs[: -len(contracted)]
    plain = xs == kept + contracted and out == kept + produced
    if not plain or ws not in (contracted + produced, produced + contracted) or sharded():
        return jnp.einsum(eqn, x, w, preferred_element_type=dtype)
    n = len(contracted)
    flat_x = x.reshape(-1, math.prod(x.shape[-n:]))
    rows = flat_x.shape[0]
    if jnp.issubdtype(x.dtype, jnp.integer) and rows == 1:  # on a CPU one row of integers takes 4x as long as two
        flat_x = jnp.pad(flat_x, ((0, 1), (0, 0)))
    first = ws.startswith(contracted)
    tail = w.shape[n:] if first else w.shape[:-n]
    flat_w = w.reshape(-1, math.prod(tail)) if first else w.reshape(math.prod(tail), -1)
    dims = (((1,), (0 if first else 1,)), ((), ()))
    y = jax.lax.dot_general(flat_x, flat_w, dims, preferred_element_type=dtype)
    return (y[:rows] if len(y) > rows else y).reshape(x.shape[:-n] + tail)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": the platform of the ambient mesh, whose devices may be abstract, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def shards(*axes: str) -> int:
    """The number of parts into which the ambient mesh splits a dimension that is sharded over `axes`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape.get(a, 1) for a in axes)


def assigned_axes(
    names: Sequence[str | None], sizes: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules
) -> list[tuple[str, ...]]:
    """For each dimension, with its logical name and size, the mesh axes over which it is sharded.

    A dimension that its mesh axes do not divide evenly is replicated. A mesh axis shards only the first dimension that
    maps to it.
    """
    table, used, found = dict(rules), set(), []
    for name, size in zip(names, sizes, strict=True):
        axes = table.get(name or "") or ()
        axes = (axes,) if isinstance(axes, str) else axes
        fits = not used & set(axes) and size % math.prod(mesh.shape.get(a, 1) for a in axes) == 0
        found.append(axes if fits else ())
        used |= set(found[-1])
    return found


def mesh_axes(names: Sequence[str | None], sizes: Sequence[int]) -> list[tuple[str, ...]]:
    """`assigned_axes` for the ambient mesh and flax's current rules, without mesh axes of size 1."""
    found = assigned_axes(names, sizes, jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules())
    return [tuple(a for a in axes if shards(a) > 1) for axes in found]


def place(names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding | None:
    """The sharding on the ambient mesh of an array with these logical axis names; None on a single device."""
    return NamedSharding(jax.sharding.get_mesh(), P(*mesh_axes(names, shape))) if sharded() else None


# --- trees -----------------------------------------------------------------------------------------------------------


def is_weight(x: object) -> TypeGuard[Weight]:
    return isinstance(x, Weight)


def is_spec(x: object) -> TypeGuard[Spec]:
    return isinstance(x, Spec)


def name(path: tuple) -> str:
    """A key path as "layers/attn/wq/a"."""
    parts = []
    for key in path:
        match key:
            case DictKey(key=k) | FlattenedIndexKey(key=k):
                parts.append(str(k))
            case SequenceKey(idx=i):
                parts.append(str(i))
            case GetAttrKey(name=n):
                parts.append(n)
    return "/".join(parts)


def at(tree: Tree, path: str) -> Tree:
    """The part of nested dicts at a path such as "layers/attn/wq"."""
    return functools.reduce(operator.getitem, path.split("/"), tree)


def arrays(tree: Tree) -> list[Array]:
    """The arrays of a tree, where a quantized weight (codes and scales) counts as the one array that it represents."""
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Weight) and x.whole)


def map_named(f: Callable, tree: Tree, *rest: Tree, is_leaf: Callable[[object], bool] | None = None) -> Tree:
    """`jax.tree.map`, but `f` takes the path of a leaf, as a string, as its first argument."""
    return jax.tree.map_with_path(lambda path, *xs: f(name(path), *xs), tree, *rest, is_leaf=is_leaf)


def replace(params: Params, specs: Specs, f: Callable[[str, Tree, Spec | None], Tree]) -> Params:
    """`params` with every leaf replaced by `f(name, leaf, spec)`; the spec of an Extra is None."""
    declared = {name(path): spec for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec)}
    return map_named(lambda path, leaf: f(path, leaf, declared.get(path)), params, is_leaf=is_weight)


def wrapping(where: str, f: Callable[[str, Array | Weight, Spec, Array], Weight]) -> Transform:
    """A Transform that replaces every multiplied parameter whose name matches `where` by `f(name, leaf, spec, key)`.
    Each call gets the same key, from which `f` derives a key of the parameter with `key_for`.

    Raises ValueError if no parameter matches.
    """

    def transform(params: Params, specs: Specs, key: Array) -> Params:
        chosen = lambda path, spec: spec is not None and spec.eqn and re.fullmatch(where, path)
        if not any(chosen(name(path), s) for path, s in jax.tree.leaves_with_path(specs, is_leaf=is_spec)):
            raise ValueError(f"where={where!r} matches no multiplied parameter")
        wrap = lambda path, leaf, spec: f(path, leaf, spec, key) if chosen(path, spec) else leaf
        return replace(params, specs, wrap)

    return transform


def key_for(key: Array, path: str) -> Array:
    """A separate key for every parameter, which does not depend on the rest of the tree."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def trainable(params: Params, what: str) -> Tree:
    """A tree of bools, True for each array of `params` that is trained. `what` is "all", "adapters", or a regex that
    the whole name must match.

    "all" excludes integers and the non-trainable fields of a Weight, because gradients cannot update quantized values,
    and the base of an adapter is frozen by definition.
    Raises ValueError if no array would be trained.
    """

    def pick(path: str, leaf: Array | Weight, moves: bool | None) -> Tree:  # None: not inside a Weight
        if isinstance(leaf, Weight):
            adapter = "base" in fields(leaf)  # if an adapter wraps another one, as on a tied table, both train
            own = lambda f: f in leaf.trainable and (moves is not False or adapter)
            return leaf.replace(**{f: walk(f"{path}/{f}", getattr(leaf, f), own(f)) for f in fields(leaf)})
        if what in ("all", "adapters"):
            return (what == "all" if moves is None else moves) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        return re.fullmatch(what, path) is not None

    def walk(prefix: str, tree: Tree, moves: bool | None) -> Tree:
        join = lambda path: "/".join(filter(None, (prefix, path)))
        return map_named(lambda path, x: pick(join(path), x, moves), tree, is_leaf=is_weight)

    mask = walk("", params, None)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(f"trainable={what!r} selects no parameter")
    return mask


def fields(node: Weight) -> list[str]:
    """The fields of a Weight that hold arrays or other Weights."""
    declared: Any = node  # the subclasses are dataclasses, Weight itself is not
    return [f.name for f in dataclasses.fields(declared) if f.metadata.get("pytree_node", True)]


def partition(params: T, mask: Tree) -> tuple[T, T]:
    """(trainable, frozen): two trees of the same structure, each with None where the other one has the array."""
    chosen = jax.tree.map(lambda m, x: x if m else None, mask, params)
    others = jax.tree.map(lambda m, x: None if m else x, mask, params)
    return chosen, others


def combine(a: T, b: T) -> T:
    """The inverse of `partition`."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


def in_training(params: Params, key: Array, step: Array) -> Params:
    """`params` with every Weight prepared for training step `step`; see Weight.in_training."""
    live = lambda path, w: w.in_training(key_for(key, path), step) if is_weight(w) else w
    return map_named(live, params, is_leaf=is_weight)


def for_inference(params: Params) -> Params:
    """Unstacked parameters with every Weight prepared for inference; see Weight.for_inference."""
    return jax.tree.map(lambda w: w.for_inference() if is_weight(w) else w, params, is_leaf=is_weight)


def base(params: Tree) -> Tree:
    """`params` without adapters: each leaf that wraps a frozen `base` is replaced by this base, and Extras are dropped.
    This yields the reference policy without a copy of the weights."""
    if isinstance(params, dict):
        return {k: base(v) for k, v in params.items() if not isinstance(v, Extra)}
    if isinstance(params, tuple):
        return tuple(map(base, params))
    leaf: Array | Weight = params
    while is_weight(leaf) and "base" in fields(leaf):
        leaf = vars(leaf)["base"]
    return leaf


def quantized_under_adapters(params: Params) -> bool:
    """Whether any adapter wraps a quantized leaf."""
    off = [(w, base(w)) for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w)]
    return any(w is not under and is_weight(under) for w, under in off)


def underived(params: Params) -> Params:
    """`params` with derived fields set to None, since their rounding may differ between machines."""

    def strip(w: Array | Weight) -> Array | Weight:
        if not is_weight(w):
            return w
        kept = {f: jax.tree.map(strip, getattr(w, f), is_leaf=is_weight) for f in fields(w)}
        return w.replace(**kept | dict.fromkeys(w.derived))

    return jax.tree.map(strip, params, is_leaf=is_weight)


def dense(params: Params, specs: Specs) -> Params:
    """`params` with every Weight merged into the plain array that it represents."""
    return replace(params, specs, lambda _, w, spec: dense_of(w, spec))


def dense_of(w: Array | Weight, spec: Spec | None) -> Array:
    return w.dense(spec) if isinstance(w, Weight) else w


def axes(params: Params, specs: Specs) -> Tree:
    """`params` with every array replaced by the tuple of its logical axis names."""
    return replace(params, specs, lambda _, w, spec: axes_of(w, spec))


def axes_of(w: Array | Weight, spec: Spec | None) -> Weight | tuple[str | None, ...]:
    if isinstance(w, Weight):
        return w.axes(spec)
    assert spec, "a plain array without a Spec"
    return spec.names
