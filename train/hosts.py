"""What the processes of one run agree on. With a single process every function here is free."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from configs.errors import UserError


def primary() -> bool:
    """The one process that writes logs and renames folders."""
    return jax.process_index() == 0


def from_first(value: int | bool) -> int:
    """The first process's value, on all of them; a barrier too."""
    if jax.process_count() == 1:
        return int(value)
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def all_true(ok: bool) -> bool:
    """Whether `ok` holds on every process."""
    return jax.process_count() == 1 or bool(multihost_utils.process_allgather(np.array([ok])).all())


def require_same(what: dict[str, Any]) -> None:
    """Raises UserError on every process when one was started with another config, seed or code."""
    if jax.process_count() == 1:
        return
    digests = [np.frombuffer(hashlib.sha256(repr(v).encode()).digest(), np.uint32) for v in what.values()]
    seen = multihost_utils.process_allgather(np.stack(digests))  # [P, len(what), 8]
    odd = [name for i, name in enumerate(what) if (seen[:, i] != seen[0, i]).any()]
    if odd:
        raise UserError(f"the processes differ in {', '.join(odd)}", "launch", "start all of them from the same files")


def refuse_together(error: UserError | None) -> None:
    """Raises `error`, found by the first process, everywhere: a process left alone would wait for the others."""
    if error:
        from_first(1)
        raise error
    if from_first(0):
        raise UserError("the first process refused to start", "launch", "see its message")
