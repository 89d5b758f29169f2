"""The step keeps its promises on every mesh: same losses, exact accumulation, bad steps change nothing."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from model import build, weights
from model.net import head
from tests.helpers.steps import Random, T, config, losses, mesh_of, rows
from train import cost, init, optim
from train.mesh import BATCH, RULES
from train.objectives import Objective, Role
from train.step import compile_step, make_step


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("peft", ["", "lora"])
def test_same_losses_on_every_mesh(shape, peft):
    c = config(**{"peft.name": peft, "model.heads": 8, "model.kv_heads": 8})
    one, _ = losses(c)
    many, state = losses(c, shape)
    assert one[-1] < 0.7 * one[0]
    np.testing.assert_allclose(many, one, rtol=2e-5)
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(state)) or shape[0] == 8


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_accumulation_is_exact_with_unequal_masks(name):
    """Four micro-batches of two rows do what one batch of eight does: the mean is over tokens, not over batches."""
    one, a = losses(config(**{"optim.name": name}), steps=4)
    four, b = losses(config(**{"optim.name": name, "accum": 4}), steps=4)
    np.testing.assert_allclose(one, four, rtol=1e-5)
    assert one[-1] < one[0]
    if name == "adamw":
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), a.params, b.params)


def test_packed_equals_unpacked():
    """Two documents in a row behave as in two rows: the same loss, and the second does not see the first."""
    c = config()
    model = build.model(c, None, 500)
    params = {"policy": model.init(jax.random.key(0))}
    objective = build.find("train.objectives", c.objective)(model)
    apart = rows(batch=2)
    packed = {k: v.reshape(1, 2 * T) for k, v in apart.items()}
    packed["segments"] = np.repeat([[1, 2]], T, 1).reshape(1, 2 * T)
    loss = jax.jit(lambda b: objective.loss(params, b, None)["loss"])
    np.testing.assert_allclose(loss(apart), loss(packed), rtol=1e-5)
    other = dict(packed, tokens=packed["tokens"].copy())
    other["tokens"][0, :T] = 7
    logits = lambda b: model(params["policy"], b["tokens"], b["positions"], b["segments"])
    np.testing.assert_array_equal(logits(packed)[0, T:], logits(other)[0, T:])


def test_bad_step_changes_nothing_but_its_counters():
    c = config()
    model = build.model(c, None, 500)
    plan = init.blueprint(c, model, mesh_of(1, 1, 1))
    state = init.first_state(c, plan, None)
    nan_at = lambda bad: lambda p, b, k: jax.tree.map(lambda x: x * jnp.where(b["bad"], jnp.nan, 1.0), loss(p, b, k))
    loss = plan.objective.loss
    step = jax.jit(make_step(nan_at(True), plan.tx))
    good, bad = dict(rows(), bad=False), dict(rows(), bad=True)
    state, _ = step(state, good)
    after, _ = step(state, bad)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    assert (int(after.step), int(after.bad), int(after.skipped)) == (2, 1, 1)
    again, _ = step(after, good)
    assert (int(again.bad), int(again.skipped)) == (0, 1)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), again.params, state.params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("peft", ["", "lora"])
def test_everything_trainable_moves_in_two_steps_and_nothing_else(peft):
    c = config(**{"peft.name": peft})
    _, before = losses(c, steps=0)
    _, after = losses(c, steps=2)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before.params, after.params)
    assert all(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)


def test_dpo_reference_stays_while_the_policy_moves():
    """At step 0 the loss is log 2 in both modes, and they take the same first steps: the base is the frozen copy."""
    pair = {"chosen": rows(1), "rejected": rows(2)}
    full, state = losses(config(**{"objective.name": "dpo", "optim.lr": 1e-3}), steps=3, batch=pair)
    slim, _ = losses(config(**{"objective.name": "dpo", "optim.lr": 1e-3, "peft.name": "lora"}), steps=3, batch=pair)
    assert "ref" in state.frozen
    for curve in (full, slim):
        np.testing.assert_allclose(curve[0], np.log(2), rtol=1e-6)
        assert curve[-1] < np.log(2) - 1e-3


def test_learning_rates_by_path():
    c = config(**{"optim.lr_scale": (("embed/.*", 0.0),)})
    _, before = losses(c, steps=0)
    _, after = losses(c, steps=1)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before.params["policy"], after.params["policy"])
    assert not moved["embed"]["table"] and moved["layers"]["attn"]["wq"]


def test_remat_changes_no_bit_that_matters():
    curves = [losses(config(**{"model.remat": r}), steps=3)[0] for r in ("none", "dots", "full")]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-6)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-6)


def test_schedules_by_hand():
    from train.optim import schedule

    o = config().optim
    o.lr, o.warmup, o.final_lr = 1.0, 2, 0.5
    lr = schedule(o, 12)
    np.testing.assert_allclose([lr(0), lr(1), lr(2), lr(7), lr(12)], [0.5, 1.0, 1.0, 0.75, 0.5], rtol=1e-6)
    o.schedule, o.decay = "wsd", 0.5
    lr = schedule(o, 12)
    np.testing.assert_allclose([lr(0), lr(2), lr(6), lr(9), lr(12)], [0.5, 1.0, 1.0, 0.75, 0.5], rtol=1e-6)


def test_specs_of_the_plan_are_those_of_the_state():
    c = config(**{"peft.name": "lora"})
    plan = init.blueprint(c, build.model(c, None, 500), mesh_of(2, 2, 2))
    state = init.first_state(c, plan, None)
    jax.tree.map(lambda x, s: np.testing.assert_equal((x.shape, x.dtype), (s.shape, s.dtype)), state, plan.abstract)
    assert dataclasses.asdict(plan.model.config)["layers"] == 2


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_parameters_of_16_bits_learn_as_those_of_32(dtype):
    """Rounded to the nearest, bfloat16 is at 5.22 after these steps, float32 at 4.77."""
    c = config(**{"optim.lr": 3e-4})
    want, _ = losses(c)
    c.model.param_dtype = dtype
    got, state = losses(c)
    np.testing.assert_allclose(got, want, atol=0.02)
    start = init.first_state(c, init.blueprint(c, build.model(c, None, 500), mesh_of(1)), None)
    for name, before in start.params["policy"]["layers"]["mlp"].items():
        after = state.params["policy"]["layers"]["mlp"][name]
        assert after.dtype == dtype and float((after != before).mean()) > 0.9


def test_random_rounding_by_hand():
    """1 + 2^-9 lies a quarter of the way from 1 to the next bfloat16, 1 + 2^-7; what is one already stays."""
    x = jnp.full((64, 512), 1 + 2**-9).at[0].set(-3.0)
    draw = jax.jit(lambda x: optim.round_randomly(x, jnp.bfloat16, jax.random.key(3)))
    y = draw(x)
    assert (y[0] == -3).all() and set(np.unique(y[1:])) == {1, 1 + 2**-7}
    np.testing.assert_allclose((y[1:] > 1).mean(), 0.25, atol=0.01)
    rows, columns = (y[1:] > 1).mean(1), (y[1:] > 1).mean(0)
    assert abs(rows - 0.25).max() < 0.1 and abs(columns - 0.25).max() < 0.25  # no line of equal bits
    laid = jax.device_put(x, NamedSharding(mesh_of(2, 2, 2), BATCH))
    np.testing.assert_array_equal(draw(laid), y)


def teacher_objective(model):
    """A loss of all kinds of roles: a policy, a critic on its base, a reference, a teacher of another shape."""
    small = build.model(config(**{"model.layers": 1, "model.embed": 32, "model.heads": 2, "model.mlp": 48}), None, 500)

    def loss(roles, batch, key):
        hidden = lambda net, p: net.hidden(p, batch["tokens"], batch["positions"], batch["segments"]).x
        nll = lambda net, p: head.nll(net, p, hidden(net, p), batch["targets"], batch["mask"])
        ref = roles["ref"] if "ref" in roles else weights.base(roles["policy"])
        values = roles["critic"]["head"](hidden(model, roles["critic"]))
        own, critic = nll(model, roles["policy"]), (jnp.square(values - 1) * batch["mask"]).sum()
        fixed = jax.lax.stop_gradient(nll(model, ref) + nll(small, roles["teacher"]))
        n = batch["mask"].sum()
        return {"loss": (own + 2 * critic, n), "fixed": (fixed, n)}

    roles = {
        "policy": Role("train"), "critic": Role("train", head="scalar", shares="policy"), "ref": Role("initial"),
        "teacher": Role("frozen", start=Random(small, 7), model=small),
    }  # fmt: skip
    return Objective(loss, "lm", roles)


@pytest.mark.parametrize("peft", ["", "lora"])
def test_roles_start_share_and_stay_as_they_say(peft, monkeypatch):
    """The critic moves on the policy's frozen base, the teacher keeps its shape and its weights, the reference the
    policy's first ones; only what trains is in `params`."""
    monkeypatch.setattr(build, "find", lambda package, cfg, find=build.find: (
        teacher_objective if package == "train.objectives" else find(package, cfg)))  # fmt: skip
    c = config(**{"peft.name": peft} | ({"peft.rank": 1} if peft else {}))
    with jax.set_mesh(mesh_of(1, 1, 1)), nn.logical_axis_rules(RULES):
        plan = init.blueprint(c, build.model(c, None, 500), mesh_of(1, 1, 1))
        state = init.first_state(c, plan, None)
        before = jax.tree.map(np.asarray, {name: state.role(name) for name in state.roles})
        step = compile_step(plan)
        for _ in range(3):
            state, _ = step(state, rows())
    assert set(state.params) == {"policy", "critic"} and ("ref" in state.roles) == (not peft)
    assert "critic" not in state.frozen
    after = {name: state.role(name) for name in state.roles}
    same = {name: all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), before[name], after[name])))
            for name in after}  # fmt: skip
    assert same == {"policy": False, "critic": False, "teacher": True} | ({} if peft else {"ref": True})
    assert after["teacher"]["embed"]["table"].shape[1] == 32
    assert not before["critic"]["head"].w.any() and after["critic"]["head"].w.any()
    trunk = {k: v for k, v in before["critic"].items() if k != "head"}
    alike = jax.tree.map(lambda x, y: bool((x == y).all()), before["policy"], trunk)
    assert all(jax.tree.leaves(alike))
    base = [weights.base(after[name])["layers"]["attn"]["wq"] for name in ("policy", "critic")]
    assert bool((base[0] == base[1]).all()) == bool(peft)
    prices = cost.of_roles(plan, T)
    assert prices["ref"].layer_train_flops == pytest.approx(prices["policy"].layer_flops, rel=0 if not peft else 0.2)
    assert prices["teacher"].trained == 0 < prices["critic"].trained
    assert cost.of_plan(plan, T).step(1, 1) == sum(p.step(1, 1) for p in prices.values())


def test_dpo_costs_its_reference_too():
    """8 N FLOPs a token of full tuning: 6 N of the policy and 2 N of the reference; 6 N under LoRA."""
    for peft, per_weight in (("", 8), ("lora", 6)):
        c = config(
            **{"objective.name": "dpo", "peft.name": peft, "data.packing": "none"} | ({"peft.rank": 1} if peft else {})
        )
        plan = init.blueprint(c, build.model(c, None, 500), mesh_of(1, 1, 1))
        n = cost.of_roles(plan, 1)["ref"].layer_flops / 2
        total = cost.of_plan(plan, 1)
        assert total.layer_train_flops / n == pytest.approx(per_weight, rel=0.12)
