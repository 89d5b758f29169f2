"""Measures the seconds per request when requests come one at a time."""

import time
from collections.abc import Callable

import numpy as np

from common.types import Json


def measure(one: Callable[[int], object], n: int, compiled: bool) -> Json:
    """Returns percentiles of the seconds that the calls `one(i)` take, for i < n. If `compiled`, each call is first
    made once untimed, so that compilation does not count."""
    seconds = []
    for i in range(n):
        if compiled:
            one(i)
        start = time.perf_counter()
        one(i)
        seconds.append(time.perf_counter() - start)
    p50, p95 = np.percentile(seconds, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "n": n}
