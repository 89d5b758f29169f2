"""Objectives of preferences, labels, rankings and ratings: values by hand, and what each must not depend on."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import record
from common.errors import UserError
from data.rows import batch as batches
from data.rows.loader import make_loaders
from infer.lm import LM
from infer.models import load, open_model
from model import build
from model.io import export, gguf_write
from tests.helpers.processes import ROOT
from tests.helpers.steps import config, losses, rows
from train.main import main
from train.objectives import dpo, kto, orpo, ranking

LOG2 = float(np.log(2))
order_logp = jax.jit(ranking.order_logp)


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


MORE = (
    ("dpo", {"loss": "hinge"}, 1.0),
    ("dpo", {"loss": "ipo", "beta": 0.5}, 1.0),
    ("dpo", {"loss": "robust", "label_smoothing": 0.1}, LOG2),
    ("dpo", {"length_normalized": True}, LOG2),
    ("simpo", {}, None),
    ("cpo", {}, None),
    ("orpo", {}, None),
)


@pytest.mark.parametrize(
    "name, settings, first",
    [
        ("dpo", {}, LOG2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE),
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
    with pytest.raises(UserError, match="a micro-batch has only one row"):
        loss(params, jax.tree.map(lambda x: x[:1], whole), None)


def test_kinds_with_columns_serve_those_without():
    assert batches.serves("labelled", "lm") and not batches.serves("lm", "labelled")
    assert not batches.serves("rated", "labelled") and not batches.serves("pair", "lm")
    assert list(itertools.chain(batches.abstract("rated", 2, 4)))[-1] == "rating"


# --- reward models ---


def test_plackett_luce_by_hand():
    """Equal scores give log k!; two answers are Bradley-Terry; one tied with all others behind it costs nothing."""
    for k, want in ((2, 0.693147), (3, 1.791759), (4, 3.178054)):
        found = order_logp(jnp.zeros((1, k)), jnp.arange(k)[None])
        np.testing.assert_allclose(-found, [want], rtol=1e-5)
    two = order_logp(jnp.array([[0.3, 1.0]]), jnp.array([[2, 1]]))
    np.testing.assert_allclose(two, jax.nn.log_sigmoid(jnp.array([0.7])), rtol=1e-5)
    np.testing.assert_allclose(order_logp(jnp.array([[5.0, -3.0, 1.0]]), jnp.ones((1, 3))), [0], atol=1e-5)


@pytest.mark.parametrize("ranks", [(1, 2, 3, 4), (2, 1, 2, 3), (1, 4, 4, 4), (1, 1, 2, 2), (3, 1, 3, 3)])
def test_ties_and_partial_orders_are_sums_over_orders(ranks):
    scores = np.array([0.4, -1.2, 2.0, 0.1])
    total = 0.0
    for order in itertools.permutations(range(4)):
        if all(ranks[a] <= ranks[b] for a, b in itertools.pairwise(order)):
            left = [np.exp(scores[list(order[i:])]).sum() for i in range(4)]
            total += np.prod([np.exp(scores[i]) / rest for i, rest in zip(order, left, strict=True)])
    logp = lambda s: order_logp(s, jnp.array([ranks]))[0]
    np.testing.assert_allclose(logp(jnp.array([scores])), np.log(total), rtol=1e-5)
    assert np.isfinite(jax.grad(logp)(jnp.array([scores]))).all()


def test_nine_answers_are_too_many():
    with pytest.raises(UserError, match="9 answers to a prompt; at most 8"):
        order_logp(jnp.zeros((1, 9)), jnp.zeros((1, 9)))


def group(k=3):
    ranks = np.array([1, 2, 3, 1, 2, 3, 1, 2], np.int32)
    return {name: rows(i) | {"rank": (ranks + i) % 3} for i, name in enumerate(batches.answers(k))}


@pytest.mark.parametrize(
    "name, settings, batch, first",
    [
        ("reward", {"center": 0.1}, {"chosen": rows(1), "rejected": rows(2)}, LOG2),
        ("ranking", {}, group(), np.log(6)),
        ("rating", {}, rows(1) | {"rating": np.full(8, 4.0, np.float32)}, 1.0),
        ("rating", {"loss": "ordinal"}, rows(1) | {"rating": np.full(8, 4.0, np.float32)}, 1.8509805),
    ],
    ids=("reward", "ranking", "rating", "ordinal"),
)
def test_a_reward_model_starts_at_zero_and_learns(name, settings, batch, first):
    """Rewards start at 0: log 2, log 3!, (4 - 3)^2, and softplus of -1.5, -0.5, 0.5, -1.5 for 4 of 5."""
    c = config(**{"objective.name": name, "optim.lr": 1e-2, "peft.name": "lora"})
    c.objective.update(settings)
    curve, state = losses(c, steps=4, batch=batch)
    np.testing.assert_allclose(curve[0], first, rtol=1e-5)
    assert curve[-1] < curve[0]
    assert float(jnp.abs(state.params["policy"]["head"].w).max()) > 0


def test_a_reward_is_that_of_the_last_token_wherever_padding_stands():
    """The same document after 0 to 3 slots of padding, and before any."""
    from model import heads
    from train.objectives._reward import rewards

    model = build.model(config(), None, 500)
    params = model.init(jax.random.key(0))
    params["head"] = heads.find("scalar")(model.config, jax.random.key(0)).replace(w=jnp.ones(model.config.embed))
    batch = {name: np.zeros((5, 12), np.int32) for name in ("tokens", "segments", "positions")}
    for row, at in enumerate((0, 1, 2, 3, 6)):
        batch["tokens"][row, at : at + 6] = np.arange(7, 13)
        batch["segments"][row, at : at + 6], batch["positions"][row, at : at + 6] = 1, np.arange(6)
    found = rewards(model, params, batch)
    np.testing.assert_allclose(found, np.full(5, found[0]), rtol=2e-5)
    x = model.hidden(params, batch["tokens"][:1, :6]).x
    np.testing.assert_allclose(found[0], x[0, -1].astype(jnp.float32).sum(), rtol=1e-5)


# --- the life of a reward model ---


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    """A few steps of LoRA and a head on pairs with margins and ties."""
    folder = tmp_path_factory.mktemp("reward")
    data = [
        {"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 2), "margin": 0.5, "tie": i % 4 == 0}
        for i in range(64)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    argv = [
        f"--config={ROOT}/configs/rlhf/reward_tiny.py", f"--workdir={folder}/run", "--config.steps=12",
        f"--config.data.source={folder}/pairs.jsonl", "--config.peft.name=lora", "--config.optim.lr=0.01",
        f"--config.data.cache={folder}/cache", "--config.model.vocab_size=272", "--config.samples=()",
    ]  # fmt: skip
    assert main(argv) == 0
    return folder / "run"


def test_a_reward_run_scores_as_it_was_trained(reward_run):
    """The held-out accuracy and margin of the record, from `score`, on the rows that were held out."""
    lm = load(reward_run)
    line = [line for line in record.read(reward_run / "metrics.jsonl") if line["kind"] == "eval"][-1]
    cfg = open_model(reward_run).cfg
    _, held = make_loaders(cfg.data, lm.tokenizer, cfg.seed)
    texts = list(map(json.loads, (reward_run.parent / "pairs.jsonl").read_text().splitlines()))
    rows = [texts[i] for i in held.parts[0].documents]
    assert len(rows) == held.sizes[0] > 0
    chosen, rejected = (
        lm.score([r["prompt"] for r in rows], [r[side] for r in rows]) for side in ("chosen", "rejected")
    )
    np.testing.assert_allclose(np.mean(chosen), line["reward_chosen"], rtol=1e-4)
    np.testing.assert_allclose(np.mean(rejected), line["reward_rejected"], rtol=1e-4)
    decided = [a > b for a, b, r in zip(chosen, rejected, rows, strict=True) if not r["tie"]]
    np.testing.assert_allclose(np.mean(decided), line["accuracy"], rtol=1e-6)
    assert abs(chosen[0]) > 1e-3


def test_a_reward_model_exported_scores_the_same(reward_run, tmp_path):
    lm = load(reward_run)
    export.export_hf(lm.model, lm.params, lm.tokenizer, tmp_path / "out")
    again = load(tmp_path / "out")
    asked = ["3+1="] * 2, ["4", "5"]
    np.testing.assert_allclose(again.score(*asked), lm.score(*asked), rtol=1e-4)
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    with pytest.raises(UserError, match="cannot store a reward model's head"):
        gguf_write.write(tmp_path / "x.gguf", lm.model, lm.params, {})


def test_a_language_model_does_not_score():
    lm = LM(build.model(config(), None, 500), {}, None)
    with pytest.raises(UserError, match="has no reward head"):
        lm.score(["a"], ["b"])


def test_a_policy_starts_from_a_reward_run_without_its_head(reward_run):
    opened = open_model(reward_run)
    assert "head" in opened.params(opened.model.specs) and "head" not in opened.load(opened.model.specs)


def test_kto_wants_both_labels(tmp_path, capsys):
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 16)
    argv = [
        f"--config={ROOT}/configs/rlhf/dpo_tiny.py", f"--workdir={tmp_path}/run", "--config.objective.name=kto",
        f"--config.data.source={tmp_path}/good.jsonl", "--config.data.format=labelled", "--config.data.holdout=0",
        f"--config.data.cache={tmp_path}/cache",
    ]  # fmt: skip
    assert main(argv) == 2
    assert "all 16 answers are labeled good · KTO learns from both labels" in capsys.readouterr().err
