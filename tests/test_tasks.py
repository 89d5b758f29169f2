"""Tasks that are files: rows, scorers, splits, pairs of results, and rows that training has read."""

import gzip
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from common.errors import UserError
from data import dataset, sources
from data.text import formats as tokenizers
from data.text.tokenizer import DEFAULT_TEMPLATE
from evals import main, overlap, paired, rows, scorers, task
from evals.scorers import number, rouge_l, set_f1

FRUIT = ("apple", "fig", "pear")


def write(path: Path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def fruits(path: Path, n: int = 60) -> str:
    return write(path, *({"question": f"Fruit {i}?", "answer": FRUIT[i % 3], "kind": i % 2} for i in range(n)))


# --- scorers ---


@pytest.mark.parametrize(
    ("name", "answer", "reference", "score"),
    [
        ("exact", "The  Cat!", "cat", 1),
        ("exact", "a black cat", "cat", 0),
        ("contains", "It is Paris.", "paris", 1),
        ("contains", "comparison", "paris", 0),
        ("contains", "", "the", 1),
        ("number", "16 - 3 = 13, so she has $1,018.50 left.", "#### 1018.5", 1),
        ("number", "#### 18 dollars, not 5", "18", 1),
        ("number", "none", "18", 0),
        ("choice", "fig ", "fig", 1),
        ("token_f1", "the cat sat", "cat sat down", 0.8),
        ("token_f1", "", "", 1),
        ("set_f1", "Red, green and blue", '["blue", "red"]', 0.8),
        ("regex", "on 2026-01-05.", r"\b\d{4}-\d\d-\d\d\b", 1),
        ("json", '```json\n{"a": 1, "b": {"c": " x"}}\n```', '{"a": 1.0, "b": {"c": "x", "d": 2}}', 0.8),
        ("json", "{}", "{}", 1),
        ("json", "no object {", '{"a": true}', 0),
        ("json", '{"a": 1}', '{"a": true}', 0),
        ("rouge_l", "police kill the gunman", "police killed the gunman", 0.75),  # Lin 2004, section 3
        ("rouge_l", "the gunman kill police", "police killed the gunman", 0.5),
        ("rouge_l", "a b c d e", "a c e", 0.75),  # 3 common: 2 * 3 / (5 + 3)
    ],
)
def test_scorer(name, answer, reference, score):
    assert scorers.find(name)(answer, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3-4=-1", -1), ("1,234.50 pears", 1234.5), ("1e3", 1000), ("3.", 3), (".5", 0.5), ("12,34", 34), ("x2", None)],
)
def test_the_number_of_a_text(text, value):
    assert number.value(text) == value


def test_common_subsequence_equals_the_table():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(12))] for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(b)):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        assert rouge_l.common(a, b) == table[-1, -1]


def test_every_scorer_is_right_about_itself():
    for name in scorers.known():
        score, text = scorers.find(name), '{"a": 7}'
        assert score(text, "7" if name in ("number", "regex") else text) == 1, name
    assert set_f1.items("b; a") == {"b"}  # articles are no items
    with pytest.raises(UserError, match="did you mean number"):
        scorers.find("numbr")


# --- rows ---


def only(path: Path, record: dict, options: str = "") -> dict:
    """The one row of a task with ten rows like a record."""
    spec = write(path / "one.jsonl", *([record] * 10)) + ":split=all" + options
    return task.load(spec).examples("heldout")[0]


TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A b c"},
]


@pytest.mark.parametrize(
    ("record", "options", "prompt", "references"),
    [
        ({"prompt": "Q", "completion": "A b c"}, "", "Q", ["A b c"]),
        ({"question": "Q", "answers": ["A", "B"]}, ":scorer=exact", "Q", ["A", "B"]),
        ({"question": "Q", "answers": {"text": ["A", "B"], "answer_start": [0, 1]}}, ":scorer=exact", "Q", ["A", "B"]),
        ({"question": "Q", "answers": {"text": []}}, ":scorer=exact", "Q", [""]),
        ({"question": "Q", "answer": 42}, ":scorer=exact", "Q", ["42"]),
        ({"question": "Q", "answer": ["x", "y"]}, ":scorer=set_f1", "Q", ['["x", "y"]']),
        ({"question": "Q", "answer": {"a": 1}}, ":scorer=json", "Q", ['{"a": 1}']),
        ({"text": "Q", "label": "yes"}, ":scorer=exact", "Q", ["yes"]),
        ({"frage": "Q", "antwort": "A"}, ":prompt=frage:completion=antwort:scorer=exact", "Q", ["A"]),
        ({"instruction": "Q", "input": "I", "output": "A"}, ":scorer=exact",
         [{"role": "user", "content": "Q\n\nI"}], ["A"]),
        ({"messages": TURNS}, ":scorer=exact", TURNS[:2], ["A b c"]),
        ({"messages": TURNS[:2], "answer": "A"}, ":scorer=exact", TURNS[:2], ["A"]),
        ({"messages": TURNS, "label": "A"}, ":scorer=exact", TURNS[:2], ["A b c"]),  # as training reads it
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, ":scorer=exact",
         [{"role": "user", "content": "Q"}], ["A"]),
        ({"question": "Q", "choices": ["x", "y"], "answer": 1}, "", "Q", ["y"]),
        ({"question": "Q", "choices": '{"text": ["x", "y"], "label": ["A", "B"]}', "answer": "B"}, "", "Q", ["y"]),
    ],
)  # fmt: skip
def test_a_row_of_every_shape(tmp_path, record, options, prompt, references):
    row = only(tmp_path, record, options)
    assert (row["prompt"], row["references"], row["answer"]) == (prompt, references, references[0])


def test_files_of_every_kind_are_one_task(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [{"question": f"What is {i}?", "answer": str(i)} for i in range(30)]
    write(tmp_path / "a.jsonl", *records)
    (tmp_path / "a.json").write_text(json.dumps(records))
    lines = ["question{}answer", *(f"{r['question']}{{}}{r['answer']}" for r in records)]
    (tmp_path / "a.csv").write_text("\n".join(line.format(",") for line in lines))
    (tmp_path / "a.tsv").write_text("\n".join(line.format("\t") for line in lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    found = [task.load(str(path)) for path in sorted(tmp_path.iterdir())]
    assert len({task.fingerprint(t) for t in found}) == 1 and len(found) == 6
    assert found[0].notes[1] == "scorer number, since there are numbers in all answers"


@pytest.mark.parametrize(
    ("answers", "scorer", "why"),
    [
        (["yes", "no"] * 10, "choice", "2 different answers in 20 rows"),
        ([f"so {i} is it\n#### {i}" for i in range(20)], "number", "numbers"),
        ([json.dumps({"a": i}) for i in range(20)], "json", "JSON objects"),
        ([json.dumps([i, "x"]) for i in range(20)], "set_f1", "lists"),
        ([f"answer {i}" for i in range(20)], "exact", "answers of at most 2 words"),
        ([f"answer {i} of a few more words" for i in range(20)], "token_f1", "of at most 12 words"),
        ([f"answer {i} " + "of many words " * 9 for i in range(20)], "rouge_l", "up to 29 words"),
    ],
)
def test_auto_says_what_it_chose_and_why(tmp_path, answers, scorer, why):
    made = task.load(write(tmp_path / "a.jsonl", *({"question": f"{i}?", "answer": a} for i, a in enumerate(answers))))
    assert (
        made.scorer == scorer
        and made.notes[1].startswith(f"scorer {scorer}, since there are ")
        and why in made.notes[1]
    )


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fruits", ":scoer=exact", "unknown option 'scoer' · did you mean scorer?"),
        ("fruits", ":scorer=exat", "no scorer 'exat' · did you mean exact?"),
        ("fruits", ":split=dev", "unknown split 'dev'"),
        ("fruits", ":slices=kinds", "no column 'kinds' (for slices)"),
        ("fruits", ":completion=anwser", "no column 'anwser' (for completion)"),
        ("fruits", ":scorer=json", "the answer contains no JSON object"),
        ("fruits", ":tokens=many", "tokens=many is not a whole number"),
        ("none", "", "60 of 60 rows are not a question with an answer"),
        ("empty", "", "1 of 61 rows are not a question with an answer: column 'answer' is empty (1 row, first: {}:61)"),
        ("one", ":scorer=choice", "every row has the answer 'fig', so there is nothing to choose"),
        ("many", ":scorer=choice", "60 different answers exceed the limit of 50 options"),
        ("binary", "", "not UTF-8"),
        ("pair", "", "a pair record is not a question with an answer"),
        ("tiny", "", "the test split has no rows (train 2, validation 0, test 0)"),
        ("absent", "", "no such source"),
    ],
)
def test_a_file_that_is_no_task_is_one_line(tmp_path, name, options, said, capsys):
    path = tmp_path / f"{name}.jsonl"
    fruits(path)
    if name == "none":
        write(path, *({"question": f"{i}?"} for i in range(60)))
    if name == "empty":
        path.write_text(path.read_text() + '{"question": "q", "answer": ""}\n')
    if name in ("one", "many"):
        write(path, *({"question": f"{i}?", "answer": "fig" if name == "one" else f"x{i}"} for i in range(60)))
    if name == "binary":
        path.write_bytes(bytes(range(128, 256)) * 9)
    if name == "pair":
        write(path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    if name == "tiny":
        write(path, *({"question": q, "answer": q} for q in ("alpha", "gamma")))
    if name == "absent":
        path.unlink()
    assert main.main(["--model=none", f"--tasks={path}{options}"]) == 2
    error = capsys.readouterr().err
    assert said.format(path) in error and error.count("\n") == 1


def test_names_of_tasks():
    assert rows.name("data/rows.jsonl:scorer=number") == rows.name("rows.v2.csv.gz@test") == "rows"
    assert rows.name("gsm8k/test.jsonl") == "gsm8k-test" and rows.name("hf:openai/gsm8k:main@test") == "main"
    assert rows.name("synthetic:add?n=10&digits=2") == "add" and rows.name("a.jsonl:name=b") == "b"
    assert rows.parse("gs://a/b.csv:scorer=exact:slices=x+y") == ("gs://a/b.csv", {"scorer": "exact", "slices": "x+y"})
    with pytest.raises(UserError, match="two tasks have the name 'add'"):
        task.named(["synthetic:add?n=40", "synthetic:add?n=50"])


def test_splits_never_overlap_and_are_those_of_training(tmp_path):
    """What `FILE@train` trains on is where shots come from; what is scored is neither."""
    spec = fruits(tmp_path / "a.jsonl", 200)
    made = task.load(spec)
    parts = {name: [r["prompt"] for r in made.examples(name)] for name in ("train", "validation", "heldout")}
    assert sorted(itertools.chain(*parts.values())) == sorted(r["question"] for r in sources.records(spec))
    for name, part in (("train", "train"), ("validation", "validation"), ("heldout", "test")):
        assert parts[name] == [r["question"] for r in sources.records(f"{spec}@{part}")]
    texts = list(dataset.texts(f"{spec}@train"))
    assert len(texts) == len(parts["train"]) and not any(q in t for q in parts["heldout"] for t in texts)
    assert [r["prompt"] for r in task.load(f"{spec}@test").examples("heldout")] == parts["heldout"]
    whole = task.load(f"{spec}:split=all")
    assert len(whole.examples("heldout")) == 200 and not whole.examples("train")


def test_a_split_column_and_split_files_decide(tmp_path):
    write(
        tmp_path / "a.jsonl",
        *({"question": f"{i}?", "answer": f"{i}", "split": "test" if i < 5 else "train"} for i in range(20)),
    )
    made = task.load(f"{tmp_path}/a.jsonl")
    assert [r["prompt"] for r in made.examples("heldout")] == [f"{i}?" for i in range(5)]
    (tmp_path / "two").mkdir()
    for part in ("train", "test"):
        write(tmp_path / "two" / f"{part}.jsonl", *({"question": f"{part} {i}?", "answer": f"{i}"} for i in range(9)))
    made = task.load(f"{tmp_path}/two")
    assert {r["prompt"][:5] for r in made.examples("heldout")} == {"test "} and len(made.examples("train")) == 9
    assert task.load(f"{tmp_path}/two/test.jsonl").notes[0].endswith("scored: all")


def test_a_row_is_asked_as_training_shows_it(tmp_path):
    made = task.load(fruits(tmp_path / "a.jsonl"))
    one = made.examples("heldout")[0]
    assert made.raw(one) == one["prompt"] and made.prompt(one) == [{"role": "user", "content": one["prompt"]}]
    assert rows._as_chat({"prompt": TURNS[:2]}) == TURNS[:2]
    assert task.load(write(tmp_path / "b.jsonl", *[{"messages": TURNS}] * 20) + ":split=all:scorer=exact").raw is None


@pytest.mark.parametrize(
    "record",
    [
        {"question": "Q?", "answer": "A b"},
        {"instruction": "Q?", "input": "I", "output": "A b", "system": "S"},
        {"messages": TURNS},
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "A"},
            ]
        },
    ],
)
@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, None])
def test_the_tokens_asked_are_those_that_training_reads(tmp_path, record, template):
    """Prompt and answer of a row are encoded as the document that training makes of the record."""
    from infer.lm import LM

    tok = tokenizers.load("bytes")
    tok.chat_template = template
    made = task.load(write(tmp_path / "a.jsonl", *[record] * 10) + ":split=all:scorer=exact")
    found = dataset.prepare(str(tmp_path / "a.jsonl"), tok, folder=tmp_path / "cache")
    start, end = found.stored.offsets[:2]
    row = made.examples("heldout")[0]
    asked = LM(None, {}, tok).encode((made.raw if made.raw and not template else made.prompt)(row))
    whole = found.stored.tokens[start:end].tolist()
    assert whole[: len(asked)] == asked
    assert whole[len(asked) :][: len(row["answer"])] == tok.encode(row["answer"])


# --- results ---


def test_mcnemar_and_its_interval():
    assert paired.mcnemar(8, 1) == pytest.approx(20 / 512)  # 2 (1 + 9) / 2^9
    assert paired.mcnemar(0, 0) == paired.mcnemar(3, 3) == 1
    for wins, losses in ((8, 1), (5, 11), (40, 20)):
        assert paired.mcnemar(wins, losses) == pytest.approx(scipy.stats.binomtest(wins, wins + losses).pvalue)
    low, high = paired.newcombe(36, 12, 2, 0)
    assert low == pytest.approx(0.0569, abs=5e-4) and high == pytest.approx(0.3404, abs=5e-4)
    assert paired.newcombe(0, 0, 0, 10)[0] < 0 < paired.newcombe(0, 0, 0, 10)[1]  # it does not collapse


def test_intervals_of_differences_hold_the_difference():
    """In 95 % of 400 experiments, give or take three standard errors."""
    rng = np.random.default_rng(0)
    held = {"mcnemar": 0, "bootstrap": 0}
    for _ in range(400):
        skill = rng.random(80)
        a, b = (rng.random((2, 80)) < np.stack([0.2 + 0.7 * skill, 0.7 * skill])).astype(float)
        found = paired.compare(a, b)
        held["mcnemar"] += found.low <= 0.2 <= found.high
    for _ in range(100):
        low, high, _ = paired.bootstrap(rng.normal(0.2, 1, 80), seed=1)
        held["bootstrap"] += low <= 0.2 <= high
    assert 370 <= held["mcnemar"] <= 394 and 88 <= held["bootstrap"] <= 100


def test_a_difference_that_an_unpaired_test_misses():
    a, b = [1.0] * 60 + [0.0] * 40, [1.0] * 52 + [0.0] * 48
    found = paired.compare(a, b)
    assert (found.n, found.wins, found.losses, found.difference) == (100, 8, 0, pytest.approx(0.08))
    assert found.p == pytest.approx(2 / 2**8) and found.low > 0
    graded = paired.compare([0.5, 0.25, 1, 0.75] * 9, [0.25, 0.25, 0.5, 0.5] * 9)
    assert (
        graded.low > 0
        and graded.p == 1 / paired.DRAWS
        and graded == paired.compare([0.5, 0.25, 1, 0.75] * 9, [0.25, 0.25, 0.5, 0.5] * 9)
    )
    assert paired.compare([0.5] * 5, [0.5] * 5).p == 1


# --- rows where they should not be ---


def test_near_duplicates_across_splits_are_named(tmp_path):
    text = "how many apples does the farmer have after he sells {} of them at the market on the first day of may"
    records = [{"question": text.format("ten"), "answer": "1", "split": "train"}]
    records += [{"question": text.format("ten") + " please", "answer": "2", "split": "test"}]
    records += [
        {"question": f"something else about {i} and {i * i} pears", "answer": f"{i}", "split": "train"}
        for i in range(99)
    ]
    notes = task.load(write(tmp_path / "a.jsonl", *records)).notes
    [line] = [note for note in notes if "nearly the same" in note]
    assert line == f"1 questions of train and test are nearly the same: {tmp_path}/a.jsonl:1 and {tmp_path}/a.jsonl:2"


def test_near_equals_every_pair_by_hand():
    rng = random.Random(0)
    texts = [" ".join(rng.choice("abcdef") for _ in range(4)) for _ in range(120)]
    sets = [overlap.shingles(t) for t in texts]
    alike = {
        (i, j)
        for i, j in itertools.combinations(range(120), 2)
        if len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j])
    }
    found = set(overlap.near(texts))
    groups = lambda pairs: {i: min(j for pair in pairs if i in pair for j in pair) for pair in pairs for i in pair}
    assert found <= alike and groups(found).keys() == groups(alike).keys()


def test_rows_that_training_has_read_are_named(tmp_path):
    words = [f"w{i}" for i in range(60)]
    asked = " ".join(words[:30])
    source = write(
        tmp_path / "train.jsonl",
        {"text": "nothing of it"},
        {"text": "x " + " ".join(words[10:23]) + " y"},  # 13 words of the first
        {"prompt": "What is two?", "completion": "Two."},
        {"odd": " ".join(words[40:52])},
    )
    held = [
        (asked, "a"),
        (" ".join(words[30:60]), "b"),
        ("What is two?", "two"),
        ("What is two?", "three"),
        (" ".join(words[40:50]), "c"),
    ]
    found = overlap.seen(held, source, tokenizers.load("bytes"))
    assert found == {0: f"{source}:2", 2: f"{source}:3", 4: f"{source}:4"}


def test_an_instruction_that_all_rows_share_is_no_overlap(tmp_path):
    """Neither across splits nor with training data: only what a row says itself counts."""
    form = "Is the following review of a film positive or negative ? Answer with one word and nothing else . Review :"
    own = lambda i: " ".join(f"w{i}x{j}" for j in range(9))
    records = [
        {"prompt": f"{form} {own(i)}", "completion": "yes", "split": "test" if i % 2 else "train"} for i in range(40)
    ]
    records.append(records[0] | {"split": "test"})
    spec = write(tmp_path / "a.jsonl", *records)
    [line] = [note for note in task.load(f"{spec}:scorer=exact").notes if "nearly the same" in note]
    assert line.startswith("1 questions of train and test are nearly the same")
    held = [(r["prompt"], "yes") for r in records if r["split"] == "test"]
    assert list(overlap.seen(held, f"{spec}@train", tokenizers.load("bytes"))) == [20]
    short = [(f"{form} good{i}", "yes") for i in range(20)]
    source = write(tmp_path / "b.jsonl", {"prompt": f"{form} good7", "completion": "yes"}, {"text": f"{form} good"})
    assert overlap.seen(short, source, tokenizers.load("bytes")) == {7: f"{source}:1"}


def test_token_caches_and_runs_are_looked_through(tmp_path):
    tok = tokenizers.load("bytes")
    source = write(
        tmp_path / "a.jsonl", *({"text": f"this is text number {i} of a file with many words"} for i in range(9))
    )
    made = dataset.prepare(source, tok, folder=tmp_path / "cache")
    held = [
        ("this is text number 7 of a file with many words", "x"),
        ("this is text number 77 of a file with many words", "x"),
    ]
    assert overlap.seen(held, str(made.folder), tok) == {0: f"{made.folder}, document 7"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps({"data": {"source": source, "format": "auto", "fields": ""}}))
    assert overlap.seen(held, str(tmp_path / "run"), tok) == {0: f"{source}:8"}
    other = tokenizers.load("bytes")
    other.chat_template = DEFAULT_TEMPLATE
    if other.fingerprint != tok.fingerprint:
        with pytest.raises(UserError, match="made with another tokenizer"):
            overlap.seen(held, str(made.folder), other)
