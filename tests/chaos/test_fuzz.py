"""Small files that were found to take everything, or to be read as what they are not; and a part of `make chaos`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2 as proto

from common.errors import UserError
from data import dataset
from data.text import formats as tokenizers
from infer.models import Run
from model.io import saved
from tests.chaos import fuzz
from tests.chaos.test_kills import ROOT, environment

ROWS = "".join(f'{{"text": "a {i}"}}\n' for i in range(30))
DEEP = "[" * 100_000


def changed(name: str, **values: Any) -> Callable[[Path], object]:
    """An object of JSON with other values."""

    def change(root: Path) -> None:
        path = root / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))

    return change


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(content)


def tensors(name: str, change: Callable[[str, np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda root: save_file({n: change(n, x) for n, x in load_file(root / name).items()}, root / name)


def pieces(*own: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        model = proto.ModelProto()
        model.trainer_spec.model_type = proto.TrainerSpec.BPE
        for piece in ("<unk>", "a", "b", *own):
            model.pieces.add(piece=piece, score=-1.0)
        (root / "tokenizer.model").write_bytes(model.SerializeToString())

    return change


def header(**fields: Any) -> Callable[[Path], None]:
    """A GGUF file of one tensor; a value is a number, or a list of texts."""

    def change(root: Path) -> None:
        writer = gguf.GGUFWriter(root / "m.gguf", "llama")
        sizes = {"block_count": 1, "embedding_length": 8, "feed_forward_length": 8, "context_length": 8}
        eps = {"attention.layer_norm_rms_epsilon": 1e-5, "attention.head_count": 1}
        for name, value in (sizes | eps | {k.replace("__", "."): v for k, v in fields.items()}).items():
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            (writer.add_array if isinstance(value, list) else add)(f"llama.{name}", value)
        writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()

    return change


def shape(**values: Any) -> Callable[[Path], None]:
    """The model.json of a run that holds every parameter."""
    whole = dict(vocab_size=320, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=32)
    return changed("run/model.json", **(whole | values))


def adapter(**values: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / "adapter").mkdir()
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        a, b = np.ones((2, 16), np.float32), np.ones((16, 2), np.float32)
        save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, root / "adapter/adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (root / "adapter/adapter_config.json").write_text(json.dumps(config | values))

    return change


def pattern(regex: str) -> Callable[[Path], None]:
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return changed("base/tokenizer.json", pre_tokenizer=step)


def token(number: int) -> Callable[[Path], object]:
    """A vocabulary in which one token has another id."""
    model = json.loads((fuzz.OLD / "base/tokenizer.json").read_text())["model"]
    name = next(iter(model["vocab"]))
    return changed("base/tokenizer.json", model=model | {"vocab": model["vocab"] | {name: number}})


def far(root: Path) -> None:
    when = pyarrow.array([1 << 60, *range(30)], pyarrow.timestamp("us"))
    table = pyarrow.table({"text": [f"a {i}" for i in range(31)], "when": when})
    pyarrow.parquet.write_table(table, root / "rows.parquet")


def sealed(root: Path) -> None:
    """A manifest with a right checksum, of an array that its files cannot hold."""
    path = root / "run/ckpt/4" / saved.MANIFEST
    manifest = json.loads(path.read_text())["manifest"]
    next(leaf for name, leaf in manifest["leaves"].items() if name.startswith("params/"))["shape"] = [10**9]
    path.write_text(saved.seal(manifest))


def read_shape(root: Path) -> None:
    _ = Run(root / "run").config


MODEL, TOKENIZER, RUN = fuzz.read_model("base"), fuzz.read_tokenizer("base"), read_shape
GGUF, ADAPTER = fuzz.read_model("m.gguf"), fuzz.read_adapter
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0)
CASES = {  # what is wrong -> (change, reader, what the one line says; "" where the file is read)
    "10^9 layers": (changed("base/config.json", num_hidden_layers=10**9), MODEL, "1,000,000,000 layers"),
    "nested without end": (text("base/config.json", DEEP), MODEL, "config.json · not readable as JSON: it is nested"),
    "an epsilon of NaN": (changed("base/config.json", rms_norm_eps=float("nan")), MODEL, "the number NaN is"),
    "1e400": (text("base/config.json", '{"rope_theta": 1e400}'), MODEL, "the number 1e400 is not finite"),
    "a negative epsilon": (changed("base/config.json", rms_norm_eps=-1e-5), MODEL, "norm_eps=-1e-05 is not a number"),
    "rope_theta 0": (changed("base/config.json", rope_theta=-1), MODEL, "rope_theta=-1.0 is not a number from"),
    "a text for a number": (changed("base/config.json", hidden_size="16"), MODEL, "config of llama is"),
    "a list for a number": (changed("base/config.json", max_position_embeddings=[1]), MODEL, "max_len=[1] is not a"),
    "an empty band": (changed("base/config.json", rope_scaling=LLAMA3), MODEL, "high_freq_factor is not above"),
    "heads of one number": (changed("base/config.json", head_dim=1), MODEL, "dimensions per head, not 1"),
    "10^18 tokens": (changed("base/config.json", vocab_size=10**18), MODEL, "vocab_size=1000000000000000000 is not"),
    "generation NaN": (text("base/generation_config.json", '{"temperature": NaN}'), MODEL, "NaN is not finite"),
    "weights of NaN": (tensors("base/model.safetensors", lambda n, x: x * np.nan), MODEL, "the weights contain NaN"),
    "an infinite weight": (
        tensors("base/model.safetensors", lambda n, x: np.where(x == x.max(), np.inf, x).astype(x.dtype)),
        MODEL,
        "the weights contain NaN or infinities",
    ),
    "an index of a list": (
        lambda root: (
            (root / "base/model.safetensors").unlink(),
            changed("base/model.safetensors.index.json", weight_map=[1])(root),
        ),
        MODEL,
        "weight_map is not an object",
    ),
    "10^9 ids of padding": (
        changed("base/tokenizer.json", padding={"strategy": {"Fixed": 10**9}, "direction": "Right",
                "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}), TOKENIZER, ""),
    "a token of id 10^9": (token(10**9), TOKENIZER, "one of them has the id 1,000,000,000"),
    "a pattern that explodes": (pattern("(a+)+$"), TOKENIZER, "retry-limit-in-match over"),
    "no ids of the end": (changed("base/tokenizer_config.json", extra_eos_ids=["x", -1, 2**70, [1]]), TOKENIZER, ""),
    "a piece of 200 kB": (pieces("a" * 200_000), fuzz.read_tokenizer("tokenizer.model"), "a piece has 200,000 char"),
    "many long pieces": (
        pieces(*("a" * n for n in range(800, 1025))), fuzz.read_tokenizer("tokenizer.model"), ""),
    "10^6 blocks": (header(block_count=10**6), GGUF, "1,000,000 layers, but the files"),
    "GGUF of NaN": (header(rope__freq_base=float("nan")), GGUF, "rope_theta=nan is not a number from"),
    "heads by layer": (header(block_count=["x"]), GGUF, "block_count differs between layers"),
    "lora_alpha inf": (adapter(lora_alpha=float("inf")), ADAPTER, "the number Infinity is not finite"),
    "a text for lora_alpha": (adapter(lora_alpha="4"), ADAPTER, "lora_alpha='4' is not a valid value"),
    "a kind of a list": (adapter(peft_type=[1]), ADAPTER, "peft_type=[1] is not a valid value"),
    "a huge r": (adapter(r=10**18), ADAPTER, ""),
    "alpha_pattern explodes": (adapter(alpha_pattern={"(q+)+x": 1.0}), ADAPTER, "which can take forever"),
    "adapters of NaN": (
        lambda root: (adapter()(root), tensors("adapter/adapter_model.safetensors", lambda n, x: x * np.nan)(root)),
        ADAPTER,
        "the weights contain NaN",
    ),
    "a run without a number": (changed("run/config.json", seed=None), RUN, "config.seed = None"),
    "a run of another init": (changed("run/config.json", init=7), RUN, "config.init = 7"),
    "a shape of NaN": (shape(norm_eps=float("nan")), RUN, "the number NaN is not finite"),
    "a shape of texts": (shape(heads="2"), RUN, "heads=2 is not a whole number"),
    "blocks of lists": (shape(blocks=[[1]]), RUN, "blocks must be names"),
    "an unknown activation": (shape(act="x"), RUN, "act='x' is not supported"),
    "an array of 10^9": (sealed, fuzz.read_arrays, "is larger than the files of the checkpoint can"),
    "a shape of 10^9 layers": (shape(layers=10**9), RUN, "layers=1000000000 is not a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_small_file_takes_little_and_is_refused_in_one_line(tmp_path, monkeypatch, capfd, case):
    change, read, told = CASES[case]
    shutil.copytree(fuzz.OLD, tmp_path / "root")
    monkeypatch.chdir(tmp_path / "root")
    change(Path())
    found = fuzz.ended(read, Path())
    assert found.good and found.how == ("refused" if told else "read"), found.told
    assert told in found.told and "panicked" not in capfd.readouterr().err


STRANGE = {
    "half a surrogate": '{"text": "\\ud800"}',
    "half a surrogate beside": '{"text": "a", "id": "\\udfff"}',
    "5,000 digits": f'{{"text": "a", "n": {"9" * 5000}}}',
    "nested without end": DEEP,
    "a time of year 38,000": "",
}


@pytest.mark.parametrize("strange", STRANGE)
def test_a_strange_row_is_one_bad_row(tmp_path, strange):
    if strange.startswith("a time"):
        far(tmp_path)
    else:
        (tmp_path / "rows.jsonl").write_text(f"{ROWS}{STRANGE[strange]}\n")
    source = next(map(str, tmp_path.iterdir()))
    made = dataset.prepare(source, tokenizers.byte_tokenizer(), folder=tmp_path / "cache", max_bad=0.05)
    assert (made.report["documents"], made.report["bad"]) == (30, 1)
    with pytest.raises(UserError, match="1 of 31 records are bad"):
        dataset.prepare(source, tokenizers.byte_tokenizer(), folder=tmp_path / "cache", max_bad=0.01)


@pytest.mark.slow
def test_damaged_files_are_read_or_refused():
    command = [sys.executable, "-m", "tests.chaos.fuzz", "--mutations=2000", "--seconds=240", "--seed=100"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and " 0 findings" in done.stdout, done.stdout + done.stderr
