"""Meshes: a context axis changes no loss, kernels agree with the einsums, and a changed rule shows as a diff."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UserError
from configs import schema
from configs.models import SHAPES
from model.config import ModelConfig
from model.net import backends, head
from model.net.attention import attention, context, mask
from model.net.layers import unembed
from model.net.ring import FAR, ring_attention
from model.net.transformer import REMAT
from tests.helpers import processes
from tests.helpers.steps import B, T, config, losses, mesh_of, rows
from tools.plan.parameters import table
from train import inputs, mesh, source
from train.keep import flags

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = {"2": (1, 1, 1, 2), "4": (1, 1, 1, 4), "x fsdp": (1, 2, 1, 4), "x tensor": (1, 1, 2, 2), "all": (1, 2, 2, 2)}


def packed(seed: int = 0) -> dict:
    """Rows of two to four documents and padding, with masks that keep very different numbers of targets."""
    r, batch = np.random.default_rng(seed), rows(seed)
    for i in range(B):
        ends = np.sort(r.choice(np.arange(1, T + 1), r.integers(2, 5), replace=False))
        segments = 1 + np.searchsorted(ends, np.arange(T), side="right")
        segments[segments > len(ends)] = 0
        starts = np.concatenate([[0], ends])[np.where(segments > 0, segments - 1, len(ends))]
        batch["segments"][i], batch["positions"][i] = segments, np.arange(T) - starts
        batch["mask"][i] *= segments > 0
    return batch


# --- the same losses ---


@functools.cache
def curve(objective: str, shape: tuple[int, ...] = (1,), accum: int = 1) -> np.ndarray:
    """Losses of 12 steps on a mesh: data, fsdp, tensor, context."""
    batch = packed() if objective == "sft" else {"chosen": packed(1), "rejected": packed(2)}
    c = config(**{"objective.name": objective, "accum": accum, "optim.lr": 3e-3})  # at 1e-2 rounding grows step by step
    return losses(c, shape, steps=12, batch=batch)[0]


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("objective", "on", "accum"),
    [("sft", "x fsdp", 2)] + [slow("sft", on, 1) for on in CONTEXT] + [slow("dpo", on, 1) for on in ("2", "all")],
)
def test_a_context_axis_changes_no_loss(objective, on, accum):
    one = curve(objective)
    assert one[-1] < 0.9 * one[0]
    np.testing.assert_allclose(curve(objective, CONTEXT[on], accum), one, rtol=2e-5)


@pytest.mark.slow
def test_two_processes_share_rows_and_one_resumes(tmp_path):
    """Each of two processes holds half of the columns of every row; then one process with another mesh goes on."""
    flat = ("--config.optim.schedule=constant", "--config.optim.warmup=0", "--config.samples=()")
    processes.finish([processes.start(*processes.TINY, *flat, f"--workdir={tmp_path / 'one'}")])
    half = (*flat, "--config.steps=8", "--config.mesh.context=8")
    processes.finish(processes.pair(tmp_path / "many", *half, devices=4))
    axes = ("--config.mesh.context=2", "--config.mesh.fsdp=2", f"--workdir={tmp_path / 'many'}")
    processes.finish([processes.start(*processes.TINY, *flat, *axes, devices=4)])
    (_, one, whole), (_, other, parts) = (processes.outcome(tmp_path / name) for name in ("one", "many"))
    assert parts[-1]["event"] == whole[-1]["event"] == "done" and parts[-1]["tokens"] == whole[-1]["tokens"]
    for step in one:
        np.testing.assert_allclose(other[step][0], one[step][0], rtol=2e-5)


def test_columns_of_a_batch_lie_where_the_mesh_says():
    on = mesh_of(2, 1, 1, 4)
    loader = SimpleNamespace(batch_size=B, batch=lambda step: packed(step))
    batch, counts = source.Batches(loader, on).batch(3)
    want = packed(3)
    jax.tree.map(np.testing.assert_array_equal, batch, want)
    assert {s.data.shape for s in batch["tokens"].addressable_shards} == {(B // 2, T // 4)}
    assert counts["tokens"] == (want["segments"] > 0).sum()


@pytest.mark.parametrize(
    ("shape", "changes", "told"),
    [
        ((3,), {}, "8 is not divisible by 3 devices x 1"),
        ((2, 2), {"accum": 4}, "by 4 devices x 4 micro-batches · use a multiple of 16"),
        ((1, 1, 1, 3), {}, "config.mesh.context · 3 does not divide data.seq_len"),
    ],
)
def test_a_batch_that_the_mesh_does_not_divide_is_one_line(shape, changes, told):
    c = config(**{"data.batch_size": 8} | changes)
    with pytest.raises(UserError) as e:
        inputs.sources(c, None, mesh_of(*shape))
    assert told in str(e.value) and "\n" not in str(e.value)


def test_the_head_moves_no_row():
    """Each shard sorts and unembeds its own rows: what the devices exchange is the number of chunks."""
    on, model = (
        mesh_of(2, 1, 1, 4),
        SimpleNamespace(head=lambda table: (functools.partial(unembed, "BTD,DV->BTV", 0.0), table)),
    )
    place, whole = NamedSharding(on, mesh.BATCH), NamedSharding(on, P())
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.device_put(jax.random.normal(keys[0], (B, T, 16)), place)
    table = jax.device_put(jax.random.normal(keys[1], (16, 64)), whole)
    targets = jax.device_put(jax.random.randint(keys[2], (B, T), 0, 64), place)
    counts = jax.device_put((jnp.arange(T) > 20).astype(jnp.float32) * jnp.ones((B, 1)), place)
    with jax.set_mesh(on), nn.logical_axis_rules(mesh.RULES):
        logps = jax.jit(lambda *args: head.token_logps(model, *args)).lower(table, x, targets, counts).compile()
    assert "all-reduce" in logps.as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", logps.as_text())
    want = jnp.take_along_axis(jax.nn.log_softmax(x @ table), targets[..., None], -1)[..., 0] * counts
    np.testing.assert_allclose(logps(table, x, targets, counts), want, atol=1e-4)


# --- attention ---


def problem(T: int, H: int, N: int = 4, K: int = 2) -> tuple:
    """q, k, v, the cotangent (0 on padding), positions, segments: two rows of documents, one ends with padding."""
    keys, quarter = jax.random.split(jax.random.key(0), 4), np.arange(T // 4)
    q, g = (jax.random.normal(key, (2, T, N, H)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, K, T, H)) for key in keys[2:])
    segments = np.repeat([[1, 1, 2, 3], [1, 2, 2, 0]], T // 4, axis=1)
    half = np.arange(T // 2)
    positions = np.stack([np.concatenate([half, quarter, quarter]), np.concatenate([quarter, half, quarter])])
    return q, k, v, g * (segments > 0)[..., None, None], jnp.asarray(positions), jnp.asarray(segments)


def value_and_gradients(f, q, k, v, g) -> tuple:
    def both(q, k, v, g):
        out, pull = jax.vjp(f, q, k, v)
        return out * (g != 0), pull(g)

    return jax.jit(both)(q, k, v, g)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 1, 4, 2), (1, 2, 1, 4)], ids=str)
def test_ring_equals_attention(shape, window, causal):
    """Values and gradients; with tensor 4 the two key heads do not divide."""
    q, k, v, g, positions, segments = problem(32, 16)
    see = mask(positions, segments, positions, segments, window or None, causal)
    want = value_and_gradients(lambda q, k, v: attention(q, k, v, see), q, k, v, g)
    with jax.set_mesh(mesh_of(*shape)):
        ring = lambda q, k, v: ring_attention(q, k, v, positions, segments, window or FAR, causal)
        got = value_and_gradients(ring, q, k, v, g)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize(
    ("shape", "window", "causal"),
    [(None, 0, True), ((1, 1, 4), 100, True), ((2, 1, 2, 2), 100, True), ((1, 1, 4), 0, False), (None, 100, False)],
    ids=str,
)
def test_splash_equals_attention(monkeypatch, shape, window, causal):
    """The TPU's kernel, interpreted: values and gradients, with grouped heads, documents and a window."""
    interpreted = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", interpreted)
    q, k, v, g, positions, segments = problem(512, 64)
    see = mask(positions, segments, positions, segments, window or None, causal)
    want = value_and_gradients(lambda q, k, v: attention(q, k, v, see), q, k, v, g)
    with jax.set_mesh(mesh_of(*shape or (1,))):
        got = value_and_gradients(lambda q, k, v: backends.splash(q, k, v, segments, window, causal), q, k, v, g)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_remat_does_not_run_splash_again():
    """What the backward pass keeps of a layer holds what the kernel returned; with nothing kept it runs once more."""
    q, k, v, *_, segments = problem(512, 64)
    f = lambda remat: jax.checkpoint(lambda q: backends.splash(q, k, v, segments).sum(), policy=REMAT[remat])
    lowered = lambda remat: jax.jit(jax.value_and_grad(f(remat))).trace(q).lower(lowering_platforms=("tpu",))
    kernels = lambda remat: lowered(remat).as_text().count("@tpu_custom_call")
    assert kernels("full") == kernels("dots") + 1


def test_cudnn_lowers(monkeypatch):
    """For a GPU that is absent: its flash attention forward and backward, under the mask of documents; with remat
    "dots" the forward kernel runs once."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    *tensors, positions, segments = problem(64, 64)
    ctx = context(shape(), positions, segments, None, "cudnn")

    def lowered(remat):
        attend = jax.checkpoint(lambda q, k, v: backends.attend(q, k, v, ctx), policy=REMAT[remat])
        traced = jax.jit(lambda *args: value_and_gradients(attend, *args)).trace(
            *(x.astype(jnp.bfloat16) for x in tensors)
        )
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    count = lambda remat: lowered(remat).count("@__cudnn$fmhaScaleBiasSoftmax(")
    assert (count("full"), count("dots")) == (2, 1) and "fmhaScaleBiasSoftmaxBackward(" in lowered("dots")
    assert lowered("dots").count("mask_type\\22: \\22CAUSAL") == 2


def shape(head_dim: int = 64) -> ModelConfig:
    return ModelConfig(**{**SHAPES["llama2-7b"], "head_dim": head_dim})


@pytest.mark.parametrize(
    ("asked", "head_dim", "dtype", "length", "platform", "context", "backend", "why"),
    [
        ("auto", 64, "float32", 100, "cpu", 1, "xla", "type cpu"),
        ("auto", 128, "bfloat16", 2048, "tpu", 4, "splash", "type tpu"),
        ("auto", 128, "bfloat16", 2048, "tpu", 32, "xla", "2048 tokens / 32"),
        ("auto", 80, "bfloat16", 2048, "tpu", 1, "xla", "head size 80"),
        ("auto", 128, "bfloat16", 2048, "gpu", 1, "cudnn", "type gpu"),
        ("auto", 128, "float32", 2048, "gpu", 1, "xla", "activations are float32"),
        ("auto", 128, "bfloat16", 2048, "gpu", 2, "xla", "whole rows"),
        ("xla", 128, "bfloat16", 2048, "tpu", 1, "xla", "as configured"),
        ("splash", 128, "bfloat16", 2048, "cpu", 1, None, "needs a TPU"),
        ("splash", 64, "bfloat16", 2000, "tpu", 1, None, "multiple of 128"),
        ("cudnn", 256, "bfloat16", 2048, "gpu", 1, None, "head size 256"),
    ],
)  # fmt: skip
def test_choice_of_attention(asked, head_dim, dtype, length, platform, context, backend, why):
    choose = lambda: backends.choose(asked, shape(head_dim), dtype, length, platform, context)
    if backend is None:
        with pytest.raises(UserError, match=why):
            choose()
    else:
        found = choose()
        assert found[0] == backend and why in found[1]


def test_splash_leaves_rows_that_are_split_and_looked_at_both_ways_to_the_ring():
    both_ways = ModelConfig.from_dict({**shape().to_dict(), "causal": False})
    choose = lambda split: backends.choose("auto", both_ways, "bfloat16", 2048, "tpu", split)
    assert choose(1)[0] == "splash" and choose(2)[0] == "xla" and "bidirectional" in choose(2)[1]


# --- slices ---


def test_slices_split_the_data_axis_alone():
    """Stand-ins with what the layout reads of a TPU: three slices of eight chips, listed in no order."""
    chip = lambda i: SimpleNamespace(
        id=i, platform="tpu", device_kind="TPU v4", slice_index=i // 8, process_index=i // 4, core_on_chip=0,
        coords=(i % 2, i // 2 % 2, i // 4 % 2),
    )  # fmt: skip
    chips = [chip(i) for i in np.random.default_rng(0).permutation(24)]
    sizes = {"data": -1, "fsdp": 2, "tensor": 2}
    grid = mesh.arrange(mesh.mesh_shape(sizes, 24), chips)
    assert grid.shape == (6, 2, 1, 1, 2)
    assert [{d.slice_index for d in part.flat} for part in grid] == [{0}, {0}, {1}, {1}, {2}, {2}]
    with pytest.raises(UserError, match="3 slices"):
        mesh.arrange((1, 24, 1, 1, 1), chips)


# --- where parameters lie ---

LLAMA = {"model.shape": "llama2-7b", "model.vocab_size": 32000, "data.tokenizer": "bytes", "data.batch_size": 16}
GOLDEN = {
    "llama2_7b_fsdp16": LLAMA | {"mesh.fsdp": 16},
    "llama2_7b_fsdp4_tensor2": LLAMA | {"mesh.fsdp": 4, "mesh.tensor": 2},
    "llama2_7b_lora": LLAMA | {"mesh.fsdp": 16, "peft.name": "lora"},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_places_of_parameters(name):
    """UPDATE_GOLDEN=1 writes the files anew."""
    cfg, _ = schema.resolve(schema.read("configs/pretrain/tiny.py"), GOLDEN[name])
    path, now = ROOT / "tests" / "golden" / f"{name}.txt", table(cfg, 16) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(now)
    assert now == path.read_text()


def test_the_table_command():
    """6,738,415,616 parameters of 4 bytes over 16 devices: all of them divide. No backend is asked for."""
    script = (
        "import sys; from tools.plan.__main__ import main; code = main(sys.argv[1:]); from jax._src import xla_bridge;"
        "assert not xla_bridge._backends, 'a device was touched'; sys.exit(code)"
    )
    args = ["--config=configs/pretrain/tiny.py", "--parameters", "--devices=16", "--config.mesh.data=1"]
    args += [f"--config.{key}={value}" for key, value in GOLDEN["llama2_7b_fsdp16"].items()]
    run = lambda *more: subprocess.run(
        [sys.executable, "-c", script, *args, *more], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["all", f"{6_738_415_616 * 4 // 16:,}"]
    wrong = run("--config.mesh.context=3")
    assert wrong.returncode == 2 and "does not divide data.seq_len" in " ".join(wrong.stderr.split())


# --- compiler flags ---


def test_presets(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine=1")
    monkeypatch.setattr(flags.metadata, "version", lambda name: "0.0.42.1")
    flags.apply("")
    assert os.environ["LIBTPU_INIT_ARGS"] == "--mine=1"
    flags.apply("dcn")
    assert os.environ["LIBTPU_INIT_ARGS"].startswith("--mine=1 --xla_tpu_enable_data_parallel_all_reduce_opt=true ")
    with pytest.raises(UserError, match="known: overlap"):
        flags.apply("fastest")
    monkeypatch.setattr(flags.metadata, "version", lambda name: "0.0.1")
    with pytest.raises(UserError, match=r"no presets for libtpu 0\.0\.1"):
        flags.apply("dcn")
