"""The device mesh, and the one table that says which mesh axis a logical axis lives on."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Activations have names of their own: a weight and an activation that share the axis
# "embed" make XLA rematerialise whole arrays at the embedding. What is not listed is replicated.
RULES = (
    ("act_batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
)
BATCH = P(("data", "fsdp"))


def mesh_shape(cfg: Any, devices: int) -> tuple[int, ...]:
    """Sizes of the axes; at most one -1 takes the devices that remain. Raises UserError when they do not fit."""
    sizes = [cfg[a] for a in AXES]
    known = math.prod(s for s in sizes if s > 0)
    sizes = [devices // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != devices:
        asked = " x ".join(f"{a} {s}" for a, s in zip(AXES, sizes))
        raise UserError(f"{asked} is not {devices} devices", "config.mesh", "let one axis be -1")
    return tuple(sizes)


def make_mesh(cfg: Any) -> Mesh:
    """A mesh over all devices. Auto axes: the partitioner places what the rules leave open."""
    shape = mesh_shape(cfg, jax.device_count())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(cfg: Any) -> AbstractMesh:
    """The mesh of a plan: no device is touched, and an axis of -1 counts as 1."""
    return AbstractMesh(tuple(max(cfg[a], 1) for a in AXES), AXES)


def partition_spec(names: tuple, shape: tuple[int, ...], mesh: Any) -> P:
    """Logical names of an array -> PartitionSpec. An axis that does not divide is replicated, and each mesh axis is
    used once, by the first that asks."""
    table, used, out = dict(RULES), set(), []
    for name, size in zip(names, shape, strict=True):
        axis = table.get(name)
        names_of = (axis,) if isinstance(axis, str) else axis or ()
        fits = not used & set(names_of) and size % math.prod(mesh.shape[a] for a in names_of) == 0
        used |= set(names_of) if fits else set()
        out.append(axis if fits else None)
    return P(*out)


def shardings(axes: Any, abstract: Any, mesh: Any) -> Any:
    """A NamedSharding at every array of `abstract`; `axes` holds its logical names."""
    named = lambda x, names: NamedSharding(mesh, partition_spec(names, x.shape, mesh))
    return jax.tree.map(named, abstract, axes)


def replicated(tree: Any, mesh: Any) -> Any:
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)
