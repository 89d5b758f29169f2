"""Sets XLA options before XLA starts: named presets of compiler flags for TPUs, and threads and memory for CPUs.

Each version of libtpu has its own presets, since libtpu aborts the process on an unknown flag.
"""

import ctypes
import functools
import os
import re
from importlib import metadata

from common.errors import UserError

_OVERLAP = {  # gathers the next layer's parameters while the current layer computes
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}

# {libtpu version: {preset: flags}}.
# No preset is used by default, since the best preset depends on the model and on the TPU slice.
PRESETS: dict[str, dict[str, dict[str, str]]] = {
    "0.0.42.1": {
        "overlap": _OVERLAP,
        "dense": _OVERLAP | {"xla_tpu_scoped_vmem_limit_kib": "98304"},  # allows larger fusions in VMEM, as in MaxText
        # does not gather parameters in advance, which saves memory
        "memory": {"xla_tpu_enable_latency_hiding_scheduler": "false"},
        "dcn": {  # reduces gradients across slices in chunks during the backward pass
            "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
            "xla_tpu_data_parallel_opt_different_sized_ops": "true",
        },
    },
}


def apply(preset: str) -> None:
    """Adds the flags of a preset to LIBTPU_INIT_ARGS. Call `apply` before anything uses devices. If `preset` is "", no
    flags are added.

    Raises UserError when libtpu is not installed or its version has no such preset.
    """
    if not preset:
        return
    where = "config.xla_preset"
    try:
        version = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        raise UserError(f"{preset!r} is for TPUs, but libtpu is not installed", where, "leave it empty") from None
    known = PRESETS.get(version)
    if known is None:
        raise UserError(f"there are no presets for libtpu {version}", where, f"supported: {', '.join(PRESETS)}")
    if preset not in known:
        raise UserError(f"no preset {preset!r} for libtpu {version}", where, f"known: {', '.join(known)}")
    flags = [f"--{name}={value}" for name, value in known[preset].items()]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *flags]).strip()


def fake_devices() -> None:
    """Configures XLA for simulated devices on a CPU: sets a larger thread pool and a longer timeout for collectives.
    Call `fake_devices` before anything uses devices.

    A collective blocks one thread per device until all devices arrive. If no thread is left for a parallel matmul, the
    process deadlocks. By default, XLA aborts the process once a collective has waited for 40 s, which happens on
    machines with few or busy cores.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    found = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    devices, patience = int(found[-1]) if found else 1, "--xla_cpu_collective_call_terminate_timeout_seconds"
    if devices > 1:
        os.environ.setdefault("NPROC", str(2 * devices + (os.cpu_count() or 1)))  # the size of XLA's thread pools
        if patience not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {patience}=300"


@functools.cache
def trim_after_compiling() -> None:
    """Makes glibc return freed memory to the system after each long compilation. Otherwise a process that trains 135M
    parameters keeps 0.2 GB of memory that the compiler, LLVM, no longer uses. Only the first call in a process has an
    effect, and only if the process uses glibc."""
    from jax import monitoring

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def listener(event: str, duration_secs: float, **_: str | int) -> None:
        if trim and event == "/jax/core/compile/backend_compile_duration" and duration_secs > 0.5:
            trim(0)

    monitoring.register_event_duration_secs_listener(listener)
