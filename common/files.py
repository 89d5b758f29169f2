"""Functions that all packages use to write files. A new file or folder appears either complete or not at all.

While a file or folder is being written, it is locked, and has a temporary name in its final parent folder. The
temporary name begins with WRITING. The kernel releases the lock when the process ends. The next process that writes to
the same parent folder can therefore recognize the unfinished files of killed processes, and deletes them.
"""

import contextlib
import errno
import fcntl
import filecmp
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common import paths
from common.errors import UserError, reason
from common.paths import Place
from common.types import Json

WRITING = ".writing-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK = "LOCK"  # the name of lock files, which are never uploaded to a bucket (see also train.keep.lease)
MIRRORS = Path("~/.cache/kungfu/runs")


# --- whole files and folders ---


def write(path: Place, content: str | bytes) -> None:
    """Writes the content to the file `path` and flushes it to disk. A symbolic link at `path` is replaced, not
    followed."""
    data = content.encode() if isinstance(content, str) else content
    if paths.remote(path):
        path.write_bytes(data)
        return
    with file(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def file(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yields the path of an empty temporary file to fill. The file is renamed to `path` if the `with` block succeeds,
    and deleted if the block raises an error.

    With replace=False, raises FileExistsError if `path` exists with different content. An existing file with the same
    content is accepted, because an earlier process may have been killed just after renaming its file.
    """
    with _naming(path):
        with _beside(path, is_folder=False) as part:
            yield part
            sync(part)
            if not replace and os.path.lexists(path) and not filecmp.cmp(part, path, shallow=False):
                raise FileExistsError(f"{path} exists")
            os.replace(part, path)
        sync(path.parent)


def write_json(path: Place, value: Any) -> None:
    """Writes a JSON file. Raises ValueError for NaN and infinities; use `plain` to convert these numbers to None."""
    write(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_lines(path: Place, values: Iterable[Json]) -> None:
    """Writes a .jsonl file atomically."""
    write(path, "".join(map(json_line, values)))


@contextlib.contextmanager
def folder(path: Place, marker: str) -> Iterator[Path]:
    """Yields the path of an empty temporary folder to fill. The folder is renamed to `path` if the `with` block
    succeeds, and deleted if the block raises an error.

    An object store cannot rename a folder, so the files are uploaded to `path` one by one, and the file named `marker`
    is uploaded last. In a store, a folder without its marker file is incomplete, and the next writer deletes it.

    An existing folder at `path` is kept, unless it is empty. FileExistsError is raised if its files differ from the new
    files. A local folder with the same files is accepted, because an earlier process may have been killed just after
    renaming its folder.
    """
    if paths.remote(path):
        if (path / marker).exists():
            raise FileExistsError(f"{path} exists")
        remove(path)
        with tempfile.TemporaryDirectory() as work:
            yield Path(work)
            for name in sorted(paths.sizes(Path(work)), key=lambda name: name == marker):
                write(path / name, (Path(work) / name).read_bytes())
        return
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _beside(path, is_folder=True) as work:
            yield work
            for at, _, names in os.walk(work):
                for each in (at, *(os.path.join(at, name) for name in names)):
                    if not os.path.islink(each):
                        sync(each)
            try:
                os.rename(work, path)
            except OSError as error:
                if not os.path.lexists(path):
                    raise
                if not _same(work, path):
                    raise FileExistsError(f"{path} exists") from error
        sync(path.parent)


def _same(a: Path, b: Path) -> bool:
    """Whether two folders contain the same files with the same content."""
    names = paths.sizes(a)
    return names == paths.sizes(b) and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the file's path to an OSError caused by a full disk, because the operating system does not always report the
    path."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def _beside(path: Path, is_folder: bool) -> Iterator[Path]:
    """Yields a new, locked file or folder in the parent folder of `path`. When the `with` block ends, the new file or
    folder is deleted, unless the block has renamed it."""
    clean(path.parent)
    part, fd = _locked(path, is_folder)
    try:
        yield part
    finally:
        os.close(fd)
        _delete(part)


def _locked(path: Path, is_folder: bool) -> tuple[Path, int]:
    while True:
        part = path.with_name(f"{WRITING}{secrets.token_hex(4)}-{path.name[-100:]}")
        if is_folder:
            part.mkdir()
        else:
            part.touch(exist_ok=False)
        with contextlib.suppress(FileNotFoundError):  # another process deleted the new file before it was locked
            fd = os.open(part, os.O_RDONLY if is_folder else os.O_WRONLY | os.O_NOFOLLOW)
            if _lock(fd) is not False and part.exists():
                return part, fd
            os.close(fd)


def _lock(fd: int) -> bool | None:
    """Tries to lock a file. Returns True if this process now holds the lock, False if another process holds it, and
    None if the file system does not support locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def clean(place: Path) -> None:
    """Deletes the unfinished files and folders that killed processes left in a folder. Symbolic links are not
    deleted."""
    for part in place.glob(f"{WRITING}*"):
        with contextlib.suppress(OSError):
            fd = os.open(part, os.O_RDONLY | os.O_NOFOLLOW)
            if _lock(fd):
                _delete(part)
            os.close(fd)


def _delete(part: Path) -> None:
    """Deletes a file or a folder if it exists. Symbolic links are deleted, but not the files to which they point."""
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Flushes the content of a file, or the entries of a folder, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(place: Place) -> None:
    """Deletes a folder, and ignores errors of the local file system. A symbolic link is deleted, not followed."""
    if not paths.remote(place):
        _delete(place)
    elif place.exists():
        place.rmtree()


# --- JSON files and JSON lines ---


def plain(x: Any) -> Any:
    """Converts a value to a form that strict JSON allows: arrays become numbers or lists, and NaN and infinities become
    None."""
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if hasattr(x, "tolist"):
        return plain(x.tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x


def strict(text: str) -> Any:
    """Parses JSON text. Raises ValueError for invalid JSON, for NaN, for numbers too large for a float, and for nesting
    that is too deep."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:20]} is not finite")
    return number


def load_json(path: Path) -> Json:
    """Reads a JSON file that contains one object. Raises UserError if the file is missing or invalid."""
    try:
        value = strict(path.read_text("utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # raises UnicodeEncodeError for an unpaired surrogate
    except (OSError, ValueError) as error:
        raise UserError(f"not readable as JSON: {reason(error)}", str(path)) from error
    if not isinstance(value, dict):
        raise UserError("not a JSON object", str(path))
    return value


def read_json(path: Path) -> Json:
    """Reads a JSON file that contains one object. Returns {} if the file is missing or invalid."""
    try:
        return load_json(path)
    except UserError:
        return {}


def read_lines(path: str | Path) -> list[Json]:
    """Reads the objects in a .jsonl file, to which a process may still be appending. Skips incomplete lines, and
    returns an empty list if the file is missing."""
    try:
        text = Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return []
    return [value for line in text.split("\n") if (value := _object(line))]


def _object(text: str) -> Json:
    try:
        value = strict(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def not_followed(path: str | Path, flags: int) -> int:
    """An `opener` for Python's `open` that raises OSError for a symbolic link. It is used to open files for
    appending."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def append(path: Path, value: Json) -> None:
    """Appends a value to a .jsonl file as one line."""
    with contextlib.closing(Lines(path)) as lines:
        lines.write(value)


class Lines:
    """A .jsonl file, opened for appending. If the last line is incomplete because a process was killed, a line break is
    added first.

    Raises OSError if the path is a symbolic link. If a line cannot be written, for example because the disk is full,
    `write` and `flush` raise OSError, and the next call writes that line first.
    """

    def __init__(self, path: Path):
        self.path, self._left = path, b""
        self._fd = not_followed(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        end = os.lseek(self._fd, 0, os.SEEK_END)
        if end and os.pread(self._fd, 1, end - 1) != b"\n":
            self._left = b"\n"

    def write(self, value: Json) -> None:
        """Appends a line. Raises ValueError for NaN and infinities; use `plain` to convert these numbers to None."""
        self._left += json_line(value).encode("utf-8", "backslashreplace")
        self.flush()

    def flush(self) -> None:
        with _naming(self.path):
            while self._left:
                self._left = self._left[os.write(self._fd, self._left) :]

    def sync(self) -> None:
        """Flushes everything written so far to disk."""
        self.flush()
        with _naming(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        """Closes the file. Lines that could not be written are lost, so call `flush` first."""
        os.close(self._fd)


def json_line(value: Json) -> str:
    """Formats a value as a line of a .jsonl file. Raises ValueError for NaN and infinities; use `plain` to convert
    these numbers to None."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


# --- the local copy of a run that is stored in a bucket ---


def mirror(home: Place) -> Path:
    """The local folder for the small files of a run that is stored in an object store. They are written locally first,
    because a store cannot append to files."""
    return MIRRORS.expanduser() / hashlib.sha256(str(home).encode()).hexdigest()[:16]


def fetch(home: Place, folder: Path) -> None:
    """Replaces the content of `folder` with a copy of the run at `home` in an object store. Checkpoints and lock files
    are not copied."""
    for old in folder.iterdir():
        if old.name != LOCK:
            _delete(old)
    for name in paths.sizes(home):
        if not name.startswith(("ckpt/", LOCK)) and ".." not in name.split("/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((home / name).read_bytes())


def put(folder: Path, home: Place, known: dict[str, tuple[int, int]]) -> None:
    """Uploads each file in `folder` whose size or modification time differs from the values recorded in `known`, and
    updates `known`."""
    for name, size in paths.sizes(folder).items():
        stamp = (size, (folder / name).stat().st_mtime_ns)
        if name != LOCK and known.get(name) != stamp:
            (home / name).write_bytes((folder / name).read_bytes())
            known[name] = stamp
