"""Devices that are not here, by the name of their slice; they can be compiled for, and nothing else."""

import importlib.util
import os
from typing import TYPE_CHECKING

from common.errors import UserError
from tools.plan import gpu

if TYPE_CHECKING:
    from jax import Device


def devices(name: str, slices: int = 1) -> "list[Device]":
    """The devices of equal TPU slices, described by libtpu, or H100s of one machine. Raises UserError."""
    if not name:
        raise UserError("no slice named", "--topology", "as v5e:4x4, v5p:2x2x1, v6e:4x4, tpu7x:2x2x1 or h100:8")
    if slices < 1 or (slices > 1 and name.startswith("h100:")):
        raise UserError(f"{slices} slices", "--slices", "1 or more, of TPUs")
    if name.startswith("h100:"):
        return gpu.devices(name.removeprefix("h100:"))
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed", "tools.plan", "pip install -r requirements/tpu.txt")
    # Other processes may hold libtpu's lock file, and this host need not be a TPU's.
    os.environ |= dict(JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")
    os.environ |= dict(TPU_ACCELERATOR_TYPE="v5litepod-1", TPU_WORKER_HOSTNAMES="localhost")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices
    except Exception as e:
        reason = str(e).splitlines()[0][:160]
        raise UserError(f"{name!r} is no slice that libtpu knows: {reason}", "--topology", "as v5e:4x4") from e
