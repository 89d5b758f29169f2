"""Kernels against their references, interpreted on the CPU; whole and on shards; and how the report reads a listing."""

import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import blocks, codes_triton, int4_matmul, packing
from kernels import nf4 as kernel_nf4
from model import paged, weights
from model.quant import _multiply, fp8, int4, int8, nf4
from tests.helpers.chips import gpu, tpu
from tests.helpers.models import rand, relative
from tools.kernel_report import __main__ as kernel_report
from tools.kernel_report import schedule
from tools.kernel_report.cases import by_xla, cases
from tools.plan import hlo, topology
from train.mesh import RULES, make_mesh

ROOT = Path(__file__).parents[1]


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run on the CPU, and leaves choose as they do on a TPU, or on what `interpreted` is called with."""
    call = pl.pallas_call
    jax.clear_caches()  # of what was traced for a device
    monkeypatch.setattr(pl, "pallas_call", lambda *a, **k: call(*a, **k | {"interpret": True}))

    def leaves_on(platform):
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, default, **on: on.get(platform, default)(*a))

    leaves_on("tpu")
    yield leaves_on
    jax.clear_caches()


@pytest.mark.parametrize(
    "by, m, k, n, group",
    [
        (int4_matmul, 5, 512, 160, 64),  # whole blocks of bytes, column after column
        (int4_matmul, 16, 576, 300, 128),  # a ragged last group
        pytest.param(int4_matmul, 3, 6656, 130, 64, marks=pytest.mark.slow),  # the last block of rows holds less
        pytest.param(int4_matmul, 130, 2048, 200, 64, marks=pytest.mark.slow),
        pytest.param(int4_matmul, 200, 2560, 256, 64, marks=pytest.mark.slow),
        pytest.param(int4_matmul, 1100, 256, 2100, 32, marks=pytest.mark.slow),  # several blocks each way
        (codes_triton, 5, 1240, 97, 64),  # five shares of the groups, and a ragged last group
        (codes_triton, 16, 576, 128, 128),
        (codes_triton, 130, 608, 300, 32),  # several blocks of rows; the last share has fewer groups
        (codes_triton, 600, 256, 64, 64),  # left to XLA
        pytest.param(codes_triton, 1, 4096, 64, 128, marks=pytest.mark.slow),
        pytest.param(codes_triton, 64, 640, 3, 32, marks=pytest.mark.slow),
        pytest.param(codes_triton, 400, 1240, 260, 64, marks=pytest.mark.slow),  # several blocks each way
    ],
)
def test_int4_is_its_reference(interpreted, by, m, k, n, group):
    """Both regimes and both directions, with ragged columns, rows and groups; bfloat16 inputs, sums in float32."""
    eqn, platform = "TD,DF->TF", "tpu" if by is int4_matmul else "cuda"
    leaf = int4.make(group=group).encode(rand(k, n), eqn)
    x, g = rand(m, k, seed=1).astype(jnp.bfloat16), rand(m, n, seed=2).astype(jnp.bfloat16)
    taken = _multiply.kernels(leaf, m, jnp.bfloat16, backward=False)
    assert (platform in taken) == (m <= codes_triton.MOST or by is int4_matmul)
    interpreted(platform)
    product = jax.jit(lambda x, leaf: leaf.einsum(eqn, x))  # no constants: XLA folds those of 4 bits wrongly on a CPU
    y, pull = jax.vjp(lambda x: product(x, leaf), x)
    want, pull_plain = jax.vjp(lambda x: by_xla(leaf, False, x, leaf.codes, leaf.scale), x)
    assert relative(*map(jnp.float32, (y, want))) < 4e-3  # bfloat16 keeps 8 bits
    assert relative(*map(jnp.float32, (pull(g)[0], pull_plain(g)[0]))) < 4e-3
    few = x[:5].astype(jnp.float32)
    assert relative(by.matmul(few, leaf.codes, leaf.scale, group), few @ leaf.floats(jnp.float32)) < 1e-5


@pytest.mark.parametrize("m, k, n", [(5, 1240, 97), pytest.param(100, 320, 200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fmt", ["int4", "nf4", "int8", "fp8"])
def test_codes_of_every_form(interpreted, fmt, m, k, n):
    """Ragged rows, columns and groups on a GPU, against the dequantized leaf."""
    interpreted("cuda")
    leaf = FORMATS[fmt].encode(rand(k, n), "TD,DF->TF")
    x, w = rand(m, k, seed=1), leaf.matrix()
    y, pull = jax.vjp(lambda x: leaf.einsum("TD,DF->TF", x), x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and relative(y.astype(jnp.float32), x @ w) < 6e-3
    g = rand(m, n, seed=2).astype(jnp.bfloat16)
    assert relative(pull(g)[0].astype(jnp.float32), g.astype(jnp.float32) @ w.T) < 6e-3
    taken = [_multiply.kernels(leaf, m, dtype, backward=False) for dtype in (jnp.bfloat16, jnp.float32)]
    assert ["cuda" in kernels for kernels in taken] == [True, fmt != "nf4" and 3 * m <= codes_triton.MOST]
    assert relative(leaf.einsum("TD,DF->TF", x), x @ w) < 1e-5


@pytest.mark.parametrize("by", [int4_matmul, codes_triton])
def test_int4_by_hand(interpreted, by):
    """Rows 3, -2, 0, ... of one group with scale 0.5, times 2, 1, 0, ...: (6 - 2) / 2."""
    codes = packing.pack(jnp.zeros((64, 128)).at[0].set(3).at[1].set(-2))
    x = jnp.zeros((1, 64), jnp.bfloat16).at[0, :2].set(jnp.array([2, 1]))
    y = by.matmul(x, codes, jnp.full((1, 128), 0.5, jnp.bfloat16), 64)
    np.testing.assert_array_equal(y, jnp.full((1, 128), 2.0))


@pytest.mark.parametrize(
    "k, n", [(256, 160), *[pytest.param(*s, marks=pytest.mark.slow) for s in ((576, 130), (4608, 128))]]
)
def test_nf4_is_its_reference_bit_for_bit(interpreted, k, n):
    leaf = nf4.make().encode(rand(k, n), "TD,DF->TF").plain_scales()
    assert kernel_nf4.supported(k, n, 64)
    scale = leaf.scale
    got = jax.jit(functools.partial(kernel_nf4.dequantize, group=64))(leaf.codes, scale)
    np.testing.assert_array_equal(got, leaf.floats(jnp.bfloat16))
    for m in (1, 20):
        x = rand(m, k, seed=1).astype(jnp.bfloat16)
        y, want = kernel_nf4.matmul(x, leaf.codes, scale, 64), by_xla(leaf, False, x, leaf.codes, scale)
        assert y.dtype == want.dtype and relative(y.astype(jnp.float32), want.astype(jnp.float32)) < 3e-3
    assert got[3, 5] == jnp.bfloat16(np.float32(packing.LEVELS[int(packing.unpack(leaf.codes, k)[3, 5])]) * scale[0, 5])


@pytest.mark.parametrize(
    "rows, columns, by_columns", [(2048, 4096, 0), (2048, 4100, 1), (768, 576, 1), (288, 576, 0), (288, 192, 0)]
)
def test_bytes_lie_as_xla_lays_them(rows, columns, by_columns):
    """Against the layouts that libtpu gave parameters of these shapes."""
    assert packing.by_columns(rows, columns) == by_columns


@pytest.mark.parametrize("fmt", ["int4", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_decoding_loop_has_whole_registers_of_columns(interpreted, monkeypatch, fmt):
    """Of a TPU, where XLA would turn the bytes of 260 columns; products and values stay what they are."""
    leaf, x = FORMATS[fmt].encode(rand(1024, 260), "BTD,DF->BTF"), rand(1, 3, 1024, seed=1).astype(jnp.bfloat16)
    assert leaf.for_inference() is leaf or fmt == "nf4"  # on a CPU
    monkeypatch.setattr(weights, "platform", lambda: "tpu")
    wide = leaf.for_inference()
    assert (wide.codes.shape, wide.scale.shape, wide.shape) == ((512, 384), (16, 384), (1024, 260))
    np.testing.assert_array_equal(wide.floats(jnp.float32), leaf.floats(jnp.float32))
    for rows in (x, jnp.tile(x, (1, 50, 1))):  # of the two regimes
        y, want = (jax.jit(lambda x, w: w.einsum("BTD,DF->BTF", x))(rows, w) for w in (wide, leaf))
        np.testing.assert_array_equal(y, want)
    assert FORMATS[fmt].encode(rand(1024, 256), "BTD,DF->BTF").for_inference().codes.shape == (512, 256)


def test_blocks_pad_least():
    assert blocks.cut(4096, 768, 256) == 512 and blocks.cut(4100, 768, 256) == 768
    assert blocks.cut(11008, 6144, 512) == 5632 and blocks.cut(300, 768, 256) == 300


# --- shards ---

FORMATS = {"int4": int4.make(group=64), "nf4": nf4.make(), "int8": int8.make(), "fp8": fp8.make()}


@pytest.mark.parametrize(
    "fmt, platform, eqn, shape",
    [
        ("int4", "tpu", "BTD,DF->BTF", (256, 256)),
        ("int4", "tpu", "BTNH,NHD->BTD", (4, 64, 512)),
        ("int4", "cuda", "BTD,DF->BTF", (256, 256)),
        ("int4", "cuda", "BTNH,NHD->BTD", (4, 64, 512)),
        ("nf4", "cuda", "BTD,DF->BTF", (256, 256)),
        ("int8", "cuda", "BTD,DF->BTF", (256, 256)),
        ("nf4", "tpu", "BTF,FD->BTD", (256, 512)),
        pytest.param("nf4", "tpu", "BTD,DF->BTF", (256, 256), marks=pytest.mark.slow),
        pytest.param("nf4", "tpu", "BTNH,NHD->BTD", (4, 64, 512), marks=pytest.mark.slow),
    ],
)
def test_on_shards_it_is_the_plain_product(interpreted, monkeypatch, fmt, platform, eqn, shape):
    """W over fsdp and tensor, both ways: columns over tensor stay split, rows over tensor are summed."""
    interpreted(platform)
    used = []
    tpu = (int4_matmul, "matmul"), (int4_matmul, "gradient"), (kernel_nf4, "dequantize"), (kernel_nf4, "matmul")
    for module, name in {"tpu": tpu, "cuda": ((codes_triton, "matmul"),)}[platform]:
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, k=kernel, **kw: used.append(a[-2].shape) or k(*a, **kw))
    leaf = FORMATS[fmt].encode(rand(*shape), eqn)
    x = rand(4, 2, *shape[: len(shape) - 1], seed=1).astype(jnp.bfloat16)
    plain = leaf.replace(codes=leaf.codes)
    want, pull = jax.vjp(lambda x: jnp.einsum(eqn, x, plain.floats(jnp.bfloat16)), x)
    g = rand(*want.shape, seed=2).astype(jnp.bfloat16)
    with jax.set_mesh(make_mesh({"data": 1, "fsdp": 4, "tensor": 2})), nn.logical_axis_rules(RULES):
        got, dx = jax.jit(
            lambda x, g, leaf: (lambda y, back: (y, back(g)[0]))(*jax.vjp(lambda x: leaf.einsum(eqn, x), x))
        )(x, g, leaf)
    assert relative(*map(jnp.float32, (got, want))) < 5e-3
    assert relative(*map(jnp.float32, (dx, pull(g)[0]))) < 5e-3
    k, n = leaf.kn
    rows, columns = {"BTD,DF->BTF": (k, n // 2)}.get(eqn, (k // 2, n))
    byte = 2 if leaf.codes.dtype == jnp.uint8 else 1
    assert used and set(used) == {(rows // byte, columns)}  # gathered over fsdp, not over tensor


# --- the report ---

LISTING = """
     0   :  { %s1 = smov 0 } /* Start region 1 :: End region 1 */
   0x1 LB: > { %v1 = vmatmul.bf16.gmra.mxu0 %v2 /* Start region 2 */ }
   0x2   : > { sbr.rel (%p1) target = $region9 }
{skipped}
  0x50   : > { %v3 = vst [vmem:[#allocation7_spill] sm:$0xff] %v1 /* Start region 9 */ }
  0x51   : > { %p2 = scmp.ge.s32.totalorder %s1_s2, 6 /* loop exit test */ /* stage = 1 */ }
  0x52   : > { sbr.rel (!%p2) target = $region2 }
  0x53   :  { shalt.err }
"""


def test_a_listing_by_hand():
    """Six turns of which two fill and drain; 30 bundles of the body run once in three."""
    skipped = "\n".join(f"  {0x10 + i:#x}   : > {{ %v9 = vadd.f32 %v1, %v2 }}" for i in range(30))
    got = schedule.read(LISTING.replace("{skipped}", skipped), sums=3)
    assert (got.turns, got.hot, got.products, got.spills, got.known) == (4, 2 + 3 + 1, 1, 1, True)
    assert got.cycles == 1 + 4 * 6 + 30 * 2  # ceil(4 / 3) of the skipped ones


def test_moved_bytes_by_hand():
    """W [256, 300] is read once, x [1100, 256] once for each of one block of columns, y [1100, 300] written once."""
    args = jnp.zeros((1100, 256), jnp.bfloat16), jnp.zeros((128, 300), jnp.uint8), jnp.zeros((4, 300), jnp.bfloat16)
    (grid,) = kernel_report.calls(jax.make_jaxpr(lambda *a: int4_matmul.matmul(*a, 64))(*args).jaxpr)
    assert grid.grid == (2, 1, 1)
    assert kernel_report.moved(grid) == 2 * 1100 * 256 + 128 * 300 + 2 * 4 * 300 + 2 * 1100 * 300


def test_every_kernel_is_in_the_report():
    names = {case.name for case in cases()}
    assert {"int4", "int4 dx", "nf4", "nf4 dequantize", "paged lora", "w8a8"} <= names
    for case in cases():
        if case.kernel:
            assert jax.eval_shape(case.kernel, *case.args) == jax.eval_shape(case.xla, *case.args)


@pytest.mark.parametrize("chips", ["v9", "v6e,h100"])
def test_chips_that_it_cannot_report_are_one_line(capsys, chips):
    assert kernel_report.main([f"--chip={chips}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


GOLDEN = ROOT / "tests" / "golden" / "kernels.json"


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make tpu")
def test_schedules_are_those_committed():
    """Cycles within 5 % and bytes moved exactly; KUNGFU_GOLDEN=1 writes the file anew."""
    argv = [sys.executable, "-m", "tools.kernel_report", "--shapes=quick", "--json"]
    told = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout
    keep = ("cycles", "bytes_moved", "bytes_temporary")
    got = {
        f"{r['chip']} {r['case']} {r['shape']} {by}": {k: r[by][k] for k in keep}
        for r in json.loads(told) for by in ("kernel", "xla") if by in r
    }  # fmt: skip
    got = {name: row for name, row in got.items() if name.endswith("kernel") or " w8a8 " in name}
    if os.environ.get("KUNGFU_GOLDEN"):
        GOLDEN.write_text(json.dumps(got, indent=1) + "\n")
    want = json.loads(GOLDEN.read_text())
    assert got.keys() == want.keys()
    for name, row in want.items():
        assert got[name]["cycles"] == pytest.approx(row["cycles"], rel=0.05), name
        assert (
            got[name]["bytes_moved"] == row["bytes_moved"] and got[name]["bytes_temporary"] == row["bytes_temporary"]
        ), name


@pytest.mark.parametrize("chip", [pytest.param("h100", marks=gpu)])
def test_no_program_spills_and_none_writes_a_float_w(chip):
    argv = [sys.executable, "-m", "tools.kernel_report", f"--chip={chip}", "--json"]
    told = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout
    by_name = {f"{c.name} {c.shape}": c for c in cases() if c.platform == "cuda"}
    rows = {f"{r['case']} {r['shape']}": r for r in json.loads(told)}
    assert rows.keys() == by_name.keys()
    for name, row in rows.items():
        if by_name[name].kernel is None:
            continue
        assert row["kernel"]["spill_stores"] == row["kernel"]["spill_loads"] == 0 < row["kernel"]["registers"], name
        if row["case"] == "paged lora":
            assert row["bytes_least"] <= row["kernel"]["bytes_moved"] < 1.01 * row["bytes_least"], name
            continue
        x, codes, _ = by_name[name].args
        w = x.shape[1] * codes.shape[1] * x.dtype.itemsize
        assert row["kernel"]["bytes_temporary"] < w / 4 and row["xla"]["bytes_temporary"] >= w, name
        assert row["bytes_least"] <= row["kernel"]["bytes_moved"] < 2.5 * row["bytes_least"], name
        assert row["xla"]["bytes_moved"] > 3 * row["bytes_least"], name


@pytest.mark.parametrize(
    "fmt, on, kernel, calls",
    [
        pytest.param("int4", "v5e:2x2", "tpu_custom_call", 2, marks=tpu),
        pytest.param("nf4", "v5e:2x2", "tpu_custom_call", 1, marks=tpu),  # XLA merges the two, which are equal
        pytest.param("int4", "h100:4", "__gpu$xla.gpu.triton", 1, marks=gpu),
    ],
)
def test_four_absent_chips_gather_packed_weights(fmt, on, kernel, calls):
    """A kernel each for a forward and a backward pass, of which a GPU leaves the second to XLA; codes gathered as bytes
    over fsdp, no float W on the wire."""
    eqn, mesh = "BTF,FD->BTD", make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, topology.devices(on))
    laid = lambda a, *axes: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P(*axes)))
    leaf = jax.eval_shape(lambda w: FORMATS[fmt].encode(w, eqn), jax.ShapeDtypeStruct((1024, 512), jnp.float32))
    leaf = jax.tree.map(lambda a: laid(a, *("tensor", "fsdp") if a.shape[-1] == 512 else ()), leaf)
    x = laid(jax.ShapeDtypeStruct((4, 128, 1024), jnp.bfloat16), "fsdp", None, "tensor")
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        forward = lambda x, leaf: leaf.einsum(eqn, x).astype(jnp.float32).sum()
        f = forward if on.startswith("h100") else jax.value_and_grad(forward)
        text = jax.jit(f).lower(x, leaf).compile().as_text()
    assert text.count(f'custom_call_target="{kernel}"') == calls
    types = " ".join(re.findall(r"= (.*?) all-gather(?:-start)?\(", text))  # a GPU gathers codes and scales at once
    gathered = {
        (dtype, math.prod(map(int, dims.split(",")))) for dtype, dims in re.findall(r"(\w+)\[([\d,]+)\]", types)
    }
    assert ("u8", 256 * 512) in gathered and max(size for _, size in gathered) < 512 * 512


@pytest.mark.parametrize("eqn, split", [("BTD,DF->BTF", (None, "tensor")), ("BTF,FD->BTD", ("tensor", None))])
@pytest.mark.parametrize(
    "on, kernel, calls",
    [
        pytest.param("v5e:2x2", "tpu_custom_call", (1, 0), marks=tpu),
        pytest.param("h100:4", "__gpu$xla.gpu.triton", (2, 2), marks=gpu),
    ],
)
def test_four_absent_chips_keep_their_parts_of_the_adapters(eqn, split, on, kernel, calls):
    """Columns over tensor by the kernels of one device. With rows there what is added lies between two kernels on a
    GPU, and between two loops on a TPU. Nothing as large as the stacks is sent."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 4}, topology.devices(on))

    def laid(*shape, dtype="bfloat16", at=()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*at)))

    a, b = (laid(640, 1024, at=(None, axis)) for axis in split)
    route = paged.Route(*[laid(16, dtype="int32")] * 3, laid(dtype="int32"))
    leaf = paged.PagedLoRA(laid(1024, 1024, at=split), a, b, eqn, route)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        text = jax.jit(lambda x, leaf: leaf.einsum(eqn, x)).lower(laid(8, 1, 1024), leaf).compile().as_text()
    assert text.count(f'custom_call_target="{kernel}"') == calls[split[1] is None]
    sent = hlo.Program(text, 1).sent(dict(mesh.shape))
    assert sum(size for kinds in sent.values() for size in kinds.values()) < 8 * 8 * 1024
