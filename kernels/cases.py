"""What `tools.kernel_report` compiles: every module of this folder lists its own in `cases()`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Case(NamedTuple):
    """One operation on one shape."""

    name: str
    shape: str
    kernel: Callable | None  # None: XLA is left to do it
    xla: Callable  # the same of the same operands, without a kernel
    args: tuple[Any, ...]  # abstract arrays, or arrays where their values matter
    flops: int = 0
    peak: str = "bfloat16"  # whose rate bounds the products
    quick: bool = False  # one of the few that a test compiles
    platform: str = "tpu"


def array(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
