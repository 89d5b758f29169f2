"""From a command line to a locked, checked config, before jax is imported."""

from configs.schema.config import (
    ConfigDict,
    Loaded,
    diff,
    digest,
    from_dict,
    load,
    read,
    recorded,
    resolve,
    running,
    to_dict,
)
from configs.schema.keys import base_keys, flatten, unknown

__all__ = [
    "ConfigDict", "Loaded", "base_keys", "diff", "digest", "flatten", "from_dict", "load", "read",
    "recorded", "resolve", "running", "to_dict", "unknown",
]  # fmt: skip
