"""Parameter trees. Each parameter is an array or a `Weight`.

A `Weight` is an object that replaces an array, such as a quantized matrix or a matrix with LoRA factors. Its methods
define how activations are multiplied by it. Layers call `einsum(eqn, x, w)` and `take(w, ids)`, where `w` may be an
array or a `Weight`. Techniques such as LoRA and quantization are functions that replace arrays in a tree by `Weight`
objects.
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
Params = dict[str, Any]  # nested dicts whose leaves are arrays or `Weight` objects
Specs = dict[str, Any]  # nested dicts with the same structure, and a Spec for every parameter
Tree = Any  # any pytree of arrays, shapes, shardings or bools
Transform = Callable[[Params, Specs, Array], Params]  # (parameters, specs, random key) -> new parameters

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]  # (logical axis, mesh axes) pairs

# {letter in einsum equations: logical axis}. train/mesh.py maps logical axes to mesh axes.
AXES = dict(
    B="batch", T="seq", S="seq", D="embed", F="mlp", N="heads", K="kv_heads", H="head_dim", V="vocab",
    E="experts", R="rank", W="recurrent", C="taps", X="taps", Y="taps", Z="taps", I="block_in", J="block_out",
)  # fmt: skip


@flax.struct.dataclass
class Spec(nn.LogicallyPartitioned):
    """The declaration of a parameter: its abstract value, logical axes (`names`) and the einsum equation that uses it.

    `eqn` is "" for parameters that are not used in matrix products (norm scales, biases). If a parameter is stacked
    over layers, its first axis is "layers", which is not part of the equation.
    """

    eqn: str = flax.struct.field(default="", pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def stacked(self) -> int:
        """The number of leading axes that are not in the equation, because the parameter is stacked over them."""
        return len(self.shape) - len(operands(self.eqn)[1]) if self.eqn else 0

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis of the weight, keyed by its letter in the equation."""
        return dict(zip(operands(self.eqn)[1], self.shape[self.stacked :], strict=True))


def operands(eqn: str) -> tuple[str, str, str]:
    """Splits an equation into its parts. For example, "BTD,DF->BTF" becomes ("BTD", "DF", "BTF")."""
    inputs, out = eqn.split("->")
    x, w = inputs.split(",")
    return x, w, out


def split(eqn: str) -> tuple[str, str, str]:
    """Splits the weight's letters into (shared axes such as experts, contracted axes, output axes).

    Shared axes are in x, in the weight and in the result. Contracted axes are not in the result. Output axes are not in
    x.
    """
    x, w, out = operands(eqn)
    return (
        "".join(c for c in w if c in x and c in out),
        "".join(c for c in w if c in x and c not in out),
        "".join(c for c in w if c not in x),
    )


class Weight:
    """Base class of parameters that are not plain arrays. Each subclass must be a `flax.struct.dataclass`."""

    trainable: ClassVar[tuple[str, ...]] = ()  # fields that can be trained; all other fields are frozen
    derived: ClassVar[tuple[str, ...]] = ()  # fields that are computed from others; fingerprints omit them
    # whether instances have the `shape`, `ndim` and `size` of the array that they replace
    whole: ClassVar[bool] = False

    if TYPE_CHECKING:  # flax.struct adds this method

        def replace(self, **changes: object) -> Self: ...

    def einsum(self, eqn: str, x: Array) -> Array:
        """Computes `jnp.einsum(eqn, x, dense)` without building the array `dense`."""
        raise NotImplementedError

    def take(self, ids: Array, dtype: DTypeLike) -> Array:
        """Looks up the rows `ids` [...] of an embedding table [V, D]. Returns an array [..., D] of dtype `dtype`."""
        raise NotImplementedError

    def dense(self, spec: Spec | None) -> Array:
        """Returns the plain array that this `Weight` represents.

        It is used for merging, export, and expected values in tests.
        """
        raise NotImplementedError

    def axes(self, spec: Spec | None) -> "Weight":
        """Returns this object with each array replaced by the tuple of its logical axes, which define its sharding."""
        raise NotImplementedError

    def in_training(self, key: Array, step: Array) -> "Weight":
        """Returns this `Weight`, prepared for a training step.

        For example, adds a random key for dropout or stochastic rounding, which are only used in training. By default,
        this method only prepares nested `Weight` objects.
        """
        inner = {f: getattr(self, f) for f in fields(self) if is_weight(getattr(self, f))}
        return self.replace(**{f: w.in_training(key_for(key, f), step) for f, w in inner.items()})

    def for_inference(self) -> "Weight | Array":
        """Returns this `Weight`, which belongs to a single layer, prepared for inference.

        Values that do not depend on activations are computed in advance.
        """
        return self.replace(**{f: for_inference(getattr(self, f)) for f in fields(self) if is_weight(getattr(self, f))})

    def macs(self, stacked: int) -> "Weight":
        """Returns this object with each array replaced by the number of its multiply-adds per token.

        This number is the size of a matrix, and 0 for a vector. `stacked` is the number of leading axes over which
        layers are stacked.
        """
        one = lambda x: x.macs(stacked) if is_weight(x) else x.size * (x.ndim - stacked >= 2)
        return self.replace(**{f: jax.tree.map(one, getattr(self, f), is_leaf=is_weight) for f in fields(self)})


class Extra(Weight):
    """Base class of parameters that the base model does not have, such as a prefix.

    Layers use them if they are present. They cannot be merged into weights.
    """

    def dense(self, spec: Spec | None) -> Array:
        raise UserError(f"{type(self).__name__} cannot be merged into weights", "adapter", "keep it as an adapter")


def einsum(eqn: str, x: Array, w: Array | Weight) -> Array:
    """Multiplies an activation x by a weight w. The result has the dtype of x.

    For example, the equation "BTD,DF->BTF" multiplies x [B,T,D] by w [D,F] and returns [B,T,F]. The result has the
    checkpoint name "product", by which remat policies select it.
    """
    y = w.einsum(eqn, x) if isinstance(w, Weight) else product(eqn, x, cast(w, x.dtype))
    return checkpoint_name(y, "product")


def cast(w: Array, dtype: DTypeLike) -> Array:
    """Casts one layer's weight to `dtype`, such that XLA does not move the cast out of the loop over layers.

    On a TPU mesh, XLA moves a plain cast before the loop. This creates a second copy of all layers, which takes 2.1 GB
    per chip for 7B parameters on four chips. XLA does not move `reduce_precision`.
    """
    narrows = jnp.dtype(dtype).itemsize < w.dtype.itemsize and jnp.issubdtype(w.dtype, jnp.floating)
    return _rounded(w, dtype) if narrows else w.astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(w: Array, dtype: DTypeLike) -> Array:
    form = jnp.finfo(dtype)
    return jax.lax.reduce_precision(w, form.nexp, form.nmant).astype(dtype)


@_rounded.defjvp
def _(dtype: DTypeLike, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return _rounded(*primals, dtype), tangents[0].astype(dtype)  # cast gradients normally


def take(w: Array | Weight, ids: Array, dtype: DTypeLike) -> Array:
    """Looks up the rows `ids` [...] of an embedding table [V, D]. Returns an array [..., D] of dtype `dtype`."""
    if isinstance(w, Weight):
        return w.take(ids, dtype)
    # Without this constraint, the looked-up rows would be sharded over "embed", and XLA would replicate them to reshard
    # them.
    table: Any = spmd.with_logical_constraint(w, ("vocab", None))
    return jnp.take(table, ids, axis=0).astype(dtype)


def product(eqn: str, x: Array, w: Array, dtype: DTypeLike | None = None) -> Array:
    """Computes `jnp.einsum` of two arrays, accumulated in `dtype`.

    If possible, reshapes both arrays to matrices first, because XLA's CPU backend is only fast for products of
    matrices. Otherwise, with activations [B,T,D], the gradient for a weight would contract two axes, B and T, and an
    MLP would take 1.65 times as long. On a mesh, arrays are not reshaped, because XLA's partitioner needs the separate
    axes.
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
    # On a CPU, multiplying a single row of integers takes 4 times as long as multiplying two rows.
    if jnp.issubdtype(x.dtype, jnp.integer) and rows == 1:
        flat_x = jnp.pad(flat_x, ((0, 1), (0, 0)))
    first = ws.startswith(contracted)
    tail = w.shape[n:] if first else w.shape[:-n]
    flat_w = w.reshape(-1, math.prod(tail)) if first else w.reshape(math.prod(tail), -1)
    dims = (((1,), (0 if first else 1,)), ((), ()))
    y = jax.lax.dot_general(flat_x, flat_w, dims, preferred_element_type=dtype)
    return (y[:rows] if len(y) > rows else y).reshape(x.shape[:-n] + tail)


def platform() -> str:
    """Returns the platform of the current mesh, which may be abstract.

    If there is none, returns JAX's default platform.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def shards(*axes: str) -> int:
    """Returns the number of shards of a dimension that is sharded over the mesh axes `axes` of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape.get(a, 1) for a in axes)


def assigned_axes(
    names: Sequence[str | None], sizes: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules
) -> list[tuple[str, ...]]:
    """Returns, for each dimension of an array, the mesh axes that shard it.

    `names` are the logical axes of the dimensions. A dimension is replicated if its size is not a multiple of the
    number of shards. If several dimensions map to the same mesh axis, only the first of them is sharded over it.
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
    """Returns `assigned_axes` for the current mesh and flax's current rules. Leaves out mesh axes of size 1."""
    found = assigned_axes(names, sizes, jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules())
    return [tuple(a for a in axes if shards(a) > 1) for axes in found]


def place(names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding | None:
    """Returns the sharding of an array with the logical axes `names` on the current mesh; None on a single device."""
    return NamedSharding(jax.sharding.get_mesh(), P(*mesh_axes(names, shape))) if sharded() else None


# --- trees -----------------------------------------------------------------------------------------------------------


def is_weight(x: object) -> TypeGuard[Weight]:
    return isinstance(x, Weight)


def is_spec(x: object) -> TypeGuard[Spec]:
    return isinstance(x, Spec)


def name(path: tuple) -> str:
    """Converts a JAX key path to a string such as "layers/attn/wq/a"."""
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
    """Returns the value at a path such as "layers/attn/wq" in nested dicts."""
    return functools.reduce(operator.getitem, path.split("/"), tree)


def arrays(tree: Tree) -> list[Array]:
    """Returns the arrays in a tree. A quantized weight, which consists of codes and scales, counts as one array."""
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Weight) and x.whole)


def map_named(f: Callable, tree: Tree, *rest: Tree, is_leaf: Callable[[object], bool] | None = None) -> Tree:
    """Like `jax.tree.map`, but `f` gets the path of the leaf, as a string, as an additional first argument."""
    return jax.tree.map_with_path(lambda path, *xs: f(name(path), *xs), tree, *rest, is_leaf=is_leaf)


def replace(params: Params, specs: Specs, f: Callable[[str, Tree, Spec | None], Tree]) -> Params:
    """Replaces each parameter (array or `Weight`) by `f(name, parameter, spec)`. For an Extra, `spec` is None."""
    declared = {name(path): spec for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec)}
    return map_named(lambda path, leaf: f(path, leaf, declared.get(path)), params, is_leaf=is_weight)


def wrapping(where: str, f: Callable[[str, Array | Weight, Spec, Array], Weight]) -> Transform:
    """Returns a Transform that replaces matrices whose names match the regex `where` by `f(name, matrix, spec, key)`.

    All calls get the same random key; `f` can derive a separate key for its matrix with `key_for`. The Transform raises
    ValueError if no name matches.
    """

    def transform(params: Params, specs: Specs, key: Array) -> Params:
        chosen = lambda path, spec: spec is not None and spec.eqn and re.fullmatch(where, path)
        if not any(chosen(name(path), s) for path, s in jax.tree.leaves_with_path(specs, is_leaf=is_spec)):
            raise ValueError(f"where={where!r} matches no parameter that a matrix product uses")
        wrap = lambda path, leaf, spec: f(path, leaf, spec, key) if chosen(path, spec) else leaf
        return replace(params, specs, wrap)

    return transform


def key_for(key: Array, path: str) -> Array:
    """Derives a random key for the parameter `path`. It does not depend on which other parameters exist."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def trainable(params: Params, what: str) -> Tree:
    """Returns a tree of bools: for each array in `params`, whether it is trained.

    `what` is "all", "adapters", or a regex that must match the whole name of a parameter. Even "all" excludes integers,
    because gradients cannot update quantized values. It also excludes the frozen fields of a `Weight`, such as the base
    weight of an adapter. Raises ValueError if no array would be trained.
    """

    # `moves` says whether a field of a `Weight` is trainable; it is None for arrays that are not in a `Weight`
    def pick(path: str, leaf: Array | Weight, moves: bool | None) -> Tree:
        if isinstance(leaf, Weight):
            adapter = "base" in fields(leaf)  # if adapters are nested, as on a tied table, train all of them
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
    """Returns the names of those fields of a `Weight` that contain arrays or other `Weight` objects."""
    declared: Any = node  # all subclasses of Weight are dataclasses, although Weight itself is not
    return [f.name for f in dataclasses.fields(declared) if f.metadata.get("pytree_node", True)]


def partition(params: T, mask: Tree) -> tuple[T, T]:
    """Splits `params` into (trained arrays, frozen arrays), according to a mask.

    Both trees have the structure of `params`, with None in place of the arrays in the other tree.
    """
    chosen = jax.tree.map(lambda m, x: x if m else None, mask, params)
    others = jax.tree.map(lambda m, x: None if m else x, mask, params)
    return chosen, others


def combine(a: T, b: T) -> T:
    """The inverse of `partition`."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


def in_training(params: Params, key: Array, step: Array) -> Params:
    """Calls `in_training` of every `Weight` in `params`, to prepare it for training step `step`."""
    live = lambda path, w: w.in_training(key_for(key, path), step) if is_weight(w) else w
    return map_named(live, params, is_leaf=is_weight)


def for_inference(params: Params) -> Params:
    """Calls `for_inference` of every `Weight` in `params`, whose layers must not be stacked."""
    return jax.tree.map(lambda w: w.for_inference() if is_weight(w) else w, params, is_leaf=is_weight)


def base(params: Tree) -> Tree:
    """Returns `params` without adapters, for example as the reference policy. No weights are copied.

    Each adapter is replaced by its `base` weight. Parameters of the class `Extra` are dropped.
    """
    if isinstance(params, dict):
        return {k: base(v) for k, v in params.items() if not isinstance(v, Extra)}
    if isinstance(params, tuple):
        return tuple(map(base, params))
    leaf: Array | Weight = params
    while is_weight(leaf) and "base" in fields(leaf):
        leaf = vars(leaf)["base"]
    return leaf


def quantized_under_adapters(params: Params) -> bool:
    """Returns whether any adapter wraps a quantized weight."""
    off = [(w, base(w)) for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w)]
    return any(w is not under and is_weight(under) for w, under in off)


def underived(params: Params) -> Params:
    """Sets the derived fields of every `Weight` to None, because their rounding may differ between machines."""

    def strip(w: Array | Weight) -> Array | Weight:
        if not is_weight(w):
            return w
        kept = {f: jax.tree.map(strip, getattr(w, f), is_leaf=is_weight) for f in fields(w)}
        return w.replace(**kept | dict.fromkeys(w.derived))

    return jax.tree.map(strip, params, is_leaf=is_weight)


def dense(params: Params, specs: Specs) -> Params:
    """Replaces every `Weight` in `params` by the plain array that it represents."""
    return replace(params, specs, lambda _, w, spec: dense_of(w, spec))


def dense_of(w: Array | Weight, spec: Spec | None) -> Array:
    return w.dense(spec) if isinstance(w, Weight) else w


def axes(params: Params, specs: Specs) -> Tree:
    """Replaces every array in `params` by the tuple of its logical axes."""
    return replace(params, specs, lambda _, w, spec: axes_of(w, spec))


def axes_of(w: Array | Weight, spec: Spec | None) -> Weight | tuple[str | None, ...]:
    if isinstance(w, Weight):
        return w.axes(spec)
    assert spec, "a plain array without a Spec"
    return spec.names
