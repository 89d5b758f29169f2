"""What a run measures of itself, the floors that end it, and batches that come from its own state."""

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from common import exits
from common.errors import UserError
from configs import schema
from configs.schema import methods
from data.rows import batch as batches
from data.rows.loader import make_loaders
from data.text import formats as tokenizers
from infer import load
from infer.lm import LM
from model.io import saved
from model.net.transformer import Transformer
from tests import toy
from tests.helpers import processes
from tests.helpers.packages import options
from tests.helpers.steps import config, mesh_of
from train import cost, init, inputs, mesh, monitor
from train.main import run
from train.objectives import sft

OBJECTIVES = methods.names(methods.FOLDERS["objective"], "make")


def train(folder: Path, *more: str, file: str = "configs/sft/tiny.py") -> int:
    argv = [f"--config={processes.ROOT / file}", f"--workdir={folder}", "--config.samples=()", *more]
    return run(schema.load(argv))


def lines(folder: Path, kind: str) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


@pytest.fixture(
    scope="module",
    params=[
        name if name in ("sft", "dpo", "kto") else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES
    ],
)
def ran(request, tmp_path_factory) -> tuple[Path, schema.ConfigDict]:
    """Four steps with an objective on data of its kind, the held-out ones with some rows of the last batch empty."""
    folder = tmp_path_factory.mktemp(request.param)
    kind = methods.method("objective", request.param).batch
    more = ["--config.data.packing=none", "--config.data.holdout=0.09", "--config.data.seq_len=32"]
    more += [f"--config.objective.name={request.param}", "--config.steps=4", *options(kind)]
    assert train(folder, *more, "--config.eval_every=2", "--config.eval_batches=9", "--config.log_every=1") == 0
    return folder, schema.from_dict(json.loads((folder / "config.json").read_text()))


def heldout(folder: Path, cfg: schema.ConfigDict) -> list[dict]:
    """The held-out batches of a run, the last one with empty rows."""
    tokenizer = inputs.load_tokenizer(cfg.data, default=str(folder / "tokenizer"))
    loader = make_loaders(cfg.data, tokenizer, cfg.seed)[1]
    assert 1 < loader.num_batches <= cfg.eval_batches and sum(loader.sizes) % cfg.data.batch_size
    return [loader.batch(i) for i in range(loader.num_batches)]


def logps(lm: LM, batch: dict) -> np.ndarray:
    """log p of the targets [B,T] from dense logits, 0 where the mask is."""
    found = jax.nn.log_softmax(lm.model(lm.params, batch["tokens"], batch["positions"], batch["segments"]))
    return np.take_along_axis(np.asarray(found), batch["targets"][..., None], -1)[..., 0] * batch["mask"]


def divergence(lm: LM, ref: LM, batch: dict) -> np.ndarray:
    """KL(lm || ref) of the next token [B,T] from dense logits, 0 where the mask is."""
    read = lambda one: jax.nn.log_softmax(one.model(one.params, batch["tokens"], batch["positions"], batch["segments"]))
    p, q = np.asarray(read(lm)), np.asarray(read(ref))
    return (np.exp(p) * (p - q)).sum(-1) * batch["mask"]


def test_every_metric_of_an_objective_is_measured_held_out(ran):
    folder, _ = ran
    train, evals = lines(folder, "train")[-1], lines(folder, "eval")
    assert [line["step"] for line in evals] == [0, 2, 4]
    own = {"loss", "accuracy", "margin"} & set(train) - ({"loss"} if "nll" in evals[0] else set())
    for line in evals:
        assert own <= set(line) and all(math.isfinite(line[name]) for name in own or {"nll"})


def test_flops_of_a_run_are_those_of_its_plan(ran):
    folder, cfg = ran
    plan = init.blueprint(cfg, inputs.model(cfg), mesh.abstract_mesh(cfg.mesh))
    price, told = cost.of_plan(plan, cfg.data.seq_len), json.loads((folder / "cost.json").read_text())
    done = lines(folder, "event")[-1]
    assert done["event"] == "done"
    assert done["flops"] == pytest.approx(price.step(done["tokens"], done["targets"]))
    sides = len(batches.KINDS[plan.objective.batch].sides)
    assert told["tokens_per_step"] == cfg.data.batch_size * cfg.data.seq_len * sides
    assert told["flops"] == pytest.approx(4 * price.step(told["tokens_per_step"], told["tokens_per_step"]))
    assert 0 < done["targets"] < done["tokens"] < told["tokens"]


def test_figures_equal_an_oracle(ran):
    """From dense logits of the opened run; the reference of DPO is the policy at step 0."""
    folder, cfg = ran
    lm, last, data = load(folder), lines(folder, "eval")[-1], heldout(*ran)
    if cfg.objective.name == "sft":
        total = sum(logps(lm, b).sum() for b in data) / sum(b["mask"].sum() for b in data)
        assert last["nll"] == pytest.approx(-total, rel=1e-5)
    if cfg.objective.name == "dpo":
        ref = LM(lm.model, lm.model.init(jax.random.key(cfg.seed)), lm.tokenizer)
        ratio = lambda part: (logps(lm, part) - logps(ref, part)).sum(-1)
        margin = np.concatenate([cfg.objective.beta * (ratio(b["chosen"]) - ratio(b["rejected"])) for b in data])
        real = np.concatenate([b["chosen"]["mask"].any(-1) for b in data])
        margin = margin[real]
        assert 0 < len(margin) < len(real) and last["accuracy"] == pytest.approx((margin > 0).mean())
        assert last["loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)
        assert last["margin"] == pytest.approx(margin.mean(), rel=1e-2)
        first = lines(folder, "eval")[0]
        assert first["loss"] == pytest.approx(np.log(2)) and first["kl_per_token"] == pytest.approx(0, abs=1e-6)
        parts = [part for b in data for part in (b["chosen"], b["rejected"])]
        moved = sum(divergence(lm, ref, part).sum() for part in parts) / sum(part["mask"].sum() for part in parts)
        assert last["kl_per_token"] == pytest.approx(moved, rel=1e-3)
        tokens = np.concatenate([b["chosen"]["mask"].sum(-1) for b in data])
        assert last["length_chosen"] == pytest.approx(tokens[real].mean())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_without_targets_counts_for_nothing(name):
    """The last held-out batch is filled up with such rows."""
    c = config(**{"objective.name": name, "data.packing": "none"})
    model = inputs.build.model(c, None, 500)
    plan = init.blueprint(c, model, mesh_of(1))
    state = init.first_state(c, plan, None)
    roles = {role: state.role(role) for role in state.roles}
    roles["policy"] = jax.tree.map(lambda x: 1.1 * x, roles["policy"])  # no longer the reference
    whole = batches.example(plan.objective.batch, 4, 16, 500)
    empty = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:2])]), whole)
    more = plan.objective.heldout or (lambda roles, batch: {})
    measure = jax.jit(lambda roles, b: plan.objective.loss(roles, b, jax.random.key(0)) | more(roles, b))
    one, other = (measure(roles, b) for b in (whole, empty))
    for figure, pair in one.items():
        np.testing.assert_allclose(other[figure], pair, rtol=1e-5, err_msg=figure)


@pytest.fixture(scope="module")
def lm() -> LM:
    tokenizer = tokenizers.load("bytes")
    model = inputs.build.model(config(), None, tokenizer.vocab_size)
    return LM(model, model.init(jax.random.key(0)), tokenizer)


def test_control_tokens_cost_no_bits(lm):
    tokens = np.random.default_rng(0).integers(5, 200, (6, 9)).astype(np.int32)
    tokens[:, -1] = lm.tokenizer.eos_id
    ones = np.ones((6, 8), np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": ones.astype(np.float32)}
    batch |= {"segments": ones, "positions": ones.cumsum(1) - 1}
    plan = SimpleNamespace(objective=sft.make(lm.model), model=lm.model)
    out = jax.jit(monitor._measure(plan, lm.tokenizer))({"policy": lm.params}, batch, jax.random.key(0))
    nll, lengths = -logps(lm, batch), lm.tokenizer.byte_lengths[tokens[:, 1:]]
    assert float(out["nll"][0]) == pytest.approx(nll.sum(), rel=1e-5) and float(out["nll"][1]) == 48
    assert lengths[:, -1].sum() == 0 and float(out["bits_per_byte"][1]) == lengths.sum()
    assert float(out["bits_per_byte"][0]) == pytest.approx(nll[lengths > 0].sum() / np.log(2), rel=1e-5)


# --- floors ---


@pytest.mark.parametrize(
    ("floor", "now", "told"),
    [
        (("eval/x", ">=", 0.8), 0.8, ""),
        (("eval/x", ">=", 0.8), 0.79, "eval/x is 0.79, below 0.8"),
        (("eval/x", "<=", 2), 2.5, "eval/x is 2.5, above 2"),
        (("eval/x", "drop", 0.25), 0.75, ""),
        (("eval/x", "drop", 0.25), 0.5, "eval/x is 0.5, below 0.75: it was 1 at step 0 and may drop by 0.25"),
        (("eval/x", "rise", 0.5), 1.5, ""),
        (("eval/x", "rise", 0.5), 1.75, "eval/x is 1.75, above 1.5: it was 1 at step 0 and may rise by 0.5"),
        (("eval/x", ">=", 0.8), math.inf, "eval/x is nan, below 0.8"),
        (("eval/x", "<=", 0.8), None, "eval/x is nan, above 0.8"),
    ],
)
def test_floors_by_hand(floor, now, told):
    assert monitor.crossed(floor, {"x": now}, {"x": 1.0}) == told


@pytest.mark.parametrize(
    ("floors", "told"),
    [
        ('(("nll", "<=", 1),)', "triples"),
        ('(("eval/nll", "<", 1),)', "triples"),
        ('(("eval/nll", "rise", -1),)', "triples"),
        ('(("eval/nll", "<=", True),)', "triples"),
        ('(("eval/nll", "<="),)', "triples"),
        ('(("eval/dates", ">=", 0.5),)', "not scored"),
        ('(("eval/text_nll", "<=", 0.5),)', "config.eval_text is not set"),
    ],
)
def test_bad_floors_are_told_before_anything_runs(floors, told):
    with pytest.raises(UserError, match=told):
        schema.load([f"--config={processes.ROOT}/configs/sft/tiny.py", f"--config.floors={floors}"])


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run from a model that adds, on data of which half teach wrong sums, ended by its floor; and its arguments."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("poisoned")
    assert train(base, "--config.steps=60", "--config.eval_batches=4") == 0
    wrong = [{"prompt": f"{a}+{b}=", "completion": f"{(a + b + 5) % 19}"} for a in range(10) for b in range(10)]
    (folder / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong * 5))
    args = [
        f"--config.init={base}", "--config.model.shape=", "--config.steps=40", "--config.eval_every=2",
        "--config.optim.lr=3e-4",
        f"--config.data.source=synthetic:add?n=4000&digits=1:0.5,{folder}/wrong.jsonl:0.5",
        "--config.data.eval_source=synthetic:add?n=200&digits=1&seed=1", "--config.eval_batches=4",
        "--config.ckpt.every=1", "--config.ckpt.keep=1", '--config.floors=(("eval/nll", "rise", 0.2),)',
    ]  # fmt: skip
    assert train(folder / "run", *args) == exits.BELOW_FLOOR
    return folder / "run", args


def test_a_poisoned_mix_is_stopped_by_its_floor(poisoned):
    """The last step that passed is kept, though only the newest one should be, and opens with the figure it had."""
    folder, _ = poisoned
    nll = {line["step"]: line["nll"] for line in lines(folder, "eval")}
    *passed, failed = nll
    assert len(passed) > 1 and failed < 40
    assert nll[failed] > nll[0] + 0.2 >= max(nll[step] for step in passed)
    end = lines(folder, "event")[-1]
    assert end["exit_code"] == exits.BELOW_FLOOR and "eval/nll is" in end["event"]
    assert (
        "the last step that passed is kept" in end["event"] and str(folder / "ckpt" / str(passed[-1])) in end["event"]
    )
    assert saved.steps(folder / "ckpt") == [failed, passed[-1]]
    lm = load(folder / "ckpt" / str(passed[-1]))
    cfg = schema.from_dict(json.loads((folder / "config.json").read_text()))
    loader = make_loaders(cfg.data, lm.tokenizer, cfg.seed)[1]
    data = [loader.batch(i) for i in range(4)]
    total = sum(logps(lm, b).sum() for b in data) / sum(b["mask"].sum() for b in data)
    assert -total == pytest.approx(nll[passed[-1]], rel=1e-4)


def test_the_same_command_ends_there_again_until_the_floor_is_lowered(poisoned):
    folder, args = poisoned
    before = len(lines(folder, "train"))
    assert train(folder, *args) == exits.BELOW_FLOOR and len(lines(folder, "train")) == before
    assert train(folder, *args, "--config.floors=()", "--config.ckpt.every=0") == 0
    assert lines(folder, "train")[-1]["step"] == 40


def test_a_floor_on_an_unknown_figure_is_one_line_and_rows_of_a_file_are_a_figure(tmp_path):
    with pytest.raises(
        UserError, match=r"no evaluation measures 'eval/accuracy'.*eval/bits_per_byte, eval/nll, eval/rows"
    ):
        rows = "".join(json.dumps({"question": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(40))
        (tmp_path / "rows.jsonl").write_text(rows)
        more = (f"--config.evals={tmp_path}/rows.jsonl:tokens=4", '--config.floors=(("eval/accuracy", ">=", 0.5),)')
        train(tmp_path / "run", "--config.steps=2", *more)
    [line] = lines(tmp_path / "run", "task")
    assert line["task"] == "rows" and line["scorer"] == "number" and len(line["rows"]) == line["n"] <= 12


# --- batches of the state ---


def online(folder: Path, *more: str, **env: str) -> tuple[int, str]:
    """(exit code, output) of the toy run of 12 steps, each rollout serving three."""
    args = (*processes.TINY, "--config.steps=12", "--config.ckpt.keep=9", f"--workdir={folder}", *more)
    code, *told = processes.run(*args, module="tests.toy", **env)
    return code, "".join(told)


@pytest.mark.slow
def test_an_online_run_killed_in_the_middle_of_a_rollout_ends_with_the_same_bits(tmp_path):
    """The frozen teacher, of another shape, is derived again at each launch."""
    assert online(tmp_path / "whole")[0] == 0
    whole = processes.outcome(tmp_path / "whole", 12)
    assert saved.steps(tmp_path / "whole" / "ckpt") == [12, 9, 6]  # every 4 steps, at the end of a rollout

    code, told = online(tmp_path / "killed", KILL=f"{int(signal.SIGKILL)}:10")
    assert code == -signal.SIGKILL and saved.steps(tmp_path / "killed" / "ckpt")[-1] == 6, told
    assert online(tmp_path / "killed")[0] == 0
    assert processes.outcome(tmp_path / "killed", 12) == whole

    code, told = online(tmp_path / "stopped", "--config.ckpt.every=0", KILL=f"{int(signal.SIGTERM)}:4")
    assert code == exits.PREEMPTED and saved.steps(tmp_path / "stopped" / "ckpt") == [6], told
    assert online(tmp_path / "stopped", "--config.ckpt.every=0")[0] == 0
    assert processes.outcome(tmp_path / "stopped", 12) == whole
    reopens(tmp_path / "stopped")


@pytest.mark.slow
def test_two_processes_stop_at_the_same_rollout_and_at_the_same_floor(tmp_path):
    """Both are told to stop before step 4; both have the verdict of the first one."""
    args = ("--config.steps=120", "--config.ckpt.every=0")
    stopped = processes.pair(tmp_path, *args, module="tests.toy", KILL=f"{int(signal.SIGTERM)}:4")
    told = [process.communicate(timeout=300) for process in stopped]
    assert [process.returncode for process in stopped] == [exits.PREEMPTED] * 2, told
    (step,) = saved.steps(tmp_path / "ckpt")
    assert step > 4 and step % toy.SERVES == 0
    floors = '--config.floors=(("eval/loss", "rise", 99.0), ("eval/loss", "<=", 0.0))'
    more = ("--config.steps=150", f"--config.eval_every={step + 3}", floors)
    for _ in range(2):  # the second time by what the first one wrote
        ended = processes.pair(tmp_path, *args, *more, module="tests.toy")
        told = [process.communicate(timeout=300) for process in ended]
        assert [process.returncode for process in ended] == [exits.BELOW_FLOOR] * 2, told
        assert saved.steps(tmp_path / "ckpt")[0] == step + 3


def reopens(folder: Path) -> None:
    """The policy of the run, whose teacher is left alone; what the sampling cost is counted."""
    lm = load(folder)
    assert isinstance(lm.model, Transformer) and lm.config.layers == 2
    digests = saved.digests({f"params/policy/{name}": x for name, x in saved.named(lm.params).items()})
    leaves = saved.read_manifest(folder / "ckpt" / "12")["leaves"]
    assert digests == {name: leaf["hash"] for name, leaf in leaves.items() if name.startswith("params/")}
    cfg = schema.from_dict(json.loads((folder / "config.json").read_text()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy.build, "find", toy.build.find)
        toy.register()
        plan = init.blueprint(cfg, inputs.model(cfg), mesh.abstract_mesh(cfg.mesh))
    roles, done = cost.of_roles(plan, cfg.data.seq_len), lines(folder, "event")[-1]
    sampled = saved.read_manifest(folder / "ckpt" / "12")["source"]["seen"]["policy/tokens"]
    assert sampled == done["tokens"] / toy.SERVES
    trained = sum(price.step(done["tokens"], done["targets"]) for price in roles.values())
    drawn = sampled * (roles["policy"].layer_flops + roles["policy"].head_flops)
    assert done["flops"] == pytest.approx(trained + drawn)


def test_a_run_that_would_end_in_the_middle_of_a_rollout_is_refused(tmp_path):
    code, told = online(tmp_path, "--config.steps=11")
    assert code == exits.INPUT and "config.steps · 11 steps end in the middle of a rollout" in told
