"""Runs and data at gs://: a bucket on disk behind etils and fsspec, and where gcsfs is installed an emulated server."""

import contextlib
import gzip
import importlib.util
import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils.epath import backend

from common import exits, files, paths
from common.errors import UserError
from data import sources
from model.io import saved
from tests.helpers import processes
from tools.report import page as report
from train.keep import lease, runs
from train.keep.checkpoint import Checkpointer

OTHER = "pid 1 on elsewhere since 2026-01-01 00:00:00\n"


def test_data_are_read_as_from_disk(bucket):
    (folder := bucket / "data").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nnot json\n')
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    (folder / "c.json").write_text('[{"text": "four"}]')
    pq.write_table(pa.table({"text": ["five"]}), folder / "d.parquet")
    (folder / "e.txt").write_text("six")
    for spec in ("", "/a.jsonl", "/*.jsonl", "/d.parquet"):
        here, there = f"{folder}{spec}", f"gs://bucket/data{spec}"
        assert [(r.record, r.reason) for r in sources.rows(there)] == [(r.record, r.reason) for r in sources.rows(here)]
        assert sources.content_id(there) == sources.content_id(here)
    assert [row.where for row in sources.rows("gs://bucket/data/a.jsonl")][2] == "gs://bucket/data/a.jsonl:3"
    assert sources.mixture("gs://bucket/a.jsonl:1,pydocs:3") == {"gs://bucket/a.jsonl": 0.25, "pydocs": 0.75}


@pytest.mark.parametrize(
    ("spec", "told"),
    [("gs://bucket/none.jsonl", "no such source"), ("ftp://bucket/a.jsonl", "this kind of URL is not supported")],
)
def test_a_place_that_is_not_there_is_one_line(bucket, spec, told):
    with pytest.raises(UserError, match=told) as e:
        list(sources.rows(spec))
    assert "\n" not in str(e.value)


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_without_gcsfs(tmp_path):
    code, _, err = processes.run(*processes.TINY, "--workdir=gs://bucket/run", HOME=str(tmp_path))
    assert code == 2 and err.count("\n") == 1 and "requirements/cloud.txt" in err, err


def test_small_files_of_a_run_go_and_come_back(bucket, tmp_path, monkeypatch):
    with runs.RunDir("gs://bucket/run", {"seed": 1}) as folder:
        assert (bucket / "run" / "config.json").exists() and (bucket / "run" / "LOCK.0").exists()
        (folder.path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n')
        (folder.path / "tokenizer").mkdir()
        (folder.path / "tokenizer" / "a.json").write_text("{}")
        folder.publish()
        times = {p: p.stat().st_mtime_ns for p in (bucket / "run").rglob("*.json*")}
        (folder.path / "samples.jsonl").write_text("late")
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())  # what did not change is not sent again
    names = {"config.json", "overrides.json", "environment.json", "metrics.jsonl", "tokenizer/a.json", "samples.jsonl"}
    assert paths.sizes(paths.parse("gs://bucket/run")).keys() == names  # no lock is left
    (bucket / "run" / "ckpt" / "3").mkdir(parents=True)
    (bucket / "run" / "ckpt" / "3" / "array").write_text("large")
    for mirrors in ("mirrors", "another machine"):
        monkeypatch.setattr(files, "MIRRORS", tmp_path / mirrors)
        files.mirror("gs://bucket/run").mkdir(parents=True, exist_ok=True)
        (files.mirror("gs://bucket/run") / "stale").write_text("of a step that was not saved")
        with runs.RunDir("gs://bucket/run", {"seed": 1}) as folder:
            assert paths.sizes(folder.path).keys() == {*names, "LOCK"}
    (copy := report.local("gs://bucket/run", str(tmp_path / "copy"))).joinpath("metrics.jsonl").read_text()
    assert copy.name == "run" and not (copy / "ckpt").exists()


def test_a_step_in_a_store_is_one_that_has_its_manifest(bucket):
    home = paths.parse("gs://bucket/run/ckpt")
    for name in ("3/state/d/0", "3/state_hashes.json", "4/state/d/1", "4/state_hashes.json", "5/state/d/2", "note"):
        (home / name).write_text(name)
    told = []
    cfg = SimpleNamespace(keep=1, keep_every=0)
    with contextlib.closing(Checkpointer(home, cfg, log=told.append)) as ckpt:
        assert saved.steps(home) == [4, 3] and len(told) == 1 and "ignoring note" in told[0]
        assert not (home / "5").exists()  # a save that a kill cut short
        ckpt._prune()
        assert sorted(p.name for p in home.iterdir()) == ["4", "note"]
        ckpt._set_aside(home / "4")
    assert not saved.steps(home) and paths.sizes(home / "invalid-4-0") == {"state/d/1": 11, "state_hashes.json": 19}


def test_a_run_in_use_is_refused(bucket, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    home = paths.parse("gs://bucket/run")
    held = lease.Lease(home, OTHER)
    with pytest.raises(UserError, match="in use by pid 1 on elsewhere"):
        lease.Lease(home, runs.holder())
    assert not paths.create(home / "LOCK.0", "another")
    held.close()
    assert not paths.sizes(home)


def test_the_lock_of_a_dead_run_is_taken_over(bucket, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    home, slept = paths.parse("gs://bucket/run"), []
    monkeypatch.setattr(lease.time, "sleep", slept.append)
    for left, watched in ((OTHER, [pytest.approx(0.15)]), (f"pid 1 on {socket.gethostname()} since\n", [])):
        slept.clear()
        (home / "LOCK.4").write_text(left)
        held = lease.Lease(home, runs.holder())
        assert slept == watched and list(paths.sizes(home)) == ["LOCK.5"]
        held.close()


def test_a_holder_that_was_replaced_ends(bucket, monkeypatch):
    """As a machine that was suspended for longer than its lock lasts."""
    ended = []
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease.os, "_exit", lambda code: (ended.append(code), held._stop.set()))
    home = paths.parse("gs://bucket/run")
    held = lease.Lease(home, OTHER)
    assert paths.create(home / "LOCK.1", "another")
    held.path.unlink()
    held._thread.join(5)
    assert ended == [exits.PREEMPTED]


# --- with gcsfs and the emulator of requirements/cloud.txt ---

cloud = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed: make cloud"),
]


@pytest.fixture
def server(monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv = [sys.executable, "-m", "gcp_storage_emulator", "start", f"--port={port}", "--host=127.0.0.1", "--in-memory"]
    process = subprocess.Popen([*argv, "--default-bucket=bucket"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask for credentials
    backend.fsspec_backend._get_filesystem.cache_clear()
    while process.poll() is None:
        with socket.socket() as s:
            if not s.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.05)
    yield
    process.kill()
    process.wait()
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.mark.parametrize("times", [pytest.param(6, marks=cloud)])
def test_killed_runs_in_a_store_end_with_the_same_bits(tmp_path, server, times):
    """Every launch is on another of two machines, each with a home of its own; the data lie in the store as well."""
    data = "".join(
        json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) + "\n" for a in range(30) for b in range(30)
    )
    home = paths.parse("gs://bucket/runs/killed")
    (home.parent.parent / "data" / "sums.jsonl").write_text(data)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
    argv = [*processes.TINY, "--config.data.source=gs://bucket/data/sums.jsonl"]
    code, _, err = processes.run(*argv, f"--workdir={tmp_path / 'whole'}", **cache)
    assert code == 0, err

    def launch(machine: int) -> tuple[subprocess.Popen, Path]:
        own = tmp_path / f"home{machine}"
        process = processes.start(*argv, f"--workdir={home}", HOME=str(own), **cache)
        return process, own / ".cache/kungfu/runs" / files.mirror(home).name

    r = random.Random(0)
    for i in range(times):
        process, mirror = launch(i % 2)
        seconds, steps = r.uniform(3, 12), r.randrange(1, 9)
        end = time.monotonic() + (seconds if r.random() < 0.3 else 120)
        before = 4 * max([0, *(int(p.name) // 4 for p in (home / "ckpt").glob("*") if p.name.isdigit())])
        while time.monotonic() < end and processes.lines(mirror) < before + steps and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    process, _ = launch(2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert processes.outcome(home) == processes.outcome(tmp_path / "whole")
    left = {name.split("/")[1] for name in paths.sizes(home) if name.startswith("ckpt/")}
    assert left == {"20", "24"} and not [n for n in paths.sizes(home) if n.startswith("LOCK")]
    code, _, err = processes.run(*argv, f"--workdir={home}", "--config.optim.lr=0.5", HOME=str(tmp_path), **cache)
    assert code == 2 and "optim.lr" in err
