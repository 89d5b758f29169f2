"""What a sweep's page shows of the size of adapters: held-out loss and forgetting, by rank and by parameters."""

import csv
import json
import re

import pytest

from configs import schema
from configs.peft import rank_sweep
from tools.sweep import __main__ as sweep
from tools.sweep import page as sweep_page
from tools.sweep.page import Group, Result, sizes


def test_the_config_yields_every_rank_and_full_tuning():
    points = list(rank_sweep.sweep())
    assert {(p["peft.name"], p.get("peft.rank")) for p in points} == {
        ("", None), *((m, r) for m in rank_sweep.METHODS for r in rank_sweep.RANKS)
    }  # fmt: skip
    assert len(points) == 2 * 4 * 3 + 3


def result(name, lr, value, *, rank, trained, forgetting):
    values = {"peft.name": name, "peft.rank": rank, "optim.lr": lr}
    return Result(f"{name}{rank}{lr}", values, "done", 9, value, 0.0, name or "full", rank, trained, forgetting)


def test_a_size_has_its_best_learning_rate():
    """Of LoRA's two at rank 1 the better one counts, with what it forgot; full tuning has no rank."""
    rows = [
        result("lora", 1e-3, 2.0, rank=1, trained=100, forgetting=0.1),
        result("lora", 1e-2, 1.0, rank=1, trained=100, forgetting=0.3),
        result("lora", 1e-3, 0.5, rank=4, trained=400, forgetting=0.4),
        result("", 1e-3, 0.4, rank=None, trained=9000, forgetting=0.9),
    ]
    ranked = [Group(r.setting, r.value, None, None, 1) for r in sorted(rows, key=lambda r: r.value)]
    charts = sizes(rows, ranked, "eval/nll")
    labels = [re.search(r'aria-label="([^"]+)"', chart)[1] for chart in charts]
    assert labels == [
        "eval/nll by rank: lora", "forgetting, nats per token of general text by rank: lora",
        "eval/nll by trained parameters: lora, full",
        "forgetting, nats per token of general text by trained parameters: lora, full",
    ]  # fmt: skip
    assert [chart.count("<circle") for chart in charts] == [2, 2, 3, 3]
    assert not sizes(rows[:2], ranked[2:], "eval/nll")  # one size: nothing to compare


@pytest.mark.slow
def test_a_sweep_measures_quality_and_forgetting(tmp_path):
    """A real base, three points of the config at four steps each."""
    from train.main import run

    base, out, file = tmp_path / "base", tmp_path / "out", tmp_path / "points.py"
    small = [f"--config.data.cache={tmp_path}/cache", "--config.eval_batches=1", "--config.log_every=1"]
    argv = ["--config=configs/pretrain/tiny.py", f"--workdir={base}", "--config.steps=8", "--config.model.shape=tiny"]
    argv += ["--config.data.tokenizer=bytes", "--config.samples=()", *small]
    assert run(schema.load(argv)) == 0
    file.write_text(
        "from configs.peft.rank_sweep import get_config\n"
        "def sweep():\n"
        "    yield from [{'peft.rank': 1}, {'peft.rank': 8}, {'peft.name': ''}]\n"
    )
    argv = [f"--config={file}", f"--out={out}", "--config.steps=4", f"--config.init={base}", *small]
    assert sweep.main(argv) == 0
    rows = {row["trained"]: row for row in csv.DictReader((out / "results.csv").open())}
    weights = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    lora = [str(2 * sum(rank * (i + o) for i, o in weights)) for rank in (1, 8)]
    assert len(rows) == 3 and set(lora) < set(rows)
    for row in rows.values():
        lines = map(json.loads, (out / row["point"] / "metrics.jsonl").read_text().splitlines())
        known = [line["text_nll"] for line in lines if line["kind"] == "eval"]
        assert len(known) == 2 and known[0] != known[1]
        assert float(row["forgetting"]) == pytest.approx(known[1] - known[0])
    page = sweep_page.write(out, "eval/nll", False).read_text()
    assert page.split("<h2>Effect of the size")[1].count("<figure>") >= 4
