"""Sampled answers, rewards, judges and the router: from prompts to what people are asked and what their labels buy."""

import json

import pytest

from common.errors import UserError
from evals import answers
from infer.models import load
from model.io.export import export_hf
from tests.cases import people
from tests.helpers.adapters import make
from tools import sample_pairs


def rows(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def lines(path):
    return list(map(json.loads, path.read_text().split("\n")[:-1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with a chat template."""
    path = tmp_path_factory.mktemp("people") / "model"
    model, params, _ = make()
    export_hf(model, params, people.tokenizer(), path, check=False)
    return path


# --- prompts and answers ---

HH = "\n\nHuman: Q\n\nAssistant:"
ASKED = (
    ({"prompt": "Q"}, "Q"),
    ({"question": "Q", "answer": "A"}, "Q"),
    ({"instruction": "Q", "input": "I", "output": "A"}, [{"role": "user", "content": "Q\n\nI"}]),
    ({"messages": [people.U, people.A]}, [people.U]),
    ({"messages": [people.S, people.U]}, [people.S, people.U]),
    (
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
        "\n\nHuman: Q\n\nAssistant:",
    ),
    ({"text": "Q"}, "Q"),
)


def test_prompts_of_every_shape(tmp_path):
    source = rows(tmp_path / "x.jsonl", *(record for record, _ in ASKED))
    assert [prompt for _, prompt, _ in answers.prompts(source)] == [prompt for _, prompt in ASKED]
    with pytest.raises(UserError, match=r"y.jsonl.*the row has no prompt"):
        list(answers.prompts(rows(tmp_path / "y.jsonl", {"a": 1})))


def test_sampled_items_are_the_same_after_a_kill(folder, tmp_path, capsys):
    source = rows(tmp_path / "prompts.jsonl", *({"prompt": f"{i}+1="} for i in (*range(20), 3)))
    command = [f"--prompts={source}", f"--models={folder}", "--max_new_tokens=4", "--temperature=4"]
    assert sample_pairs.main([*command, f"--out={tmp_path}/a.jsonl"]) == 0
    whole = (tmp_path / "a.jsonl").read_bytes()
    items = lines(tmp_path / "a.jsonl")
    assert len(items) == 20 and all(len({a["text"] for a in item["answers"]}) == 2 for item in items)
    drawn = load(folder).generate([[{"role": "user", "content": "0+1="}]] * 2, max_new_tokens=4, temperature=4.0)
    assert [a["text"] for a in items[0]["answers"]] == drawn
    for kept in (0, 200, len(whole) - 5, len(whole)):
        (tmp_path / "b.jsonl").write_bytes(whole[:kept])
        assert sample_pairs.main([*command, f"--out={tmp_path}/b.jsonl"]) == 0
        assert (tmp_path / "b.jsonl").read_bytes() == whole
    assert sample_pairs.main([*command, "--seed=1", f"--out={tmp_path}/b.jsonl"]) == 2
    assert "something else than answers of these models" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, problem",
    [
        (["--models=a,b,c"], "one or two"),
        (["--models=a,b", "--answers=3"], "an even number"),
        (["--temperature=0"], "equal at temperature 0"),
        (["--prompts=nothing.jsonl"], "no such source"),
    ],
)
def test_settings_of_sampling_are_checked_first(more, problem, tmp_path, capsys):
    source = rows(tmp_path / "x.jsonl", {"prompt": "Q"})
    assert sample_pairs.main([f"--prompts={source}", "--models=m", f"--out={tmp_path}/o", *more]) == 2
    assert problem in capsys.readouterr().err
