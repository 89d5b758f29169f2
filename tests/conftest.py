"""Eight CPU devices, so that meshes are real in every test; set before jax is imported.

Most of the time of these tests is compilation. In this process LLVM optimizes nothing, and XLA compiles without its
emitters of fused kernels, which triples the speed of compilation (programs started by tests are compiled as for a
user). The compilation cache compiles a program once that several tests or processes need.
"""

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers.buckets import bucket as bucket  # a fixture
from train.keep import flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if metadata.version("jaxlib") < "0.11":  # later versions have no other emitters
    _FLAGS.append("--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 2**30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
flags.fake_devices()


@pytest.fixture(autouse=True, scope="module")
def forget() -> Iterator[None]:
    """What a module compiled would stay in memory until the last one."""
    yield
    import jax

    jax.clear_caches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start many programs come first, for no worker to be left alone with them at the end."""
    items.sort(key=lambda item: item.path.stem not in ("test_readme", "test_main", "test_sweep"))
