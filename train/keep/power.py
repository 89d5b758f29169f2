"""Measures power in a background thread: with nvidia-smi for NVIDIA boards, with RAPL for CPU packages."""

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTERVAL = 10.0  # seconds between samples


class Power:
    """Counts the joules that are used until `close` is called. If power cannot be read on this machine, no thread is
    started and no joules are reported.

    RAPL covers only the CPU packages, not memory or the rest of the machine, and often only root may read it.
    """

    def __init__(self, powercap: str | Path = "/sys/class/powercap", interval: float = INTERVAL):
        self._packages = [p for p in sorted(Path(powercap).glob("intel-rapl:*")) if p.name.count(":") == 1]
        self._last: dict[str, tuple[float, Any]] = {}
        self._spent: dict[str, list[float]] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.sample()
        if self._last:
            threading.Thread(target=self._work, args=(interval,), name="power", daemon=True).start()

    def joules(self) -> dict[str, list[float]]:
        """Returns {"gpu": [joules per board, seconds], "cpu": [joules of all packages, seconds]}. Entries that cannot
        be measured are missing."""
        return {name: [round(x, 2) for x in spent] for name, spent in self._spent.items()}

    def sample(self) -> None:
        """Adds the energy used since the previous sample. A source that cannot be read is tried again at the next
        sample."""
        sources: dict[str, Callable[[], Any]] = {"gpu": board_watts, "cpu": self._counters}
        with self._lock:
            for name, read in sources.items():
                try:
                    now, value = time.monotonic(), read()
                    then, before = self._last.get(name, (now, value))
                    used = (now - then) * (before + value) / 2 if name == "gpu" else self._used(before, value)
                except (OSError, ValueError, ZeroDivisionError, subprocess.SubprocessError):
                    continue
                joules, seconds = self._spent.get(name, (0.0, 0.0))
                self._spent[name], self._last[name] = [joules + used, seconds + now - then], (now, value)

    def _counters(self) -> list[int]:
        """Returns the energy counter of each CPU package, in microjoules."""
        if not self._packages:
            raise OSError("no RAPL")
        return [int((p / "energy_uj").read_text()) for p in self._packages]

    def _used(self, before: list[int], after: list[int]) -> float:
        """Returns the joules used between two readings of the counters, which may wrap around."""
        wrap = lambda p: int((p / "max_energy_range_uj").read_text())
        pairs = zip(self._packages, before, after, strict=True)
        return sum(b - a if b >= a else b - a + wrap(p) for p, a, b in pairs) / 1e6

    def _work(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self.sample()

    def close(self) -> None:
        self._stop.set()


def board_watts() -> float:
    """Mean power, in watts, of the GPUs in CUDA_VISIBLE_DEVICES, or of all GPUs if that is unset. Raises OSError if
    nvidia-smi is not installed."""
    only = os.environ.get("CUDA_VISIBLE_DEVICES")
    query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", *(["-i", only] if only else [])]
    watts = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.split()
    return sum(map(float, watts)) / len(watts)
