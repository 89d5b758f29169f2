"""Eight CPU devices, so that meshes are real in every test; set before jax is imported."""

import os

from train import flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
flags.spare_threads()
