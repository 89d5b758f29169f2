"""--debug names what is in a batch and where the first number broke; --profile's trace and table."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from configs import schema
from model import build
from tests.helpers.processes import run
from tests.helpers.steps import rows
from train import debug, init
from train.keep import trace
from train.mesh import abstract_mesh
from train.objectives import Objective

TINY = [
    "--config=configs/sft/tiny.py", "--config.data.batch_size=8", "--config.model.remat=none", "--config.samples=()",
    "--config.eval_batches=1", "--config.log_every=1",
]  # fmt: skip


@pytest.fixture
def planned():
    cfg = schema.load(TINY).config
    model = build.model(cfg, None, 500)
    plan = init.blueprint(cfg, model, abstract_mesh(cfg.mesh))
    params = model.init(jax.random.key(0))
    state = init.TrainState.create({"policy": params}, jax.tree.map(lambda _: None, {"policy": params}), plan.tx, 0)
    return plan, state


def changed(state, path: str, f):
    """The state with one parameter changed."""
    params = jax.tree.map(lambda x: x, state.params)
    *groups, name = path.split("/")
    node = params["policy"]
    for group in groups:
        node = node[group]
    node[name] = f(node[name])
    return state.replace(params=params)


def with_loss(plan, extra):
    """The plan with `extra(params)` added to its loss."""

    def loss(params, batch, key):
        metrics = plan.objective.loss(params, batch, key)
        return metrics | {"loss": (metrics["loss"][0] + extra(params["policy"]), metrics["loss"][1])}

    return dataclasses.replace(plan, objective=Objective(loss, plan.objective.batch))


def examine(capsys, plan, state) -> tuple[int, str]:
    code = debug._examine(plan, state, rows(batch=2))
    return code, capsys.readouterr().out


def test_all_is_well(capsys, planned):
    code, out = examine(capsys, *planned)
    assert code == 0 and "is finite" in out
    assert re.search(r"layers/0/attn_norm +float32 \[2, \d+, 64\]", out)
    assert [line.split()[0] for line in out.split("activations")[1].splitlines()[1:8]] == [
        "layers/0/attn_norm", "layers/0/attn", "layers/0/mlp_norm", "layers/0/mlp", "layers/0",
        "layers/1", "final_norm",
    ]  # fmt: skip


def test_the_layer_and_the_line_of_the_first_nan(capsys, planned):
    plan, state = planned
    state = changed(state, "layers/attn/wq", lambda x: x.at[1].set(1e38))  # finite, but its products are not
    code, out = examine(capsys, plan, state)
    assert code == 70
    assert re.search(r"the output of layers/1/attn; the first NaN comes from model/net/\w+\.py:\d+", out), out


def test_a_parameter(capsys, planned):
    plan, state = planned
    code, out = examine(capsys, plan, changed(state, "layers/mlp/up", lambda x: x.at[0, 3, 3].set(jnp.nan)))
    assert code == 70 and "a parameter policy/layers/mlp/up in layer 0" in out


def test_the_loss_itself(capsys, planned):
    plan, state = planned
    code, out = examine(capsys, with_loss(plan, lambda p: jnp.log(-1.0)), state)
    assert code == 70 and "the output of the metric loss" in out


@pytest.mark.parametrize(
    ("of", "where"),
    [
        (lambda p: p["layers"]["attn"]["wk"][1].sum(), "policy/layers/attn/wk in layer 1"),
        (lambda p: p["layers"]["mlp"]["up"].sum() + p["final_norm"]["scale"].sum(), "policy/final_norm/scale"),
        (lambda p: p["embed"]["table"].sum() + p["layers"]["mlp"]["up"][:1].sum(), "policy/layers/mlp/up in layer 0"),
    ],
)
def test_the_gradient_nearest_to_the_loss(capsys, planned, of, where):
    """sqrt(0 x) is 0, and its gradient inf * 0."""
    plan, state = planned
    code, out = examine(capsys, with_loss(plan, lambda p: jnp.sqrt(0 * of(p))), state)
    assert code == 70 and f"the gradient of {where}\n" in out


@pytest.mark.slow
def test_a_run_is_examined_where_it_stands_and_left_alone(tmp_path):
    argv = [*TINY, f"--workdir={tmp_path}", "--config.steps=4", f"--config.data.cache={tmp_path}/cache"]
    code, out, err = run(*argv, "--profile=2")
    assert code == 0, err
    assert "ms/step" in out and list(tmp_path.glob("profile/**/perfetto_trace.json.gz"))
    shares = [float(x) for x in re.findall(r" +[\d.]+ +([\d.]+)% +[\d.]+  \S", out)]
    assert 1 <= len(shares) <= 10 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.5
    assert list(tmp_path.glob("profile/**/*.xplane.pb"))

    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "cache" not in p.parts}
    code, out, err = run(*argv, "--debug")
    assert code == 0, err
    assert "row 0 of step 4" in out and "<|eos|>" in out and "in the loss" in out
    assert float(re.search(r"loss ([\d.]+) averaged over", out)[1]) < 6.3  # four steps have been learnt; 6.5 at random
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "cache" not in p.parts}
    code, _, err = run(*argv, "--debug", "--config.model.layers=3")
    assert code == 2 and "use the config of the run" in err and "Traceback" not in err


def test_time_within_an_operation_is_not_its_own():
    """while [0, 10] holds dot [1, 4] and add [5, 6]; another thread has dot [0, 2]. All in microseconds."""
    op = lambda name, ts, dur, tid=1: dict(ph="X", pid=1, tid=tid, ts=ts, dur=dur, name=name, args={"hlo_op": name})
    events = [op("dot", 1, 3), op("while", 0, 10), op("add", 5, 1), op("dot", 0, 2, 2), {"ph": "M", "name": "x"}]
    seconds, calls = trace.own_seconds([*events, {**op("host", 0, 99), "args": {}}])
    assert {k: round(1e6 * s) for k, s in seconds.items()} == {"while": 6, "dot": 5, "add": 1}
    assert calls == {"while": 1, "dot": 2, "add": 1}


def test_kernels_of_a_gpu_stand_for_themselves():
    """Two that it ran side by side, out of one command buffer: [0, 10] and [2, 5]."""
    args = {"hlo_op": "command_buffer_3", "correlation_id": "36"}
    kernel = lambda name, ts, dur: dict(ph="X", pid=1, tid=14, ts=ts, dur=dur, name=name, args=args)
    seconds, calls = trace.own_seconds([kernel("gemm", 0, 10), kernel("add", 2, 3)])
    assert {k: round(1e6 * s) for k, s in seconds.items()} == {"gemm": 10, "add": 3} and calls == {"gemm": 1, "add": 1}


def test_a_run_too_short_to_trace_says_nothing(tmp_path, capsys):
    t = trace.Trace(3, tmp_path)
    t.close()
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())
