"""Chips, the gas line by hand, measured power."""

import json
import os
import time
from pathlib import Path

import pytest

from common import chips, gas
from common.errors import UserError
from common.record import read
from configs import schema
from tools.report import page as report
from train import cost
from train.keep.metrics import Metrics
from train.keep.power import Power

NAMES = ("v4", "v5e", "v5p", "v6e", "tpu7x", "a100", "a100-80gb", "h100", "h200", "b200", "l4")


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_chip_has_its_range_and_source(name):
    chip = chips.find(name)
    for number in filter(lambda x: isinstance(x, chips.Number), (*chip, *chips.site())):
        assert number.low <= number.value <= number.high and number.low > 0
        assert number.quality in ("published", "derived", "estimate") and number.source
        assert number.date.startswith("2026-")
    watts = chip.watts
    assert watts.low < watts.high  # no chip here has one published average of its whole system


@pytest.mark.parametrize(
    "kind, name",
    [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"),
     ("TPU7x", "tpu7x"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("V6E", "v6e")],
)  # fmt: skip
def test_device_kinds_are_found(kind, name):
    assert chips.find(kind).name == name


def test_unknown_chips_are_no_guess():
    assert chips.find("cpu") is None and chips.find("NVIDIA H100 PCIe") is None and chips.find("") is None
    assert cost.mfu(1e12, None, 1) is None


def test_mfu_by_hand():
    assert cost.mfu(0.5 * 918e12 * 8, chips.find("v6e"), 8) == pytest.approx(0.5)
    assert cost.mfu(0.5 * 2307e12 * 4, chips.find("tpu7x"), 8) == pytest.approx(0.5)  # 8 devices are 4 chips


def test_an_unknown_chip_in_the_config_is_told_with_the_nearest():
    with pytest.raises(UserError, match=r"config\.chip = v6 .* did you mean v6e"):
        schema.load(["--config=configs/sft/tiny.py", "--config.chip=v6"])


# --- the line ---


def session(kind: str, count: int, **ended) -> dict:
    devices = {"kind": kind, "count": count, "processes": 1}
    return {"step": 0, "kind": "event", "event": "session", "devices": devices, **ended}


def train(at: int, flops: float, **seconds) -> dict:
    return {"step": at, "kind": "train", "flops": flops, "seconds": seconds}


# Ten steps that count and ten that are lost on 8 devices; the lost ones again on 16.
TWO = [
    session("TPU v6 lite", 8),
    train(10, 1e18, init=10.0, compile=20.0, data=1.0, step=49.0),
    session("TPU v6 lite", 16, seconds={"init": 10.0, "compile": 20.0, "data": 3.0, "step": 97.0}, lost_steps=10),
    train(20, 2e18, init=12.0, compile=8.0, data=1.0, step=29.0, eval=20.0),
    {"step": 20, "kind": "task", "flops": 5e18, "mean": 0.5, "seconds": 7.5},
    {"step": 20, "kind": "event", "event": "done", "flops": 2e18, "seconds": {
        "init": 12.0, "compile": 8.0, "data": 1.0, "step": 29.0, "eval": 20.0, "checkpoint": 10.0}},
]  # fmt: skip


def test_the_line_by_hand():
    """8 chips for 130 s and 16 for 80 s, at the numbers that stand in chips.json."""
    table = json.loads((Path(chips.__file__).with_name("chips.json")).read_text())
    v6e, pue, grid = table["chips"]["v6e"], table["pue"]["value"], table["region"]["gco2_per_kwh"]["value"]
    used = gas.line(TWO, {})
    chip_seconds = 8 * 130 + 16 * 80
    hours = chip_seconds / 3600
    assert used.chips == ("v6e",) and used.flops == 2e18
    assert gas.line(TWO[:-1], {}).flops == 2e18  # a task's FLOPs and seconds are no training
    assert used.hours == pytest.approx(hours)
    assert used.replayed == pytest.approx(8 * (2 + 48) / 3600)
    assert used.mfu == pytest.approx(2e18 / (918e12 * chip_seconds))
    assert used.usd == pytest.approx(hours * v6e["usd_hour"]["value"])
    assert used.usd_spot == pytest.approx(hours * v6e["usd_hour_spot"]["value"])
    assert used.kwh == pytest.approx([hours * v6e["watts"][k] / 1000 * pue for k in ("value", "low", "high")])
    assert used.co2_kg == pytest.approx([kwh * grid / 1000 for kwh in used.kwh])
    assert used.co2_kg_cci == pytest.approx(2 * v6e["cci"]["value"] / 1000)
    assert used.seconds == {"init": 22, "compile": 28, "data": 2, "step": 78, "eval": 20, "checkpoint": 10, "lost": 50}
    assert used.goodput == pytest.approx(78 / 210)
    twice = gas.total([used, used])
    assert (twice.hours, twice.flops, twice.mfu) == pytest.approx((2 * hours, 4e18, used.mfu))
    assert twice.kwh.high == pytest.approx(2 * used.kwh.high) and twice.seconds["lost"] == 100


def test_the_line_in_print():
    """3.4 h x 3600 x 918e12 x 0.41 = 4.6e18; x 2.70 = 9.2 and x 0.5442 = 1.9 dollars; x 0.3 kW x 1.1 = 1.1 kWh."""
    used = gas.line([session("TPU v6 lite", 1), train(1, 4.6e18, step=3.4 * 3600)], {})
    assert str(used) == (
        "gas: 4.6e18 model FLOPs (MFU 41 %) · 3.4 v6e chip-h · $9.2 on demand ($1.9 spot) · "
        "1.1 kWh (0.75-1.3, estimate) · 0.48 kgCO2e (0.32-0.56, us-central1, PUE 1.1)"
    )
    assert "(0.11 replayed)" in str(gas.line(TWO, {}))


def test_a_tpu7x_chip_shows_two_devices():
    used = gas.line([session("TPU7x", 8), train(1, 1e18, step=3600.0)], {})
    assert used.hours == 4 and used.peak == 4 * 3600 * 2307e12
    assert used.usd is None and "$ n/a" in str(used) and used.kwh.value > 0  # nobody tells its price


def test_an_unknown_chip_has_neither_price_nor_energy():
    lines = [session("NVIDIA RTX 4090", 2), train(1, 3e15, step=1800.0)]
    used = gas.line(lines, {})
    assert (used.mfu, used.usd, used.usd_spot, used.kwh, used.co2_kg, used.co2_kg_cci) == (None,) * 6
    assert str(used) == (
        "gas: 3.0e15 model FLOPs (MFU n/a) · 1 NVIDIA RTX 4090 device-h · $ n/a · n/a kWh · n/a kgCO2e · "
        "n/a: NVIDIA RTX 4090 is not in common/chips.json; a training run can name its chip with --config.chip"
    )
    assert gas.total([used, gas.line(TWO, {})]).usd is None  # a part is not the sum
    assert gas.line(lines, {}, chip="l4").usd > 0  # unless the config says what it is


def test_old_lines_take_their_devices_from_the_environment():
    environment = {"devices": {"kind": "TPU v4", "count": 4}}
    assert gas.line([train(1, 1e15, step=900.0)], environment).hours == 1
    assert gas.line([train(1, 1e15, step=900.0)], {}).hours is None
    assert str(gas.line([], {})).startswith("gas: n/a model FLOPs")


def test_measured_energy_beats_the_estimate():
    """Two boards of a mean 500 W for an hour are 1 kWh, and 1.1 with PUE."""
    lines = [session("NVIDIA H100 80GB HBM3", 2), train(1, 1e18, step=3600.0)]
    samples = {"gpu": [500.0 * 3500, 3500.0], "cpu": [9e9, 3500.0]}
    used = gas.line([lines[0], lines[1] | {"joules": samples}], {})
    assert used.kwh == pytest.approx((1.1, 1.1, 1.1)) and "1.1 kWh (measured)" in str(used)
    few = gas.line([lines[0], lines[1] | {"joules": {"gpu": [500.0 * 1000, 1000.0]}}], {})
    assert few.kwh.value == pytest.approx(2 * 0.7 * 1.1) and "estimate" in str(few)
    cpu = [session("cpu", 8), train(1, 1e12, step=3600.0) | {"joules": {"cpu": [3.6e5, 3600.0]}}]
    assert "$ n/a · 0.1 kWh (measured) · n/a kgCO2e" in str(gas.line(cpu, {}))


def test_a_run_adds_up(tmp_path):
    """On the CPU: FLOPs by the equations of the tiny shape, and seconds that are all of the wall time."""
    from train.main import run

    argv = [
        "--config=configs/sft/tiny.py", f"--workdir={tmp_path}", "--config.samples=()", "--config.eval_batches=1",
        "--config.data.seq_len=64", "--config.model.vocab_size=512", "--config.log_every=2", "--config.steps=4",
    ]  # fmt: skip
    began = time.perf_counter()
    assert run(schema.load(argv)) == 0
    wall = time.perf_counter() - began
    lines = list(read(tmp_path / "metrics.jsonl"))
    done = lines[-1]
    layers = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    token = 6 * layers + 3 * 4 * 2 * 64 * (64 + 1) / 2
    used = gas.line(lines, {})
    assert used.flops == pytest.approx(done["tokens"] * token + done["targets"] * 6 * 64 * 512)
    assert sum(used.seconds.values()) == pytest.approx(wall, rel=0.03)
    assert used.seconds["lost"] == 0 and used.seconds["other"] < 0.1 * wall
    assert used.hours == pytest.approx(sum(used.seconds.values()) / 3600) and used.usd is None
    assert done["gas"]["hours"] == pytest.approx(used.hours) and done["gas"]["flops"] == used.flops


def test_the_report_has_a_box_for_each_run_and_their_sum(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(x | {"time": 0}) + "\n" for x in TWO))
    path = report.write([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html")
    page = path.read_text()
    assert page.count("0.64 v6e chip-h") == 2 and "1.3 v6e chip-h" in page and "goodput: 37 % of 210 s" in page
    assert "all runs: gas: 4.0e18" in path.with_suffix(".md").read_text()


# --- power ---


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A script of that name, first on the PATH."""

    def make(body: str) -> Path:
        script = tmp_path / "bin" / "nvidia-smi"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
        return tmp_path

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


def package(root: Path, name: str, microjoules: int) -> Path:
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "energy_uj").write_text(f"{microjoules}\n")
    (root / name / "max_energy_range_uj").write_text("262143328850\n")
    return root / name


def test_boards_are_sampled_in_a_thread(nvidia_smi):
    nvidia_smi('[ "$1" = --query-gpu=power.draw ] && printf "100.00\\n300.00\\n"')
    power = Power("/nowhere", interval=0.01)
    end = time.monotonic() + 20
    while power.joules()["gpu"][1] < 0.1 and time.monotonic() < end:
        time.sleep(0.01)
    power.close()
    joules, seconds = power.joules()["gpu"]
    assert seconds >= 0.1 and joules == pytest.approx(200 * seconds, abs=2)
    assert "cpu" not in power.joules()


def test_only_the_visible_boards_are_read(nvidia_smi, monkeypatch):
    root = nvidia_smi('echo "$@" > "$0.args"; echo 50')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    Power("/nowhere").close()
    assert (root / "bin/nvidia-smi.args").read_text().endswith("-i 2,3\n")


@pytest.mark.parametrize("body", ["echo '[N/A]'", "exit 9", "true"])
def test_boards_that_do_not_tell_are_not_measured(nvidia_smi, body):
    nvidia_smi(body)
    assert Power("/nowhere").joules() == {}


def test_packages_are_read_once_each_and_wrap_around(tmp_path, nvidia_smi):
    nvidia_smi("exit 1")
    package(tmp_path, "intel-rapl:0", 1_000_000)
    package(tmp_path, "intel-rapl:1", 262_143_000_000)
    package(tmp_path, "intel-rapl:0:0", 5)  # the cores, part of package 0
    power = Power(tmp_path, interval=60)
    package(tmp_path, "intel-rapl:0", 8_000_000)
    package(tmp_path, "intel-rapl:1", 671_150)
    package(tmp_path, "intel-rapl:0:0", 5_000_000)
    power.sample()
    power.close()
    assert power.joules()["cpu"][0] == 8.0  # 7 + (262143328850 - 262143000000 + 671150) / 1e6
    (tmp_path / "intel-rapl:1/energy_uj").unlink()
    power.sample()  # not readable any more: what is known stays
    assert power.joules()["cpu"][0] == 8.0


def test_joules_stand_in_the_lines(tmp_path, nvidia_smi, capsys):
    nvidia_smi("echo 100")
    path = tmp_path / "metrics.jsonl"
    for restored in (0, 1):
        with Metrics(path, 2) as m:
            m.rewind(restored)
            with m.timer("step"):
                time.sleep(0.2)
            m.write(restored + 1, "train", flops=1.0)
            m.end("done")
    first, *_, last = [line["joules"]["gpu"] for line in read(path) if "joules" in line]
    assert first[0] == 0 and last[0] == pytest.approx(100 * last[1], abs=1) and last[1] >= 0.2
    assert [line["joules"]["gpu"][1] >= 0.2 for line in read(path) if line.get("lost_steps") == 0] == [True]
    assert capsys.readouterr().out.count("gas: 1.0e00") == 2
