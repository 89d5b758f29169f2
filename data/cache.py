"""Stores tokenized documents on disk, as flat arrays that are memory-mapped for reading. The name of a cache folder is
a fingerprint of everything that the tokens depend on.

A cache folder contains the following files. tokens.bin: the tokens of all documents (uint16 or uint32). mask.bin: one
bit per token, which is set if the next token counts in the loss. offsets.bin: for each document, the index of its first
token in tokens.bin, followed by the total number of tokens (int64). hashes.bin: one uint64 per document. index.json:
the sizes and sha256 of these files, and a report on how the source was read. If documents have numeric columns,
columns.bin: float64 [documents, columns]. If documents have tags, tags.bin: one tag per token (int16).
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from common import files
from common.errors import UserError

VERSION = 2  # version of the file layout; a cache with another version is rebuilt
FILES = ("tokens.bin", "mask.bin", "offsets.bin", "hashes.bin")
INDEX = "index.json"


class Broken(UserError):
    """The cache is damaged or outdated and must be rebuilt."""


class Document(NamedTuple):
    ids: list[int]
    learnt: list[int] | None  # 1 for each token that counts in the loss, else 0; None if all tokens count
    hash: int  # hash that decides whether the document is held out
    columns: Mapping[str, float] = MappingProxyType({})  # {name: number}; all documents have the same names
    tags: list[int] | None = None  # one class number per token (int16), or -1 for a token without a tag


def write(folder: Path, documents: Iterable[Document], index: dict, vocab_size: int, check: Callable) -> None:
    """Writes a cache under a temporary name and then renames it to `folder`, so a reader never sees an incomplete
    cache.

    The iterator `documents` may add entries to `index` while it runs. `check()` is called after the last document; if
    it raises an error, no cache is written.
    """
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(folder.parent, os.W_OK):
        raise UserError("cannot write to the cache folder", str(folder.parent), "set data.cache")
    try:
        with files.folder(folder, INDEX) as work:
            dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
            written = _write_arrays(work, documents, dtype)
            check()
            sizes = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in work.iterdir()}
            index = {**index, **written, "layout": VERSION, "dtype": dtype, "files": sizes}
            index["check"] = _checksum(index)
            (work / INDEX).write_text(json.dumps(index, indent=2, ensure_ascii=False), "utf-8")
    except FileExistsError:  # another process has written the same cache in the meantime
        if not (folder / INDEX).is_file():
            raise


def _write_arrays(work: Path, documents: Iterable[Document], dtype: str) -> dict:
    """Writes the arrays of a cache. Returns the index entries that describe these arrays."""
    ends, hashes, columns, bits, names = [0], [], [], np.zeros(0, np.uint8), ()
    with (
        open(work / "tokens.bin", "wb") as tokens,
        open(work / "mask.bin", "wb") as masks,
        open(work / "tags.bin", "wb") as tags,
    ):
        for document in documents:
            tokens.write(np.asarray(document.ids, dtype).tobytes())
            learnt = np.ones(len(document.ids)) if document.learnt is None else document.learnt
            bits = np.concatenate([bits, learnt[1:], [0]]).astype(np.uint8)  # the last token has no target
            whole = len(bits) // 8 * 8
            masks.write(np.packbits(bits[:whole]).tobytes())
            bits = bits[whole:]
            ends.append(ends[-1] + len(document.ids))
            hashes.append(document.hash)
            names = tuple(document.columns)
            columns.append(tuple(document.columns.values()))
            tags.write(np.asarray(document.tags or (), np.int16).tobytes())
        masks.write(np.packbits(bits).tobytes())
    (work / "offsets.bin").write_bytes(np.asarray(ends, np.int64))  # tofile would hide the cause of a failed write
    (work / "hashes.bin").write_bytes(np.asarray(hashes, np.uint64))
    if not (work / "tags.bin").stat().st_size:
        (work / "tags.bin").unlink()
    if names:
        (work / "columns.bin").write_bytes(np.asarray(columns, np.float64))
    return {"sequences": len(hashes), "tokens": ends[-1], "columns": names}


class Stored(NamedTuple):
    tokens: np.ndarray  # [N]
    bits: np.ndarray  # uint8 [ceil(N / 8)]
    offsets: np.ndarray  # int64 [documents + 1]
    hashes: np.ndarray  # uint64 [documents]
    index: dict
    columns: np.ndarray | None = None  # float64 [documents, columns]; index["columns"] has the names of the columns
    tags: np.ndarray | None = None  # int16 [N]; -1: no tag

    def mask(self, slots: np.ndarray) -> np.ndarray:
        """Returns, for each token position in `slots`, 1.0 if the next token counts in the loss, else 0.0. The array is
        float32 and has the shape of `slots`."""
        return ((self.bits[slots >> 3] >> (7 - (slots & 7)).astype(np.uint8)) & 1).astype(np.float32)


def read(folder: Path, check_hashes: bool = False) -> Stored:
    """Memory-maps a cache. Raises Broken if a file is missing or has the wrong size. With `check_hashes`, also raises
    Broken if the sha256 of a file is wrong."""
    try:
        index = files.load_json(folder / INDEX)
        if (layout := index.get("layout", 1)) != VERSION:
            raise Broken(f"the cache has file layout {layout}, but this version reads layout {VERSION}", str(folder))
        if index.pop("check", None) != _checksum(index):
            raise Broken("the index does not match its checksum", str(folder))
        for name, file in index["files"].items():
            size = (folder / name).stat().st_size
            if size != file["bytes"]:
                raise Broken(f"{name} has {size} bytes, not {file['bytes']}", str(folder))
            if check_hashes and sha256(folder / name) != file["sha256"]:
                raise Broken(f"{name} does not have the sha256 it was written with", str(folder))
        dtypes = (np.dtype(index["dtype"]), np.uint8, np.int64, np.uint64)
        arrays = [np.memmap(folder / name, dtype, "r") for name, dtype in zip(FILES, dtypes)]
        columns = tags = None
        if "columns.bin" in index["files"]:
            columns = np.memmap(folder / "columns.bin", np.float64, "r").reshape(-1, len(index["columns"]))
        if "tags.bin" in index["files"]:
            tags = np.memmap(folder / "tags.bin", np.int16, "r")
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"not a token cache ({error})", str(folder), "delete it; it will be rebuilt") from None
    stored = Stored(*arrays, index, columns, tags)
    if len(stored.offsets) != index["sequences"] + 1 or stored.offsets[-1] != len(stored.tokens):
        raise Broken("the offsets do not match the tokens", str(folder), "delete it; it will be rebuilt")
    return stored


def _checksum(index: dict) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
