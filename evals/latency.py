"""Seconds per request, for requests one at a time: compiled before, with everything that a request needs."""

import time
from collections.abc import Callable

import numpy as np

from common.types import Json


def measure(one: Callable[[int], object], n: int) -> Json:
    """Percentiles of the seconds of `one(i)` for i < n; each is called once before, which compiles its shape."""
    seconds = []
    for i in range(n):
        one(i)
        start = time.perf_counter()
        one(i)
        seconds.append(time.perf_counter() - start)
    p50, p95 = np.percentile(seconds, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "n": n}
