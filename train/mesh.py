"""Makes the device mesh, and defines the table that maps logical axes to mesh axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UserError
from common.types import Config
from configs.schema import rules
from model import weights
from model.weights import Tree

# Mesh axes, ordered from the slowest to the fastest network connection between neighboring devices.
# The axis "expert" has size 1, since no model has experts yet.
AXES = ("data", "fsdp", "expert", "context", "tensor")

# Pairs (logical axis, mesh axes over which the logical axis is sharded).
# Logical axes that are not listed are replicated.
# Activations have axis names of their own: if they shared "embed" with weights, XLA would rematerialize whole arrays.
RULES = (
    ("act_batch", ("data", "fsdp")),
    ("act_seq", "context"),
    ("act_rows", ("data", "fsdp", "context")),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("recurrent", "tensor"),
    ("experts", "expert"),
)
BATCH = P(("data", "fsdp"), "context")  # [B,T]


def mesh_shape(cfg: Config, devices: int) -> tuple[int, ...]:
    """Returns the sizes of the mesh axes. An axis of -1 takes all remaining devices. Raises UserError if the product of
    the sizes is not the number of devices."""
    sizes = [cfg.get(a, 1) for a in AXES]
    known = math.prod(s for s in sizes if s > 0)
    sizes = [devices // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != devices:
        asked = " x ".join(f"{a} {s}" for a, s in zip(AXES, sizes) if a in cfg)
        raise UserError(f"{asked} is not {devices} devices", "config.mesh", "set one axis to -1")
    return tuple(sizes)


def make_mesh(cfg: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, with axes of type Auto: XLA's partitioner chooses the shardings that RULES leave
    open."""
    devices = jax.devices() if devices is None else devices
    grid = arrange(mesh_shape(cfg, len(devices)), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Arranges the devices in a grid such that devices with fast network connections are neighbors. Several TPU slices
    are placed along the data axis, so that only gradients cross the data center's network. Raises UserError if the size
    of the data axis is not a multiple of the number of slices."""
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(f"the data axis has size {shape[0]}, not a multiple of {slices} slices", "config.mesh.data")
    inner, outer = (shape[0] // slices, *shape[1:]), (slices, *[1] * len(shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def row_shards(cfg: Config, mesh: Mesh | AbstractMesh) -> int:
    """The number of shards into which the rows of a batch are split. Raises UserError when the mesh does not divide a
    batch [B,T] evenly. For an axis of -1, this depends on the number of devices."""
    for path, problem, fix in rules.shares(cfg.data.batch_size, cfg.accum, cfg.data.seq_len, mesh.shape):
        raise UserError(problem, f"config.{path}", fix)
    return mesh.shape["data"] * mesh.shape["fsdp"]


def abstract_mesh(cfg: Config, devices: int = 0) -> AbstractMesh:
    """An abstract mesh for `--plan`, which uses no devices. If the number of devices is unknown (0), an axis of -1
    counts as 1."""
    shape = mesh_shape(cfg, devices) if devices else tuple(max(cfg.get(a, 1), 1) for a in AXES)
    return AbstractMesh(shape, AXES)


def shardings(axes: Tree, abstract: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Returns a tree like `abstract`, with a NamedSharding for each array. `axes` holds the logical axis names of each
    array."""
    named = lambda x, names: NamedSharding(mesh, P(*weights.assigned_axes(names, x.shape, mesh, RULES)))
    return jax.tree.map(named, abstract, axes)


def replicated(tree: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)
