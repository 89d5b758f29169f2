"""The real command line: plans, kills, signals, changed inputs, exit codes. Every run here is a process of its own."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, TINY, environment, finish, lines, outcome, pair, record, run, start


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple:
    """The outcome of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    code, _, err = run(*TINY, f"--workdir={folder}")
    assert code == 0, err
    return outcome(folder)


def kill_at_random(folder: Path, times: int, seed: int, launch) -> None:
    """Starts the same command again and again and kills it `times` times: at a step, or at any moment of its start."""
    r = random.Random(seed)
    for _ in range(times):
        processes = launch()
        before, seconds, steps = lines(folder), r.uniform(0.5, 8), r.randrange(1, 9)
        end = time.monotonic() + (seconds if r.random() < 0.3 else 120)
        while time.monotonic() < end and lines(folder) < before + steps and processes[0].poll() is None:
            time.sleep(0.01)
        for process in processes:
            process.kill()
            process.wait()
    for process in (last := launch()):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert last


@pytest.mark.slow
@pytest.mark.parametrize("times", [3, 20])
def test_killed_runs_end_with_the_same_bits(tmp_path, whole, times):
    kill_at_random(tmp_path, times, seed=times, launch=lambda: [start(*TINY, f"--workdir={tmp_path}")])
    assert outcome(tmp_path) == whole


@pytest.mark.slow
def test_killed_pairs_of_processes_end_with_the_same_bits(tmp_path, whole):
    """Two gloo processes, each with its own rows; all reductions in one order, so two whole runs agree as well."""
    finish(pair(tmp_path / "whole"))
    kill_at_random(tmp_path / "killed", 20, seed=1, launch=lambda: pair(tmp_path / "killed"))
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    ours, theirs = outcome(tmp_path / "whole")[1], whole[1]
    assert all(abs(ours[s][0] - theirs[s][0]) <= 2e-5 * theirs[s][0] for s in theirs)


@pytest.mark.slow
def test_resume_on_another_mesh_and_other_processes(tmp_path):
    """From two processes with one device each, which sample text too, to one with four: the same losses as on one."""
    flat = ("--config.optim.schedule=constant", "--config.optim.warmup=0")  # a rate that does not depend on `steps`
    finish([start(*TINY, *flat, f"--workdir={tmp_path / 'one'}")])
    finish(pair(tmp_path / "many", *flat, "--config.steps=8", '--config.samples=("2+3=",)'))
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", '--config.samples=("2+3=",)')
    finish([start(*TINY, *flat, *mesh, f"--workdir={tmp_path / 'many'}", devices=4)])
    one, many = outcome(tmp_path / "one")[1], outcome(tmp_path / "many")[1]
    assert all(abs(many[s][0] - one[s][0]) <= 1e-4 * one[s][0] for s in one)


def test_sigterm_saves_and_says_so(tmp_path, whole):
    process = start(*TINY, f"--workdir={tmp_path}", "--config.ckpt.every=0")
    while lines(tmp_path) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "the same command resumes" in out
    assert run(*TINY, f"--workdir={tmp_path}", "--config.ckpt.every=0")[0] == 0
    assert outcome(tmp_path) == whole


def test_plan_answers_without_a_device():
    """Neither the model nor the optimizer state is made, and no backend is ever asked for."""
    script = (
        "import sys; from train.main import main; code = main(sys.argv[1:]); from jax._src import xla_bridge;"
        "assert not xla_bridge._backends, 'a device was touched'; sys.exit(code)"
    )
    args = ["--config=configs/pretrain/tiny.py", "--config.model.shape=llama2-7b", "--config.data.tokenizer=bytes"]
    env = environment(1) | {"JAX_PLATFORMS": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, *args, "--config.model.vocab_size=32000", "--config.mesh.fsdp=16", "--plan"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6,738,415,616" in done.stdout  # Llama 2 7B


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config.lrr=1"], "did you mean"),
        (["--config.objective.name=dpo", "--config.data.packing=none"], "the objective needs"),
        (["--config.init=no/such/model", "--config.model.shape="], "no/such/model"),
        (["--config.mesh.data=3"], "devices"),
        (["--config.data.source=no.jsonl"], "no.jsonl"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, args, words):
    code, _, err = run(*TINY, *args, f"--workdir={tmp_path}")
    assert code == 2 and words in err.lower().replace("\n", " "), err
    assert "Traceback" not in err


def test_no_workdir():
    code, _, err = run(*TINY)
    assert code == 2 and "--workdir" in err


@pytest.mark.slow
def test_ends_are_reached_once(tmp_path):
    """Killed at step 0, before the first checkpoint, and between the last one and the line that says so."""
    command = (*TINY, "--config.steps=4", '--config.samples=("2+3=",)', f"--workdir={tmp_path}")
    assert run(*command)[0] == 0
    path, whole = tmp_path / "metrics.jsonl", record(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    assert [line["kind"] for line in whole[:2]] == ["eval", "sample"] and whole[-1]["event"] == "done"
    path.write_text("".join(lines[:-1]) + lines[-1][:100])
    code, out, _ = run(*command)
    assert code == 0 and "goodput" in out and record(tmp_path) == whole
    before = path.read_bytes()
    code, out, _ = run(*command)
    assert code == 0 and "nothing is left to do" in out and path.read_bytes() == before
    shutil.rmtree(tmp_path / "ckpt")
    path.write_text("".join(lines[:3]))
    assert run(*command)[0] == 0 and record(tmp_path) == whole


def test_numbers_that_break_down_stop_the_run(tmp_path):
    code, out, err = run(*TINY, f"--workdir={tmp_path}", "--config.optim.lr=1e30", "--config.optim.clip=0")
    assert code == 70, err
    assert "non-finite steps in a row" in out


def test_changed_data_and_config_are_refused(tmp_path):
    assert run(*TINY, f"--workdir={tmp_path}", "--config.steps=4")[0] == 0
    (tmp_path / "config.json").unlink()  # the checkpoint knows
    code, _, err = run(*TINY, f"--workdir={tmp_path}", "--config.optim.lr=0.5")
    assert code == 2 and "optim.lr" in err
    code, _, err = run(*TINY, f"--workdir={tmp_path}", "--config.steps=2")
    assert code == 2 and "4 steps are done, but config.steps is 2" in err
    code, _, err = run(*TINY, f"--workdir={tmp_path}", "--config.data.source=synthetic:add?n=4001&digits=1")
    assert code == 2 and "data" in err
