"""The record of a run: one JSON object a line in metrics.jsonl, a line on the console, and a tracker beside them.

metrics.jsonl is the truth of every report. It never holds a step that the state does not have: a resume cuts it back.
"""

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax
from rich.text import Text

from train import files
from train.tracker import Feed

KINDS = ("init", "compile", "data", "step", "eval", "checkpoint")  # where the seconds of a run go


def means(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """{"loss": (sum, weight)} -> {"loss": sum / weight}, fetched from the devices at once; NaN for no weight."""
    host = jax.device_get(dict(sums))
    return {name: float(total) / float(weight) if float(weight) else math.nan for name, (total, weight) in host.items()}


class Metrics:
    """Writes lines {"step", "time", "kind": "train" | "eval" | "event", ...}; only the first process does.

    `tracker` is the config's name, or an object with `log(step, numbers)` and `close()`. Call `rewind` once the state
    is restored, `sync` when a checkpoint is saved.
    """

    def __init__(self, path: str | Path, total_steps: int, tracker: Any = "", run_config: dict | None = None):
        self.path, self.total, self.step = Path(path), total_steps, 0
        self.active = jax.process_index() == 0
        self.seconds = dict.fromkeys(KINDS, 0.0)  # of this session, by kind
        self._file = _append_to(self.path) if self.active else None
        self._feed = Feed(tracker, self.path.parent, run_config or {}) if tracker and self.active else None
        self._console = Console(total_steps) if self.active else None

    def write(self, step: int, kind: str, **numbers: Any) -> None:
        """Appends one line. Numbers may be 0-d arrays; NaN and infinities become null, as JSON has neither."""
        if not self.active:
            return
        self.step, numbers = step, {name: plain(x) for name, x in numbers.items()}
        spent = {"seconds": {k: round(s, 3) for k, s in self.seconds.items()}} if kind == "train" else {}
        self._line(step, kind, **numbers, **spent)
        self._console.show(step, kind, numbers)
        if self._feed and kind != "event":
            self._feed.put(step, {f"{kind}/{k}": x for k, x in numbers.items() if isinstance(x, (int, float))})

    def event(self, message: str, **details: Any) -> None:
        """Something that happened, at the last step written: a failed save, a skipped checkpoint, a stop."""
        self.write(self.step, "event", event=message, **details)

    def rewind(self, step: int) -> None:
        """Drops lines of steps that are to be done again, and half-written ones; the seconds they took stay counted."""
        if not self.active:
            return
        self.step = step
        self._file.close()
        lines = list(read(self.path))
        lost = max([line["step"] - step for line in lines], default=0)
        for line in lines:
            if line.get("event") == "session":
                line["step"] = min(line["step"], step)
        kept = [json.dumps(plain(line)) + "\n" for line in lines if line["step"] <= step]
        files.write(self.path, "".join(kept))
        self._file = _append_to(self.path)
        if last := session(lines):
            self._line(step, "event", event="session", seconds=last, lost_steps=max(lost, 0))

    def _line(self, step: int, kind: str, **numbers: Any) -> None:
        line = {"step": step, "time": round(time.time(), 3), "kind": kind, **numbers}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    @contextmanager
    def timer(self, kind: str) -> Iterator[None]:
        """Counts the seconds of a block as `kind`, one of KINDS."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - start

    def sync(self) -> None:
        """Makes everything written so far durable."""
        if self.active:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self.active:
            return
        self._console.close()
        if self._feed:
            self._feed.close()
        self.sync()
        self._file.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _append_to(path: Path) -> TextIO:
    """The file, open at its end; a line that a kill cut short is ended, so that the next one stays whole."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8")
    file.write("\n" if torn and path.stat().st_size else "")
    return file


def plain(x: Any) -> Any:
    """A value that strict JSON can hold; 0-d arrays become numbers."""
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if hasattr(x, "tolist"):
        return plain(x.tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read(path: str | Path) -> Iterator[dict]:
    """The lines of a metrics.jsonl; a line cut short by a kill is left out."""
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def session(lines: Iterable[dict]) -> dict[str, float] | None:
    """Seconds by kind since the last "session" event: they grow from line to line, so the last line has the sum."""
    last = None
    for line in lines:
        if "seconds" in line:
            last = None if line["kind"] == "event" else line["seconds"]
    return last


def goodput(lines: Iterable[dict]) -> dict[str, float]:
    """Seconds by kind over all sessions of a run, work that was lost and done again included."""
    lines, total = list(lines), Counter()
    ended = [line["seconds"] for line in lines if line.get("event") == "session"]
    for seconds in [*ended, session(lines) or {}]:
        total.update(seconds)
    return dict(total)


class Console:
    """One line that is redrawn in a terminal; in a file or a pipe, one plain line each time."""

    def __init__(self, total: int):
        self.total, self._live = total, None
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(auto_refresh=False)
            self._live.start()

    def show(self, step: int, kind: str, numbers: Mapping[str, Any]) -> None:
        if kind == "train":
            line = progress(step, self.total, numbers)
        else:
            told = [number(x) if k == "event" else f"{k} {number(x)}" for k, x in numbers.items()]
            line = f"step {step}: " + "  ".join(told)
        if self._live is None:
            print(line, flush=True)
        elif kind == "train":
            self._live.update(Text(line, no_wrap=True), refresh=True)
        else:
            self._live.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        if self._live:
            self._live.stop()


def progress(step: int, total: int, numbers: Mapping[str, Any]) -> str:
    """The console's line from loss, lr, tokens_per_second, mfu (0 to 1) and seconds_per_step."""
    mfu, pace = numbers.get("mfu"), numbers.get("seconds_per_step")
    parts = [
        f"step {step}/{total}",
        f"loss {number(numbers.get('loss'))}",
        f"lr {number(numbers.get('lr'))}",
        f"{number(numbers.get('tokens_per_second'))} tok/s",
        f"MFU {mfu:.1%}" if mfu is not None else "MFU n/a",
        f"{number(pace)} s/step",
        f"ETA {duration((total - step) * pace)}" if pace is not None else "ETA n/a",
    ]
    return "  ".join(parts)


def number(x: Any) -> str:
    """Four significant digits, thousands whole."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return "n/a" if x is None else str(x)
    return f"{x:,.0f}" if abs(x) >= 1000 or isinstance(x, int) else f"{x:.4g}"


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
