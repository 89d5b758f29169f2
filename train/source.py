"""Puts batches on devices: each process reads only the rows of its own devices."""

from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common.types import Json
from data.rows import batch as batches
from data.rows.batch import Batch
from data.rows.loader import Loader
from train.mesh import BATCH
from train.state import TrainState

# Counts of tokens in this process's rows: "tokens" counts all tokens except padding, and "targets" those that count in
# the loss. When a source samples answers, "ROLE/tokens" counts the tokens that it passes through a role's network, and
# "ROLE/targets" those that it passes through the role's head.
Counts = dict[str, int]


class Source(Protocol):
    """The source of a run's batches. A source that reads data ignores the training state; an on-policy source samples
    from the policy in the state.

    The batch of step n is a function of the seed, the state and n. When a killed run resumes, it therefore repeats the
    steps since its newest checkpoint with bit-identical results.
    """

    seen: Counts  # counts, summed over all sessions of the run

    def next(self, state: TrainState, step: int) -> tuple[Batch, Counts]:
        """Returns the batch that takes the run from step `step` to step `step + 1`, and its counts. Also adds the
        counts to `seen`."""
        ...

    def resumable(self, step: int) -> bool:
        """Returns whether a run can resume from a checkpoint of this step. No run can resume between steps that train
        on the same rollout.

        The result depends only on the step, because all processes must agree. It is True for step 0 and the last step.
        """
        ...

    def state_dict(self) -> Json:
        """The state of this source as plain data, to be stored in a checkpoint's manifest."""
        ...

    def load_state_dict(self, state: Json) -> None:
        """Restores the state of this source from a checkpoint's manifest. Raises UserError when the run that saved the
        checkpoint read different data."""
        ...


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """Returns the range of rows in a global batch that are placed on this process's devices."""
    held = NamedSharding(mesh, P(BATCH[0])).addressable_devices_indices_map((batch_size,)).values()
    edges = [index[0].indices(batch_size)[:2] for index in held if index]
    return slice(min(a for a, _ in edges), max(b for _, b in edges))


class Batches:
    """A Source that reads this process's rows with a data.rows.loader.Loader, and returns them as global arrays over
    the mesh."""

    def __init__(self, loader: Loader, mesh: Mesh):
        self.loader, self.mesh = loader, mesh
        self.first = local_rows(mesh, loader.batch_size).start
        self.seen = {"tokens": 0, "targets": 0}

    def next(self, state: TrainState, step: int) -> tuple[Batch, Counts]:
        batch, counts = self.batch(step)
        self.seen = {k: self.seen[k] + n for k, n in counts.items()}
        return batch, counts

    def resumable(self, step: int) -> bool:
        return True

    def batch(self, step: int) -> tuple[Batch, Counts]:
        """The batch of a step, and the counts of this process's rows."""
        local = self.loader.batch(step)
        parts = batches.parts(local).values()
        counts = {
            "tokens": sum(int((p["segments"] > 0).sum()) for p in parts),
            "targets": sum(int((p["mask"] > 0).sum()) for p in parts),
        }
        return jax.tree.map(self.place, local), counts

    def place(self, x: np.ndarray) -> jax.Array:
        """Makes the global array to which this process contributes its rows x, an array [b, T] or [b]."""
        shape = (self.loader.batch_size, *x.shape[1:])

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index
            start, stop, _ = index[0].indices(shape[0])
            return x[start - self.first : stop - self.first, *index[1:]]

        return jax.make_array_from_callback(shape, NamedSharding(self.mesh, P(*BATCH[: x.ndim])), shard)

    def state_dict(self) -> Json:
        return self.loader.state_dict() | {"seen": self.seen}

    def load_state_dict(self, state: Json) -> None:
        self.loader.load_state_dict(state)
        self.seen = state["seen"]
