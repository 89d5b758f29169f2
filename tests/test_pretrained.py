"""Open checkpoints: layouts, safetensors, GGUF, export and load, and what is refused."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import tools.export
from common.errors import UserError
from data.text import formats as tokenizers
from data.text import gguf_write as words
from data.text import pieces
from data.text.tokenizer import Tokenizer
from model import weights
from model.families import _layout as layout
from model.families._layout import Key
from model.io import export, gguf_write
from model.io.gguf import llama3_scaling
from model.io.pretrained import family, open_pretrained
from model.net.transformer import Transformer
from model.peft import lora
from tests.helpers.models import CONFIGS, LLAMA3, TINY, random_model


def export_tiny(folder, config=TINY, check=False, **kwargs):
    model, params = random_model(config)
    export.export_hf(model, params, tokenizers.load("bytes"), folder, check=check, **kwargs)
    return model, params


def assert_same(a, b):
    weights.map_named(lambda path, x, y: np.testing.assert_array_equal(x, y, path), a, b)


# --- layouts ---

SIZES = dict(N=2, K=2, H=3, D=2)


def test_layout_by_hand():
    """Two heads of three: row 4 of the file is head 1, dimension 1."""
    key = Key("q", "(NH)D->DNH")
    theirs = np.arange(12).reshape(6, 2)
    whole = (slice(None),) * 3
    ours = layout.read(key, lambda cuts: theirs[cuts], SIZES, whole)
    assert ours.shape == (2, 2, 3) and ours[0, 1, 1] == theirs[4, 0] == 8
    np.testing.assert_array_equal(layout.write([(key, ours)], SIZES), theirs)


def test_layout_of_a_fused_tensor():
    """Part 1 of "D(3KH)" is columns 6 to 11 of 18; only the slice that is asked for is read."""
    keys = [Key("qkv", "D(3KH)->DKH", part) for part in range(3)]
    theirs, seen = np.arange(36).reshape(2, 18), []

    def tensor(cuts):
        seen.append(cuts)
        return theirs[cuts]

    whole = (slice(None),) * 3
    parts = [layout.read(key, tensor, SIZES, whole) for key in keys]
    np.testing.assert_array_equal(parts[1][0], [[6, 7, 8], [9, 10, 11]])
    np.testing.assert_array_equal(layout.write(list(zip(keys, parts)), SIZES), theirs)
    some = layout.read(keys[1], tensor, SIZES, (slice(1, 2), slice(1, 2), slice(0, 2)))
    np.testing.assert_array_equal(some, [[[27, 28]]])
    assert seen[-1] == (slice(1, 2), slice(9, 12))


# --- export and load ---


@pytest.mark.parametrize("name", CONFIGS)
def test_export_then_load_is_bitwise(name, tmp_path):
    model, params = export_tiny(tmp_path / "out", CONFIGS[name])
    pretrained = open_pretrained(tmp_path / "out")
    assert pretrained.config == model.config
    assert_same(params, pretrained.load(model.specs))
    assert_same(params["layers"]["attn"]["wq"][2, 4:8, 1:3], pretrained.read("layers/attn/wq", 2, np.s_[4:8, 1:3, :]))


def test_export_merges_adapters_and_writes_what_others_read(tmp_path):
    model, params = random_model(TINY)
    params = lora.make(rank=2)(params, model.specs, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.01, params)  # B starts at zero
    delta = export.export_hf(model, params, tokenizers.load("bytes"), tmp_path / "out", generation={"temperature": 0.5})
    assert delta < 1e-5
    assert_same(weights.dense(params, model.specs), open_pretrained(tmp_path / "out").load(model.specs))
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "pad_token_id": 258, "eos_token_id": 257, "temperature": 0.5}
    assert tokenizers.load(tmp_path / "out").encode("hé") == tokenizers.load("bytes").encode("hé")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    model, params = export_tiny(tmp_path / "out", dtype="bfloat16")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == 2 * sum(x.size for x in jax.tree.leaves(params))
    loaded = open_pretrained(tmp_path / "out").load(model.specs, dtype="bfloat16")
    assert_same(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), loaded)


def test_export_that_reads_back_wrong_leaves_nothing(tmp_path, monkeypatch):
    written = export.tensors

    def broken(model, params):
        for name, x in written(model, params):
            yield name, -x if name.endswith("k_proj.weight") else x

    monkeypatch.setattr(export, "tensors", broken)
    with pytest.raises(UserError, match="logits read back differ"):
        export_tiny(tmp_path / "out", check=True)
    assert not list(tmp_path.iterdir())


def test_export_refuses(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").touch()
    with pytest.raises(UserError, match="not empty"):
        export_tiny(tmp_path / "full")
    with pytest.raises(UserError, match="cannot represent this model's qk_norm"):
        export_tiny(tmp_path / "out", dataclasses.replace(TINY, qk_norm=True))
    with pytest.raises(UserError, match="the tokenizer has 259 tokens, but the model only 100"):
        export_tiny(tmp_path / "out", dataclasses.replace(TINY, vocab_size=100))


def test_export_from_the_command_line(folder, tmp_path, capsys):
    """Half precision of a model that is already exported; then the same again, and another one to the same folder."""
    command = [f"--from={folder}", f"--to={tmp_path / 'half'}", "--dtype=float16"]
    assert tools.export.main(command) == 0
    told = capsys.readouterr().out
    assert "AutoModelForCausalLM.from_pretrained(" in told and told.endswith(f"vllm serve {tmp_path / 'half'}\n")
    card = (tmp_path / "half/README.md").read_text()
    assert (
        card.startswith("---\nlibrary_name: transformers\n---\n\n# half\n")
        and str(tmp_path) not in card.split("```")[0]
    )
    assert open_pretrained(tmp_path / "half").read("final_norm/scale").dtype == np.float16
    assert tools.export.main(command) == 0  # as after a kill behind the last rename
    assert tools.export.main(command[:2]) == 2
    assert "not empty" in capsys.readouterr().err
    (tmp_path / "half" / "model.safetensors").write_bytes(b"other weights")
    assert tools.export.main(command) == 2
    assert "not empty" in capsys.readouterr().err and not list(tmp_path.glob(".*"))


def test_each_device_reads_its_slice(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    model, params = export_tiny(tmp_path / "out")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    places = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
    pick = lambda spec: NamedSharding(mesh, PartitionSpec(*(places.get(axis) for axis in spec.names)))
    shardings = jax.tree.map(pick, model.specs, is_leaf=weights.is_spec)
    pretrained = open_pretrained(tmp_path / "out")
    read, most = pretrained.source.read, {}

    def spy(name, cuts):
        x = read(name, cuts)
        most[name] = max(most.get(name, 0), x.size)
        return x

    pretrained.source.read = spy
    loaded = pretrained.load(model.specs, shardings)
    assert_same(params, loaded)
    assert loaded["layers"]["mlp"]["up"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert most["model.layers.0.mlp.up_proj.weight"] == 32 * 64 / 8
    assert most["model.layers.0.self_attn.q_proj.weight"] == 32 * 32 / 8


# --- what is refused, in one line ---


@pytest.fixture
def folder(tmp_path):
    export_tiny(tmp_path / "m")
    return tmp_path / "m"


def change_tensors(folder: Path, f):
    tensors = load_file(folder / "model.safetensors")
    f(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_wrong_tensor_is_named(folder):
    def f(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = np.ones(7, np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(32, np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    change_tensors(folder, f)
    with pytest.raises(UserError) as error:
        open_pretrained(folder).load(Transformer(TINY).specs)
    text = str(error.value)
    assert "missing model.layers.1.mlp.up_proj.weight" in text
    assert "model.norm.weight has shape (7,), but needs (32,)" in text
    assert "unexpected model.layers.0.self_attn.q_proj.bias" in text
    assert "inv_freq" not in text and "\n" not in text


def test_a_bare_body_and_a_copied_head_load(folder):
    """Names without "model." in front, as of a body saved alone, and lm_head beside a tied embedding."""
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))

    def f(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"].copy()

    change_tensors(folder, f)
    pretrained = open_pretrained(folder)
    assert "unembed" not in pretrained.load(Transformer(pretrained.config).specs)


def test_pickles_and_paths_that_escape_are_refused(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "away.safetensors")
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="weights are only pickled"):
        open_pretrained(folder)
    index = {"weight_map": {"model.norm.weight": "../away.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is outside the folder"):
        open_pretrained(folder)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:5], lambda b: b"\xff" * 8 + b[8:]])
def test_damaged_safetensors(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="not a readable safetensors file"):
        open_pretrained(folder)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model_type": "rwkv"}, "'rwkv' is not supported; supported: "),
        ({"model_type": "../llama"}, "is not supported"),
        ({"hidden_act": "relu2"}, "activation 'relu2'"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "part of the head"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between layers"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "needs a number for low_freq_factor"),
        ({"rope_theta": "much"}, "could not convert"),
        ({"num_attention_heads": 0, "head_dim": None}, "by zero"),
        ({"quantization_config": {"bits": 4}}, "weights are quantized"),
        ({"hidden_size": None}, "is not a whole number from 1"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 key heads"),
    ],
)
def test_configs_that_the_layers_cannot_compute(folder, change, said):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said):
        open_pretrained(folder)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no such file"):
        open_pretrained("nowhere.gguf")
    with pytest.raises(UserError, match="not a local path"):
        open_pretrained("nobody/nothing")
    (tmp_path / "ckpt").mkdir()
    with pytest.raises(UserError, match="run folder"):
        open_pretrained(tmp_path)


def test_both_spellings_of_rope_scaling():
    old = family("llama").hf_config(CONFIGS["llama3"])
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    assert family("llama").config(old) == family("llama").config(new) == CONFIGS["llama3"]


def test_qwen_windows():
    """Layers from max_window_layers on slide; `layer_types` says it layer by layer."""
    base = dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=8)
    windows = family("llama").windows
    assert windows(base | {"max_window_layers": 1}) == (0, 8, 8)
    assert windows(base | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}) == (8, 0, 0)
    assert windows(base | {"use_sliding_window": False, "max_window_layers": 1}) == ()


# --- GGUF ---


def write_gguf(path, model, params, quant=gguf.GGMLQuantizationType.F32, more=()):
    """What llama.cpp's converter writes: names and metadata of its own, rotated pairs of the llama family adjacent."""
    c, tensors = model.config, dict(export.tensors(model, params))
    arch = "llama" if c.family == "mistral" else c.family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.layers)
    writer.add_context_length(c.max_len)
    writer.add_embedding_length(c.embed)
    writer.add_feed_forward_length(c.mlp)
    writer.add_head_count(c.heads)
    (writer.add_layer_norm_eps if arch == "gpt2" else writer.add_layer_norm_rms_eps)(c.norm_eps)
    if arch != "gpt2":
        writer.add_head_count_kv(c.kv_heads)
        writer.add_key_length(c.head_dim)
        writer.add_rope_freq_base(c.rope_theta)
    scaling = dict(c.rope_scaling)
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(c))
    elif scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), c.layers)
    for name, x in tensors.items():
        if arch == "gpt2" and x.ndim == 2 and ".h." in name:
            x = np.ascontiguousarray(x.T)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            x = x.reshape(-1, 2, c.head_dim // 2, c.embed).swapaxes(1, 2).reshape(x.shape)
        kind = quant if x.ndim == 2 else gguf.GGMLQuantizationType.F32
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
    for name, (x, kind) in dict(more).items():
        writer.add_tensor(name, x, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(c):
    """The loop of llama.cpp's converter."""
    s, out = dict(c.rope_scaling), []
    for freq in c.rope_theta ** -(np.arange(0, c.head_dim, 2) / c.head_dim):
        turns = s["original_max_position_embeddings"] * freq / (2 * np.pi)
        smooth = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        out.append(1 / np.clip(smooth + (1 - smooth) / s["factor"], 1 / s["factor"], 1))
    return np.array(out, np.float32)


@pytest.mark.parametrize("name", ["llama", "llama3", "yarn", "qwen2", "qwen3", "gpt2"])
def test_gguf_of_every_architecture(name, tmp_path):
    config = dataclasses.replace(CONFIGS[name], windows=())
    model, params = random_model(config)
    write_gguf(tmp_path / "m.gguf", model, params)
    pretrained = open_pretrained(tmp_path / "m.gguf")
    assert pretrained.config == config
    assert_same(params, pretrained.load(model.specs))
    part = pretrained.read("layers/attn/wq", 1, np.s_[3:9, 1:3, 2:5])
    assert_same(params["layers"]["attn"]["wq"][1, 3:9, 1:3, 2:5], part)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_quantized(kind, tmp_path):
    model, params = random_model(TINY)
    quant = gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "m.gguf", model, params, quant)
    table = open_pretrained(tmp_path / "m.gguf").load(model.specs)["embed"]["table"]
    wanted = gguf.dequantize(gguf.quantize(np.asarray(params["embed"]["table"]), quant), quant)
    np.testing.assert_array_equal(table, wanted)
    assert np.abs(table - params["embed"]["table"]).max() < 0.2


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_gguf_blocks_by_rows(kind, tmp_path):
    """Any bytes are blocks of these types; a slice of rows reads what the whole reads."""
    quant = gguf.GGMLQuantizationType[kind]
    model, params = random_model(dataclasses.replace(TINY, embed=256))
    _, row_bytes = gguf.quants.quant_shape_to_byte_shape((5000, 256), quant)
    data = np.random.default_rng(0).integers(0, 56, (5000, row_bytes), np.uint8)  # scales stay finite
    write_gguf(tmp_path / "m.gguf", model, params, more={"blocks": (data, quant)})
    read = open_pretrained(tmp_path / "m.gguf").source.read
    wanted = gguf.dequantize(data, quant)
    np.testing.assert_array_equal(read("blocks", np.s_[:, :]), wanted)  # in more than one chunk
    np.testing.assert_array_equal(read("blocks", np.s_[100:140, 7:9]), wanted[100:140, 7:9])


def test_gguf_in_parts(tmp_path, monkeypatch):
    """As llama.cpp's gguf-split cuts it: every part opens the whole, and a missing one is named."""
    model, params = random_model(TINY)
    monkeypatch.setattr(gguf, "GGUFWriter", functools.partial(gguf.GGUFWriter, split_max_tensors=7))
    write_gguf(tmp_path / "m.gguf", model, params)
    files = sorted(tmp_path.glob("m-*.gguf"))
    assert len(files) > 2 and files[0].name.startswith("m-00001-of-0000")
    for file in files[:2]:
        opened = open_pretrained(file)
        assert opened.tokenizer_source == str(files[0]) and not opened.unused
        weights.map_named(
            lambda path, x, y: np.testing.assert_array_equal(x, y, path), params, opened.load(model.specs)
        )
    files[1].unlink()
    with pytest.raises(UserError, match=f"1 of {len(files)} parts are missing: {files[1].name}"):
        open_pretrained(files[0])


def test_early_gguf(tmp_path, monkeypatch):
    """Linear scaling under its first name and without a type, as llama.cpp reads it; what nothing reads is counted."""
    model, params = random_model(TINY)

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self):
            self.add_float32("llama.rope.scale_linear", 2.0)
            self.add_float32("llama.logit_scale", 0.5)
            super().write_header_to_file()

    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    write_gguf(tmp_path / "m.gguf", model, params)
    opened = open_pretrained(tmp_path)  # which holds no other model
    assert dict(opened.config.rope_scaling) == {"rope_type": "linear", "factor": 2.0}
    assert opened.unused == ["llama.logit_scale"]
    for start, why in {
        b"tjgg": "before GGUF: convert it",
        b"GGUF\1\0\0\0": "version 1",
        b"GGUF\0\0\0\3": "big-endian",
    }.items():
        (tmp_path / "old.gguf").write_bytes(start + bytes(64))
        with pytest.raises(UserError, match=why):
            open_pretrained(tmp_path / "old.gguf")


@pytest.mark.parametrize("cut", [3, 40, 400, -100])
def test_damaged_gguf(cut, tmp_path):
    model, params = random_model(TINY)
    path = tmp_path / "m.gguf"
    write_gguf(path, model, params)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"readable GGUF|cannot read|is missing"):
        open_pretrained(path).load(model.specs)


def test_llama3_scaling_is_found_again():
    factors = llama3_factors(CONFIGS["llama3"])
    assert llama3_scaling(factors, 5e5, 64, "") == LLAMA3
    with pytest.raises(UserError, match="not a llama3 scaling"):
        llama3_scaling(factors**2 * np.linspace(1, 2, 32), 5e5, 64, "")


# --- one real model ---

MEASURE = """
import re, jax
from model.io.pretrained import open_pretrained
from model.net.transformer import Transformer
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
pretrained = open_pretrained("smollm2-135m-instruct")
specs = Transformer(pretrained.config).specs
before = peak()
params = jax.block_until_ready(pretrained.load(specs))
print((peak() - before) / sum(x.nbytes for x in jax.tree.leaves(params)))
"""


def test_loading_never_holds_the_model_twice():
    """Over what jax itself takes, the peak is the model and its largest leaf (a fifth of it)."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak is read from /proc")
    try:
        open_pretrained("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(str(error))
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    print("peak over model size:", run.stdout)
    assert float(run.stdout) < 1.35


# --- GGUF, written ---


@pytest.mark.parametrize("name", ["llama", "llama3", "yarn", "qwen2", "qwen3", "gpt2"])
def test_gguf_that_we_write_gives_the_parameters_back(name, tmp_path):
    config = dataclasses.replace(CONFIGS[name], windows=())
    model, params = random_model(config)
    gguf_write.write(tmp_path / "m.gguf", model, params, {}, "F32")
    again = open_pretrained(tmp_path / "m.gguf")
    assert again.config == config
    assert_same(params, again.load(model.specs))


def test_gguf_is_refused_for_what_llama_cpp_does_not_compute(tmp_path):
    model, params = random_model(CONFIGS["mistral"])
    with pytest.raises(UserError, match="this model's sliding windows"):
        gguf_write.write(tmp_path / "m.gguf", model, params, {}, "F32")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_goes_into_the_gguf_and_comes_back(tmp_path):
    """SentencePiece BPE as GGUF has it, its template and its ends too; a byte-level one is tested with llama.cpp."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "\u2581a", "\u2581ab"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 5]
    scores = [0.0] * 262 + [-1.0, -2.0]
    core = pieces.sentencepiece_core(tokens, scores, kinds, bpe=True, dummy_prefix=True, squeeze=False, charsmap=b"")
    tokenizer = Tokenizer(core, bos=1, eos=2, prefix=(1,), chat_template="{{ messages }}")
    model, params = random_model(dataclasses.replace(TINY, vocab_size=266))
    gguf_write.write(tmp_path / "m.gguf", model, params, words.metadata(tokenizer, 266), "Q8_0")
    again = tokenizers.load(tmp_path / "m.gguf")
    for text in ("ab a b", " ab", "hé", "abab  a"):
        assert again.encode(text) == tokenizer.encode(text)
    assert (again.chat_template, again.eos_ids, again.prefix) == ("{{ messages }}", (2,), (1,))
