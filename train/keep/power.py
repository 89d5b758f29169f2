"""Measured power: NVIDIA boards by nvidia-smi, CPU packages by RAPL, sampled in a thread beside the steps."""

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTERVAL = 10.0  # seconds between samples


class Power:
    """Counts joules from now to `close`; where nothing can be read there is no thread, and no joules.

    RAPL covers the packages of the CPU, neither memory nor the rest of the machine, and often only root may read it.
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
        """{"gpu": [joules a board, seconds they cover], "cpu": [joules of all packages, seconds]}, as far as known."""
        return {name: [round(x, 2) for x in spent] for name, spent in self._spent.items()}

    def sample(self) -> None:
        """Adds what was used since the sample before; a source that fails now is asked again next time."""
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
        """Microjoules of each package."""
        if not self._packages:
            raise OSError("no RAPL")
        return [int((p / "energy_uj").read_text()) for p in self._packages]

    def _used(self, before: list[int], after: list[int]) -> float:
        """Joules between two readings of counters that wrap around."""
        wrap = lambda p: int((p / "max_energy_range_uj").read_text())
        pairs = zip(self._packages, before, after, strict=True)
        return sum(b - a if b >= a else b - a + wrap(p) for p, a, b in pairs) / 1e6

    def _work(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self.sample()

    def close(self) -> None:
        self._stop.set()


def board_watts() -> float:
    """Mean power of the boards in CUDA_VISIBLE_DEVICES, or of all; OSError without nvidia-smi."""
    only = os.environ.get("CUDA_VISIBLE_DEVICES")
    query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", *(["-i", only] if only else [])]
    told = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.split()
    return sum(map(float, told)) / len(told)
