"""Retrieval: chunks, BM25 and fusion by hand, an index that is resumed and brought up to date, its measures."""

import json

import numpy as np
import pytest

from common.errors import UserError
from evals import retrieval
from infer.retrieve import chunks, index, search
from tests.helpers.encoders import encoder as make_encoder
from tools import index as command


def test_a_document_is_cut_at_headings_paragraphs_and_sentences():
    text = "Intro here.\n\n# One\n\na b c d\n\ne f\n\n## Deep ##\nA b. C d! E f g h i j k l.\n# Two\nz"
    assert list(chunks.split(text, "Doc", 6)) == [
        ("Doc", "Intro here."),
        ("Doc · One", "a b c d\ne f"),
        ("Doc · One · Deep", "A b.\nC d!"),
        ("Doc · One · Deep", "E f g h i j"),
        ("Doc · One · Deep", "k l."),
        ("Doc · Two", "z"),
    ]
    assert list(chunks.split("  \n\n")) == []


def test_every_word_is_in_one_chunk():
    text = "\n\n".join(" ".join(f"w{i}_{j}" for j in range(i * 7 % 41)) for i in range(30))
    found = [part for _, part in chunks.split(text, words=12)]
    assert " ".join(found).split() == text.split() and max(len(part.split()) for part in found) <= 12


@pytest.mark.parametrize("method, want", [("lucene", 0.719875), ("robertson", 0.374918), ("atire", 2.015802)])
def test_bm25_by_hand(method, want):
    """Three sentences and "windy london" of rank_bm25's issue 43."""
    sentences = ["Hello there good man!", "It is quite windy in London", "How is the weather today?"]
    found = search.Words(sentences, method).scores("windy London")
    np.testing.assert_allclose(found, [0, want, 0], rtol=1e-5)


def test_a_question_without_a_known_word_scores_nothing():
    assert search.Words(["a b", "c"]).scores("?!").tolist() == [0, 0]


def test_fusion_by_hand():
    """Ranks 1 2 3 and 3 1 2; scores 4 2 0 and -1 1 0, scaled to 1 .5 0 and 0 1 .5."""
    parts = [np.array([4.0, 2.0, 0.0]), np.array([-1.0, 1.0, 0.0])]
    np.testing.assert_allclose(search.fuse(parts, "rrf"), [1 / 61 + 1 / 63, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62])
    np.testing.assert_allclose(search.fuse(parts, "mean"), [0.5, 0.75, 0.25])
    np.testing.assert_allclose(search.fuse([np.zeros(2), np.array([1.0, 3.0])], "mean"), [0, 0.5])


def test_blocks_and_ties(monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 3)
    vectors = np.eye(8, dtype=np.float16)
    np.testing.assert_array_equal(search.cosines(vectors, np.arange(8, dtype=np.float32)), np.arange(8))
    assert search.best(np.array([1.0, 3, 3, 2, 3]), 3).tolist() == [1, 2, 4]
    assert search.best(np.array([1.0]), 5).tolist() == [0] and search.best(np.zeros(0), 5).size == 0


def test_measures_by_hand():
    """The relevant documents come 1st, 3rd and not at all; gains 3 2 3 0 1 2 give nDCG .96081 with linear gains."""
    ranked, relevant = ["a", "x", "b"], {"a": 1.0, "b": 1.0, "c": 1.0, "x": 0.0}
    assert retrieval.recall(ranked, relevant, 1) == pytest.approx(1 / 3)
    assert retrieval.recall(ranked, relevant, 3) == pytest.approx(2 / 3)
    assert retrieval.reciprocal_rank(["x", "b"], relevant, 10) == 0.5
    assert retrieval.reciprocal_rank(["x", "b"], relevant, 1) == 0.0
    gains = dict(zip("abcdef", (3, 2, 3, 0, 1, 2), strict=True))
    assert retrieval.ndcg(list("abcdef"), gains, 6) == pytest.approx(0.96081, abs=1e-5)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def documents(tmp_path):
    rows = [{"title": "Spain", "text": "the rain in spain"}, {"title": "", "text": "in the query"}]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "docs.jsonl"


def test_an_index_is_searched_by_words_and_by_meaning(documents, encoder, tmp_path):
    made = index.build(str(documents), tmp_path / "index", str(encoder))
    assert made["chunks"] == 2
    found = index.Index(tmp_path / "index")
    assert found.vectors.dtype == np.float16 and found.record["injections"] == 0
    tokens = sum(map(len, found.embedder.encode(["rain", "in the rain"])))  # 2 layers of D = 16 and an MLP of 24
    assert found.flops(["rain", "in the rain"]) == tokens * 2 * 2 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 2 * 2 * 16
    assert found.flops(["rain"], "bm25") == 0
    best = found.search(["rain", "query"], 1, "bm25")
    assert [hit[0].chunk.document.rpartition(":")[2] for hit in best] == ["1", "2"]
    assert found.search(["zebra"], 2, "bm25") == [[]]
    scores = found.vectors.astype(np.float32) @ found.embedder.embed(["rain"], "query")[0]
    hits = found.search(["rain"], 2, "dense")[0]
    np.testing.assert_allclose([hit.score for hit in hits], sorted(scores, reverse=True), rtol=1e-6)
    assert {len(hits) for hits in found.search(["rain"], 2) + found.search(["rain"], 2, "rrf")} == {2}


def test_a_killed_build_goes_on_and_a_changed_source_costs_only_its_change(documents, encoder, tmp_path, monkeypatch):
    asked = []

    def counting(model, texts, prompt=""):
        asked.extend(texts)
        if len(asked) > 4:
            raise KeyboardInterrupt
        return real(model, texts, prompt)

    real = index.Embedder.embed
    monkeypatch.setattr(index.Embedder, "embed", counting)
    monkeypatch.setattr(index, "PART", 1)
    build = lambda: index.build(str(documents), tmp_path / "index", str(encoder))
    with pytest.raises(KeyboardInterrupt):
        build()  # three texts for the digest, one chunk, and the next one is not reached
    assert not (tmp_path / "index").exists() and len(list((tmp_path / "index.parts").iterdir())) == 1
    asked.clear()
    build()
    assert asked[3:] == ["in the query"] and not (tmp_path / "index.parts").exists()
    before = np.load(tmp_path / "index/vectors.npy")
    asked.clear()
    build()
    assert len(asked) == 3
    with documents.open("a") as file:
        file.write('{"title": "new", "text": "rain"}\n')
    asked.clear()
    assert build()["chunks"] == 3
    assert asked[3:] == ["new\nrain"]
    np.testing.assert_array_equal(index.Index(tmp_path / "index").vectors[:2], before)


def test_the_command(documents, tmp_path, capsys):
    place = f"--index={tmp_path / 'index'}"
    assert command.main([place, f"--documents={documents}", "--ask=rain"]) == 0
    out = capsys.readouterr().out
    assert "2 chunks" in out and "docs.jsonl:1\nSpain\nthe rain in spain" in out
    rows = [{"question": "rain", "documents": [f"{documents}:{line}"]} for line in (1, 2)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command.main([place, f"--questions={tmp_path / 'questions.jsonl'}", "--k=1"]) == 0
    assert "recall@1 0.500" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--index=nowhere"], "there is nothing to do"),
        (["--index=nowhere", "--ask=x"], "nowhere · there is no index here"),
        (["--index=x", "--ask=x", "--k=0"], "the values must be positive"),
        (["--index={docs}", "--documents={docs}"], "the folder exists and is not an index"),
        (["--index={tmp}/i", "--documents={docs}", "--ask=x", "--how=dense"], "has no vectors for 'dense'"),
        (["--index={tmp}/i", "--documents={bad}"], "the record has no text"),
    ],
)
def test_misuse_is_one_line(argv, message, documents, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"x": 1}\n')
    where = dict(tmp=tmp_path, docs=documents, bad=tmp_path / "bad.jsonl")
    assert command.main([arg.format(**where) for arg in argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_another_embedder_in_its_place_is_refused(documents, encoder, tmp_path, monkeypatch):
    index.build(str(documents), tmp_path / "index", str(encoder))
    monkeypatch.setattr(index, "digest", lambda _: "other")
    with pytest.raises(UserError, match="have changed since it computed the vectors"):
        index.Index(tmp_path / "index").search(["rain"])
