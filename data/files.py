"""Reads the records of one file. The file format may be JSON lines, a JSON array, CSV, Arrow, Parquet or text, and the
file may be compressed with gzip or Zstandard."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TextIO

from common import paths
from common.errors import UserError, reason

if TYPE_CHECKING:
    import pyarrow

MAX_RECORD = 64 << 20  # bytes
TEXT_PART = 64 << 10  # maximum characters of a document; a longer text file is split at empty lines
CHUNK = 1 << 20  # number of characters of a JSON list that are read at a time
SPACE = re.compile(r"[ \t\r\n]*")


class Row(NamedTuple):
    """One record and its position in a file. If the record could not be read, `record` is None and `reason` says
    why."""

    where: str
    record: dict | None
    reason: str = ""


def read(path: Path) -> Iterator[Row]:
    """Yields the records of a file. For an unreadable record, yields a Row that states the reason. If nothing after
    that record can be read, this Row is the last one."""
    last = Row(f"{path}:0", None)
    try:
        for last in READERS[kind(path)](path):
            yield last
    except UserError:
        raise
    except UnicodeDecodeError:
        yield Row(str(path), None, f"not UTF-8, after {last.where}" if last.record else "not UTF-8")
    except Exception as error:  # libraries raise many types of errors for a damaged file
        behind = f", after {last.where}" * (last.record is not None)
        yield Row(str(path), None, f"not readable: {reason(error)}{behind}")


def kind(path: Path) -> str:
    """The suffix that identifies the format of a file, such as ".jsonl" for "x.jsonl.gz", or "" if the format is not
    supported."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return next((suffix for suffix in READERS if name.endswith(suffix)), "")


class _Unpacked(io.RawIOBase):
    """A raw Python stream that wraps a decompressor's stream, which only has the method `read`."""

    def __init__(self, stream: "pyarrow.CompressedInputStream"):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file as a stream of decompressed bytes. Files in an object store are buffered, since the file objects of
    fsspec ignore the size limit of readline."""
    with path.open("rb") as file:
        if path.name.lower().endswith(".gz"):
            file = gzip.GzipFile(fileobj=file)
        elif path.name.lower().endswith(".zst"):
            import pyarrow

            file = io.BufferedReader(_Unpacked(pyarrow.CompressedInputStream(file, "zstd")), 1 << 20)
        yield io.BufferedReader(file, 1 << 20) if paths.remote(path) else file


def _jsonl(path: Path) -> Iterator[Row]:
    with opened(path) as file:
        number = 0
        while line := file.readline(MAX_RECORD):
            number += 1
            if len(line) == MAX_RECORD:
                raise UserError(f"a line longer than {MAX_RECORD >> 20} MiB", f"{path}:{number}")
            if line.strip():
                yield _parsed(line, f"{path}:{number}")


def _parsed(line: bytes, where: str) -> Row:
    try:
        return _checked(json.loads(line.decode("utf-8-sig")), where)
    except UnicodeDecodeError:
        return Row(where, None, "not UTF-8")
    except (ValueError, RecursionError) as error:  # a number with thousands of digits raises a plain ValueError
        return Row(where, None, f"not JSON: {str(error).split(';')[0]}")


def _checked(record: object, where: str) -> Row:
    if not isinstance(record, dict):
        return Row(where, None, f"a {type(record).__name__}, not an object")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Row(where, None, "text with a lone surrogate, which is not a valid character")
    return Row(where, record)


def _json(path: Path) -> Iterator[Row]:
    """Reads a .json file: a list of objects, as in many published datasets, or one object per line."""
    with opened(path) as file:
        start = file.read(4096).decode("utf-8-sig", "ignore").lstrip()[:1]
    if start != "[":
        yield from _jsonl(path)
        return
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig") as text:
        for i, record in enumerate(_entries(text)):
            yield _checked(record, f"{path}[{i}]")


def _entries(text: TextIO) -> Iterator[object]:
    """Yields the entries of a JSON list without loading the whole list into memory. Raises ValueError for invalid
    JSON."""
    decoder, buffer, at, mark = json.JSONDecoder(), "", 0, "["
    while True:
        try:
            start = SPACE.match(buffer, at).end()
            if buffer[start] == "]" and mark == ",":
                return
            if buffer[start] != mark:
                raise ValueError(f"{buffer[start : start + 20]!r} instead of {mark!r}")
            start = SPACE.match(buffer, start + 1).end()
            if buffer[start] == "]" and mark == "[":
                return
            entry, at = decoder.raw_decode(buffer, start)
        except (IndexError, ValueError) as error:  # the entry is invalid, or only its beginning has been read
            buffer, at = buffer[at:], 0
            more = text.read(max(CHUNK, len(buffer))) if len(buffer) <= MAX_RECORD else ""
            if not more:
                raise ValueError(f"not JSON: {str(error).split(';')[0]}") from None
            buffer += more
            continue
        yield entry
        mark = ","


def _csv(path: Path) -> Iterator[Row]:
    """Reads a table with a header. The cells are separated by commas, semicolons or tabs, and are read as text."""
    csv.field_size_limit(MAX_RECORD)
    with opened(path) as file:
        first = file.readline(MAX_RECORD)
    mark = "\t" if kind(path) == ".tsv" else max(",;", key=lambda mark: first.count(mark.encode()))
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        table = csv.reader(text, delimiter=mark, strict=True)
        header = [name.strip() for name in next(table, [])]
        if len(set(header)) < len(header):
            raise UserError("two columns have the same name", str(path))
        for cells in table:
            where = f"{path}:{table.line_num}"
            if len(cells) == len(header):
                yield Row(where, dict(zip(header, cells, strict=True)))
            elif cells:
                yield Row(where, None, f"{len(cells)} cells, but the header has {len(header)}")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with opened(path) as file:
        yield from _batches(pyarrow.parquet.ParquetFile(file).iter_batches(1024), path)


def _arrow(path: Path) -> Iterator[Row]:
    """Reads the rows of an Arrow file, as written by `save_to_disk` of Hugging Face's library `datasets`."""
    import pyarrow

    def checked(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
        batch.validate(full=True)  # otherwise Arrow would follow damaged offsets and read outside its memory
        return batch

    with opened(path) as file:
        yield from _batches(map(checked, pyarrow.ipc.open_stream(file)), path)


def _batches(batches: Iterable["pyarrow.RecordBatch"], path: Path) -> Iterator[Row]:
    numbers = itertools.count()
    for batch in batches:
        for record, why in _records(batch):
            yield Row(f"{path}:{next(numbers)}", record, why)


def _records(batch: "pyarrow.RecordBatch") -> Iterator[tuple[dict | None, str]]:
    """Yields (record, "") for each row, or (None, reason) if the row cannot be converted. Arrow allows values that
    Python cannot represent, such as times in the year 140,000."""
    try:
        yield from ((record, "") for record in batch.to_pylist())
    except Exception:
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0], ""
            except Exception as error:
                yield None, f"not readable: {error}"


def _text(path: Path) -> Iterator[Row]:
    with opened(path) as file:
        text = file.read().decode("utf-8-sig")
    at = 0
    while at < len(text) or at == 0:
        end = len(text)
        if end - at > TEXT_PART:
            end = next((cut for mark in ("\n\n", "\n") if (cut := text.rfind(mark, at + 1, at + TEXT_PART)) > at), 0)
            end = end or at + TEXT_PART
        part = text[at:end]
        yield Row(f"{path}@{at}" if at else str(path), {"text": part.strip("\n") if at else part})
        at = max(end, at + 1)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _text,
    ".md": _text,
}
