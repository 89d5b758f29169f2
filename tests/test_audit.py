"""tools.compare.audit: what cheaper ways to choose would have chosen, on a record made by hand."""

import pytest

from common.errors import UserError
from tools.compare import audit
from tools.compare.record import Record

N = 100


def result(right: int, n: int) -> dict:
    scores = [1.0] * right + [0.0] * (n - right)
    return {"mean": right / n, "n": n, "scores": scores, "rows": list(map(str, range(n))), "task_hash": "h", "flops": n}


def method(name: str, right: int, candidate: str) -> dict:
    tests = [{"seed": 0, "result": result(right, N), "text": None, "trained_before": True}]
    return {
        "name": name, "model": "m", "label": name, "how": "", "status": "tested", "why": "", "candidate": candidate,
        "documents": False, "trained": name in ("lora", "full"), "tests": tests, "spent": {},
    }  # fmt: skip


def candidate(name: str, method: str, rungs: list[int], flops: float) -> dict:
    """A candidate that got `rungs` of 50 validation rows right; training costs `flops` per row."""
    return {
        "id": name, "method": method, "model": "m", "label": name, "settings": {},
        "rungs": [
            {"rung": i, "result": result(right, 50), "flops": flops * rows, "seconds": 1.0}
            for i, (right, rows) in enumerate(zip(rungs, (30, 90, 270), strict=True))
        ],
    }  # fmt: skip


@pytest.fixture
def record() -> Record:
    """LoRA is the best in the end, and few-shot on the first rung; full tuning costs five times as much as LoRA."""
    return Record(
        task={"name": "t", "hash": "h", "scorer": "exact", "rows": {"train": 270, "validation": 50, "test": N}},
        models=["m"], documents=None, requests=1.0, seeds=[0], epochs=1.0,
        rungs=[{"share": s, "train": rows, "rows": 50} for s, rows in ((1 / 9, 30), (1 / 3, 90), (1, 270))],
        methods_asked=["zero_shot", "few_shot", "lora", "full"],
        budget={"asked": "all", "flops": None, "rate": None, "rate_from": ""},
        machine={"name": "cpu", "devices": 1, "chip": None}, prices=[],
        candidates=[
            candidate("zero_shot", "zero_shot", [5, 5, 5], 0), candidate("few_shot", "few_shot", [25, 25, 25], 0),
            candidate("lora:lr=1", "lora", [5, 10, 20], 10), candidate("lora:lr=2", "lora", [20, 35, 45], 10),
            candidate("full", "full", [10, 30, 46], 50),
        ],
        methods=[
            method("zero_shot", 10, "zero_shot"), method("few_shot", 50, "few_shot"), method("lora", 90, "lora:lr=2"),
            method("full", 88, "full"),
        ],
    )  # fmt: skip


def test_ways_choose_and_cost_what_is_worked_out_by_hand(record):
    found = {way.name: way for way in audit.ways(record)}
    total = 2 * 10 * 390 + 50 * 390 + 5 * 3 * 50  # training FLOPs of three settings, and 50 validation rows each
    assert {name: way.candidate for name, way in found.items()} == {
        "rule": "lora:lr=1", "zero-shot": "zero_shot", "pilot": "few_shot", "halving": "lora:lr=2", "all": "lora:lr=2",
    }  # fmt: skip
    assert found["rule"].gas == pytest.approx(2700 / total) and found["zero-shot"].gas == 0
    assert found["pilot"].gas == pytest.approx((2 * 300 + 1500 + 250) / total) and found["all"].gas == 1
    assert found["halving"].gas <= 0.25
    assert found["pilot"].difference == pytest.approx(-0.4) and not found["pilot"].close
    # lr=1 was not tested: 90 % less the 25 of 50 validation rows that lr=2 gets right and it does not
    assert found["rule"].estimated and found["rule"].score == pytest.approx(0.9 - 0.5)
    assert found["rule"].low < -0.5 < found["rule"].high and not found["rule"].close
    assert found["halving"].difference == 0 and found["halving"].close


def test_few_rows_are_for_prompts_and_documents_for_retrieval(record):
    record.task["rows"]["train"] = 49
    assert {way.name: way.candidate for way in audit.ways(record)}["rule"] == "few_shot"
    record.task["rows"]["train"], record.documents = 270, "wiki"
    with pytest.raises(UserError, match="no method 'rag'"):
        audit.ways(record)


def test_other_comparisons_are_refused(record, tmp_path, capsys):
    record.budget["asked"] = "1e15"
    record.save(tmp_path)
    assert audit.main([str(tmp_path)]) == 2
    assert "repeat it with --budget=all" in capsys.readouterr().err
    assert audit.main([str(tmp_path / "none")]) == 2


def test_the_command_prints_and_writes(record, tmp_path, capsys):
    record.save(tmp_path)
    assert audit.main([str(tmp_path), f"--out={tmp_path / 'audit.json'}"]) == 0
    out = capsys.readouterr().out
    assert "halving: as good as all on 1 of 1 tasks (at most 2 points worse" in out and "(estimate)" in out
    assert '"close": true' in (tmp_path / "audit.json").read_text()


def test_a_rung_is_skipped_if_the_best_method_could_otherwise_not_be_trained_on_all_rows(record):
    """LoRA needs 350, 950 and 2,750 FLOPs in the three rungs, and the two prompts 100 in the first."""
    record.candidate("lora:lr=1")["rungs"][0]["result"] = result(40, 50)
    for budget, entered in (4150, ["lora:lr=1"]), (4149, []):
        replay = audit.Replay(record, budget)
        assert replay.choose() == "lora:lr=1" and replay.r.spent["flops"] == 3200 + 950 * len(entered)
        assert replay.r.decisions[1]["entered"] == entered
        assert replay.r.decisions[2]["entered"] == ["lora:lr=1"]
