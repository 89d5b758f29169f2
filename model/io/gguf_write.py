"""Writes a model as a GGUF file, which llama.cpp and model/io/gguf.py can read."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from common import files
from common.errors import UserError
from common.types import Json
from model import weights
from model.config import ModelConfig
from model.io import export
from model.io.gguf import TRANSPOSED
from model.net.attention import rope_frequencies
from model.net.transformer import Transformer
from model.weights import Params

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
BIAS = {"llama": "none", "qwen2": "qkv", "qwen3": "none", "gpt2": "all"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
# {type of the written matrices: largest accepted change of the logits, as a fraction of the largest logit}
TOLERANCE = {"F32": 1e-4, "F16": 1e-2, "BF16": 6e-2, "Q8_0": 0.1, "Q4_0": 1.0, "Q4_1": 1.0}


def write(path: str | Path, model: Transformer, params: Params, tokenizer: Json, kind: str = "F16") -> float:
    """Merges adapters, writes the model with the tokenizer's metadata, and reads the file back to compare logits.

    `kind` is the type of the written matrices. Returns the difference between the logits of `params` and those of the
    written file, relative to the largest logit. Raises UserError if llama.cpp does not support the model, if the file
    exists and has other content, or if the logits differ too much.
    """
    path, config = Path(path), model.config
    if kind not in FILE_TYPES:
        raise UserError(f"type {kind!r} is not supported", "--dtype", f"supported: {', '.join(FILE_TYPES)}")
    _check(config)
    if "head" in params:
        raise UserError("a .gguf file cannot store a reward model's head", str(path), "export it without --format")
    plain = weights.dense(params, model.specs)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with files.file(path, replace=False) as work:
            _file(work, model, plain, tokenizer, kind)
            delta = export.check_logits(model, params, work, path, kind, TOLERANCE[kind])
    except FileExistsError:
        raise UserError("the file exists with other content", str(path), "choose a new name") from None
    return delta


def _check(config: ModelConfig) -> None:
    """Raises UserError for a model that llama.cpp does not support."""
    arch, scaling = ARCHITECTURES.get(config.family), dict(config.rope_scaling).get("rope_type", "none")
    act = "gelu_tanh" if arch == "gpt2" else "silu"
    said = {
        f"family {config.family}": arch is not None,
        f"bias {config.bias}": arch is not None and config.bias == BIAS[arch],
        f"activation {config.act}": config.act == act,
        "sliding windows": not any(0 < w < config.max_len for w in config.windows),
        f"rope type {scaling}": scaling in ("none", "linear", "yarn", "llama3"),
    }
    if lost := [name for name, fits in said.items() if not fits]:
        raise UserError(f"the GGUF export does not support this model's {', '.join(lost)}", "export", "--format=hf")


def _file(path: Path, model: Transformer, params: Params, tokenizer: Json, kind: str) -> None:
    import gguf

    c, arch = model.config, ARCHITECTURES[model.config.family]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _shape(writer, c, arch)
    for name, value in tokenizer.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        if value != []:
            add[type(value)](name, value)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), c.layers)
    if dict(c.rope_scaling).get("rope_type") == "llama3":
        plain = dataclasses.replace(c, rope_scaling=())
        factors = np.asarray(rope_frequencies(plain, 1)[0]) / np.asarray(rope_frequencies(c, 1)[0])
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    for theirs, x in export.tensors(model, params):
        name, x = names.get_name(theirs, try_suffixes=(".weight", ".bias")), np.asarray(x, np.float32)
        if arch == "gpt2" and name.endswith(TRANSPOSED):
            x = x.T
        # llama.cpp rotates pairs of adjacent dimensions
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            x = x.reshape(-1, 2, c.head_dim // 2, c.embed).swapaxes(1, 2).reshape(x.shape)
        to = gguf.GGMLQuantizationType[_kind(kind, x)]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(x), to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind(kind: str, x: np.ndarray) -> str:
    """Returns the type in which a tensor is written.

    Vectors are written as float32. A matrix whose row length is not a multiple of 32 cannot be quantized, and is
    written as float16.
    """
    if x.ndim < 2:
        return "F32"
    return "F16" if kind.startswith("Q") and x.shape[-1] % 32 else kind


def _shape(writer: Any, c: ModelConfig, arch: str) -> None:
    import gguf

    writer.add_block_count(c.layers)
    writer.add_context_length(c.max_len)
    writer.add_embedding_length(c.embed)
    writer.add_feed_forward_length(c.mlp)
    writer.add_head_count(c.heads)
    if arch == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
        return
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab_size)
    scaling = dict(c.rope_scaling)
    if scaling.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling.get("original_max_position_embeddings") or c.max_len)
