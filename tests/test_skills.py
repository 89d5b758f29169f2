"""The example of skills as vectors, on one seed: what subtraction takes away, and what it leaves."""

import pytest

from examples import skills


@pytest.mark.slow
def test_a_skill_is_added_removed_and_combined(tmp_path, capsys):
    found = skills.skills(tmp_path, seed=0)
    right = lambda model: (found[model]["sums"], found[model]["words"])
    assert right("sums")[0] > 0.9 and right("words")[1] > 0.9 and min(right("both")) > 0.9
    sums, words = right("both - sums")
    assert words - sums > 0.15  # of a model that is right in both
    sums, words = right("both - words")
    assert sums - words > 0.15
    assert sum(right("sums + words, TIES")) > max(right("sums")[1], right("words")[0]) + 0.5
    skills.show([found, found])
    assert "mean over 2 seeds" in " ".join(capsys.readouterr().out.split())


def test_no_such_seeds_is_refused(capsys):
    assert skills.main(["--seeds=2"]) == 2
    assert "--out" in capsys.readouterr().err
