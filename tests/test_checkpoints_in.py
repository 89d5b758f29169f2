"""Checkpoints as people have them on disk: each is generated, opened, and compared with what it stands for."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from common.errors import UserError
from infer import models
from infer.lm import LM
from model import weights
from model.config import ModelConfig
from model.io import export
from model.io.pretrained import open_pretrained
from model.net.transformer import Transformer
from tests.helpers.models import random_model
from train import main

TINY = ModelConfig(vocab_size=272, layers=2, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=24, max_len=64)
SHAPES = {
    "llama": TINY,
    "biases": dataclasses.replace(TINY, bias="all"),
    "tied": dataclasses.replace(TINY, tied=True),
    "mistral": dataclasses.replace(TINY, family="mistral", windows=(8, 8)),
    "qwen2": dataclasses.replace(TINY, family="qwen2", bias="qkv"),
    "qwen3": dataclasses.replace(TINY, family="qwen3", qk_norm=True),
    "gpt2": dataclasses.replace(
        TINY, family="gpt2", kv_heads=2, norm="layernorm", norm_eps=1e-5, act="gelu_tanh", gated=False,
        position="learned", bias="all", tied=True, mlp=64,
    ),
}  # fmt: skip
Tensors = dict[str, np.ndarray]
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder of `shape` after `change(folder, config, tensors)`, which is then stored
    unless it says that all is done.

    Right is: the same parameters, and the config with `differs` in it; or a UserError that matches `error`. `said`
    is what the log must say, "" nothing at all.
    """

    shape: str
    change: Callable[[Path, dict, Tensors], Any]
    differs: dict = dataclasses.field(default_factory=dict)
    error: str = ""
    said: str = ""
    context: int = 64


def store(folder: Path, config: dict, tensors: Tensors, name: str = "model.safetensors") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, folder / name, {"format": "pt"})


def made(case: Case, folder: Path) -> tuple[Transformer, dict]:
    """Writes the folder of a case. Returns the model and the parameters that it was made of."""
    model, params = random_model(SHAPES[case.shape])
    config = json.loads(json.dumps(export.family(model.config.family).hf_config(model.config)))
    tensors = dict(export.tensors(model, params))
    folder.mkdir()
    if not case.change(folder, config, tensors):
        store(folder, config, tensors)
    return model, params


# --- config.json ---


def config_with(**changes) -> Callable:
    """The config with some keys changed; None takes one away."""

    def change(folder: Path, config: dict, tensors: Tensors) -> None:
        config.update(changes)
        for key in [k for k, v in config.items() if v is None]:
            del config[key]

    return change


def renamed(prefix: str, head: str = "lm_head.weight", **changes) -> Callable:
    """Names with another prefix than "model."."""

    def change(folder: Path, config: dict, tensors: Tensors) -> None:
        for name in list(tensors):
            new = head if name == "lm_head.weight" else prefix + name.split(".", 1)[1]
            tensors[new] = tensors.pop(name)
        config.update(changes)

    return change


def multimodal(kind: str, prefix: str, head: str, key: str = "text_config", text: str = "") -> Callable:
    """A release with a tower for images beside the language model."""

    def change(folder: Path, config: dict, tensors: Tensors) -> None:
        inner = {k: v for k, v in config.items() if k != "architectures"} | ({"model_type": text} if text else {})
        renamed(prefix, head)(folder, config, tensors)
        for i in range(3):
            tensors[f"vision_tower.encoder.layers.{i}.mlp.weight"] = np.ones((2, 2), np.float32)
        config.clear()
        config.update({"model_type": kind, key: inner, "vision_config": {"model_type": "clip"}})

    return change


def with_tensors(dtype=np.float32, **more) -> Callable:
    """More tensors in the file; a double underscore in a name stands for a dot."""

    def change(folder: Path, config: dict, tensors: Tensors) -> None:
        tensors.update({name.replace("__", "."): np.ones(shape, dtype) for name, shape in more.items()})

    return change


# --- files ---


def sharded(folder: Path, config: dict, tensors: Tensors, parts: int = 3) -> dict[str, Tensors]:
    """Stored in parts with an index: {file: tensors}."""
    names, files = sorted(tensors), {}
    for i in range(parts):
        file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        files[file] = {n: tensors[n] for n in names[i::parts]}
        store(folder, config, files[file], file)
    index = {"metadata": {}, "weight_map": {n: file for file, own in files.items() for n in own}}
    (folder / INDEX).write_text(json.dumps(index))
    return files


def part_missing(folder, config, tensors):
    sharded(folder, config, tensors)
    (folder / "model-00002-of-00003.safetensors").unlink()
    return True


def no_index(folder, config, tensors):
    sharded(folder, config, tensors)
    (folder / INDEX).unlink()
    return True


def no_index_part_missing(folder, config, tensors):
    part_missing(folder, config, tensors)
    (folder / INDEX).unlink()
    return True


def index_that_errs(folder, config, tensors):
    """Every tensor is said to lie in the first part; that of another model is promised."""
    files = sharded(folder, config, tensors)
    first = min(files)
    weight_map = dict.fromkeys([*tensors, "model.layers.7.mlp.up_proj.weight"], first)
    weight_map |= {f"nowhere.{i}": file for i, file in enumerate(files)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return True


def stale_index(folder, config, tensors):
    """The parts of another model, in whose folder a merged one was saved as one file."""
    sharded(folder, config, {n: x + 1 for n, x in tensors.items()})
    store(folder, config, tensors)


def beside(*files: str) -> Callable:
    def change(folder: Path, config: dict, tensors: Tensors) -> None:
        for file in files:
            (folder / file).write_bytes(b"x")

    return change


def pickled(folder, config, tensors):
    store(folder, config, {})
    (folder / "pytorch_model.bin").write_bytes(b"x")
    return True


def lfs(folder, config, tensors):
    store(folder, config, {})
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    return True


def other_name(folder, config, tensors):
    store(folder, config, tensors, "weights.safetensors")
    return True


def adapter_only(folder, config, tensors):
    (folder / "adapter_config.json").write_text("{}")
    return True


def only_notes(folder, config, tensors):
    (folder / "notes.txt").write_text("x")
    return True


def two_ggufs(folder, config, tensors):
    for name in "ab":
        (folder / f"{name}.gguf").write_bytes(b"GGUF")
    return True


def other_head(folder, config, tensors):
    config["tie_word_embeddings"] = True


def same_head(folder, config, tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()


def unmerged(folder, config, tensors):
    name = "model.layers.0.self_attn.q_proj."
    tensors[name + "base_layer.weight"] = tensors.pop(name + "weight")
    tensors[name + "lora_A.default.weight"] = np.ones((2, 16), np.float32)


def buffers_of_gpt2(folder, config, tensors):
    renamed("")(folder, config, tensors)
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = np.ones((1, 1, 64, 64), np.uint8)
        tensors[f"h.{i}.attn.masked_bias"] = np.float32(-1e4)


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FOLDERS = {
    "attention_bias and mlp_bias": Case("biases", config_with()),
    "attention_bias that the file lacks": Case(
        "llama", config_with(attention_bias=True), error=r"missing model\.layers\.0\.self_attn\.\w_proj\.bias"
    ),
    "a bias that the config lacks": Case("biases", config_with(mlp_bias=False), error="unexpected .*mlp.*bias"),
    "mistral knows no attention_bias": Case("mistral", config_with(attention_bias=True)),
    "no model_type": Case("qwen2", config_with(model_type=None)),
    "names of the attribute map": Case(
        "gpt2", config_with(n_embd=None, n_layer=None, hidden_size=16, num_hidden_layers=2, n_inner=None)
    ),
    "quick_gelu": Case("llama", config_with(hidden_act="quick_gelu"), {"act": "gelu_sigmoid"}),
    "a bare gpt2 with its masks": Case("gpt2", buffers_of_gpt2),
    "saved by torch.compile": Case("qwen3", renamed("_orig_mod.model.", "_orig_mod.lm_head.weight")),
    "llava": Case(
        "llama", multimodal("llava", "language_model.model.", "language_model.lm_head.weight"), said="3 x vision_tower"
    ),
    "qwen2-vl": Case(
        "qwen2", multimodal("qwen2_vl", "model.language_model.", "lm_head.weight", text="qwen2_vl_text"), said="vision"
    ),
    "smolvlm": Case("llama", multimodal("smolvlm", "model.text_model.", "lm_head.weight"), said="vision"),
    "a text part of no family here": Case(
        "llama", multimodal("mllama", "language_model.model.", "lm_head.weight", text="mllama_text_model"),
        error="'mllama_text_model' is not supported",
    ),
    "a tied table that differs": Case("llama", other_head, said="ties the head .* is used"),
    "a tied table twice": Case("tied", same_head),
    "a billion layers": Case("mistral", config_with(num_hidden_layers=10**9), error="1,000,000,000 layers, but"),
    "fields of the config that nothing reads": Case(
        "llama", config_with(logit_scale=0.5, embedding_multiplier=None, attention_dropout=0.1), said="json:logit_scale"
    ),
    "another head": Case("llama", with_tensors(score__weight=(2, 16)), said="does not use score.weight"),
    "layers of multi-token prediction": Case(
        "llama", with_tensors(model__layers__2__mlp__up_proj__weight=(24, 16)), said=r"model\.layers\.2\.mlp"
    ),
    "scales of a cache": Case(
        "llama", with_tensors(model__layers__0__self_attn__k_scale=(1,)), said=r"layers\.0\.self_attn\.k_scale"
    ),
    "bitsandbytes in the config only": Case("llama", config_with(quantization_config=BNB), said="bitsandbytes"),
    "absmax beside floats": Case(
        "llama", with_tensors(model__layers__0__mlp__up_proj__weight__absmax=(6,)), said="up_proj.weight.absmax"
    ),
    "adapters that are not merged": Case("llama", unmerged, error="merge_and_unload"),
    "a folder with an adapter alone": Case("llama", adapter_only, error="name its base"),
    "sharded": Case("llama", sharded),
    "a part is missing": Case("llama", part_missing, error="1 of 3 parts are missing: model-00002-of-00003"),
    "parts without an index": Case("llama", no_index),
    "parts without an index, one missing": Case("llama", no_index_part_missing, error="00002-of-00003"),
    "an index that errs": Case("llama", index_that_errs),
    "one file beside an old index": Case("llama", stale_index, said="model-00001-of-00003.safetensors"),
    "a trainer's files": Case("llama", beside("training_args.bin", "optimizer.pt", "rng_state_0.pth", "x.gguf")),
    "the same weights as a pickle": Case("llama", beside("pytorch_model.bin")),
    "a head in a file of its own": Case("llama", beside("value_head.safetensors"), said="value_head.safetensors"),
    "a folder of something else": Case("llama", only_notes, error="holds no config.json, .* it holds notes.txt"),
    "several GGUF files": Case("llama", two_ggufs, error="holds 2 models: a.gguf, b.gguf · give the path of one"),
    "a pickle": Case("llama", pickled, error=r"only pickled.*from_pretrained\('.*'\)\.save_pretrained"),
    "a pointer of git-lfs": Case("llama", lfs, error="git lfs pull"),
    "a file of another name": Case("llama", other_name, error="it holds weights.safetensors"),
}  # fmt: skip


# --- rope, in every spelling ---


def rope(context: int, changes: dict, said: str = "", error: str = "", shape: str = "llama", **scaling) -> Case:
    """A config with these keys, that stands for a context of so many positions and the scaling."""
    pairs = tuple(sorted(scaling.items()))
    return Case(shape, config_with(**changes), {"rope_scaling": pairs}, error, said, context)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KEY = "original_max_position_embeddings"
ROPE = {
    "yarn, Qwen's recipe": rope(
        256, dict(rope_scaling={"type": "yarn", "factor": 4.0, KEY: 64}), **YARN | {KEY: 64}
    ),
    "yarn, max_position_embeddings grown already": rope(64, dict(rope_scaling=YARN), **YARN),
    "yarn, original length beside": rope(
        64, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, KEY: 16}, **YARN
    ),
    "yarn without a factor": rope(64, dict(rope_scaling={"type": "yarn", KEY: 16, "factor": None}), **YARN),
    "yarn without an original length": rope(
        256, dict(rope_scaling={"type": "yarn", "factor": 4.0}), rope_type="yarn", factor=4.0
    ),
    "linear": rope(128, dict(rope_scaling={"type": "linear", "factor": 2.0}), rope_type="linear", factor=2.0),
    "dynamic": rope(128, dict(rope_scaling={"type": "dynamic", "factor": 2}), rope_type="dynamic", factor=2),
    "both names of the type": rope(
        128, dict(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2.0}), rope_type="linear", factor=2.0
    ),
    "rope_parameters": rope(
        64, dict(rope_theta=None, rope_scaling=None, rope_parameters=YARN | {"rope_theta": 1e4}), **YARN
    ),
    "rope_scaling goes before rope_parameters": rope(
        64, dict(rope_scaling=YARN, rope_parameters={"rope_type": "default", "rope_theta": 1e4}), **YARN
    ),
    "llama3": rope(64, dict(rope_scaling=LLAMA3 | {KEY: 32}), **LLAMA3 | {KEY: 32}),
    "llama3 without an original length": rope(64, dict(rope_scaling=LLAMA3), **LLAMA3 | {KEY: 64}),
    "a field of its own": rope(
        128, dict(rope_scaling={"type": "linear", "factor": 2.0, "new": 1}), said=r"config.json:rope_scaling.new$",
        rope_type="linear", factor=2.0, new=1,
    ),
    "default said aloud": rope(64, dict(rope_scaling={"rope_type": "default"}, rope_parameters=None)),
    "mrope": rope(
        64, dict(rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]}, model_type="qwen2_vl"), shape="qwen2"
    ),
    "a part of the head": rope(0, dict(partial_rotary_factor=0.25), error="part of the head"),
    "longrope": rope(0, dict(rope_scaling={"type": "longrope", "long_factor": [1.0]}), error="rope type 'longrope'"),
    "linear without a factor": rope(0, dict(rope_scaling={"type": "linear"}), error="needs a number for factor"),
}  # fmt: skip
CASES = FOLDERS | ROPE


@pytest.mark.parametrize("name", CASES)
def test_checkpoint(name, tmp_path, caplog):
    case = CASES[name]
    model, params = made(case, tmp_path / "m")
    if case.error:
        with pytest.raises(UserError, match=case.error) as error:
            opened = open_pretrained(tmp_path / "m")
            opened.load(Transformer(opened.config).specs)
        assert "\n" not in str(error.value)
        return
    with caplog.at_level(logging.WARNING):
        opened = open_pretrained(tmp_path / "m")
        got = opened.load(Transformer(opened.config).specs)
    assert opened.config == dataclasses.replace(model.config, **case.differs)
    assert opened.config.context == case.context
    weights.map_named(lambda path, x, y: np.testing.assert_array_equal(x, y, path), params, got)
    lines = [r.getMessage() for r in caplog.records]
    if not case.said:
        assert not lines
    else:
        assert len(lines) == 1 and "\n" not in lines[0]
        assert re.search(case.said, lines[0]), lines


def test_strict_makes_it_an_error(tmp_path):
    made(CASES["another head"], tmp_path / "m")
    with pytest.raises(UserError, match=r"does not use score.weight .* without strict"):
        models.load(tmp_path / "m", strict=True)


# --- positions beyond the table ---


def test_rows_beyond_the_context_are_an_error_before_the_first_step(tmp_path, capsys):
    """64 positions of gpt2; with YARN 256, less the tokens of a prompt."""
    made(Case("gpt2", config_with()), tmp_path / "gpt2")
    made(CASES["yarn, Qwen's recipe"], tmp_path / "yarn")

    def plan(name: str, length: int, *more: str) -> str:
        model = [f"--config.init={tmp_path / name}", "--config.model.shape=", "--config.data.tokenizer=bytes"]
        code = main.main(["--config=configs/sft/tiny.py", "--plan", *model, f"--config.data.seq_len={length}", *more])
        said = capsys.readouterr()
        assert (code == 2) == bool(said.err)
        return said.err

    assert "rows of 65 tokens exceed the model's context of 64" in plan("gpt2", 65)
    assert not plan("gpt2", 64)
    assert not plan("yarn", 250)
    assert "rows of 250 tokens exceed the model's context of 248" in plan(
        "yarn", 250, "--config.peft.name=prompt", "--config.peft.tokens=8"
    )


def test_a_text_as_long_as_the_table(tmp_path):
    model, params = made(Case("gpt2", config_with()), tmp_path / "m")
    config = dataclasses.replace(model.config, max_len=40)
    params["position"]["table"] = params["position"]["table"][:40]
    lm = LM(Transformer(config), params, None)
    rows = [([1], list(range(2, 41))), ([1], [2])]
    sums, _ = lm.sums(rows)
    assert np.isfinite(sums).all()
    loss, n = lm.loss([list(range(1, 61))])  # in two windows
    assert n == 59 and np.isfinite(loss)
    with pytest.raises(UserError, match="41 tokens per row exceed the model's 40 learned positions"):
        lm.logits(np.arange(41))


# --- quantized by other tools: each writes a matrix in its format, value by value, and says what it stands for ---

NF4 = np.sort(np.random.default_rng(5).normal(size=16)).astype(np.float32)  # any table will do: the file brings it


def bnb4(w: np.ndarray, name: str, nested: bool) -> tuple[Tensors, np.ndarray]:
    """Blocks of 64 of the flat matrix; their peaks as floats, or as codes of a table and a second peak."""
    rng, flat = np.random.default_rng(6), w.reshape(-1)
    codes = rng.integers(0, 16, flat.size)
    peaks = np.abs(rng.normal(size=-(-flat.size // 64))).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(w.shape)}
    out = {"weight.quant_map": NF4}
    if nested:
        table, indices = np.linspace(-1, 1, 256, dtype=np.float32), rng.integers(0, 256, len(peaks)).astype(np.uint8)
        state |= {"nested_blocksize": 256, "nested_offset": 0.5, "nested_dtype": "float32"}
        out |= {"weight.nested_quant_map": table, "weight.nested_absmax": np.array([1.5], np.float32)}
        peaks = np.array([table[i] * np.float32(1.5) + np.float32(0.5) for i in indices])
        out["weight.absmax"] = indices
    else:
        out["weight.absmax"] = peaks
    out["weight"] = np.array([[16 * a + b] for a, b in codes.reshape(-1, 2)], np.uint8)
    out["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    values = [NF4[code] * peaks[i // 64] for i, code in enumerate(codes)]
    return {name + part: x for part, x in out.items()}, np.array(values, np.float32).reshape(w.shape)


def bnb8(w: np.ndarray, name: str) -> tuple[Tensors, np.ndarray]:
    peaks = np.abs(w).max(1)
    codes = np.round(w / peaks[:, None] * 127).astype(np.int8)
    stored = {"weight": codes, "SCB": peaks.astype(np.float32), "weight_format": np.array(0, np.uint8)}
    return {name + part: x for part, x in stored.items()}, codes * (peaks[:, None] / np.float32(127))


def words(codes: np.ndarray, order: list[int]) -> np.ndarray:
    """Eight codes of 4 bits a word along the last axis; slot i of a word holds the code order[i]."""
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), np.uint32)
    for at in np.ndindex(out.shape):
        for slot, k in enumerate(order):
            out[at] |= np.uint32(int(codes[(*at[:-1], at[-1] * 8 + k)]) << 4 * slot)
    return out.view(np.int32)


def packed(w: np.ndarray, name: str, awq: bool, acted: bool = False) -> tuple[Tensors, np.ndarray]:
    """GPTQ or AWQ with groups of 8 inputs; `acted`: the inputs of a group lie apart."""
    (n, k), rng = w.shape, np.random.default_rng(7)
    codes, zeros = rng.integers(0, 16, (k, n)), rng.integers(1, 16, (k // 8, n))
    scales = np.abs(rng.normal(size=(k // 8, n))).astype(np.float16)
    group = rng.permutation(k) // 8 if acted else np.arange(k) // 8
    order = [0, 2, 4, 6, 1, 3, 5, 7] if awq else list(range(8))
    stored = {"scales": scales, "qzeros": words(zeros if awq else zeros - 1, order)}
    stored["qweight"] = words(codes, order) if awq else words(codes.T, order).T
    if not awq:
        stored["g_idx"] = group.astype(np.int32)
    value = [[np.float32(scales[group[i], j]) * (codes[i, j] - zeros[group[i], j]) for i in range(k)] for j in range(n)]
    return {name + part: x for part, x in stored.items()}, np.array(value, np.float32)


def fp8(w: np.ndarray, name: str, part: str, block: tuple[int, int] | None) -> tuple[Tensors, np.ndarray]:
    codes, rng = w.astype(ml_dtypes.float8_e4m3fn), np.random.default_rng(8)
    (n, k), (a, b) = w.shape, block or w.shape
    scale = np.abs(rng.normal(size=(-(-n // a), -(-k // b)))).astype(np.float32)
    value = [[np.float32(codes[i, j]) * scale[i // a, j // b] for j in range(k)] for i in range(n)]
    return {f"{name}weight": codes, f"{name}weight_{part}": scale if block else scale.reshape(())}, np.array(value)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}
FORMATS = {
    "bitsandbytes nf4": (BNB, lambda w, n: bnb4(w, n, False)),
    "bitsandbytes nf4, double": (BNB, lambda w, n: bnb4(w, n, True)),
    "bitsandbytes int8": (BNB | {"load_in_8bit": True}, bnb8),
    "gptq": (GPTQ, lambda w, n: packed(w, n, False)),
    "gptq, act order": (GPTQ, lambda w, n: packed(w, n, False, True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}, lambda w, n: packed(w, n, True)),
    "awq by auto-round": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 8, "packing_format": "auto_round:auto_awq"},
        lambda w, n: packed(w, n, True),
    ),
    "fp8 of blocks": (FP8, lambda w, n: fp8(w, n, "scale_inv", (8, 8))),
    "fp8 of rows": ({"quant_method": "fbgemm_fp8"}, lambda w, n: fp8(w, n, "scale", (1, w.shape[1]))),
    "fp8 of tensors": ({"quant_method": "fp8"}, lambda w, n: fp8(w, n, "scale_inv", None)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_by_another_tool(name, tmp_path):
    """The values are those of the format, in whole and in slices."""
    quantized, encode = FORMATS[name]
    model, params = random_model(SHAPES["llama"])
    tensors, values = dict(export.tensors(model, params)), {}
    for n in [n for n in tensors if n.endswith("_proj.weight")]:
        stored, values[n] = encode(tensors.pop(n), n.removesuffix("weight"))
        tensors |= stored
    config = export.family("llama").hf_config(model.config) | {"quantization_config": quantized}
    store(tmp_path / "m", config, tensors)
    opened = open_pretrained(tmp_path / "m")
    opened.load(model.specs)
    for n, wanted in values.items():
        got = opened.source.read(n, np.s_[:, :])
        np.testing.assert_allclose(got, wanted, rtol=1e-6, err_msg=n)
        np.testing.assert_array_equal(opened.source.read(n, np.s_[3:8, 5:11]), got[3:8, 5:11])


def test_a_packing_that_is_not_read(tmp_path):
    def change(folder: Path, config: dict, tensors: Tensors) -> None:
        config["quantization_config"] = GPTQ | {"checkpoint_format": "marlin"}
        name = "model.layers.0.mlp.up_proj."
        tensors |= packed(tensors.pop(name + "weight"), name, False)[0]

    made(Case("llama", change), tmp_path / "m")
    with pytest.raises(UserError, match="by gptq in the format 'marlin', which is not supported"):
        open_pretrained(tmp_path / "m")


@pytest.mark.parametrize("method", ["hqq", "aqlm", "quanto", "mxfp4", "torchao"])
def test_quantized_by_a_tool_that_is_not_read(method, tmp_path):
    def change(folder: Path, config: dict, tensors: Tensors) -> None:
        config["quantization_config"] = {"quant_method": method}
        tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((24, 8), np.uint8)

    made(Case("llama", change), tmp_path / "m")
    with pytest.raises(UserError, match=f"quantized by {method}, which is not supported.*unquantized model"):
        open_pretrained(tmp_path / "m")
