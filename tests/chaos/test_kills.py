"""A few of the tries of `make chaos`, a disk that is really full, and a process of two that is lost."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import lines, pair

ROOT = Path(__file__).resolve().parents[2]
SIZES = (8, 300, 1000)  # kB: for no lock, no checkpoint, not the last one


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}


@pytest.mark.slow
def test_kills_leave_no_trace():
    """A kill at a point and one at a random moment, for each of six commands."""
    only = "--only=train,resume,pair,quantize,export,prepare"
    command = [sys.executable, "-m", "tests.chaos", only, "--kinds=kill,moment", "--tries=12", "--seconds=200"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "0 failed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_small_tmpfs(tmp_path):
    """Libraries in C++ and Rust find the disk full as well: one line each time, and with room the run is done."""
    folder = tmp_path / "disk"
    folder.mkdir()
    train = f"{sys.executable} -m train.main --config=configs/sft/tiny.py --config.steps=4 --config.ckpt.every=2 "
    train += f"--config.samples='()' --config.data.cache={folder}/cache --workdir={folder}/run"
    script = f"mount -t tmpfs -o size={SIZES[0]}k none {folder} || exit 99\n"
    for size in SIZES:
        script += f"mount -o remount,size={size}k {folder}; {train} > /dev/null 2> {tmp_path}/err-{size}\n"
        script += f"echo $? >> {tmp_path}/codes\n"
    script += f"mount -o remount,size=100m {folder}; {train}; echo $? >> {tmp_path}/codes; find {folder}\n"
    options = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], **options)
    if not (tmp_path / "codes").exists():
        pytest.skip("mounting is not allowed here")
    told = [(tmp_path / f"err-{size}").read_text() for size in SIZES]
    assert (tmp_path / "codes").read_text().split() == ["2", "2", "2", "0"], told
    assert all("Traceback" not in text and "No space left" in text.strip().splitlines()[-1] for text in told), told
    assert ".writing-" not in done.stdout and ".tmp" not in done.stdout and "goodput" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("which", ["the first process of this run, 127.0.0.1:", "another process of this run was lost"])
def test_the_peer_of_a_killed_process_says_so_and_ends(tmp_path, which):
    processes = pair(tmp_path, "--config.steps=2000")
    while lines(tmp_path) < 3:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    lost, left = processes if which.startswith("the first") else reversed(processes)
    lost.kill()
    _, told = left.communicate(timeout=60)
    lost.wait()
    assert left.returncode == 75, told
    assert which in told.strip().splitlines()[-1] and "Traceback" not in told
