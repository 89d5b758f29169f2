"""common/programs.py: where compiled programs are kept."""

import jax

from common import programs


def test_the_environment_and_the_caller_come_first(monkeypatch):
    updates, before = {}, jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    programs.keep()
    assert updates == {"jax_persistent_cache_min_compile_time_secs": programs.SHORT}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/somebody")
    programs.keep()
    assert before and "jax_compilation_cache_dir" not in updates  # the caller's
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", "", raising=False)
    programs.keep()
    assert updates["jax_compilation_cache_dir"] == f"/home/somebody/.cache/kungfu/xla-{jax.__version__}"
