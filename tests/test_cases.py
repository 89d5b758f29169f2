"""What people bring works, or one line says why not: the cases of tests/cases, each with what is right."""

import pytest

from tests.cases import people
from tools import formats


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
