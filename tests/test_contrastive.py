"""Tuning an embedder: the loss by hand, and from a file of matches to an index that takes the tuned embedder or not."""

import json

import numpy as np
import pytest

from data.examples import Match, Text
from data.text import formats as tokenizers
from infer import embed
from tests.helpers.encoders import encoder
from tools import index as command
from train.main import main as train
from train.objectives import contrastive


def test_the_loss_by_hand():
    """Logits 2 0 | 1 1 with all negatives: ln(1 + e^-2) and ln 2; a copy of the own passage is no negative."""
    logits = np.array([[2.0, 0.0], [1.0, 1.0]])
    found = contrastive.info_nce(logits, ~np.eye(2, dtype=bool), np.array([True, True]))
    assert float(found["loss"][0]) == pytest.approx(np.log(1 + np.exp(-2)) + np.log(2)) and found["loss"][1] == 2
    assert float(found["accuracy"][0]) == 1 and float(found["mrr"][0]) == 1.5  # equals do not count as found
    alone = contrastive.info_nce(logits, np.zeros((2, 2), bool), np.array([True, False]))
    assert float(alone["loss"][0]) == 0 and alone["loss"][1] == 1


def test_copies_and_empty_rows_are_no_negatives():
    side = lambda *rows: {"tokens": np.array(rows), "segments": (np.array(rows) > 0).astype(int)}
    found = contrastive.negatives(side([1, 2], [1, 2], [3, 0], [0, 0]), side([5], [6], [5], [0]))
    assert np.array(found).astype(int).tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0]]


def test_a_match_is_read_as_the_embedder_reads_it(tmp_path):
    tokenizer = tokenizers.load(encoder(tmp_path))
    found = Match(Text("the rain in spain"), Text("rain"))
    ids = [document.ids for document in found.documents(tokenizer, iter(()))]
    assert ids == tokenizer.encode_inputs(["the rain in spain", "rain"], 99) and ids[1][0] == 1 and ids[1][-1] == 2


WORDS = ("the", "rain", "in", "spain", "query")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A tiny encoder, documents of two words each, and a run that learns to find them by their words in reverse."""
    root = tmp_path_factory.mktemp("tuned")
    (root / "base").mkdir()
    encoder(root / "base")
    pairs = [(a, b) for a in WORDS for b in WORDS if a != b]
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    (root / "docs.jsonl").write_text(lines({"text": f"{a} {b}"} for a, b in pairs))
    (root / "pairs.jsonl").write_text(lines({"query": f"{b} {a}", "passage": f"{a} {b}"} for a, b in pairs) * 4)
    asked = [{"question": f"{b} {a}", "documents": [f"{root}/docs.jsonl:{i}"]} for i, (a, b) in enumerate(pairs, 1)]
    (root / "questions.jsonl").write_text(lines(asked))
    run = ["--config=configs/embed/own_documents.py:file=" + str(root / "pairs.jsonl"), f"--workdir={root / 'run'}"]
    run += [f"--config.init={root / 'base'}", "--config.data.seq_len=8", "--config.data.batch_size=16"]
    run += ["--config.epochs=0", "--config.steps=60", "--config.optim.lr=1e-2", "--config.eval_every=0"]
    assert train([*run, "--config.floors=()", f"--config.data.cache={root / 'cache'}"]) == 0
    return root


def test_a_run_is_an_embedder(tuned):
    """With the pooling and the prompts of its base; its vectors have moved."""
    base, found = embed.load(tuned / "base"), embed.load(tuned / "run")
    assert (found.pooling, found.longest, found.prompts) == (base.pooling, base.longest, base.prompts)
    assert np.abs(found.embed(["rain in"]) - base.embed(["rain in"])).max() > 1e-2
    lines = [json.loads(line) for line in (tuned / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]


def test_an_embedder_replaces_another_only_if_it_is_better(tuned, capsys):
    """The tuned one is; the way back is refused with the figure, and the index stays."""
    place = [f"--index={tuned / 'index'}", f"--documents={tuned / 'docs.jsonl'}"]
    asked, run, base = (
        f"--questions={tuned / 'questions.jsonl'}",
        f"--embedder={tuned / 'run'}",
        f"--embedder={tuned / 'base'}",
    )
    assert command.main([*place, run]) == 2
    assert "must first be compared with another one" in capsys.readouterr().err
    assert command.main([*place, base]) == 0
    assert command.main([*place, run]) == 2
    assert "--questions=FILE" in capsys.readouterr().err
    assert command.main([*place, run, asked]) == 0
    assert "is better: nDCG@10 " in capsys.readouterr().out
    before = (tuned / "index/index.json").read_bytes()
    assert command.main([*place, base, asked]) == 2
    err = capsys.readouterr().err
    assert "not better: nDCG@10 " in err and err.count("\n") == 1
    assert (tuned / "index/index.json").read_bytes() == before
    assert command.main([*place, run]) == 0  # an update keeps the embedder


def test_a_temperature_of_0_is_refused():
    with pytest.raises(ValueError, match="must be above 0"):
        contrastive.make(None, temperature=0.0)
