"""What people bring works, or one line says why not: the cases of tests/cases, each with what is right."""

import pytest

from tests.cases import people
from tools import formats, prepare


def test_prepare_counts_what_is_unused_and_strict_refuses_it(tmp_path, capsys):
    source, cache = tmp_path / "rows", tmp_path / "cache"
    source.mkdir()
    (source / "x.csv").write_text("prompt,completion,score\n" + "Q,A,3\n" * 20)
    (source / "note.txt").write_text("no rows")
    argv = ["--config=configs/sft/tiny.py", f"--config.data.source={source}", f"--config.data.cache={cache}"]
    argv += ["--config.data.holdout=0.0", "--config.data.batch_size=1"]
    assert prepare.main(argv) == 0
    assert "unused: score (20 rows)" in capsys.readouterr().out
    assert prepare.main([*argv, "--strict"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "unused: score (20 rows)" in lines[-1] and "not read: note.txt" in lines[-1]


def test_the_page_of_formats_lists_the_tables_of_the_code():
    assert formats.PAGE.read_text("utf-8") == formats.page(), "python -m tools.formats writes it anew"


CASES = {**people.FOLDERS, **people.FILES}


@pytest.mark.parametrize("name", [*people.ROWS, *CASES])
def test_case(name, tmp_path):
    if name in people.ROWS:
        make, right = people.ROWS[name]
        assert make() == right
    else:
        make, right = CASES[name]
        assert make(tmp_path / "x") == right
