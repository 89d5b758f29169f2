"""Named sets of compiler flags for TPUs, per version of libtpu: it aborts the process on a flag it does not know."""

import os
from importlib import metadata

from configs.errors import UserError

_OVERLAP = {  # gather the next layer's parameters while this one computes
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}

# libtpu version -> preset -> flags. None is on by default: what pays depends on the model and the slice.
PRESETS: dict[str, dict[str, dict[str, str]]] = {
    "0.0.42.1": {
        "overlap": _OVERLAP,
        "dense": _OVERLAP | {"xla_tpu_scoped_vmem_limit_kib": "98304"},  # larger fusions in vector memory (MaxText)
        "dcn": {  # gradients between slices, in parts, while the backward pass goes on
            "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
            "xla_tpu_data_parallel_opt_different_sized_ops": "true",
        },
    },
}


def apply(preset: str) -> None:
    """Adds the flags of a preset to LIBTPU_INIT_ARGS; call it before anything asks for devices. "" adds none.

    Raises UserError when libtpu is not installed or its version has no such preset.
    """
    if not preset:
        return
    where = "config.xla_preset"
    try:
        version = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        raise UserError(f"{preset!r} is for TPUs, and libtpu is not installed", where, "leave it empty") from None
    known = PRESETS.get(version)
    if known is None:
        raise UserError(f"no presets for libtpu {version}", where, f"there are some for {', '.join(PRESETS)}")
    if preset not in known:
        raise UserError(f"no preset {preset!r} for libtpu {version}", where, f"known: {', '.join(known)}")
    flags = [f"--{name}={value}" for name, value in known[preset].items()]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *flags]).strip()
