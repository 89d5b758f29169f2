"""Trees of parameters, in which each parameter is either an array or a `Weight`.

A `Weight` is an object that replaces an array, such as a quantized matrix or a matrix with LoRA factors. The methods of
a `Weight` define how activations are multiplied by it. Layers call `einsum(eqn, x, w)` and `take(w, ids)`, where `w`
may be an array or a `Weight`. Techniques such as LoRA and quantization are functions that replace arrays of a tree by
`Weight` objects.
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
Specs = dict[str, Any]  # the same nested dicts, with a Spec for every parameter
Tree = Any  # any pytree of arrays, shapes, shardings or bools
Transform = Callable[[Params, Specs, Array], Params]  # (parameters, specs, random key) -> new parameters

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]  # pairs (logical axis, mesh axes)

# The logical axis that each letter of an einsum equation stands for. train/mesh.py maps logical axes to mesh axes.
AXES = dict(
    B="batch", T="seq", S="seq", D="embed", F="mlp", N="heads", K="kv_heads", H="head_dim", V="vocab",
    E="experts", R="rank", W="recurrent", C="taps", X="taps", Y="taps", Z="taps", I="block_in", J="block_out",
)  # fmt: skip


@flax.struct.dataclass
class Spec(nn.LogicallyPartitioned):
    """The declaration of a parameter: its abstract value, its logical axes (`names`) and the einsum that uses it.

    `eqn` is "" for parameters that no matrix product uses (norm scales, biases). A parameter that is stacked over
    layers has the leading axis "layers", which is not in the equation.
    """

    eqn: str = flax.struct.field(default="", pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def stacked(self) -> int:
        """The number of leading axes over which the parameter is stacked, which are not in the equation."""
        return len(self.shape) - len(operands(self.eqn)[1]) if self.eqn else 0

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis of the weight, by its letter in the equation."""
        return dict(zip(operands(self.eqn)[1], self.shape[self.stacked :], strict=True))


def operands(eqn: str) -> tuple[str, str, str]:
    """Splits an equation "BTD,DF->BTF" into ("BTD", "DF", "BTF")."""
    inputs, out = eqn.split("->")
    x, w = inputs.split(",")
    return x, w, out


def split(eqn: str) -> tuple[str, str, str]:
    """Splits the weight's letters into (shared axes such as experts, contracted axes, output axes).

    Shared axes are in x, in the weight and in the result. Contracted axes are only missing in the result, and output
    axes are only missing in x.
    """
    x, w, out = operands(eqn)
    return (
        "".join(c for c in w if c in x and c in out),
        "".join(c for c in w if c in x and c not in out),
        "".join(c for c in w if c not in x),
    )


class Weight:
    """Base class of parameters that are not plain arrays. Each subclass is a `flax.struct.dataclass`."""

    trainable: ClassVar[tuple[str, ...]] = ()  # fields that training may change; all other fields are frozen
    derived: ClassVar[tuple[str, ...]] = ()  # fields computed from other fields, which the fingerprint omits
    whole: ClassVar[bool] = False  # whether it has the `shape`, `ndim` and `size` of the array that it replaces

    if TYPE_CHECKING:  # flax.struct adds this method

        def replace(self, **changes: object) -> Self: ...

    def einsum(self, eqn: str, x: Array) -> Array:
        """Computes `jnp.einsum(eqn, x, dense)` without building the array `dense`."""
        raise NotImplementedError

    def take(self, ids: Array, dtype: DTypeLike) -> Array:
        """Returns the rows `ids` [...] of an embedding table [V, D], as an array [..., D] of `dtype`."""
        raise NotImplementedError

    def dense(self, spec: Spec | None) -> Array:
        """Returns the plain array that this `Weight` represents, for merging, export and reference values in tests."""
        raise NotImplementedError

    def axes(self, spec: Spec | None) -> "Weight":
        """Returns this object with each array replaced by a tuple of its logical axes, which determine its sharding."""
        raise NotImplementedError

    def in_training(self, key: Array, step: Array) -> "Weight":
        """Returns this `Weight` prepared for a training step, for example with a random key for dropout or rounding.

        Outside of training, no `Weight` uses randomness. By default, this method only prepares nested `Weight` objects.
        """
        inner = {f: getattr(self, f) for f in fields(self) if is_weight(getattr(self, f))}
        return self.replace(**{f: w.in_training(key_for(key, f), step) for f, w in inner.items()})

    def for_inference(self) -> "Weight | Array":
        """Prepares this `Weight` of one layer for inference.

        Values that depend only on the arrays of the `Weight`, and not on activations, are computed in advance.
        """
        return self.replace(**{f: for_inference(getattr(self, f)) for f in fields(self) if is_weight(getattr(self, f))})

    def macs(self, stacked: int) -> "Weight":
        """Returns this object with each array replaced by its number of multiply-adds per token.

        The number for a matrix is its size, and the number for a vector is 0. `stacked` is the number of leading axes
        over which layers are stacked.
        """
        one = lambda x: x.macs(stacked) if is_weight(x) else x.size * (x.ndim - stacked >= 2)
        return self.replace(**{f: jax.tree.map(one, getattr(self, f), is_leaf=is_weight) for f in fields(self)})


class Extra(Weight):
    """Base class of added parameters, such as a prefix, that the base model does not have.

    A layer uses such parameters if they are present. Added parameters cannot be merged into weights.
    """

    def dense(self, spec: Spec | None) -> Array:
        raise UserError(f"{type(self).__name__} cannot be merged into weights", "adapter", "keep it as an adapter")


def einsum(eqn: str, x: Array, w: Array | Weight) -> Array:
    """Multiplies an activation x by a weight w. The result has the dtype of x.

    For example, the equation "BTD,DF->BTF" multiplies x [B,T,D] by w [D,F] and returns [B,T,F]. The result is tagged
    with the checkpoint name "product", so that remat policies can save it.
    """
    y = w.einsum(eqn, x) if isinstance(w, Weight) else product(eqn, x, cast(w, x.dtype))
    return checkpoint_name(y, "product")


def cast(w: Array, dtype: DTypeLike) -> Array:
    """Casts one layer's weight to `dtype` in a way that XLA does not move out of the loop over layers.

    On a TPU mesh, XLA moves a plain cast before the loop and so keeps a second copy of all layers, which takes 2.1 GB
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
    return _rounded(*primals, dtype), tangents[0].astype(dtype)  # a gradient is cast without this rounding


def take(w: Array | Weight, ids: Array, dtype: DTypeLike) -> Array:
    """Looks up the rows `ids` [...] of an embedding table [V, D], and returns them as an array [..., D] of `dtype`."""
    if isinstance(w, Weight):
        return w.take(ids, dtype)
    # Without this constraint, the rows would be sharded over "embed", and XLA would replicate them to reshard them.
    table: Any = spmd.with_logical_constraint(w, ("vocab", None))
    return jnp.take(table, ids, axis=0).astype(dtype)


def product(eqn: str, x: Array, w: Array, dtype: DTypeLike | None = None) -> Array:
    """Computes `jnp.einsum` of two arrays, accumulated in `dtype`, on one device as a product of matrices if possible.

    XLA's CPU backend is only fast for products of two-dimensional arrays. With activations [B,T,D], the gradient of a
    weight contracts two axes, and an MLP takes 1.65 times as long. Under a mesh, axes are not merged into matrices,
    since XLA's partitioner needs them.
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
    if jnp.issubdtype(x.dtype, jnp.integer) and rows == 1:  # one row of integers takes 4x as long as two on a CPU
        flat_x = jnp.pad(flat_x, ((0, 1), (0, 0)))
    first = ws.startswith(contracted)
    tail = w.shape[n:] if first else w.shape[:-n]
    flat_w = w.reshape(-1, math.prod(tail)) if first else w.reshape(math.prod(tail), -1)
    dims = (((1,), (0 if first else 1,)), ((), ()))
    y = jax.lax.dot_general(flat_x, flat_w, dims, preferred_element_type=dtype)
    return (y[:rows] if len(y) > rows else y).reshape(x.shape[:-n] + tail)


def platform() -> str:
    """Returns the platform of the current mesh, whose devices may be abstract, or else JAX's default platform."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def shards(*axes: str) -> int:
    """Returns the number of parts into which the current mesh splits a dimension that is sharded over `axes`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape.get(a, 1) for a in axes)


def assigned_axes(
    names: Sequence[str | None], sizes: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules
) -> list[tuple[str, ...]]:
    """Returns the mesh axes over which each dimension of an array is sharded, given its logical name and its size.

    A dimension that the mesh axes do not divide evenly is replicated. If several dimensions map to the same mesh axis,
    this axis only shards the first of them.
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
    """Returns `assigned_axes` for the current mesh and flax's current rules, without mesh axes of size 1."""
    found = assigned_axes(names, sizes, jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules())
    return [tuple(a for a in axes if shards(a) > 1) for axes in found]


def place(names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding | None:
    """Returns the sharding of an array with these logical axes on the current mesh; None on a single device."""
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
    """Returns the arrays of a tree, in which a quantized weight (codes and scales) counts as one array."""
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Weight) and x.whole)


def map_named(f: Callable, tree: Tree, *rest: Tree, is_leaf: Callable[[object], bool] | None = None) -> Tree:
    """Like `jax.tree.map`, but the first argument of `f` is the path of the leaf as a string."""
    return jax.tree.map_with_path(lambda path, *xs: f(name(path), *xs), tree, *rest, is_leaf=is_leaf)


def replace(params: Params, specs: Specs, f: Callable[[str, Tree, Spec | None], Tree]) -> Params:
    """Replaces every parameter (array or `Weight`) by `f(name, parameter, spec)`. An Extra gets None as its spec."""
    declared = {name(path): spec for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec)}
    return map_named(lambda path, leaf: f(path, leaf, declared.get(path)), params, is_leaf=is_weight)


def wrapping(where: str, f: Callable[[str, Array | Weight, Spec, Array], Weight]) -> Transform:
    """Returns a Transform that replaces each matrix whose name matches `where` by `f(name, matrix, spec, key)`.

    Each call gets the same random key, from which `f` derives a separate key for the matrix with `key_for`. Raises
    ValueError if no name matches the regex `where`.
    """

    def transform(params: Params, specs: Specs, key: Array) -> Params:
        chosen = lambda path, spec: spec is not None and spec.eqn and re.fullmatch(where, path)
        if not any(chosen(name(path), s) for path, s in jax.tree.leaves_with_path(specs, is_leaf=is_spec)):
            raise ValueError(f"where={where!r} matches no multiplied parameter")
        wrap = lambda path, leaf, spec: f(path, leaf, spec, key) if chosen(path, spec) else leaf
        return replace(params, specs, wrap)

    return transform


def key_for(key: Array, path: str) -> Array:
    """Derives a separate random key for the parameter `path`, which does not depend on other parameters."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def trainable(params: Params, what: str) -> Tree:
    """Returns a tree of bools, which is True for each array of `params` that is trained.

    `what` is "all", "adapters", or a regex that must match the whole name of a parameter. Even "all" excludes integers
    and the frozen fields of a `Weight`, because gradients cannot update quantized values, and an adapter does not train
    its base weight. Raises ValueError if no array would be trained.
    """

    def pick(path: str, leaf: Array | Weight, moves: bool | None) -> Tree:  # None: not inside a Weight
        if isinstance(leaf, Weight):
            adapter = "base" in fields(leaf)  # if an adapter wraps another one, as on a tied table, both are trained
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
    """Returns the names of the fields of a `Weight` that are arrays or other `Weight` objects."""
    declared: Any = node  # subclasses of Weight are dataclasses, although Weight itself is not
    return [f.name for f in dataclasses.fields(declared) if f.metadata.get("pytree_node", True)]


def partition(params: T, mask: Tree) -> tuple[T, T]:
    """Splits `params` by a mask into two trees: one with the trained arrays, and one with the frozen arrays.

    Both trees have the structure of `params`, with None in place of the arrays that are in the other tree.
    """
    chosen = jax.tree.map(lambda m, x: x if m else None, mask, params)
    others = jax.tree.map(lambda m, x: None if m else x, mask, params)
    return chosen, others


def combine(a: T, b: T) -> T:
    """The inverse of `partition`."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


def in_training(params: Params, key: Array, step: Array) -> Params:
    """Prepares every `Weight` in `params` for training step `step`, by calling Weight.in_training."""
    live = lambda path, w: w.in_training(key_for(key, path), step) if is_weight(w) else w
    return map_named(live, params, is_leaf=is_weight)


def for_inference(params: Params) -> Params:
    """Prepares every `Weight` of unstacked parameters for inference, by calling Weight.for_inference."""
    return jax.tree.map(lambda w: w.for_inference() if is_weight(w) else w, params, is_leaf=is_weight)


def base(params: Tree) -> Tree:
    """Returns `params` without adapters, which gives the reference policy without copying the weights.

    Each adapter is replaced by the frozen `base` that it wraps. Added parameters (`Extra`) are dropped.
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
    """Sets the derived fields of every `Weight` to None, since their rounding may differ between machines."""

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
