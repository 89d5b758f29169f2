"""H100s as XLA's compiler for CUDA is told of them: for absent devices it compiles by a description."""

import importlib.util
import os
from typing import Any

from common import chips
from common.errors import UserError

# CUDA C++ Programming Guide, technical specifications of compute capability 9.0; NVIDIA H100 Tensor Core GPU
# Architecture, of the SXM5 board: multiprocessors, level-2 cache, clock.
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
MOST = 8  # GPUs of a machine, all linked; what lies between machines is not known


def devices(count: str) -> list[Any]:
    """As many H100s of one machine. Raises UserError for another number, or without the CUDA wheels."""
    if count not in map(str, range(1, MOST + 1)):
        raise UserError(f"{count!r} H100s are not one machine", "--topology", f"h100:1 to h100:{MOST}")
    if not installed():
        raise UserError("the CUDA wheels are not installed", "tools.plan", "pip install -r requirements/gpu.txt")
    # Nothing can be timed here, so that XLA takes the first algorithm that it knows.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # else the CUDA plug-in looks for a driver
    chip = chips.find(KIND)
    target = H100.format(bandwidth=int(chip.hbm_bandwidth.value), memory=int(chip.hbm_bytes.value), kind=KIND)
    return topologies.get_topology_desc("", "cuda", topology=f"1x1x{count}", target_config=target).devices


def installed() -> bool:
    """Whether the CUDA wheels are, of either version that JAX is built for."""
    return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def room(peak: int) -> tuple[bool, str]:
    """(whether so many bytes fit, why). The compiler does not say it; JAX takes a share of a GPU's memory."""
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    most = share * chips.find(KIND).hbm_bytes.value
    return (
        peak <= most,
        f"{peak / 1e9:.1f} GB of {most / 1e9:.1f}, XLA_PYTHON_CLIENT_MEM_FRACTION={share:g} of a device",
    )
