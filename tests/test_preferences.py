"""Objectives of preferences, labels, rankings and ratings: values by hand, and what each must not depend on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.rows import batch as batches
from model import build
from tests.helpers.steps import config, losses, rows
from train.objectives import dpo, kto, orpo

LOG2 = float(np.log(2))


def test_dpo_family_by_hand():
    """h = 0, 10, 0 and beta 0.1: margins 0, 1, 0."""
    h = jnp.array([0.0, 10.0, 0.0])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    close(dpo.preference_loss(h, 0.1), [LOG2, 0.313262, LOG2])
    close(dpo.preference_loss(h, 0.1, label_smoothing=0.25)[1], 0.75 * 0.313262 + 0.25 * 1.313262)
    close(dpo.preference_loss(h, 0.1, "hinge"), [1, 0, 1])
    close(dpo.preference_loss(h, 0.1, "ipo"), [25, 25, 25])  # (0 - 5)^2, (10 - 5)^2: 1/(4 beta^2) where h is 0
    close(dpo.preference_loss(h, 0.1, "robust", 0.25)[1], (0.75 * 0.313262 - 0.25 * 1.313262) / 0.5)
    close(orpo.log_odds(jnp.log(jnp.array([0.5, 0.8]))), [0, np.log(4)])


@pytest.mark.parametrize(
    "name, settings, first",
    [
        ("dpo", {}, LOG2),
        ("dpo", {"loss": "hinge"}, 1.0),
        ("dpo", {"loss": "ipo", "beta": 0.5}, 1.0),
        ("dpo", {"loss": "robust", "label_smoothing": 0.1}, LOG2),
        ("dpo", {"length_normalized": True}, LOG2),
        ("simpo", {}, None),
        ("cpo", {}, None),
        ("orpo", {}, None),
    ],
    ids=str,
)
def test_a_pair_objective_starts_where_it_must_and_learns(name, settings, first):
    """Where the policy is its own reference, the first loss is known; three steps lower it."""
    c = config(**{"objective.name": name, "optim.lr": 1e-3, "peft.name": "lora"})
    c.objective.update(settings)
    curve, _ = losses(c, steps=3, batch={"chosen": rows(1), "rejected": rows(2)})
    if first is not None:
        np.testing.assert_allclose(curve[0], first, rtol=1e-5)
    assert curve[-1] < curve[0]


def labelled(seed=0):
    return rows(seed) | {"label": np.arange(8, dtype=np.int32) % 2}


def test_kto_starts_at_half_and_learns():
    """At step 0 every log-ratio is 0, so each row costs half its weight."""
    c = config(**{"objective.name": "kto", "optim.lr": 1e-3, "peft.name": "lora"})
    c.objective.update({"undesirable_weight": 3.0})
    curve, _ = losses(c, steps=3, batch=labelled())
    np.testing.assert_allclose(curve[0], (0.5 + 1.5) / 2, rtol=1e-6)
    assert curve[-1] < curve[0]


def test_mismatched_rows_by_hand():
    """Prompts 1 2 and 3, answers 7 8 9 and 5: each prompt with the other's answer."""
    batch = {
        "tokens": [[1, 2, 7, 8, 9, 0], [3, 5, 0, 0, 0, 0]],
        "targets": [[2, 7, 8, 9, 0, 0], [5, 0, 0, 0, 0, 0]],
        "mask": [[0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]],
        "segments": [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]],
        "positions": [[0, 1, 2, 3, 4, 0], [0, 1, 0, 0, 0, 0]],
    }
    found = kto.mismatched(jax.tree.map(jnp.asarray, batch, is_leaf=lambda x: isinstance(x, list)))
    assert found["tokens"].tolist() == [[1, 2, 5, 0, 0, 0], [3, 7, 8, 9, 0, 0]]
    assert found["targets"].tolist() == [[2, 5, 0, 0, 0, 0], [7, 8, 9, 0, 0, 0]]
    assert found["mask"].tolist() == [[0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert found["segments"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert found["positions"].tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 0, 0]]


def test_an_empty_row_moves_no_kl():
    """The last held-out batch ends with empty rows; the estimate is that of the rows that are there."""
    model = build.model(config(), None, 500)
    params = {"policy": model.init(jax.random.key(0)), "ref": model.init(jax.random.key(1))}
    loss = jax.jit(kto.make(model).loss)
    whole = labelled()
    three = jax.tree.map(lambda x: x[:3], whole)
    empty = jax.tree.map(lambda x: np.concatenate([x[:3], np.zeros_like(x[3:])]), whole)
    # A prompt whose neighbor is empty has no pair: of three rows in a ring, two are left.
    a, b = loss(params, three, None), loss(params, empty, None)
    assert a["loss"][1] == b["loss"][1] == 3
    assert np.isfinite(b["kl"][0]) and b["reward_chosen"][1] == a["reward_chosen"][1] == 1


def test_kinds_with_columns_serve_those_without():
    assert batches.serves("labelled", "lm") and not batches.serves("lm", "labelled")
    assert not batches.serves("rated", "labelled") and not batches.serves("pair", "lm")
    assert list(itertools.chain(batches.abstract("rated", 2, 4)))[-1] == "rating"
