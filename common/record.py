"""Reads the lines of a run's metrics.jsonl, which `train.keep.metrics` writes. This module loads quickly because it
does not import jax."""

from pathlib import Path

from common import files
from common.types import Json


def read(path: str | Path) -> list[Json]:
    """Reads the lines of a metrics.jsonl, each a dict {"step", "time", "kind", ...}. Skips invalid lines, and lines
    that are incomplete because a process was killed."""
    return list(filter(_sound, files.read_lines(path)))


def _sound(line: Json) -> bool:
    seconds, joules, devices = (line.get(name, {}) for name in ("seconds", "joules", "devices"))
    if line.get("kind") == "task" and _number(seconds):  # the seconds of one evaluation, not a dict
        seconds = {}
    return (
        type(line.get("step")) is int
        and isinstance(line.get("kind"), str)
        and all(isinstance(group, dict) for group in (seconds, joules, devices))
        and all(map(_number, seconds.values()))
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(_number, pair)) for pair in joules.values())
        and isinstance(devices.get("kind", ""), str)
        and all(_number(devices.get(name, 0)) for name in ("count", "processes"))
        and _number(line.get("flops") or 0)
    )


def _number(x: object) -> bool:
    return type(x) in (int, float)
