"""The kinds of batches: an example of each has its shapes and is told apart from the others."""

import pytest

from data.rows import batch as batches

B, T = 3, 8


@pytest.mark.parametrize("kind", batches.KINDS)
def test_an_example_has_the_shapes_of_its_kind_and_tells_it(kind):
    made, wanted = batches.example(kind, B, T, 50), batches.abstract(kind, B, T)
    assert batches.kind_of(made) == batches.kind_of(wanted) == kind
    assert tuple(batches.parts(made)) == tuple(batches.parts(wanted)) == batches.KINDS[kind].sides
    for side, part in batches.parts(made).items():
        specs = batches.parts(wanted)[side]
        assert {n: (x.shape, x.dtype) for n, x in part.items()} == {n: (s.shape, s.dtype) for n, s in specs.items()}
        assert (part["tokens"][:, 1:] == part["targets"][:, :-1]).all() and 0 < part["mask"].sum() < B * T
    again = batches.parts(batches.example(kind, B, T, 50))
    assert all((again[side][n] == x).all() for side, p in batches.parts(made).items() for n, x in p.items())
    assert batches.join(batches.parts(made)).keys() == made.keys()


def test_answers_of_a_group_keep_their_order():
    many = batches.abstract("group", B, T, k=12)
    assert tuple(sorted(many)) == tuple(batches.parts(many)) == batches.answers(12) and batches.kind_of(many) == "group"
    with pytest.raises(ValueError, match="left, right"):
        batches.kind_of(dict.fromkeys(("left", "right"), batches.example("lm", B, T, 50)))
