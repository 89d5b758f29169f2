"""Folders that earlier versions wrote: what is opened as it was, and the numbers that must not drift."""

import json
import shutil
from pathlib import Path

import pytest

from common import files
from common.errors import UserError
from configs import schema
from infer import load
from model.io import saved
from tools import export
from train.main import run

ROOT = Path(__file__).resolve().parents[1]
CURVE = [1.1117, 0.38866, 0.02909, 0.00445, 0.00198]


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A base, a LoRA run of 4 steps on it and its token cache, as they were before each role had a digest."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "old", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(workdir, **changes):
    """The command of the old run, with changes."""
    keys = json.loads(Path("run/overrides.json").read_text()) | {"samples": "()"} | changes  # None: as by default
    argv = [f"--config={ROOT / 'configs/sft/tiny.py'}", f"--workdir={workdir}"]
    return run(schema.load(argv + [f"--config.{k}={v}" for k, v in keys.items() if v is not None]))


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_an_old_run_opens_with_the_same_loss(old):
    loss, tokens = load("run").loss(["2+3=5 and 7+5=12"])
    assert (loss, tokens) == (pytest.approx(5.7827230, rel=1e-5), 15)


def test_an_old_run_goes_on_with_the_same_loss(old):
    """Its data are tokenized again where the cache is of an older form; the new step has a digest for each role."""
    assert train("run", steps=6) == 0
    assert losses(old / "run") == pytest.approx([1.8817100, 1.8870953, 1.6966686], rel=1e-5)
    assert set(saved.read_manifest(old / "run" / "ckpt" / "6")["frozen"]) == {"policy"}


def test_the_model_card_of_an_unfinished_run_says_how_far_it_is(old):
    config = files.load_json(old / "run/config.json")
    assert ": 4 steps on" in export.card("out", "run", "", [])
    files.write_json(old / "run/config.json", config | {"steps": 9})
    assert ": 4 of 9 steps on" in export.card("out", "run", "", [])


def test_an_adapter_goes_on_only_on_its_own_base(old):
    """A base of the same shape with other weights would take the adapter's arrays without a word."""
    adapter = {"peft.name": "saved", "peft.folder": "run", "peft.rank": None, "steps": 1}
    assert train("own", **adapter) == 0
    weights = bytearray((old / "base" / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (old / "base" / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="another base"):
        train("other", **adapter)
    with pytest.raises(UserError, match="another base"):
        load("run")
    with pytest.raises(UserError, match="frozen weights"):
        train("run", steps=6)


@pytest.mark.slow
def test_the_loss_curve_of_a_config_stays(tmp_path):
    """configs/sft/tiny.py, every twentieth step, as it was at the first release; processors round float32 apart."""
    argv = ["--config=configs/sft/tiny.py", f"--workdir={tmp_path}/run", "--config.log_every=20", "--config.samples=()"]
    argv += [f"--config.data.cache={tmp_path}/cache", "--config.eval_batches=0"]
    assert run(schema.load(argv)) == 0
    assert losses(tmp_path / "run")[:5] == pytest.approx(CURVE, rel=5e-3)


def test_epochs_set_the_steps(tmp_path):
    """1.5 passes over the packed rows, then 2 by the same command; the last batch may go beyond."""
    argv = ["--config=configs/sft/tiny.py", f"--workdir={tmp_path}/run", "--config.log_every=1", "--config.samples=()"]
    argv += [f"--config.data.cache={tmp_path}/cache", "--config.eval_batches=0", "--config.model.layers=1"]
    argv += ["--config.data.source=synthetic:add?n=600&digits=1", "--config.steps=1"]
    for epochs in (1.5, 2.0):
        loaded = schema.load([*argv, f"--config.epochs={epochs}"])
        assert run(loaded) == 0
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["kind"] == "train"][-1]
        assert last["step"] == loaded.config.steps > 1
        assert 0 <= last["epoch"] - epochs < 16 / 50
