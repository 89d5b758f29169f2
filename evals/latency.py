"""Measures latency: the seconds per request when requests are sent one at a time."""

import time
from collections.abc import Callable

import numpy as np

from common.types import Json


def measure(one: Callable[[int], object], n: int, compiled: bool) -> Json:
    """Times the calls `one(i)` for all i < n, and returns percentiles of the seconds per call. If `compiled` is True,
    each call is first made once without timing it, so that compilation does not count."""
    seconds = []
    for i in range(n):
        if compiled:
            one(i)
        start = time.perf_counter()
        one(i)
        seconds.append(time.perf_counter() - start)
    p50, p95 = np.percentile(seconds, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "n": n}
