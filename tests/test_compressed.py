"""The compressed-tensors format: its words by hand, there and back, and what it cannot say."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from data.text import formats
from model import weights
from model.io import compressed, export
from model.io.pretrained import open_pretrained
from model.quant import fp8, int4, int8, nf4, qat
from tests.helpers.models import CONFIGS, TINY, random_model

STORED = {
    "int4": (int4.make(group=16), "pack-quantized"),
    "int4 of a column": (int4.make(group=64, calibration="mse"), "pack-quantized"),
    "int8": (int8.make(), "pack-quantized"),
    "w8a8": (int8.make(activations=True), "int-quantized"),
    "fp8": (fp8.make(), "float-quantized"),
    "fp8 of a tensor": (fp8.make(scale="tensor"), "float-quantized"),
    "a part": (int4.make(group=16, where=".*/mlp/.*"), "pack-quantized"),
    "trained for it": (qat.make(format="int8"), "pack-quantized"),
}


def test_codes_by_hand():
    """Numbers -8 .. 7 of 4 bits become 0 .. 15, the first lowest: 1, -8, 7 are 9, 0, 15. Of 8 bits: 129, 0, 255."""
    words = compressed.pack(np.array([[1, -8, 7]]), 4)
    assert words.tolist() == [[0xF09]]
    assert compressed.pack(np.array([[1, -128, 127, 0, -1]]), 8).view(np.uint32).tolist() == [[0x80FF0081, 0x7F]]
    for bits, k in ((4, 3), (4, 16), (8, 5)):
        numbers = np.random.default_rng(0).integers(-(1 << bits - 1), 1 << bits - 1, (6, k))
        np.testing.assert_array_equal(compressed.unpack(compressed.pack(numbers, bits), bits, k), numbers)


QUICK = ("int4", "fp8", "a part")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in STORED])
def test_written_and_read_back(name, tmp_path):
    """The same weights to the last bit, also slice by slice."""
    make, format = STORED[name]
    model, params = random_model(TINY)
    small = jax.jit(lambda p: make(p, model.specs, None))(params)
    assert export.export_hf(model, small, formats.load("bytes"), tmp_path / "out") < 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == format
    if name != "int4 of a column":  # of 32 rows here, of 64 there
        assert [scheme["targets"] for scheme in config["config_groups"].values()] == [["Linear"]]
    opened = open_pretrained(tmp_path / "out")
    dense = weights.dense(qat.converted(small), model.specs)
    jax.tree.map(np.testing.assert_array_equal, opened.load(model.specs), dense)
    part = opened.read("layers/mlp/down", 1, (slice(3, 60), slice(8, 24)))
    np.testing.assert_array_equal(part, dense["layers"]["mlp"]["down"][1, 3:60, 8:24])


def test_bytes_on_disk_are_the_formats(tmp_path):
    """int4 in groups of 16 with bfloat16 scales: 5 bits a weight; and 16 bytes for a shape."""
    model, params = random_model(TINY)
    small = int4.make(group=16)(params, model.specs, None)
    export.export_hf(model, small, formats.load("bytes"), tmp_path / "out", dtype="bfloat16")
    stored = load_file(tmp_path / "out/model.safetensors")
    for name in ("q_proj", "down_proj"):
        parts = [x for key, x in stored.items() if f"{name}.weight" in key]
        numbers = sum(np.prod(x) for key, x in stored.items() if f"{name}.weight_shape" in key)
        assert sum(x.nbytes for x in parts) == numbers * 5 / 8 + 16 * TINY.layers


def test_several_formats_name_their_modules(tmp_path):
    model, params = random_model(CONFIGS["qwen2"])
    small = int4.make(group=16, where=".*/mlp/.*")(params, model.specs, None)
    small = int8.make(where=".*/attn/w[qk]", activations=True)(small, model.specs, None)
    assert export.export_hf(model, small, formats.load("bytes"), tmp_path / "out") < 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 2
    ignored = {rf"re:^model\.layers\.\d+\.self_attn\.{m}$" for m in ("v_proj", "o_proj")}
    assert set(config["ignore"]) == {"lm_head", *ignored}  # the head is the table that tokens are looked up in


@pytest.mark.parametrize(
    "make, family, said",
    [
        (nf4.make(), "llama", "a type that the format lacks"),
        (fp8.make(scale="block"), "llama", "equal groups of a column"),
        (int4.make(symmetric=False), "llama", "zero points that are not integers"),
        (int4.make(scaled=True), "llama", "AWQ"),
        (int8.make(where="embed/table"), "llama", "not a separate Linear"),
        pytest.param(fp8.make(format="e5m2"), "llama", "type that the format lacks", marks=pytest.mark.slow),
        pytest.param(int4.make(group=24), "llama", "equal groups of a column", marks=pytest.mark.slow),
        pytest.param(int8.make(), "gpt2", "not a separate Linear", marks=pytest.mark.slow),
    ],
)
def test_what_the_format_cannot_say_is_refused(make, family, said, tmp_path):
    """Unless it is written as floats."""
    wide = dataclasses.replace(TINY, layers=1, mlp=192)  # a block and a half
    model, params = random_model(CONFIGS["gpt2"] if family == "gpt2" else wide)
    small = jax.jit(lambda p: make(p, model.specs, None))(params)
    write = partial(export.export_hf, model, small, formats.load("bytes"), tmp_path / "out", check=False)
    with pytest.raises(UserError, match=said):
        write()
    assert not list(tmp_path.iterdir())
    write(dequantize=True)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(
    "change, said",
    [
        ({"weight_shape": np.array([32, 999], np.int64)}, "weight_shape is 32 x 999"),
        ({"weight_scale": np.ones((32, 5), np.float32)}, "uneven groups"),
        ({"weight_scale": np.ones((31, 1), np.float32)}, "uneven groups"),
        ({"weight_packed": np.ones((32, 8), np.float32)}, "is stored as F32"),
        ({"weight_zero_point": np.ones((4, 1), np.int32)}, "zero points"),
    ],
)
def test_damaged_parts_are_told(change, said, tmp_path):
    model, params = random_model(TINY)
    small = int4.make(group=32, where=".*/mlp/down")(params, model.specs, None)
    export.export_hf(model, small, formats.load("bytes"), tmp_path / "out", check=False)
    path = tmp_path / "out/model.safetensors"
    stored = load_file(path) | {f"model.layers.0.mlp.down_proj.{name}": x for name, x in change.items()}
    save_file(stored, path)
    with pytest.raises(UserError, match=said):
        open_pretrained(tmp_path / "out").load(model.specs)


def test_activations_of_8_bits_are_not_part_of_the_comparison(tmp_path):
    """What is read back has float activations; the rounding of a token's would look like a broken export."""
    model, params = random_model(TINY)
    small = int8.make(activations=True)(params, model.specs, None)
    tokens = jnp.arange(24).reshape(2, 12)
    rounded = jax.jit(model)(small, tokens)
    assert float(jnp.abs(rounded - jax.jit(model)(weights.dense(small, model.specs), tokens)).max()) > 1e-3
    assert export.export_hf(model, small, formats.load("bytes"), tmp_path / "out") < 1e-5
