"""A Hugging Face folder: config.json and safetensors, in one file or in shards with an index. Never a pickle."""

import functools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common.errors import UserError
from model.families._layout import Index
from model.io import compressed

# What is fetched of a hub repository.
FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "vocab.txt", "merges.txt", "*.tiktoken", "*chat_template*")
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16", "F64")
CODES = ("I8", "I32", "I64", "F8_E4M3")  # of quantised weights


class Folder:
    """Tensors by name, read by slices. Metadata is read at once, tensors when asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.hf_config = read_json(path / "config.json")
        self.generation = read_json(path / "generation_config.json", optional=True)
        if quantised := self.hf_config.get("quantization_config"):
            compressed.check(quantised, str(path))
        self.shards = self._shards()

    def _shards(self) -> dict[str, str]:
        """Name of a tensor -> file that holds it."""
        if (self.path / INDEX).exists():
            shards = read_json(self.path / INDEX).get("weight_map", {})
            for file in set(shards.values()):
                if not isinstance(file, str) or Path(file).name != file:
                    raise UserError(f"shard {file!r} lies outside the folder", str(self.path / INDEX))
            return shards
        if (self.path / "model.safetensors").exists():
            return dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        if list(self.path.glob("*.bin")) or list(self.path.glob("*.pt*")):
            fix = "convert it: load it with transformers and save_pretrained(safe_serialization=True)"
            raise UserError("holds pickled weights only, which can run code when opened", str(self.path), fix)
        raise UserError("holds no model.safetensors and no index of shards", str(self.path))

    @functools.cache  # noqa: B019  (lives as long as the folder is read)
    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path / file, framework="np")
        except (SafetensorError, OSError) as error:
            raise UserError(f"not a readable safetensors file ({error})", str(self.path / file)) from None

    def _slice(self, name: str) -> Any:
        from safetensors import SafetensorError

        try:
            return self._open(self.shards[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"the index promises {name} ({error})", str(self.path / self.shards[name])) from None

    @property
    def names(self) -> set[str]:
        return compressed.names(self.shards)

    def stored(self, name: str) -> str:
        """The name here of a tensor of a causal model: a bare body has no "model." or "transformer." in front."""
        bare = name.split(".", 1)[1]
        return bare if name not in self.names and bare in self.names else name

    def shape(self, name: str) -> tuple[int, ...]:
        return compressed.shape(self, name) if f"{name}_packed" in self.shards else self.stored_shape(name)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, cuts: Index) -> np.ndarray:
        return compressed.read(self, name, cuts) if f"{name}_scale" in self.shards else self.tensor(name, cuts)

    def tensor(self, name: str, cuts: Index, known: tuple[str, ...] = DTYPES) -> np.ndarray:
        tensor = self._slice(name)
        if tensor.get_dtype() not in known:
            raise UserError(f"{name} is stored as {tensor.get_dtype()}; known: {', '.join(known)}", str(self.path))
        if tensor.get_dtype() == "F8_E4M3":
            return self._bytes(name)[cuts].view(ml_dtypes.float8_e4m3fn)
        return tensor[cuts]

    def codes(self, name: str, cuts: Index) -> np.ndarray:
        return self.tensor(name, cuts, CODES)

    def _bytes(self, name: str) -> np.ndarray:
        """A tensor of a type that the library does not give to numpy, from where the file's header says it lies."""
        path = self.path / self.shards[name]
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))[name]
        return np.memmap(path, np.uint8, "r", 8 + size + header["data_offsets"][0], tuple(header["shape"]))


def read_json(path: Path, optional: bool = False) -> dict:
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"not readable ({error})", str(path)) from None
    if not isinstance(content, dict):
        raise UserError("not a JSON object", str(path))
    return content
