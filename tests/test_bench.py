"""The bench measures: one round on a tiny model, ours alone."""

import json
from pathlib import Path

import jax
import pytest

from data.text.formats import load
from model.io.export import export_hf
from tests.helpers.models import tiny
from tools.bench import __main__ as bench
from tools.bench import ours
from tools.bench.worker import asked


@pytest.mark.slow
def test_one_round(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # one device
    model = tiny()
    params = model.init(jax.random.key(0))
    export_hf(model, params, load("bytes"), tmp_path / "model", check=False)
    out = tmp_path / "bench.json"
    argv = [f"--model={tmp_path / 'model'}", f"--out={out}", "--rounds=1", "--alone"]
    argv.append("--what=train,sft,decode,adapters")
    assert bench.main(argv) == 0
    result = json.loads(out.read_text())
    assert result["machine"]["cores"] and result["machine"]["versions"]["jax"]
    titles = [contest["title"] for contest in result["contests"]]
    assert len(titles) == 7 and titles[-1] in capsys.readouterr().out
    for contest in result["contests"]:
        for side in contest["sides"]:
            assert side["tokens_per_second"] > 0 and side["peak_bytes"] > 1e7
        assert contest["sides"][0]["ratio"]["tokens_per_second"] == 1


def test_every_method_takes_part():
    """Every file of model/peft, found by itself, but the one that reads an adapter of a folder."""
    training, contest = bench.methods("tiny", "", "")
    found = {side.case["peft"] for side in contest.sides[2:]}
    assert found == {p.stem for p in Path("model/peft").glob("[!_]*.py")} - {"saved"} and len(found) > 6
    assert {side.case["peft"] for side in training.sides} == {"", *found}


@pytest.mark.parametrize("merged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_round_with_an_adapter(tmp_path, merged):
    model = tiny()
    export_hf(model, model.init(jax.random.key(0)), load("bytes"), tmp_path / "model", check=False)
    run = ours.decode(str(tmp_path / "model"), 2, 4, 3, "float32", peft="ia3", merged=merged)
    assert run()["tokens"] == 4


def test_a_round_with_quantized_weights(tmp_path):
    model = tiny()
    export_hf(model, model.init(jax.random.key(0)), load("bytes"), tmp_path / "model", check=False)
    run = ours.decode(str(tmp_path / "model"), 2, 4, 3, "float32", quant={"name": "int8", "activations": True})
    assert run()["tokens"] == 4


def test_a_round_of_questions_behind_the_same_examples(tmp_path):
    model, data = tiny(), tmp_path / "rows.jsonl"
    export_hf(model, model.init(jax.random.key(0)), load("bytes"), tmp_path / "model", check=False)
    data.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f" {i}\nmore"}) + "\n" for i in range(9)))
    texts = asked(str(data), questions=3, shots=2)
    assert texts[0] == "0?0\n\n1?1\n\n2?" and len(texts) == 3
    run = ours.ask(str(tmp_path / "model"), str(data), 3, 2, new_tokens=2, rows=2, shared=True, dtype="float32")
    assert run()["tokens"] == sum(map(len, texts))


def test_questions_are_instructions_of_this_python():
    rows = bench.questions(limit=20)
    assert len(rows) >= 20
    assert all(row["prompt"].startswith("What does the function") and row["completion"] for row in rows)
