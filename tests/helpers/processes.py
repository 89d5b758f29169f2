"""Commands as processes of their own, alone or in pairs, and the record that they leave in a run folder."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import exits
from common.record import read
from model.io import saved

# Fields of records that depend on the machine and the moment; all other fields are functions of the inputs.
CLOCK = (
    "time", "seconds", "joules", "tokens_per_second", "seconds_per_step", "mfu", "peak_rss_bytes", "gas",
    "latency", "seconds_per_flop", "peak_bytes",
)  # fmt: skip


def timeless(value: object) -> object:
    """A JSON value without the fields of CLOCK, at any depth."""
    if isinstance(value, dict):
        return {name: timeless(x) for name, x in value.items() if name not in CLOCK}
    return [timeless(x) for x in value] if isinstance(value, list) else value


def record(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as it must be the same whatever the kills: without the clock's fields, and without the events of
    sessions, which tell of starts, stops by a signal and failed saves."""
    lines = []
    for line in read(folder / "metrics.jsonl"):
        ended = line.get("event") == "done" or line.get("exit_code", exits.PREEMPTED) != exits.PREEMPTED
        if line["kind"] != "event" or ended:
            lines.append({name: value for name, value in line.items() if name not in CLOCK})
    return lines


ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--config=configs/sft/tiny.py", "--config.steps=24", "--config.log_every=1", "--config.ckpt.every=4",
    "--config.eval_batches=1", "--config.samples=()",
]  # fmt: skip


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | more
    return env | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def start(*args: str, devices: int = 1, module: str = "train.main", **env: str) -> subprocess.Popen:
    command = [sys.executable, "-m", module, *args]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(devices, **env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*args: str, **kwargs) -> tuple[int, str, str]:
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def outcome(folder: Path, step: int = 24) -> tuple:
    """What must be the same, bit for bit: the digest of every array of the last step, the losses of all steps, and the
    whole record."""
    manifest = saved.read_manifest(folder / "ckpt" / str(step))
    lines = record(folder)
    losses = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"}
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, step + 1))
    assert [line["step"] for line in lines if line.get("event") == "done"].count(step) == 1
    return manifest["leaves"], losses, lines


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def pair(folder: Path, *args: str, devices: int = 1, **more: str) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    run = functools.partial(start, *TINY, f"--workdir={folder}", *args, devices=devices, **env, **more)
    return [run(JAX_PROCESS_ID=str(i)) for i in range(2)]


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
