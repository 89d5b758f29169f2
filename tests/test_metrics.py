"""The record of a run: what a resume cuts off, what a reader sees, and trackers that hang."""

import json
import math
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import pytest

from common import gas
from common.errors import UserError
from common.numbers import duration
from common.record import read
from train.keep import tracker
from train.keep.metrics import Metrics, means, progress

ROOT = Path(__file__).resolve().parents[1]


def lines(folder: Path, kind: str = "") -> list[dict]:
    return [line for line in read(folder / "metrics.jsonl") if kind in line["kind"]]


def test_means_by_hand():
    """Two micro-batches of 3 and 1 tokens with mean losses 1 and 5 have the mean 2, not 3."""
    got = means({"loss": (jnp.float32(3 * 1 + 1 * 5), jnp.float32(4)), "none": (jnp.float32(0), jnp.float32(0))})
    assert got["loss"] == 2.0 and math.isnan(got["none"])


def test_lines_are_strict_json(tmp_path, capsys):
    with Metrics(tmp_path / "metrics.jsonl", 10) as m:
        m.write(1, "train", loss=jnp.float32(0.5), lr=float("nan"), counts=jnp.arange(2), worst=float("-inf"))
        m.write(1, "eval", accuracy=0.25)
        m.event("a step was skipped")
    reject = lambda token: pytest.fail(token)
    train, eval_, event = [
        json.loads(text, parse_constant=reject) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert (train["step"], train["kind"], train["loss"], train["lr"]) == (1, "train", 0.5, None)
    assert train["counts"] == [0, 1] and train["worst"] is None and abs(train["time"] - time.time()) < 60
    assert (eval_["kind"], eval_["accuracy"], event["event"], event["step"]) == ("eval", 0.25, "a step was skipped", 1)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step 1/10  loss 0.5  lr n/a") and out[1:] == [
        "step 1: accuracy 0.25",
        "step 1: a step was skipped",
    ]


def test_rewind_drops_what_will_be_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, 10) as m:
        for step in range(1, 6):
            m.write(step, "train", loss=1.0 / step)
            m.write(step, "task", task="dates", seconds=1.5)
    with path.open("a") as f:
        f.write('{"step": 6, "ki')  # the kill came here
    with Metrics(path, 10) as m:
        m.event("step 5 is skipped: it was damaged")  # told before the state is restored
        m.rewind(3)
        m.write(4, "train", loss=9.0)
    assert [line["step"] for line in lines(tmp_path, "train")] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(tmp_path, "task")] == [1, 2, 3]
    assert [line["event"] for line in lines(tmp_path, "event")] == ["step 5 is skipped: it was damaged", "session"]
    assert lines(tmp_path, "event")[-1]["lost_steps"] == 2
    assert path.read_text().endswith("\n") and len(path.read_text().splitlines()) == 9


def test_rewind_of_a_new_run(tmp_path):
    with Metrics(tmp_path / "metrics.jsonl", 10) as m:
        m.rewind(0)
    assert [line["event"] for line in lines(tmp_path)] == ["session"]


def test_what_was_measured_at_step_0_is_measured_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with Metrics(path, 10) as m:
            m.rewind(0)
            m.write(0, "eval", nll=1.0)
            m.write(0, "sample", answer="a")
            m.end("a floor is crossed", exit_code=71)
    told = [line.get("event", line["kind"]) for line in lines(tmp_path)]
    assert told == ["session", "session", "eval", "sample", "a floor is crossed"]


def test_a_finished_run_is_left_as_it_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, 3) as m:
        m.write(3, "train", loss=1.0)
        m.end("done")
    before = path.read_bytes()
    with Metrics(path, 3) as m:
        m.rewind(3)
        assert m.finished
    assert path.read_bytes() == before
    with Metrics(path, 4) as m:
        m.rewind(3)
        assert not m.finished


def test_strange_lines_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    strange = ['{"step": "1", "kind": "train"}', '{"step": true, "kind": "eval"}', '{"step": 1}', "[" * 100_000]
    strange += [
        '{"step": 1, "kind": "train", "seconds": [1]}',
        '{"step": 1, "kind": "train", "seconds": {"step": "x"}}',
    ]
    path.write_text("\n".join([*strange, '{"step": 1, "kind": "train"}', ""]))
    with Metrics(path, 10) as m:
        m.rewind(1)
    assert [line["kind"] for line in lines(tmp_path)] == ["train", "event"]


@pytest.fixture
def full(monkeypatch):
    """A list of one truth: whether the disk under metrics.jsonl is full."""
    state, write = [False], os.write

    def refuse(fd, data):
        if state[0] and "metrics.jsonl" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr("common.files.os.write", refuse)
    return state


def test_a_full_disk_stops_a_run_or_keeps_its_lines(tmp_path, full, capsys):
    path = tmp_path / "metrics.jsonl"
    with (
        pytest.raises(UserError, match=r"metrics.jsonl · the file cannot be written: No space left"),
        Metrics(path, 9) as m,
    ):
        full[0] = True
        m.write(1, "train", loss=1.0)
    full[0] = False
    with Metrics(path, 9, on_error="continue") as m:
        full[0] = True
        m.write(2, "train", loss=1.0)
        m.event("a save failed")
        with pytest.raises(OSError):
            m.sync()
        full[0] = False
        m.write(3, "train", loss=1.0)
        full[0] = True
        with pytest.raises(UserError):
            m.end("done")  # it is not, while the line is missing
        full[0] = False
    assert [line["step"] for line in lines(tmp_path)] == [2, 2, 3, 3]
    assert capsys.readouterr().err.count("are kept until") == 2


def test_seconds_survive_restarts(tmp_path):
    """3 s of work of which 1 s is lost, then 2 s and a fall back to the start, then 4 s: of 9 s, 4 s count."""
    path = tmp_path / "metrics.jsonl"
    for restored, work in ((0, {1: 2.0, 2: 1.0}), (1, {2: 2.0}), (0, {1: 4.0})):
        with Metrics(path, 10) as m:
            m.rewind(restored)
            for step, seconds in work.items():
                m.seconds["step"] += seconds
                m.write(step, "train", loss=1.0)
    seconds = gas.line(read(path), {}).seconds
    assert (seconds["step"], seconds["lost"]) == (4.0, 5.0)
    assert [line["step"] for line in lines(tmp_path, "train")] == [1]


def test_timer(tmp_path):
    with Metrics(tmp_path / "metrics.jsonl", 10) as m:
        with pytest.raises(KeyError), m.timer("data"):
            time.sleep(0.02)
            raise KeyError
        m.write(1, "train")
    spent = lines(tmp_path)[0]["seconds"]
    assert 0.02 <= spent["data"] < 1 and spent["compile"] == 0


def test_console_line_by_hand():
    numbers = dict(loss=2.34567, lr=0.0003, tokens_per_second=12345.6, mfu=0.314, seconds_per_step=0.5)
    assert progress(10, 100, numbers) == (
        "step 10/100  loss 2.346  lr 0.0003  12,346 tok/s  MFU 31.4%  0.5 s/step  ETA 0:45"
    )
    assert "MFU n/a" in progress(1, 2, {}) and "ETA n/a" in progress(1, 2, {})
    assert duration(3725) == "1:02:05"


def test_terminal_redraws_one_line(tmp_path):
    code = (
        "from train.keep.metrics import Metrics\n"
        f"with Metrics({str(tmp_path / 'metrics.jsonl')!r}, 3) as m:\n"
        "    m.write(1, 'train', loss=1.0)\n    m.write(2, 'train', loss=[0.5][0])\n    m.event('[odd] text')\n"
    )
    here, there = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=there, cwd=ROOT, env=env)
    assert child.wait(60) == 0
    os.close(there)
    shown = os.read(here, 100_000).decode()
    os.close(here)
    assert "step 1/3" in shown and "step 2/3" in shown and "[odd] text" in shown and "\x1b[2K" in shown


class Stub:
    def __init__(self):
        self.points, self.closed = [], False

    def log(self, step: int, numbers: dict) -> None:
        self.points.append((step, numbers))

    def close(self) -> None:
        self.closed = True


class Hanging(Stub):
    def log(self, step: int, numbers: dict) -> None:
        threading.Event().wait()


def test_tracker_gets_every_number(tmp_path):
    stub = Stub()
    with Metrics(tmp_path / "metrics.jsonl", 10, stub) as m:
        m.write(1, "train", loss=0.5, lr=float("nan"))
        m.write(1, "eval", accuracy=1.0)
        m.event("not a number")
    assert stub.points == [(1, {"train/loss": 0.5}), (1, {"eval/accuracy": 1.0})] and stub.closed


def test_tracker_that_hangs_costs_no_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracker, "PATIENCE", 0.1)
    monkeypatch.setattr(tracker, "QUEUE", 50)
    start = time.monotonic()
    with Metrics(tmp_path / "metrics.jsonl", 10, Hanging()) as m:
        for step in range(200):
            m.write(step, "train", loss=1.0)
    assert time.monotonic() - start < 2
    assert len(lines(tmp_path)) == 200
    assert "the tracker missed 200 points" in capsys.readouterr().err


def test_tracker_that_fails_is_told_once(tmp_path, capsys):
    class Failing(Stub):
        def log(self, step: int, numbers: dict) -> None:
            raise OSError("server is down")

    with Metrics(tmp_path / "metrics.jsonl", 10, Failing()) as m:
        for step in range(3):
            m.write(step, "train", loss=1.0)
    assert capsys.readouterr().err.count("server is down") == 1 and len(lines(tmp_path)) == 3


def test_unknown_and_missing_trackers(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean tensorboard"):
        Metrics(tmp_path / "metrics.jsonl", 10, "tensorbord")
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        Metrics(tmp_path / "metrics.jsonl", 10, "wandb")


def test_tensorboard_gets_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    with Metrics(tmp_path / "metrics.jsonl", 10, "tensorboard") as m:
        m.write(1, "train", loss=0.5)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert "train/loss" in str(events.Tags())


def test_wandb_gets_points(tmp_path, monkeypatch):
    if not isinstance(pytest.importorskip("wandb"), ModuleType):
        pytest.skip("wandb is a stub")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Metrics(tmp_path / "metrics.jsonl", 10, "wandb") as m:
        m.write(1, "train", loss=0.5)
    assert list(tmp_path.glob("wandb/offline-run-*"))
