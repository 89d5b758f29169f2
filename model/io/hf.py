"""Reads a Hugging Face folder with a config.json and one or more safetensors files. Pickles are never loaded."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common import files
from common.errors import UserError
from common.seen import Seen
from model.families import llama
from model.families._layout import Index
from model.io import foreign

# Names of the files that are downloaded from a Hugging Face Hub repository.
FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "vocab.txt", "merges.txt", "*.tiktoken", "*chat_template*")
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16", "F64")
CODES = ("I8", "I32", "I64", "F8_E4M3")  # dtypes in which codes of quantized weights are stored


LFS = b"version https://git-lfs"  # a file that git-lfs has not fetched starts with these bytes
# file types for weights
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")
QUIET = re.compile(  # weight files that are ignored without a warning: copies in other formats and training state
    r"pytorch_model.*|consolidated.*|tf_model.*|flax_model.*|rust_model.*|model\.onnx.*|training_args\.bin|optimizer.*|"
    r"scheduler.*|scaler\.pt|rng_state.*|.*\.gguf"
)
# Fields of a config.json that do not affect how the model is loaded. They describe the model's origin, training,
# sampling, special token ids and other heads.
IRRELEVANT = {
    "_name_or_path", "architectures", "model_type", "multimodal", "transformers_version", "dtype", "torch_dtype",
    "quantization_config", "auto_map", "name", "custom_pipelines", "unsloth_fixed", "unsloth_version",
    "_attn_implementation_autoset", "attn_implementation", "_attn_implementation", "use_cache", "torchscript",
    "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout", "initializer_range",
    "w_init_variance_scale", "final_w_init_variance_scale", "attention_dropout",
    "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "gradient_checkpointing", "pretraining_tp",
    "reorder_and_upcast_attn", "use_bfloat16", "tf_legacy_loss", "tokenizer_class", "n_ctx", "is_llama_config",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "return_dict_in_generate", "return_dict", "output_attentions", "output_hidden_states",
    "chunk_size_feed_forward", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder", "pruned_heads",
    "cross_attention_hidden_size", "prefix", "task_specific_params", "problem_type", "finetuning_task", "id2label",
    "label2id", "num_labels", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "tie_word_embeddings",
}  # fmt: skip
PART = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
CONVERT = (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{0}').save_pretrained('{0}')\""
)
# Possible prefixes of tensor names in a transformer without a head, a causal model, or the text part of a multimodal
# model. WRAPPERS lists additional prefixes from torch wrappers such as torch.compile.
BODIES = (
    "model.", "transformer.", "", "language_model.model.", "model.language_model.", "model.text_model.",
    "text_model.model.", "language_model.", "text_model.", "model.language_model.model.", "thinker.model.",
    "llm.model.", "llm.", "model.llm.", "bert.",
)  # fmt: skip
WRAPPERS = ("", "module.", "_orig_mod.", "model._orig_mod.")
FIRST = re.compile(
    r"(.*?)(?:embed_tokens\.weight.*|wte\.weight|embeddings\.word_embeddings\.weight|layers\.\d+\..*|h\.\d+\..*)"
)
# {model_type of a multimodal model: family of its language model}. A model_type may have the suffix _text.
TEXT = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3", "qwen2_5_omni": "qwen2"}


class Folder:
    """An opened Hugging Face folder. Metadata is read immediately, and slices of tensors are read on demand."""

    floats = DTYPES

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").exists() and (path / "adapter_config.json").exists():
            what = "this is a PEFT adapter, not a model"
            raise UserError(what, str(path), f"name its base model, and add --adapter={path}")
        if not (path / "config.json").exists():
            held = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
            what = f"the folder holds no config.json, so it is not a model; it holds {held}"
            raise UserError(what, str(path), "give the path of a model's folder")
        whole = files.load_json(path / "config.json")
        self.hf_config = text_config(whole)
        generation = path / "generation_config.json"
        self.generation = files.load_json(generation) if generation.exists() else {}
        self.shards = self._shards()
        self.quantized = whole.get("quantization_config") or self.hf_config.get("quantization_config") or {}
        self.method = self.quantized.get("quant_method") if isinstance(self.quantized, dict) else None
        if any(".base_layer." in name for name in self.shards):
            what = "the checkpoint has PEFT adapters that are not merged"
            raise UserError(what, str(path), "call merge_and_unload() and save the model again")
        self.coded = foreign.find(self)
        if self.quantized:
            foreign.check(self, self.quantized)
        self.names = foreign.names(self)
        self.body, self.head = self._places(self.names)

    def _shards(self) -> dict[str, str]:
        """Returns {name of a tensor: file that contains it}. The names are read from the files, not from the index."""
        single, index = "model.safetensors", self.path / INDEX
        if (self.path / single).exists():
            return dict.fromkeys(self._open(single).keys(), single)
        said = files.load_json(index).get("weight_map", {}) if index.exists() else {}
        if not isinstance(said, dict):
            raise UserError("weight_map is not an object", str(index))
        parts = sorted(set(map(str, said.values()))) or sorted(self._numbered())
        for part in parts:
            if not part or Path(part).name != part:
                raise UserError(f"shard {part!r} is outside the folder", str(index))
        if absent := [part for part in parts if not (self.path / part).exists()]:
            raise UserError(f"{len(absent)} of {len(parts)} parts are missing: {', '.join(absent[:3])}", str(self.path))
        shards = {name: part for part in parts for name in self._open(part).keys()}  # noqa: SIM118
        if shards:
            return shards | {name: part for name, part in said.items() if name in self._open(part).keys()}  # noqa: SIM118
        found = sorted(p.name for p in self.path.iterdir() if p.suffix in SUFFIXES)
        if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in found):
            raise UserError(
                "the weights are only pickled, and opening a pickle can run code", str(self.path),
                f"if you trust them: {CONVERT.format(self.path)}",
            )  # fmt: skip
        what = f"; it holds {', '.join(found[:3])}" if found else ""
        raise UserError(f"there is neither a model.safetensors nor an index of shards{what}", str(self.path))

    def _numbered(self) -> set[str]:
        """Returns the file names of a checkpoint that has no index, derived from the names of the existing files."""
        found = (PART.fullmatch(p.name) for p in self.path.iterdir())
        counts = {(m[2], len(m[1])) for m in found if m}
        return {f"model-{i:0{w}d}-of-{n}.safetensors" for n, w in counts for i in range(1, min(int(n), 9999) + 1)}

    @staticmethod
    def _places(names: set[str]) -> tuple[str, str]:
        """Returns (prefix of the tensor names outside the head, name of the head's tensor)."""
        before = {m[1] for name in names if (m := FIRST.fullmatch(name))}
        bodies = [wrapper + body for wrapper in WRAPPERS for body in BODIES]
        body = next((b for b in bodies if b in before), "")
        parts = body.split(".")
        heads = [".".join([*parts[:n], "lm_head.weight"]) for n in range(len(parts))]
        return body, next((name for name in heads if name in names), "lm_head.weight")

    def unused_fields(self, read: Seen) -> list[str]:
        """Returns the unused non-empty fields of the config, and the unknown fields of its rope parameters."""
        rope = dict.get(read, "rope_scaling") or dict.get(read, "rope_parameters") or {}
        inside = [f"rope_scaling.{name}" for name in rope if name not in llama.ROPE_FIELDS]
        return [f"config.json:{name}" for name in [*sorted(read.unused(IRRELEVANT)), *inside]]

    def unused_files(self) -> list[str]:
        """Returns the weight files that are not read, except those that match QUIET."""
        used = set(self.shards.values())
        others = (p.name for p in self.path.iterdir() if p.suffix in SUFFIXES and p.name not in used)
        return sorted(name for name in others if not QUIET.fullmatch(name))

    @functools.cache  # noqa: B019  (a Folder exists only while a checkpoint is read)
    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path / file, framework="np")
        except (SafetensorError, OSError) as error:
            if is_pointer(self.path / file):
                what = "the file is a git-lfs pointer, not the weights"
                raise UserError(what, str(self.path / file), "git lfs pull") from None
            raise UserError(f"not a readable safetensors file ({error})", str(self.path / file)) from None

    def _slice(self, name: str) -> Any:
        from safetensors import SafetensorError

        try:
            return self._open(self.shards[name]).get_slice(name)
        except SafetensorError as error:
            what = f"the index lists {name} in this file, but it cannot be read ({error})"
            raise UserError(what, str(self.path / self.shards[name])) from None

    def stored(self, name: str) -> str:
        """Converts the name of a tensor in a causal model to its name in this folder."""
        return self.head if name == "lm_head.weight" else self.body + name.split(".", 1)[1]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.coded[name].shape(self, name) if name in self.coded else self.stored_shape(name)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, cuts: Index) -> np.ndarray:
        return self.coded[name].read(self, name, cuts) if name in self.coded else self.tensor(name, cuts)

    def dtype(self, name: str) -> str:
        return self._slice(name).get_dtype()

    def tensor(self, name: str, cuts: Index, known: tuple[str, ...] = DTYPES) -> np.ndarray:
        tensor = self._slice(name)
        if tensor.get_dtype() not in known:
            raise UserError(f"{name} is stored as {tensor.get_dtype()}; supported: {', '.join(known)}", str(self.path))
        if tensor.get_dtype() == "F8_E4M3":
            return self._bytes(name)[cuts].view(ml_dtypes.float8_e4m3fn)
        return tensor[cuts]

    def codes(self, name: str, cuts: Index) -> np.ndarray:
        return self.tensor(name, cuts, CODES)

    def _bytes(self, name: str) -> np.ndarray:
        """Memory-maps the bytes of a tensor whose dtype safetensors cannot convert to numpy.

        The file's header contains their offset.
        """
        path = self.path / self.shards[name]
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))[name]
        return np.memmap(path, np.uint8, "r", 8 + size + header["data_offsets"][0], tuple(header["shape"]))


def text_config(config: dict) -> dict:
    """Returns the config of the language model: an inner config for multimodal models, and otherwise `config` itself.

    For a multimodal model, the result has an additional field `multimodal` with the original model_type.
    """
    outer = config.get("model_type") or _by_architecture(config)
    inner = next((config[k] for k in ("text_config", "llm_config") if isinstance(config.get(k), dict)), None)
    if inner is not None:
        kind = str(inner.get("model_type") or "llama")
        return inner | {"model_type": TEXT.get(kind.removesuffix("_text"), kind), "multimodal": outer}
    return config | {"model_type": TEXT.get(outer, outer)} | ({"multimodal": outer} if outer in TEXT else {})


def _by_architecture(config: dict) -> str | None:
    """Derives the model_type from the name of the architecture, for a config.json that has no model_type."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    name = re.sub(r"(ForCausalLM|LMHeadModel|Model)$", "", name)
    return re.sub(r"(?<!^)(?=[A-Z][a-z])", "_", name).lower() or None


def is_pointer(path: Path) -> bool:
    """Returns whether a file is only a git-lfs pointer, because the real file has not been fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS
