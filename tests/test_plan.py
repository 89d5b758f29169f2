"""Plans: collectives and loops read from HLO, bytes and FLOPs against real ones, and compiles for absent TPUs."""

import functools
import importlib.util
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import schema
from configs.models import SHAPES
from infer import batch, prefix
from model import build, weights
from model.config import ModelConfig
from model.net.transformer import Transformer, unstack
from tests.helpers.chips import gpu, tpu
from tests.helpers.encoders import encoder
from tests.helpers.packages import OBJECTIVES
from tests.helpers.steps import config
from tools.plan import __main__ as plan
from tools.plan import hlo, step, topology
from train import cost, init
from train import mesh as meshes

SHAPE = {"data": 2, "fsdp": 4, "tensor": 2}
FSDP = [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]


@pytest.mark.parametrize(
    "attrs, groups, axes",
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}, dimensions={0}", FSDP, ("fsdp",)),
        ("replica_groups=[8,2]<=[16], to_apply=%add", np.arange(16).reshape(8, 2), ("tensor",)),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", FSDP, ("fsdp",)),
        ("replica_groups=mesh['a'=8,'b'=2] {'a'}, x", np.arange(16).reshape(8, 2).T, ("data", "fsdp")),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b'}", FSDP, ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'a'}", np.arange(16).reshape(8, 2), ("tensor",)),
        ("replica_groups=mesh['a'=16] {'a':(2)4}", FSDP, ("fsdp",)),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}, x", [[0, 2], [2, 4], [4, 6], [6, 0]], ("fsdp",)),
        ("replica_groups={}, to_apply=%add", [list(range(16))], ("data", "fsdp", "tensor")),
    ],
)
def test_groups_of_devices_in_every_form(attrs, groups, axes):
    found = hlo.device_groups(attrs, 16)
    assert sorted(map(sorted, found.tolist())) == sorted(map(sorted, np.asarray(groups).tolist()))
    assert hlo.spanned(found, SHAPE) == axes


def test_bytes_sent_are_those_of_the_loop():
    """Five turns of a gather over fsdp and a permute over tensor, and one sum over data, by hand."""
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    mesh = jax.make_mesh((2, 2, 2), tuple(shape), axis_types=(AxisType.Auto,) * 3)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(("data", "fsdp", "tensor")), out_specs=P(), check_vma=False)
    def f(x):  # [8,3] a device
        def turn(_, x):
            whole = jax.lax.all_gather(x, "fsdp", tiled=True)  # sends [8,3]
            x = jnp.tanh(whole.reshape(2, 8, 3).sum(0))
            return jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])

        return jax.lax.psum(jax.lax.fori_loop(0, 5, turn, x), "data")

    text = jax.jit(f).lower(jax.ShapeDtypeStruct((64, 3), jnp.float32)).compile().as_text()
    program = hlo.Program(text, unknown_trips=1000)
    one, found = 8 * 3 * 4, program.sent(shape)
    assert found == {
        "fsdp": {"all-gather": 5 * one},
        "tensor": {"collective-permute": 5 * one},
        "data": {"all-reduce": one},
    }


LOOP = """
%add (l: bf16[], r: bf16[]) -> bf16[] {
  %l = bf16[] parameter(0)
  %r = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%l, %r)
}

%cond (p: (u32[], bf16[4])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %p = (u32[]{:T(128)}, /*index=1*/bf16[4]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p.1: (u32[], bf16[4])) -> (u32[], bf16[4]) {
  %two = u32[] constant(2)
  %p.1 = (u32[], bf16[4]{0}) parameter(0)
  %i.1 = u32[] get-tuple-element(%p.1), index=0
  %x = bf16[4]{0} get-tuple-element(%p.1), index=1
  %next = u32[] add(%i.1, %two)
  %all-reduce.1 = bf16[4]{0} all-reduce(%x), channel_id=7, replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (u32[], bf16[4]{0}) tuple(%next, %all-reduce.1)
}

ENTRY %main (a: bf16[4]) -> bf16[4] {
  %zero = u32[] constant(0)
  %a = bf16[4]{0} parameter(0)
  %start = (u32[], bf16[4]{0}) tuple(%zero, %a)
  %w = (u32[], bf16[4]{0}) while(%start), condition=%cond, body=%body
  ROOT %out = bf16[4]{0} get-tuple-element(%w), index=1
}
"""


def test_trips_as_a_tpu_writes_them():
    """No known_trip_count there: 8 by steps of 2 are 4 turns, of 2 x 1/2 x 8 bytes each."""
    program = hlo.Program(LOOP, 1)
    assert program.sent({"data": 2}) == {"data": {"all-reduce": 4 * 8}}
    assert hlo.Program(LOOP.replace("constant(8)", "negate(%j)"), 100).times["body"] == 100


STACK = """
%write (s: bf16[28,64], u: bf16[1,64], i: s32[]) -> bf16[28,64] {
  %s = bf16[28,64]{1,0} parameter(0)
  %u = bf16[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %new = bf16[28,64]{1,0} dynamic-update-slice(%s, %u, %i, %none)
}

ENTRY %main (a: bf16[28,64], b: bf16[1,64], n: s32[]) -> bf16[28,64] {
  %a = bf16[28,64]{1,0} parameter(0)
  %b = bf16[1,64]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %begun = ((bf16[28,64]{1,0}, bf16[1,64]{1,0}, s32[]), bf16[28,64]{1,0}) fusion-start(%a, %b, %n), calls=%write
  ROOT %done = bf16[28,64]{1,0} fusion-done(%begun)
}
"""


def test_a_gpu_writes_a_row_of_a_stack_in_place():
    """One of 128 bytes is read and written, and its number; by a fusion that goes on beside others."""
    assert hlo.Program(STACK, 1).traffic() == 2 * 128 + 4


@pytest.mark.parametrize("changes", [{}, {"peft.name": "lora"}, {"objective.name": "dpo"}], ids=["sft", "lora", "dpo"])
def test_bytes_are_those_that_devices_hold(changes):
    """Arguments by kind against a real state and batch on eight CPU devices."""
    changes = changes | ({"data.packing": "none"} if "objective.name" in changes else {})
    c = config(**{"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "data.seq_len": 32, "data.batch_size": 8} | changes)
    c, _ = schema.resolve(c)
    model = build.model(c, None, 500)
    got = step.plan(c, model, jax.devices())["bytes"]
    mesh = meshes.make_mesh(c.mesh, jax.devices())
    with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
        state = init.first_state(c, init.blueprint(c, model, mesh), None)
    on = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    assert got["params"] == on(state.params)
    assert got["optimizer"] == on(state.opt_state)
    assert got["frozen"] == on(state.frozen)
    assert got["batch"] == (2 if "objective.name" in changes else 1) * 5 * (8 // 4) * 32 * 4
    assert (
        abs(got["arguments"] - on(state) - got["batch"]) <= 0.02 * got["arguments"]
    )  # what XLA does not read is left out


def test_decoding_sends_activations_and_no_weights():
    """With heads over the tensor axis: a token of 4 rows sends less than the smallest matrix of a layer holds."""
    shape = {"model.embed": 256, "model.heads": 8, "model.kv_heads": 4, "model.mlp": 512}
    c, _ = schema.resolve(
        config(**{"mesh.data": 1, "mesh.tensor": 4, "data.seq_len": 16, "data.batch_size": 4} | shape)
    )
    sent = step.plan(c, build.model(c, None, 512), jax.devices()[:4], "decode")["sent"]
    assert 0 < sum(sent["tensor"].values()) < 4 * 256 * 4 * 32


@pytest.mark.parametrize("peft", ["", "lora"])
def test_flops_are_those_of_an_unrolled_compile(peft):
    """The equations against XLA's count of the same loss, its loops undone, within 2 %."""
    shape = {"model.embed": 512, "model.heads": 8, "model.mlp": 1024, "model.remat": "none", "data.seq_len": 16}
    c, _ = schema.resolve(config(**shape | {"peft.name": peft}))
    model = build.model(c, None, 500)
    mesh = jax.make_mesh((1,) * len(meshes.AXES), meshes.AXES, devices=jax.devices()[:1])
    planned = init.blueprint(c, model, mesh)
    T, B = 16, 2
    part = {k: jax.ShapeDtypeStruct((B, T), jnp.int32) for k in ("tokens", "targets", "segments", "positions")}
    part["mask"] = jax.ShapeDtypeStruct((B, T), jnp.float32)
    undo = lambda tree: unstack(tree, model.config)
    train, frozen = (jax.eval_shape(undo, x["policy"]) for x in (planned.abstract.params, planned.abstract.frozen))

    def loss(train, frozen, batch):
        return planned.objective.loss({"policy": weights.combine(train, frozen)}, batch, None)["loss"][0]

    counted = jax.jit(jax.grad(loss)).lower(train, frozen, part).compile().cost_analysis()["flops"]
    price = cost.of_plan(planned, 2 * T - 1)  # dense attention computes all T keys a query
    first = 0.0  # a frozen base: nothing below the first layer's adapters needs a gradient, so XLA leaves that out
    if peft:
        c = model.config
        first = 2 * c.embed * (c.heads + 2 * c.kv_heads) * c.head_dim * B * T
    assert price.step(B * T, B * T) - first == pytest.approx(counted, rel=0.02)


def test_what_a_user_gets_wrong_is_one_line(capsys):
    argv = ["--config=configs/pretrain/tiny.py"]
    assert plan.main(argv) == 2 and "--topology" in capsys.readouterr().err
    assert plan.main([*argv, "--topology=v5e:2x2", "--what=dance"]) == 2
    assert "train or decode" in capsys.readouterr().err


def test_a_search_finds_the_best_in_few_plans(monkeypatch):
    """Against a machine of 16 devices in two equations: what a device holds, and what it does a second."""
    tried = []

    def planned(cfg, devices, flags):
        rows, tensor = cfg.data.batch_size // cfg.accum / cfg.mesh.fsdp, cfg.mesh.tensor
        held = rows / tensor * {"full": 1, "dots": 3, "none": 6}[cfg.model.remat]
        rate = (
            1e5 * rows / (rows + 1) / tensor * {"full": 1.0, "dots": 1.2, "none": 1.3}[cfg.model.remat] / cfg.accum**0.1
        )
        tried.append((rows, tensor, cfg.model.remat, cfg.accum))
        return {"fits": held <= 7, "tokens_per_second": (rate, rate)}

    monkeypatch.setattr(plan, "plan", planned)
    c, _ = schema.resolve(config(**{"data.batch_size": 256, "model.heads": 8, "model.kv_heads": 8}))
    found = plan.search(c, [None] * 16, {"what": "train", "minutes": 1.0})
    assert tried[:4] == [(16, 1, "full", 1), (8, 1, "full", 1), (4, 1, "full", 1), (4, 1, "dots", 1)]
    best = {"mesh.data": 1, "mesh.fsdp": 16, "mesh.tensor": 1, "model.remat": "full", "data.batch_size": 64, "accum": 1}
    assert found[0]["changes"] == best and [f["rank"] for f in found] == sorted(
        (f["rank"] for f in found), reverse=True
    )
    assert {tensor for _, tensor, _, _ in tried} == {1, 2} and len(tried) < 12
    assert tried[-1] == (4, 1, "full", 4)
    assert plan.search(c, [None] * 16, {"what": "train", "minutes": -1.0}) == []


COMPILERS = {"v5e:2x2": ("tpu", "libtpu"), "h100:8": ("gpu", "jax_cuda12_plugin")}


@pytest.mark.parametrize("on", COMPILERS)
def test_without_the_compiler(on, capsys, monkeypatch):
    extra, package = COMPILERS[on]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    assert plan.main(["--config=configs/pretrain/tiny.py", f"--topology={on}"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"requirements/{extra}.txt" in told


def test_more_gpus_than_a_machine_has_are_one_line(capsys):
    assert plan.main(["--config=configs/pretrain/tiny.py", "--topology=h100:9"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "h100:8" in told


def test_a_gpu_fits_what_jax_takes_of_it(monkeypatch):
    """Of 80 GiB three quarters, or the share that the environment says."""
    assert topology.room(64_000_000_000)[0] and not topology.room(65_000_000_000)[0]
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert topology.room(65_000_000_000) == (True, "65.0 GB of 77.3 GB (XLA_PYTHON_CLIENT_MEM_FRACTION=0.9)")


# --- with libtpu, or with the CUDA wheels ---

TINY = ["--config.model.shape=tiny", "--config.data.tokenizer=bytes", "--config.data.seq_len=128", "--json"]


def planned(capsys, *argv):
    code = plan.main([*argv, *TINY])
    return code, json.loads(capsys.readouterr().out)


SLICES = {
    "v5e:2x4": ("--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"),
    "v5p:2x2x1": ("--config.mesh.fsdp=4",),
    "v6e:2x2": ("--config.mesh.fsdp=2",),
    "tpu7x:2x2x1": ("--config.accum=2",),
    "h100:4": ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
}
STEPS = {name: (f"--config.objective.name={name}", "--config.data.packing=none") for name in OBJECTIVES}
STEPS |= {"lora": ("--config.peft.name=lora",), "decode": ("--what=decode",)}


@pytest.mark.parametrize("on", [pytest.param(s, marks=gpu if s.startswith("h100") else tpu) for s in SLICES])
@pytest.mark.parametrize("name", STEPS)
def test_compiles_for_a_slice_that_is_absent(name, on, capsys):
    argv = ["--config=configs/sft/tiny.py", f"--topology={on}", "--config.data.batch_size=16"]
    code, got = planned(capsys, *argv, *SLICES[on], *STEPS[name])
    assert code == 0 and got["fits"]
    held = sum(got["bytes"].get(k, 0) for k in ("params", "optimizer", "frozen", "batch", "cache"))
    assert 0 < held <= 1.3 * got["bytes"]["arguments"]  # tiles are padded, and what is not read is left out
    low, high = got["seconds"]
    assert 0 < low <= high and 0 < got["mfu"][0] <= got["mfu"][1] <= 1
    if got["mesh"]["fsdp"] > 1:
        assert "all-gather" in got["sent"]["fsdp"]


@pytest.mark.parametrize("on", [pytest.param(slice, marks=tpu) for slice in ("v5e:2x2", "v6e:2x2")])
def test_the_step_of_an_encoder_compiles(on, tmp_path, capsys):
    """Bidirectional, with learned positions, questions and passages over all devices."""
    argv = [f"--config.init={encoder(tmp_path)}", "--config.data.source=synthetic:add_matches", "--config.epochs=0"]
    argv += ["--config.data.seq_len=8", "--config.data.batch_size=16", "--json"]
    assert plan.main(["--config=configs/embed/own_documents.py", f"--topology={on}", *argv]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


@pytest.mark.parametrize("on", [pytest.param(s, marks=tpu) for s in ("v5e:2x2", "v6e:2x2")])
@pytest.mark.parametrize("shape", ["tiny", "tiny-griffin"])
def test_decoding_with_a_shared_prefix_compiles(shape, on):
    """A prefix is copied into 8 rows, which read their own tokens, enter a ring of 16 rows in place, and decode."""
    mesh = Mesh(topologies.get_topology_desc(platform="tpu", topology_name=on).devices, "all")
    config = ModelConfig.from_dict(SHAPES[shape] | dict(head_dim=64))  # libtpu crashes on v6e with heads of 16
    model = Transformer(config, dtype="bfloat16", param_dtype="bfloat16")
    on_chip = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
    abstract = lambda f, *args: jax.tree.map(on_chip, jax.eval_shape(f, *args))
    numbers = lambda *shape: on_chip(jax.ShapeDtypeStruct(shape, jnp.int32))
    kept, begun, ring = (abstract(lambda n=n, c=c: model.cache(n, c)) for n, c in ((1, 384), (8, 448), (16, 512)))
    params = abstract(lambda: unstack(model.init(jax.random.key(0)), model.config))
    compiled = [
        prefix.insert.lower(begun, kept, numbers(8), numbers(8), numbers()).compile(),
        prefix._prefill.lower(model, params, *[numbers(8, 64)] * 3, numbers(8), begun).compile(),
        prefix.insert.lower(ring, begun, numbers(8), numbers(8), numbers()).compile(),
        batch._decode.lower(model, params, ring, abstract(lambda: batch.arrays([None] * 16)), 16, 8).compile(),
    ]
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(ring))
    for memory in (c.memory_analysis() for c in compiled[2:]):
        assert memory.alias_size_in_bytes >= held and memory.temp_size_in_bytes < held


@pytest.mark.parametrize("on", [pytest.param("v5e:2x2", marks=tpu)])
def test_layers_are_cast_one_by_one(on):
    """XLA casts them all before the loop where it can; should it stop to, `weights.cast` is of no more use."""
    mesh = Mesh(topologies.get_topology_desc(platform="tpu", topology_name=on).devices, "fsdp")
    array = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))
    x, w = array((8192, 2048), jnp.bfloat16, "fsdp"), array((32, 2048, 2048), jnp.float32, None, "fsdp")
    copy = 2 * w.size // len(mesh.devices)

    def temp(product):
        layer = jax.checkpoint(lambda x, w: (product(x, w), None), prevent_cse=False)
        run = jax.jit(jax.grad(lambda w, x: jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum()))
        return run.lower(w, x).compile().memory_analysis().temp_size_in_bytes

    bare = lambda x, w: jnp.einsum("TD,DF->TF", x, w.astype(x.dtype))
    assert temp(functools.partial(weights.einsum, "TD,DF->TF")) <= temp(bare) - copy


@pytest.mark.parametrize("n", [pytest.param(1, marks=tpu)])
def test_says_what_to_turn_when_memory_runs_out(n, capsys):
    argv = ["--config=configs/pretrain/llama2_7b.py", "--topology=v5e:4x4", "--config.data.batch_size=512", "--json"]
    assert plan.main(argv) == 2
    got = json.loads(capsys.readouterr().out)
    assert not got["fits"] and "RESOURCE_EXHAUSTED" in got["verdict"] and "config.accum=2" in got["turn"]
    assert plan.main([argv[0], "--topology=v5e:2x2", "--json"]) == 2
    assert "more devices" in json.loads(capsys.readouterr().out)["turn"]


@pytest.mark.parametrize("n", [pytest.param(1, marks=gpu)])
def test_says_what_to_turn_when_a_gpu_is_too_small(n, capsys):
    assert plan.main(["--config=configs/pretrain/llama2_7b.py", f"--topology=h100:{n}", "--json"]) == 2
    got = json.loads(capsys.readouterr().out)
    assert not got["fits"] and "of 64.4" in got["verdict"] and "more devices" in got["turn"]


@pytest.mark.parametrize("minutes", [pytest.param(0.1, marks=tpu)])
def test_a_search_ends_in_time(minutes, capsys):
    argv = ["--config=configs/sft/tiny.py", "--topology=v5e:2x2", "--search", f"--minutes={minutes}"]
    code, got = planned(capsys, *argv)
    assert code == 0 and got[0]["fits"] and got[0]["changes"]["model.remat"] == "full"


@pytest.mark.parametrize("name", [pytest.param("v5e:banana", marks=tpu)])
def test_an_unknown_slice_is_one_line(name, capsys):
    assert plan.main(["--config=configs/sft/tiny.py", f"--topology={name}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("slices", [pytest.param(2, marks=tpu)])
def test_slices_exchange_gradients_alone(slices, capsys):
    """Over the data axis between two slices each device sends, of an all-reduce of its share, 2 (s - 1) / s = once."""
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=4"]
    argv = ["--config=configs/sft/tiny.py", "--topology=v5e:2x2", "--config.data.batch_size=16", *mesh]
    code, got = planned(capsys, *argv, f"--slices={slices}")
    assert code == 0 and got["fits"] and got["mesh"]["data"] == slices
    between = got["sent"][hlo.BETWEEN]
    assert between.keys() == {"all-reduce"}
    gradients = got["bytes"]["gradients"]
    assert gradients <= between["all-reduce"] <= 3 * gradients  # tiles of small arrays are padded
    low, _ = got["seconds_by"]["data center network"]
    assert low == pytest.approx(between["all-reduce"] / 3.125e9)


def test_how_many_slices_a_transfer_joins():
    target = lambda t: hlo._megascale(f'a="b",_xla_megascale_target="{t}",_xla_megascale_transfer_type="ALL_REDUCE"')
    assert [target(t) for t in ("{1,2}x{0:3}", "{1:4}x{0:3}", "{1:2,5}x{0}")] == [2, 4, 3]
