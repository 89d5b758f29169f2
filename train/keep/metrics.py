"""Records a run in metrics.jsonl (one JSON object per line), on the console, and optionally in a tracker.

All reports are made from metrics.jsonl. When a run resumes, the lines of all steps after the restored step are removed.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.typing import ArrayLike
from rich.text import Text

from common import exits, files, gas, record
from common.errors import UserError
from common.numbers import duration, number
from common.types import Json
from train.keep.power import Power
from train.keep.tracker import Feed

KINDS = ("init", "compile", "data", "step", "eval", "checkpoint")  # what a run spends time on; the rest is "other"


def means(sums: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> dict[str, float]:
    """Converts {"loss": (sum, weight)} to {"loss": sum / weight}, with one transfer from the devices. The mean is NaN
    if the weight is 0."""
    host = jax.device_get(dict(sums))
    return {name: float(total) / float(weight) if float(weight) else math.nan for name, (total, weight) in host.items()}


class Metrics:
    """Writes lines {"step", "time", "kind", ...} of kind train, eval, task, sample or event. Only the first process of
    a run writes lines.

    `tracker` is the name in the config, or an object with `log(step, numbers)` and `close()`. Call `rewind` after the
    state is restored, `sync` before a checkpoint is saved, `end` before the session ends. `on_error` is the config's
    `ckpt.on_error`: if a line cannot be written, "stop" raises UserError, and "continue" keeps the line in memory to
    write it later.
    """

    def __init__(
        self,
        path: str | Path,
        total_steps: int,
        tracker: Any = "",
        run_config: dict | None = None,
        on_error: str = "stop",
    ):
        self.path, self.total, self.on_error = Path(path), total_steps, on_error
        self.step = 0  # the step at which `event` records its line
        self.active = jax.process_index() == 0
        self.finished = False  # whether the record already has the "done" line of the last step
        self.seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)  # {kind: seconds in this session}
        self._began = time.perf_counter()
        self._refused = False  # whether the previous line could not be written
        if self.active:
            self._power, self._console, self._file = Power(), Console(total_steps), files.Lines(self.path)
        self._feed = Feed(tracker, self.path.parent, run_config or {}) if tracker and self.active else None

    def write(self, step: int, kind: str, **numbers: Any) -> None:
        """Appends one line. Numbers may be 0-d arrays; NaN and infinities become null, since JSON lacks them."""
        if not self.active:
            return
        self.step, numbers = step, {name: files.plain(x) for name, x in numbers.items()}
        self._line(step, kind, **numbers, **(self._spent() if kind in ("train", "eval") else {}))
        self._console.show(step, kind, numbers)
        if self._feed and kind != "event":
            self._feed.put(step, {f"{kind}/{k}": x for k, x in numbers.items() if isinstance(x, (int, float))})

    def event(self, message: str, **details: Any) -> None:
        """Records an event at the current step: a failed save, a skipped checkpoint, a stop."""
        self.write(self.step, "event", event=message, **details)

    def end(self, message: str, chip: str = "", **details: Any) -> None:
        """Records the end of a session and the seconds that it spent on each of KINDS, and prints the run's cost.

        `chip` is config.chip.
        """
        if not self.active:
            return
        self._power.sample()
        details |= self._spent()
        used = gas.line([*record.read(self.path), {"kind": "event"} | details], {}, chip)
        self.event(message, **details, gas=used._asdict())
        self._console.print(f"{used}\n{used.goodput_line()}")
        self._settle()

    def _spent(self) -> Json:
        """Returns the seconds that this session has taken so far, and its joules if power can be read."""
        other = max(0.0, time.perf_counter() - self._began - sum(self.seconds.values()))
        joules = self._power.joules()
        spent = {"seconds": {k: round(s, 3) for k, s in (*self.seconds.items(), ("other", other))}}
        return spent | ({"joules": joules} if joules else {})

    def rewind(self, step: int) -> None:
        """Drops incomplete lines and lines of steps that will be repeated. The seconds that the dropped steps took
        still count.

        If the run restarts at step 0, the evaluations of step 0 are repeated too. Then a "session" event is written,
        with the devices of this session and the seconds and joules of the previous session. The record of a `finished`
        run is not changed.
        """
        if not self.active:
            return
        self.step = step
        lines = record.read(self.path)
        done = any(line.get("event") == "done" and line["step"] == step for line in lines)
        self.finished = done and step == self.total
        if self.finished:
            return
        self._file.close()
        lost = max([0, *(line["step"] - step for line in lines)])
        opened = max([i + 1 for i, line in enumerate(lines) if line.get("event") == "session"], default=0)
        ended = gas.sessions(lines[opened:])
        for line in lines:
            if line.get("event") == "session":
                line["step"] = min(line["step"], step)
        kept = [line for line in lines if line["step"] <= step and (step or line["kind"] == "event")]
        # Drop the event that ended an earlier session, since this session records its own end.
        # The end of a preempted session is kept.
        kept = [line for line in kept if line.get("exit_code", exits.PREEMPTED) == exits.PREEMPTED]
        previous = {"lost_steps": lost, "seconds": ended[0].spent, "joules": ended[0].joules} if ended else {}
        devices = {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "processes": jax.process_count()}
        session = _stamped(step, "event", event="session", devices=devices, **previous)
        files.write_lines(self.path, map(files.plain, [*kept, session]))
        self._file = files.Lines(self.path)

    def _line(self, step: int, kind: str, **numbers: Any) -> None:
        try:
            self._file.write(_stamped(step, kind, **numbers))
            self._refused = False
        except OSError as e:
            if self.on_error == "stop":
                self._stop(e)
            if not self._refused:
                note = "new lines are kept until they can be written"
                print(f"warning: {self.path}: {e.strerror}; {note}", file=sys.stderr)
            self._refused = True

    def _settle(self) -> None:
        """Flushes everything written so far to disk. Raises UserError if the file cannot be written."""
        try:
            self.sync()
        except OSError as e:
            self._stop(e)

    def _stop(self, error: OSError) -> NoReturn:
        fix = "make room and run the same command again"
        raise UserError(f"the file cannot be written: {error.strerror}", str(self.path), fix) from error

    @contextmanager
    def timer(self, kind: str, since: float | None = None) -> Iterator[None]:
        """Adds the seconds spent in the with-block to `kind`, one of KINDS. `since` is a value of time.perf_counter().
        If it is given, the seconds are counted from that time."""
        start = time.perf_counter() if since is None else since
        self._began = min(self._began, start)
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - start

    def sync(self) -> None:
        """Flushes everything written so far to disk. Raises OSError if the file cannot be written."""
        if self.active:
            self._file.sync()

    def close(self) -> None:
        if not self.active:
            return
        self._console.close()
        self._power.close()
        if self._feed:
            self._feed.close()
        try:
            self._settle()
        finally:
            self._file.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # if another error ended the run, that error is reported instead
                raise


def _stamped(step: int, kind: str, **numbers: Any) -> Json:
    return {"step": step, "time": round(time.time(), 3), "kind": kind, **numbers}


class Console:
    """Shows progress: in a terminal, one line that is redrawn; in a file or a pipe, plain lines."""

    def __init__(self, total: int):
        self.total, self._live = total, None
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(auto_refresh=False)
            self._live.start()

    def show(self, step: int, kind: str, numbers: Json) -> None:
        if kind == "train":
            line = progress(step, self.total, numbers)
        else:
            flat = {k: x for k, x in numbers.items() if not isinstance(x, dict | list)}
            line = f"step {step}: " + "  ".join(
                number(x) if k == "event" else f"{k} {number(x)}" for k, x in flat.items()
            )
        if self._live and kind == "train":
            self._live.update(Text(line, no_wrap=True), refresh=True)
        else:
            self.print(line)

    def print(self, text: str) -> None:
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()


def progress(step: int, total: int, numbers: Json) -> str:
    """Formats the progress line for the console. `numbers` may have epoch, loss, lr, tokens_per_second, mfu (0 to 1)
    and seconds_per_step."""
    mfu, pace = numbers.get("mfu"), numbers.get("seconds_per_step")
    parts = [
        f"step {step}/{total}" + (f" (epoch {numbers['epoch']:.2f})" if "epoch" in numbers else ""),
        f"loss {number(numbers.get('loss'))}",
        f"lr {number(numbers.get('lr'))}",
        f"{number(numbers.get('tokens_per_second'))} tok/s",
        f"MFU {mfu:.1%}" if mfu is not None else "MFU n/a",
        f"{number(pace)} s/step",
        f"ETA {duration((total - step) * pace)}" if pace is not None else "ETA n/a",
    ]
    return "  ".join(parts)
