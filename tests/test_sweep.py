"""Sweeps: the points of a file, what is refused, runs that are killed and go on, a search, files for clusters."""

import contextlib
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from common import exits, stats
from common.errors import UserError
from configs import schema, sweeps
from tests.helpers.pages import EVIL, Page
from tests.helpers.processes import environment
from tools.report import svg
from tools.sweep import __main__ as sweep
from tools.sweep import page as sweep_page
from tools.sweep import run as sweep_run
from train.keep.runs import take_lock

ROOT = Path(__file__).resolve().parents[1]
HEAD = """
from configs.sft import tiny
from configs.sweeps import *

def get_config():
    c = tiny.get_config()
    c.steps = 9
    c.log_every = c.eval_batches = c.eval_every = c.ckpt.every = 1
    c.samples = ()
    c.model.layers = 1
    return c
"""


def config(folder: Path, text: str) -> str:
    (folder / "config.py").write_text(HEAD + text)
    return str(folder / "config.py")


def start(path: str, out: Path, *more: str) -> subprocess.Popen:
    argv = [sys.executable, "-m", "tools.sweep", f"--config={path}", f"--out={out}", *more]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(argv, cwd=ROOT, env=environment(), **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=280)
    return process.returncode, out


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def done(out: Path) -> set[str]:
    return {p.parent.name for p in out.glob("*/metrics.jsonl") if '"event": "done"' in p.read_text()}


def wait_for(condition) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_full_disk_is_no_failure_of_a_point(tmp_path):
    """The same command takes the point up again."""
    point = sweep_run.Point("p", {}, [], SimpleNamespace(steps=9))
    for said, ended in (("No space left on device", False), ("a key is unknown", True)):
        (tmp_path / "log.txt").write_text(f"{tmp_path}/metrics.jsonl · {said} · the fix\n")
        child = sweep_run.Child(point, SimpleNamespace(returncode=exits.INPUT), take_lock(tmp_path / "CLAIM"))  # type: ignore[arg-type]
        with contextlib.nullcontext() if ended else pytest.raises(UserError, match="no space is left"):
            sweep_run.finish(child, tmp_path, False)
        assert (tmp_path / "ended.json").exists() == ended and not sweep_run.held(tmp_path)
    assert sweep_run.outcome(tmp_path, 9) == sweep_run.FAILED


# --- the points of a file ---


def test_helpers_by_hand():
    ab, c = {"a": (1, 2), "b": ["xy"]}, [{"c": 3}, {"c": 4}]
    want = [{"a": a, "b": "xy", "c": k} for a in (1, 2) for k in (3, 4)]
    assert sweeps.product(ab, c) == want
    assert sweeps.zip_({"a": (1, 2)}, c) == [{"a": 1, "c": 3}, {"a": 2, "c": 4}]
    assert sweeps.chain({"a": (1, 2)}, c) == [{"a": 1}, {"a": 2}, {"c": 3}, {"c": 4}]
    assert sweeps.logspace(1e-4, 1e-2, 5) == [1e-4, 0.000316228, 1e-3, 0.00316228, 1e-2]
    some = sweeps.sample(3, want, seed=1)
    assert len({repr(p) for p in some}) == 3 and all(p in want for p in some) and some == sweeps.sample(3, want, seed=1)
    with pytest.raises(UserError, match="a is set twice"):
        sweeps.product({"a": [1]}, {"a": [2]})
    with pytest.raises(UserError, match="list of values"):
        sweeps.product({"a": "xy"})


def test_get_hyper(tmp_path):
    """A big_vision-style file: keys may begin with "config.", in the key or in `name`."""
    path = config(
        tmp_path,
        "def get_hyper(h):\n"
        "    lr = h.sweep('config.optim.lr', [0.1, 0.2])\n"
        "    both = h.zipit([h.sweep('steps', [4, 5]), h.fixed('data.seq_len', 32, length=2)], name='config')\n"
        "    return h.chainit([h.product([lr, both]), h.fixed('seed', 3)])\n",
    )
    want = [{"optim.lr": lr, "steps": n, "data.seq_len": 32} for lr in (0.1, 0.2) for n in (4, 5)]
    assert sweeps.points(path) == [*want, {"seed": 3}]


def test_named_sweeps_multiply(tmp_path):
    path = config(
        tmp_path,
        "def sweep_lr(arg=''):\n    yield {'optim.lr': 0.5 if arg else 0.1}\n"
        "def sweep_seed():\n    yield from ({'seed': i} for i in range(2))\n",
    )
    assert sweeps.points(path, "x", "seed,lr") == [{"seed": i, "optim.lr": 0.5} for i in (0, 1)]
    for chosen in ("", "lrr"):
        with pytest.raises(UserError, match="--sweep takes lr, seed"):
            sweeps.points(path, "", chosen)


def test_an_error_in_a_sweep_names_its_line(tmp_path):
    path = config(tmp_path, "def sweep():\n    yield {'seed': 0}\n    yield {'seed': 1 / 0}\n")
    with pytest.raises(UserError, match=rf"config.py:{HEAD.count(chr(10)) + 3} · ZeroDivisionError"):
        sweeps.points(path)


@pytest.mark.parametrize(
    "bad", ["loguniform(0, 1)", "uniform(2, 1)", "integers(4, float('nan'))", "choice((1, 2))", "3"]
)
def test_bad_ranges(tmp_path, bad):
    path = config(tmp_path, f"def search():\n    return {{'optim.lr': {bad}}}\n")
    with pytest.raises(UserError, match=r"config.py"):
        sweeps.space(path)
    path = config(
        tmp_path, "def search():\n    return {'config.steps': integers(2, 8, log=True), 'seed': choice(1, 2)}\n"
    )
    want = {"steps": sweeps.Range(2, 8, log=True), "seed": sweeps.Range(choices=(1, 2))}
    assert sweeps.space(path) == want


# --- what is refused, and what it would cost ---


def test_bad_points_are_refused_before_the_first_run(tmp_path, capsys):
    text = "def sweep():\n    yield from product({'optim.lrr': [1]}, {'seed': range(7)})\n    yield {'optim.lr': 'x'}\n"
    path = config(tmp_path, text + "    yield {'data.batch_size': 7, 'accum': 2}\n    yield {'seed': 9}\n")
    assert sweep.main([f"--config={path}", f"--out={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    assert "3 problems" in told and not (tmp_path / "out").exists()
    assert re.search(
        r"optim.lrr = 1 · unknown key \(point 1, 2, 3, 4, 5 and 2 more\) · did you mean config.optim.lr", told
    )
    assert "optim.lr = x · must be a number (point 8)" in told and "not a multiple of accum 2 (point 9)" in told


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--emit=slrum"], "did you mean slurm"),
        (["--jobs=0"], "must be at least 1"),
        (["--out=gs://mine/sweep"], "mount a bucket"),
        (["--search=tpe", "--emit=xpk"], "cannot be combined with --search"),
        (["--search=tpe"], "no search()"),
        (["--config.seed=3"], "is also set by the sweep"),
        (["--config.init=no/such/model", "--config.model.shape=", "--config.model.layers=none"], "no/such/model"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_bad_options(tmp_path, capsys, more, words):
    path = config(tmp_path, "def sweep():\n    yield {'seed': 0}\n")
    assert sweep.main([f"--config={path}", f"--out={tmp_path / 'out'}", *more]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_search_without_optuna_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "tools.sweep.search", raising=False)
    path = config(tmp_path, "def search():\n    return {'optim.lr': loguniform(1e-3, 1e-1)}\n")
    assert sweep.main([f"--config={path}", f"--out={tmp_path / 'out'}", "--search=tpe"]) == 2
    told = capsys.readouterr().err
    assert "requirements/search.txt" in told and told.count("\n") == 1


def test_the_price_adds_up(tmp_path, capsys):
    """Twice the steps cost twice; hours and dollars by hand: FLOPs / (197e12 * MFU) / 3600, $ 1.2 an hour of v5e."""
    path = config(tmp_path, "def sweep():\n    yield from product({'steps': (3, 6)})\n")
    assert sweep.main([f"--config={path}", f"--out={tmp_path / 'out'}", "--dry-run", "--config.chip=v5e"]) == 0
    told = capsys.readouterr().out
    tokens = 3 * 16 * 64
    assert f"{tokens:,}" in told and f"2 points: at most {3 * tokens:,} tokens" in told and "estimates" in told
    hours = [1e18 / 197e12 / mfu / 3600 for mfu in (0.5, 0.2)]
    want = tuple(f"{x[0]:.2g} to {x[1]:.2g}" for x in (hours, [1.2 * h for h in hours]))
    assert sweep.costs("v5e", 1e18) == want == ("2.8 to 7.1", "3.4 to 8.5")
    assert sweep.costs("abacus", 1e18) == ("n/a", "n/a")


def test_the_launcher_leaves_the_devices_to_its_runs(tmp_path):
    path = config(tmp_path, "def sweep():\n    yield {'seed': 0}\n")
    script = (
        "import sys; from tools.sweep.__main__ import main; code = main(sys.argv[1:]); from jax._src import xla_bridge;"
        "assert not xla_bridge._backends, 'a device was touched'; sys.exit(code)"
    )
    argv = [sys.executable, "-c", script, f"--config={path}", f"--out={tmp_path / 'out'}"]
    for more in ("--emit=lines", "--collect"):
        run = subprocess.run([*argv, more], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
        assert run.returncode == 0, run.stderr


# --- folders and their state ---


def folder(out: Path, name: str, values: dict, *metrics: dict, **files: dict) -> Path:
    (out / name).mkdir(parents=True)
    files = {"point": {"values": values, "index": len(list(out.iterdir()))}, "config": {"steps": 9}} | files
    for file, content in files.items():
        (out / name / f"{file}.json").write_text(json.dumps(content))
    if metrics:
        (out / name / "metrics.jsonl").write_text("".join(json.dumps({"time": 1e9} | line) + "\n" for line in metrics))
    return out / name


def held_out(value: float, step: int = 9) -> dict:
    return {"step": step, "kind": "eval", "nll": value}


DONE = {"step": 9, "kind": "event", "event": "done", "tokens": 1000, "flops": 2e9}

TRAIN = {"step": 4, "kind": "train", "loss": 2.0, "flops": 1e9}


def test_states(tmp_path):
    state = lambda name, *lines, **files: sweep_run.state(folder(tmp_path, name, {}, *lines, **files), 9)
    stop = lambda code: {"step": 5, "kind": "event", "event": "x", "exit_code": code}
    assert state("a") == "waiting"
    assert state("b", held_out(1.0, 3)) == state("c", stop(70), stop(75)) == "stopped"
    assert state("d", DONE) == "done" and sweep_run.state(tmp_path / "d", 10) == "stopped"
    assert state("e", stop(75), stop(70)) == state("f", ended={"state": "failed"}) == "failed"
    assert state("g", held_out(1.0, 3), ended={"state": "pruned"}) == "pruned"
    assert state("h", stop(71)) == state("i", ended={"state": "below floor"}) == "below floor"
    lock = take_lock(tmp_path / "a" / "CLAIM")
    assert sweep_run.state(tmp_path / "a", 9) == "running"
    os.close(lock)
    assert sweep_run.state(tmp_path / "a", 9) == "waiting"


def test_a_point_below_its_floor_is_not_run_again(tmp_path):
    below = {"step": 5, "kind": "event", "event": "eval/nll is 3, above 2", "exit_code": exits.BELOW_FLOOR}
    at = folder(tmp_path, "low", {"seed": 0}, held_out(3.0, 5), below)
    process = SimpleNamespace(returncode=exits.BELOW_FLOOR)
    point = sweep_run.Point("low", {"seed": 0}, [], SimpleNamespace(steps=9))
    sweep_run.finish(sweep_run.Child(point, process, os.open(at / "CLAIM", os.O_CREAT)), at, False)
    told = json.loads((at / "ended.json").read_text())
    assert (told["state"], told["said"]) == ("below floor", "eval/nll is 3, above 2")
    queue = sweep_run.Listed([point], tmp_path, retry=True)
    assert queue.take() is None and not queue.left()


# --- the page ---


def test_mean_by_hand():
    """1, 2, 3: standard error 1 / sqrt(3), and Student's t with two degrees of freedom is 4.3027."""
    assert stats.student([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert stats.student([1.5]) is None


@pytest.fixture
def swept(tmp_path):
    """Two settings with three seeds each, a failed point, and one whose loss is not finite."""
    for lr, losses in ((0.1, (1.0, 2.0, 3.0)), (0.2, (5.0, 6.0, 7.5))):
        for seed, loss in enumerate(losses):
            values = {"optim.lr": lr, "seed": seed, "init": EVIL, "data.packing": "none"}
            folder(tmp_path, f"{lr}-{seed}", values, held_out(9.0, 0), held_out(loss), DONE)
    folder(
        tmp_path,
        "broken",
        {"optim.lr": 9.0, "seed": 0},
        held_out(8.0, 4),
        TRAIN,
        ended={"state": "failed", "said": "x"},
    )
    folder(tmp_path, "nan", {"optim.lr": 7.0, "seed": 0}, held_out(0.5, 4), held_out(None), DONE)
    return tmp_path


def test_page_and_csv(swept):
    assert sweep.main([f"--out={swept}", "--collect"]) == 0
    page = Page((swept / "index.html").read_text())
    assert not page.tags & {"script", "link", "img"}
    told = " ".join(page.text.split())
    assert "8 points: 7 done and 1 failed" in told
    assert "lowest eval/nll is optim.lr 0.1: 2 (n = 3, 95 % interval -0.4841 to 4.484)" in told
    assert "The next is optim.lr 0.2: 6.167 (n = 3" in told and "the intervals overlap" in told
    rows = list(csv.DictReader((swept / "results.csv").open()))
    assert [r["eval/nll"] for r in rows] == ["1.0", "2.0", "3.0", "5.0", "6.0", "7.5", "8.0", ""]
    assert {r["state"] for r in rows[:6]} == {"done"} and rows[0]["init"] == EVIL and rows[0]["flops"] == "2000000000.0"
    assert "gas: 1.5e10 model FLOPs" in told  # 7 that are done and half a one
    assert Page((swept / "0.1-2" / "report.html").read_text()).text


def test_the_other_direction_and_an_unknown_metric(swept, capsys):
    folder(swept, "early", {"optim.lr": 0.3, "seed": 0}, held_out(99.0, 4), TRAIN, ended={"state": "pruned"})
    sweep_page.write(swept, "eval/nll", maximize=True)
    told = (swept / "index.html").read_text()
    assert "The setting with the highest eval/nll is optim.lr 0.2" in told
    assert "dashed: stopped early" in told and told.count('class="line heldout c5"') == 1
    assert sweep.main([f"--out={swept}", "--collect", "--metric=eval/los"]) == 2
    assert "they have eval/nll" in capsys.readouterr().err


def test_best_so_far_is_a_staircase(swept):
    """Losses come as 1, 2, 3, 5, 6, 7.5: the lowest never changes, the highest does each time."""
    for maximize, values in ((False, 1), (True, 6)):
        chart = sweep_page._best(sweep_page.results(swept, "eval/nll"), "eval/nll", maximize)
        points = re.findall(r"([\d.]+) ([\d.]+)", re.search(r'class="line c1" d="(M[^"]+)"', chart)[1])
        xs, ys = zip(*((float(x), float(y)) for x, y in points))
        assert len(set(ys)) == values and list(ys) == sorted(ys, reverse=True) and list(xs) == sorted(xs)
        assert len(set(xs)) == 8  # those without a value took steps too


def test_axis():
    y_at, labels = svg.axis([1e-4, 1e-2, 1e-3])
    assert sorted(labels) == [1e-4, 1e-3, 1e-2] and y_at(1e-3) == pytest.approx((y_at(1e-4) + y_at(1e-2)) / 2)
    y_at, labels = svg.axis([8, 16, 12, 12.1])
    assert y_at(12) == pytest.approx((y_at(8) + y_at(16)) / 2) and labels == [8, 16, 12]
    y_at, labels = svg.axis(["a", None, "a"])
    assert labels == ["a", None] and y_at("a") > y_at(None)


# --- for clusters ---

AWKWARD = """
def sweep():
    yield from product({'samples': [("it's $HOME [/b]", 'a b')], 'model.kv_heads': [None], 'seed': (1, 2)})
"""


@pytest.mark.parametrize("kind", sweep.CHOICES["emit"])
def test_emitted_files_say_what_a_local_sweep_runs(tmp_path, kind):
    """Each command is split as a shell splits it, and read as train.main reads it."""
    path = config(tmp_path, AWKWARD)
    args = [f"--config={path}", f"--out={tmp_path / 'My sweep'}"]
    assert sweep.main([*args, f"--emit={kind}"]) == 0
    points = sweep.planned_points(sweep.overrides.parse_args(args, sweep.FLAGS))
    files = sorted((tmp_path / "My sweep" / "emit").iterdir())
    scripts = [f for f in files if f.suffix != ".yaml"]
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    text = scripts[0].read_text()
    found = [shlex.split(line) for line in text.splitlines() if re.match(r"\d+\) exec|gcloud|sky |xpk|python", line)]
    if kind == "skypilot":
        tasks = [yaml.safe_load(Path(words[-1]).read_text()) for words in found]
        assert all(re.fullmatch(r"[a-z0-9-]+", t["name"]) for t in tasks)
        commands = [shlex.split(t["run"]) for t in tasks]
    elif kind in ("xpk", "gcloud"):
        commands = [
            shlex.split(words[words.index("--command") + 1].partition(" && ")[2] or words[-1]) for words in found
        ]
    else:
        commands = [w[2:-1] if kind == "slurm" else w for w in found]
    loaded = [schema.load(words[words.index("train.main") + 1 :]) for words in commands]
    assert [schema.digest(x.config) for x in loaded] == [schema.digest(p.config) for p in points]
    assert [x.workdir for x in loaded] == [str(tmp_path / "My sweep" / p.id) for p in points]
    assert loaded[0].config.samples == ("it's $HOME [/b]", "a b")
    if kind == "slurm":
        assert "--array=0-1 " in text
    sweep_page.write(tmp_path / "My sweep", "eval/nll", False)
    assert "2 points: 2 waiting" in (tmp_path / "My sweep" / "index.html").read_text()


# --- running ---


@pytest.mark.slow
def test_a_sweep_killed_half_way_goes_on_and_repeats_nothing(tmp_path):
    """Stopped by a signal, then killed while its runs live on; two launchers finish it."""
    path = config(
        tmp_path, "def sweep():\n    yield from product({'optim.lr': logspace(1e-3, 1e-1, 6), 'seed': (0, 1)})\n"
    )
    out, args = tmp_path / "out", ("--config.steps=4", "--config.ckpt.every=2", "--config.eval_every=0")
    first = start(path, out, *args, "--jobs=2")
    wait_for(lambda: len(done(out)) >= 3)
    first.send_signal(signal.SIGTERM)
    code, told = finish(first)
    assert code == 75 and "run the same command to continue" in told
    second = start(path, out, *args, "--jobs=2")
    wait_for(lambda: len(done(out)) >= 6)
    second.kill()
    second.communicate()
    before = {name: (out / name / "environment.json").stat().st_mtime_ns for name in done(out)}
    assert 6 <= len(before) < 12
    last = [start(path, out, *args), start(path, out, *args)]
    results = [finish(p) for p in last]
    assert [code for code, _ in results] == [0, 0], results
    assert len(done(out)) == 12
    for name in done(out):
        steps = [line["step"] for line in lines(out / name) if line["kind"] == "train"]
        assert steps == [1, 2, 3, 4]
        assert sum(line.get("event") == "done" for line in lines(out / name)) == 1
    assert all((out / name / "environment.json").stat().st_mtime_ns == t for name, t in before.items())
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [r["state"] for r in rows] == ["done"] * 12 and len({r["point"] for r in rows}) == 12
    code, told = finish(start(path, out, *args, "--config.data.seq_len=32"))
    assert code == 2 and "data.seq_len" in told and "another --out" in told


@pytest.mark.slow
def test_a_point_that_breaks_down_does_not_end_the_sweep(tmp_path):
    path = config(tmp_path, "def sweep():\n    yield from product({'optim.clip': [0.0], 'optim.lr': (1e30, 1e-3)})\n")
    out = tmp_path / "out"
    for more in ((), ("--retry-failed",)):
        code, told = finish(start(path, out, *more))
        assert code == 1 and "non-finite steps in a row" in told
        assert "failed at step" in told  # the second time it was run again
    states = {r["optim.lr"]: r["state"] for r in csv.DictReader((out / "results.csv").open())}
    assert states == {"1e+30": "failed", "0.001": "done"}


@pytest.mark.slow
def test_two_workers_drain_one_study(tmp_path):
    """One of them is killed with its run, and its trial is taken over."""
    optuna = pytest.importorskip("optuna")
    path = config(tmp_path, "def search():\n    return {'optim.lr': loguniform(1e-6, 1e-1), 'seed': choice(0, 1)}\n")
    out = tmp_path / "out"
    args = (path, out, "--search=random", "--trials=8", "--config.optim.warmup=0")
    workers = [start(*args), start(*args)]
    wait_for(lambda: sum("train" in p.read_text() for p in out.glob("*/metrics.jsonl")) >= 3)
    run = psutil.Process(workers[0].pid).children()
    for process in (workers[0], *run):
        process.kill()
    workers[0].communicate()
    workers[0] = start(*args)
    results = [finish(p) for p in workers]
    assert [code for code, _ in results] == [0, 0], results
    backend = optuna.storages.journal.JournalFileBackend(str(out / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(study_name=optuna.get_all_study_names(storage)[0], storage=storage)
    states = [t.state.name for t in study.trials]
    assert len(states) == 8 and set(states) == {"COMPLETE", "PRUNED"}, states
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert sorted(r["state"] for r in rows) == ["done"] * states.count("COMPLETE") + ["pruned"] * states.count("PRUNED")
    for r in rows:
        assert (int(r["step"]) == 9) == (r["state"] == "done")
    best = min(float(r["eval/nll"]) for r in rows if r["state"] == "done")
    assert study.best_value == pytest.approx(best)
