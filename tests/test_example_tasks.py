"""The tasks that examples/tasks.py writes."""

from collections import Counter

import pytest

from common import files
from examples import tasks


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_has_distinct_questions_with_answers(name):
    rows = tasks.make(name, 300, seed=0)
    assert len({row["question"] for row in rows}) == 300 == sum(bool(row["answer"]) for row in rows)
    assert rows == tasks.make(name, 300, seed=0) != tasks.make(name, 300, seed=1)


def test_documents_say_when_somebody_was_born():
    texts = [row["text"] for row in tasks.documents("births")]
    for row in tasks.make("births", 100, seed=0):
        name = row["question"].removeprefix("In which year was ").removesuffix(" born?")
        assert any(text.startswith(f"{name}: ") and row["answer"] in text for text in texts), row


def test_the_command(tmp_path, capsys):
    assert tasks.main(["sums", f"--to={tmp_path}", "--n=5"]) == 0
    assert len((tmp_path / "sums.jsonl").read_text("utf-8").splitlines()) == 5
    assert tasks.main(["sums", f"--to={tmp_path}", "--splits=4,3,2"]) == 0
    rows = files.read_lines(tmp_path / "sums.jsonl")
    assert Counter(row["split"] for row in rows) == {"train": 4, "validation": 3, "test": 2}
    assert tasks.main(["births", f"--to={tmp_path}", "--splits=9000,9000,9000"]) == 2
    assert tasks.main(["sum", f"--to={tmp_path}"]) == 2
    assert "did you mean sums" in capsys.readouterr().err
