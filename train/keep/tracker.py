"""Sends metrics to TensorBoard or Weights & Biases from a background thread. If the tracker hangs, it misses metrics,
but training continues."""

import importlib.util
import queue
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import UserError
from configs import schema

QUEUE = 1000  # maximum number of points that wait for a slow tracker; further points are dropped and counted
PATIENCE = 5.0  # seconds to wait for the tracker at the end of a run


class Feed:
    """Passes points, each of which holds the metrics of one step, to a tracker in the background. `tracker` is a name
    in TRACKERS, or an object with the methods `log` and `close`.

    Raises UserError if the tracker's package is not installed. If the tracker fails later, one warning is printed, and
    the run continues.
    """

    def __init__(self, tracker: Any, folder: Path, config: dict):
        if isinstance(tracker, str):
            if tracker not in TRACKERS:
                raise schema.unknown("tracker", tracker)
            if importlib.util.find_spec(tracker) is None:
                raise UserError(f"{tracker} is not installed", "config.tracker", f"pip install {tracker}")
        self._tracker, self._folder, self._config = tracker, folder, config
        self._points: queue.Queue = queue.Queue(QUEUE)
        self._offered = self._delivered = 0
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def put(self, step: int, numbers: dict[str, float]) -> None:
        self._offered += 1
        with suppress(queue.Full):
            self._points.put_nowait((step, numbers))

    def close(self) -> None:
        """Waits up to PATIENCE seconds for queued points, then abandons the tracker."""
        until = time.monotonic() + PATIENCE
        with suppress(queue.Full):
            self._points.put(None, timeout=PATIENCE)
        self._thread.join(max(0.0, until - time.monotonic()))
        if missed := self._offered - self._delivered:
            print(f"warning: the tracker missed {missed} points; metrics.jsonl has all of them", file=sys.stderr)

    def _work(self) -> None:
        try:
            tracker = self._tracker
            if isinstance(tracker, str):
                tracker = TRACKERS[tracker](self._folder, self._config)
            while (point := self._points.get()) is not None:
                tracker.log(*point)
                self._delivered += 1
            tracker.close()
        except Exception as e:
            print(f"warning: the tracker failed: {e}; metrics.jsonl is still written", file=sys.stderr)


class TensorBoard:
    def __init__(self, folder: Path, config: dict):
        from tensorboard.summary import Writer  # pyright: ignore[reportMissingImports]

        self._writer = Writer(str(folder / "tensorboard"))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, x in numbers.items():
            self._writer.add_scalar(name, x, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Sends metrics to W&B, including the step as a metric of its own. W&B's built-in step is not used, because W&B
    drops points whose step does not increase, as happens after a resume."""

    def __init__(self, folder: Path, config: dict):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(dir=str(folder), config=config, name=folder.name)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}
