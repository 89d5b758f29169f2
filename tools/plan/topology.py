"""Describes TPU slices and H100s as targets for compilation. They need not be present."""

import importlib.util
import os
from typing import TYPE_CHECKING

from common import chips
from common.errors import UserError

if TYPE_CHECKING:
    from jax import Device

# The limits are from the technical specifications of compute capability 9.0 in the CUDA C++ Programming Guide.
# Multiprocessors, L2 cache and clock are from the SXM5 board in "NVIDIA H100 Tensor Core GPU Architecture".
H100 = """
gpu_device_info {{
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048 fpus_per_core: 128 core_count: 132
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{kind}"
"""
KIND = "NVIDIA H100 80GB HBM3"
MOST = 8  # maximum number of GPUs: those of one machine, because the network between machines is not modeled


def devices(name: str, slices: int = 1) -> "list[Device]":
    """Returns the devices of identical TPU slices, as libtpu describes them, or the H100s of one machine. Raises
    UserError if this is not possible."""
    if not name:
        raise UserError("no slice is named", "--topology", "such as v5e:4x4, v5p:2x2x1, v6e:4x4, tpu7x:2x2x1 or h100:8")
    if slices < 1 or (slices > 1 and name.startswith("h100:")):
        raise UserError(f"{slices} slices are not supported", "--slices", "use 1, or more for TPUs")
    if name.startswith("h100:"):
        return _h100s(name.removeprefix("h100:"))
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed", "tools.plan", "pip install -r requirements/tpu.txt")
    # With these settings, libtpu works without a TPU, and even if another process holds its lock file.
    os.environ |= dict(JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")
    os.environ |= dict(TPU_ACCELERATOR_TYPE="v5litepod-1", TPU_WORKER_HOSTNAMES="localhost")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices
    except Exception as e:
        reason = str(e).splitlines()[0][:160]
        raise UserError(f"libtpu does not know a slice {name!r}: {reason}", "--topology", "such as v5e:4x4") from e


def _h100s(count: str) -> "list[Device]":
    """Returns `count` H100s of one machine. Raises UserError if the number is not supported or if the CUDA wheels are
    not installed."""
    if count not in map(str, range(1, MOST + 1)):
        raise UserError(f"a machine cannot have {count!r} H100s", "--topology", f"h100:1 to h100:{MOST}")
    if not cuda_installed():
        raise UserError("the CUDA wheels are not installed", "tools.plan", "pip install -r requirements/gpu.txt")
    # Without the GPU, kernels cannot be timed. Autotuning is therefore off, and XLA takes the first algorithm it knows.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # prevents the CUDA plug-in from looking for a driver
    chip = chips.find(KIND)
    target = H100.format(bandwidth=int(chip.hbm_bandwidth.value), memory=int(chip.hbm_bytes.value), kind=KIND)
    return topologies.get_topology_desc("", "cuda", topology=f"1x1x{count}", target_config=target).devices


def cuda_installed() -> bool:
    """Whether the CUDA wheels are installed, for either CUDA version that JAX supports."""
    return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def room(peak: int) -> tuple[bool, str]:
    """Returns (whether `peak` bytes fit into GPU memory, explanation). This is checked here because the compiler does
    not check it. The limit is the fraction of GPU memory that JAX preallocates."""
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    most = fraction * chips.find(KIND).hbm_bytes.value
    return (
        peak <= most,
        f"{peak / 1e9:.1f} GB of {most / 1e9:.1f} GB (XLA_PYTHON_CLIENT_MEM_FRACTION={fraction:g})",
    )
