"""Batches on devices: each process reads only the rows that its own devices hold."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data.rows import batch as batches
from train.mesh import BATCH


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that this process's devices hold, as one range."""
    held = NamedSharding(mesh, P(BATCH[0])).addressable_devices_indices_map((batch_size,)).values()
    edges = [index[0].indices(batch_size)[:2] for index in held]
    return slice(min(a for a, _ in edges), max(b for _, b in edges))


class Source:
    """A data.rows.loader.Loader of this process's rows, whose batches become global arrays over the mesh."""

    def __init__(self, loader: Any, mesh: Mesh):
        self.loader, self.mesh = loader, mesh
        self.first = local_rows(mesh, loader.batch_size).start
        self.seen = {"tokens": 0, "targets": 0}  # of this process's rows, over all sessions of the run

    def next(self, step: int) -> tuple[dict, dict[str, int]]:
        """`batch`, counted as seen."""
        batch, counts = self.batch(step)
        self.seen = {k: self.seen[k] + n for k, n in counts.items()}
        return batch, counts

    def batch(self, step: int) -> tuple[dict, dict[str, int]]:
        """The batch of a step, and what this process's rows hold: tokens that are not padding, targets of the loss."""
        local = self.loader.batch(step)
        parts = batches.parts(local).values()
        counts = {
            "tokens": sum(int((p["segments"] > 0).sum()) for p in parts),
            "targets": sum(int((p["mask"] > 0).sum()) for p in parts),
        }
        return jax.tree.map(self.place, local), counts

    def place(self, x: np.ndarray) -> jax.Array:
        """This process's rows [b, T] or [b] as its part of a global array."""
        shape = (self.loader.batch_size, *x.shape[1:])

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return x[start - self.first : stop - self.first, *index[1:]]

        return jax.make_array_from_callback(shape, NamedSharding(self.mesh, P(*BATCH[: x.ndim])), shard)

    def state_dict(self) -> dict:
        return self.loader.state_dict() | {"seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.loader.load_state_dict(state)
        self.seen = state["seen"]
