"""What several files of tests ask of a run folder."""

from pathlib import Path
from typing import Any

from common import exits
from train.keep import metrics

# What a line of metrics.jsonl says of the machine and the moment; all else is a function of the run.
CLOCK = (
    "time", "seconds", "joules", "tokens_per_second", "seconds_per_step", "mfu", "peak_rss_bytes", "gas",
)  # fmt: skip


def record(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as it must be the same whatever the kills: without the clock's fields, and without the events of
    sessions, which tell of starts, stops by a signal and failed saves."""
    lines = []
    for line in metrics.read(folder / "metrics.jsonl"):
        ended = line.get("event") == "done" or line.get("exit_code", exits.PREEMPTED) != exits.PREEMPTED
        if line["kind"] != "event" or ended:
            lines.append({name: value for name, value in line.items() if name not in CLOCK})
    return lines
