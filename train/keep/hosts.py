"""Coordinates the processes of one run. With a single process these functions cost nothing."""

import contextlib
import ctypes
import hashlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from common import exits, programs
from common.errors import UserError
from common.types import Json

# matches errors that follow the death of another process
LOST = re.compile("closed by peer|reset by peer|onnection refused|unhealthy|heartbeat")


def connect() -> None:
    """Joins the other processes of a launch, if there are any, and sets up the persistent compilation cache.

    A launch of several processes is recognized by environment variables: JAX_COORDINATOR_ADDRESS (with
    JAX_NUM_PROCESSES and JAX_PROCESS_ID), the variables of Slurm or GKE (also with several slices), or
    JAX_NUM_PROCESSES on the hosts of a TPU slice. Call `connect` before anything uses devices.
    """
    env = os.environ
    programs.keep()
    if env.get("JAX_COORDINATOR_ADDRESS"):
        numbers = (env.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        count, index = (int(text) if text else None for text in numbers)
        jax.distributed.initialize(env["JAX_COORDINATOR_ADDRESS"], count, index)
        return
    counts = "JAX_NUM_PROCESSES", "SLURM_NTASKS", "MEGASCALE_NUM_SLICES"
    if max(int(env.get(name) or 1) for name in counts) > 1 or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ends this process at once, printing a single line, when another process of the launch has died.

    The death of a process shows up as an error about a broken connection. If this process then exited normally, it
    would wait for the dead process for more than a minute, and end with a C++ stack trace.
    """
    if jax.process_count() > 1:
        _delay_abort()
    try:
        yield
    except Exception as e:
        if jax.process_count() == 1 or not LOST.search(str(e)):
            raise
        _end(str(e).strip().splitlines()[0][:300])


def _delay_abort() -> None:
    """Delays aborts by 6 s. When the first process dies, JAX aborts the other processes, often before they can print
    the reason. To do so, installs C's sleep() as the handler of SIGABRT. It is called with the signal number, 6, as its
    argument, and does not need Python's GIL."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGABRT, libc.sleep)


def _end(reason: str) -> NoReturn:
    host, _, port = os.environ.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")
    lost = "another process of this run was lost"
    if host and not primary():
        for _ in range(10):  # the first process's port may close later than its other connections
            try:
                socket.create_connection((host, int(port)), timeout=2).close()
                time.sleep(0.1)
            except OSError:
                lost = f"the first process of this run, {host}:{port}, was lost"
                break
    os.write(2, f"\n{lost}: {reason} · run the same command again\n".encode())
    os._exit(exits.PREEMPTED)


def primary() -> bool:
    """Whether this is the process that writes logs and renames folders."""
    return jax.process_index() == 0


def broadcast(value: int | bool) -> int:
    """Returns the first process's `value` on all processes. The call is also a barrier."""
    if jax.process_count() == 1:
        return int(value)
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def all_true(ok: bool) -> bool:
    """Returns whether `ok` is True on every process."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.array([ok])).all())


def require_same(what: Json) -> None:
    """Raises UserError on every process if the values of `what`, such as config and code, differ between processes."""
    if jax.process_count() == 1:
        return
    digests = [np.frombuffer(hashlib.sha256(repr(v).encode()).digest(), np.uint32) for v in what.values()]
    seen = multihost_utils.process_allgather(np.stack(digests))  # [P, len(what), 8]
    odd = [name for i, name in enumerate(what) if (seen[:, i] != seen[0, i]).any()]
    if odd:
        raise UserError(f"the processes differ in {', '.join(odd)}", "launch", "start all of them from the same files")


def refuse_together(error: UserError | None) -> None:
    """Raises UserError on all processes if the first process has an `error`. If only the first process raised the
    error, the other processes would wait forever."""
    if error:
        broadcast(1)
        raise error
    if broadcast(0):
        raise UserError("the first process refused to start", "launch", "see its message")
