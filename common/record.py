"""The lines of a run's metrics.jsonl, which `train.keep.metrics` writes, for whoever reads them; no jax here."""

from pathlib import Path

from common import files
from common.types import Json


def read(path: str | Path) -> list[Json]:
    """{"step", "time", "kind", ...} each. A line that a kill cut short, or that no run can have written, is missing."""
    return list(filter(_sound, files.read_lines(path)))


def _sound(line: Json) -> bool:
    groups = [line.get(name, {}) for name in ("seconds", "joules", "devices")]
    return (
        type(line.get("step")) is int
        and isinstance(line.get("kind"), str)
        and all(isinstance(group, dict) for group in groups)
        and all(isinstance(x, (int, float)) for x in groups[0].values())
    )
