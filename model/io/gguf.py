"""Reads a GGUF file from llama.cpp as if it were a Hugging Face folder.

Converts the metadata to the fields of a config.json, and dequantizes the tensors.
"""

import functools
import math
import re
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.gguf_header import read_header
from common.seen import Seen
from model.families._layout import Index

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
QUIET = re.compile(r"[^.]+\.(vocab_size|tensor_data_layout|rope\.scaling\.finetuned|expert_used_count)")
PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
# number of values that are dequantized at once; small enough that temporary arrays fit in the CPU cache
CHUNK = 1 << 20
TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # tensors of GPT-2


class File:
    """An opened GGUF file. Its tensors are read and dequantized slice by slice, in the axis order of Hugging Face."""

    def __init__(self, path: Path):
        files = parts(path)
        self.path, headers = files[0], [read_header(file) for file in files]
        self.metadata, self.tensors = Seen(headers[0].metadata), {}
        self.files = {name: file for file, header in zip(files, headers) for name in header.tensors}  # {tensor: file}
        for header in headers:
            self.tensors |= header.tensors
        self.architecture = self.metadata.get("general.architecture")
        if self.metadata.get("general.type") == "adapter":
            raise UserError(
                "this is a llama.cpp adapter, not a model", str(path), "open the PEFT folder that it was made from"
            )
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(f"architecture {self.architecture!r} is not supported; supported: {known}", str(path))
        try:
            self.hf_config = self._gpt2_config() if self.architecture == "gpt2" else self._llama_config()
        except KeyError as error:
            raise UserError(f"{error} is missing in the metadata", str(path)) from None
        except (TypeError, ArithmeticError) as error:
            raise UserError(f"the metadata contains a value of the wrong type ({error})", str(path)) from None
        ids = {f"{t}_token_id": self.metadata.get(f"tokenizer.ggml.{t}_token_id") for t in ("bos", "eos")}
        ids["pad_token_id"] = self.metadata.get("tokenizer.ggml.padding_token_id")
        self.generation = {name: i for name, i in ids.items() if i is not None}

    # --- metadata ---

    def _get(self, key: str, *default):
        key = f"{self.architecture}.{key}"
        value = self.metadata.get(key, *default) if default else self.metadata[key]
        if isinstance(value, list):
            raise UserError(f"{key} differs between layers, which is not supported", str(self.path))
        # The file stores 32-bit floats, so 1e-5 is read as 9.999999747e-06. This line converts it back to 1e-5.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _llama_config(self) -> dict:
        embed, heads = self._get("embedding_length"), self._get("attention.head_count")
        head_dim = self._get("attention.key_length", embed // heads)
        same = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "expert_count": 0}
        for key, value in same.items():
            if self._get(key, value) != value:
                raise UserError(f"{key}={self._get(key)} is not supported; only {value} is", str(self.path))
        theta = self._get("rope.freq_base", 10000.0)
        return {
            "model_type": self.architecture,
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "num_hidden_layers": self._get("block_count"),
            "hidden_size": embed,
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self._get("feed_forward_length"),
            "rms_norm_eps": self._get("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._get("context_length"),
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(theta, head_dim),
            "tie_word_embeddings": "output.weight" not in self.tensors,
        }

    def _gpt2_config(self) -> dict:
        return {
            "model_type": "gpt2",
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "n_layer": self._get("block_count"),
            "n_embd": self._get("embedding_length"),
            "n_head": self._get("attention.head_count"),
            "n_inner": self._get("feed_forward_length"),
            "n_positions": self._get("context_length"),
            "layer_norm_epsilon": self._get("attention.layer_norm_epsilon"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
        }

    def _rope_scaling(self, theta: float, head_dim: int) -> dict | None:
        if "rope_freqs.weight" in self.tensors:
            factors = self.read("rope_freqs.weight", (slice(None),))
            return llama3_scaling(factors, theta, head_dim, str(self.path))
        # As in llama.cpp, older files may have the key rope.scale_linear. If a file has a factor but no type, the
        # scaling is linear.
        factor = self._get("rope.scaling.factor", None) or self._get("rope.scale_linear", None) or 1.0
        kind = self._get("rope.scaling.type", "none" if factor == 1.0 else "linear")
        original = self._get("rope.scaling.original_context_length", None)
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": factor}
        return scaling | ({"original_max_position_embeddings": original} if original else {})

    # --- tensors ---

    body = ""

    def unused_fields(self, _: Seen) -> list[str]:
        """Returns the names of non-empty metadata fields that belong to the architecture but were not used."""
        own = (name for name in self.metadata.unused(()) if name.startswith(f"{self.architecture}."))
        return sorted(name for name in own if not QUIET.fullmatch(name))

    def unused_files(self) -> list[str]:
        return []

    @property
    def names(self) -> set[str]:
        return set(self.tensors) - {"rope_freqs.weight"}  # read as part of the config

    @functools.cached_property
    def _name_map(self):
        import gguf

        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        return gguf.get_tensor_name_map(arch, self._get("block_count"))

    def stored(self, name: str) -> str:
        """Converts the Hugging Face name of a tensor to its name in this file."""
        return self._name_map.get_name(name, try_suffixes=(".weight", ".bias")) or name

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.tensors[name].shape
        return shape[::-1] if self._transposed(name) else shape

    def read(self, name: str, cuts: Index) -> np.ndarray:
        if self._transposed(name):
            rows, columns = cuts[::-1]
            return self._rows(name, rows)[:, columns].T
        if len(cuts) == 1:
            return self._unpermuted(name, self._rows(name, slice(None))[0])[cuts]
        return self._unpermuted(name, self._rows(name, cuts[0]))[:, cuts[1]]

    def _transposed(self, name: str) -> bool:
        return self.architecture == "gpt2" and name.endswith(TRANSPOSED)

    def _unpermuted(self, name: str, x: np.ndarray) -> np.ndarray:
        """Reorders the rows of a query or key matrix x as in Hugging Face models. Each row is one dimension of a head.

        Files of the architecture "llama" interleave the two halves of each head, because llama.cpp rotates pairs of
        adjacent dimensions.
        """
        if self.architecture != "llama" or (".attn_q." not in name and ".attn_k." not in name):
            return x
        half = self.hf_config["head_dim"] // 2
        return x.reshape(-1, half, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    def _rows(self, name: str, rows: slice) -> np.ndarray:
        """Reads rows of a matrix as float32. A vector counts as a matrix with one row.

        The file is not memory-mapped, because mapped pages would stay in memory.
        """
        import gguf

        tensor = self.tensors[name]
        columns = tensor.shape[-1]
        start, stop, _ = rows.indices(math.prod(tensor.shape[:-1]))
        try:
            kind = gguf.GGMLQuantizationType(tensor.kind)
            row_bytes = gguf.quants.quant_shape_to_byte_shape((columns,), kind)[0]
            if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
                row_bytes = columns * (4 if kind == gguf.GGMLQuantizationType.F32 else 2)
            file = self.files[name]
            if tensor.offset + stop * row_bytes > file.stat().st_size:
                raise ValueError("it runs past the end of the file")
            out = np.empty((stop - start, columns), np.float32)
            step = max(1, CHUNK // columns)
            for i in range(0, stop - start, step):
                count = min(step, stop - start - i)
                offset = tensor.offset + (start + i) * row_bytes
                data = np.fromfile(file, np.uint8, count * row_bytes, offset=offset)
                out[i : i + count] = gguf.dequantize(data.reshape(count, row_bytes), kind)
        except (ValueError, NotImplementedError, OSError) as error:
            raise UserError(f"cannot read {name} (type {tensor.kind}): {error}", str(self.path)) from None
        return out


def inside(folder: Path) -> Path | None:
    """Returns the path of the GGUF model in a folder, or None if there is none.

    If the model is split into several files, returns the path of the first file. Raises UserError if the folder has
    several models.
    """
    found = sorted({parts(path)[0] for path in folder.glob("*.gguf")})
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:5])
        raise UserError(f"the folder holds {len(found)} models: {names}", str(folder), "give the path of one")
    return found[0] if found else None


def parts(path: Path) -> list[Path]:
    """Returns the paths of all files of a model that was split by gguf-split, given the path of one of them.

    If the model is not split, returns only the given path. Raises UserError if files are missing.
    """
    match = PART.fullmatch(path.name)
    if not match:
        return [path]
    files = [path.with_name(f"{match[1]}-{i:05d}-of-{match[2]}.gguf") for i in range(1, int(match[2]) + 1)]
    if absent := [file.name for file in files if not file.exists()]:
        raise UserError(f"{len(absent)} of {len(files)} parts are missing: {', '.join(absent[:3])}", str(path.parent))
    return files


def llama3_scaling(factors: np.ndarray, theta: float, head_dim: int, where: str) -> dict | None:
    """Reconstructs the parameters of a `llama3` rope scaling from `factors` [H/2], by which the frequencies are
    divided.

    A GGUF file only stores these divisors. The largest divisor is the parameter `factor`. High frequencies are
    unchanged, and low frequencies are divided by `factor`. For each frequency in between, the divisor determines an
    interpolation weight, `smooth`. The weight is a linear function of the frequency. The slope and offset of this
    function determine the other parameters up to a common scale, so low_freq_factor is set to 1. Raises UserError if no
    `llama3` scaling has these factors.
    """
    if (factors == 1).all():
        return None
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    factor = float(factors.max())
    smooth = (factor / factors.astype(np.float64) - 1) / (factor - 1)
    between = (smooth > 0) & (smooth < 1)
    if between.sum() < 2:
        raise UserError("rope_freqs.weight is not a llama3 scaling", where)
    slope, offset = np.polyfit(frequency[between], smooth[between], 1)
    original, high = round(-slope / offset), round(1 - 1 / offset, 3)
    refit = np.clip((original * frequency - 1) / (high - 1), 0, 1)
    if not np.allclose(1 / (refit + (1 - refit) / factor), factors, rtol=1e-4):
        raise UserError("rope_freqs.weight is not a llama3 scaling", where)
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
