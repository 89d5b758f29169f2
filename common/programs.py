"""Keeps compiled programs on the disk, so that the next process does not compile them again."""

import os

import jax

SHORT = 0.2  # seconds; a program that compiles faster is not kept


def keep() -> None:
    """Sets up JAX's persistent compilation cache, unless the environment or the caller has done so. Call this before
    anything is compiled."""
    if jax.config.jax_compilation_cache_dir and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        return
    folder = os.path.expanduser(f"~/.cache/kungfu/xla-{jax.__version__}")
    found = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": SHORT}
    for name, value in found.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
