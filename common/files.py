"""Everything the project writes: files and folders that are old or new, never half written, and lines that are whole.

What is being written stands beside its place under a name that begins with WRITING, locked by its writer; the kernel
drops the lock with the process, so that the next writer in the same folder can tell and remove what a kill left.
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
from common.paths import Place
from common.types import Json

WRITING = ".writing-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK = "LOCK"  # this one and those of train.keep.lease stay where they are
MIRRORS = Path("~/.cache/kungfu/runs")


# --- whole files and folders ---


def write(path: Place, content: str | bytes) -> None:
    """Replaces `path` by the content, on disk or in the store when this returns. A link is replaced, not followed."""
    data = content.encode() if isinstance(content, str) else content
    if paths.remote(path):
        path.write_bytes(data)
        return
    with file(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def file(path: Path, replace: bool = True) -> Iterator[Path]:
    """An empty file to fill. It gets the name `path` when the block ends without an error, else it is deleted.

    With `replace` unset, another file at `path` stays, and FileExistsError is raised; one with the same bytes, as after
    a kill behind the rename, is none.
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
    """Raises ValueError for NaN and infinities: see `plain`."""
    write(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_lines(path: Place, values: Iterable[Json]) -> None:
    """A .jsonl, which appears as a whole."""
    write(path, "".join(map(json_line, values)))


@contextlib.contextmanager
def folder(path: Place, marker: str) -> Iterator[Path]:
    """An empty folder to fill. It gets the name `path` when the block ends without an error, else it is deleted.

    A store renames nothing: there the files are copied to `path`, the one named `marker` last, and a folder without its
    marker is not whole: the next writer deletes it. When `path` is there it stays: nothing happens where its files are
    the same, as after a kill behind the rename; else FileExistsError is raised. An empty folder is replaced.
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
    """Whether two folders hold the same files."""
    names = paths.sizes(a)
    return names == paths.sizes(b) and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the name that the system leaves out into the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def _beside(path: Path, is_folder: bool) -> Iterator[Path]:
    """A new file or folder beside `path`, locked; what is left of it is deleted in the end."""
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
        with contextlib.suppress(FileNotFoundError):  # a cleaner found it in the moment before it was locked
            fd = os.open(part, os.O_RDONLY if is_folder else os.O_WRONLY | os.O_NOFOLLOW)
            if _lock(fd) is not False and part.exists():
                return part, fd
            os.close(fd)


def _lock(fd: int) -> bool | None:
    """Whether the lock is now ours; None where the file system knows no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def clean(place: Path) -> None:
    """Deletes what killed writers left in a folder; links are left alone."""
    for part in place.glob(f"{WRITING}*"):
        with contextlib.suppress(OSError):
            fd = os.open(part, os.O_RDONLY | os.O_NOFOLLOW)
            if _lock(fd):
                _delete(part)
            os.close(fd)


def _delete(part: Path) -> None:
    """Deletes a file or a folder, which may be gone; what links in it point to stays."""
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Makes a file, or the renames in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(place: Place) -> None:
    """Deletes a folder; errors within it on disk are ignored. A link is deleted, not followed."""
    if not paths.remote(place):
        _delete(place)
    elif place.exists():
        place.rmtree()


# --- JSON and lines of it ---


def plain(x: Any) -> Any:
    """A value that strict JSON can hold: arrays become numbers and lists, NaN and infinities None."""
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if hasattr(x, "tolist"):
        return plain(x.tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read_json(path: Path) -> Json:
    """The object of a JSON file; {} when there is none."""
    try:
        return _object(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def read_lines(path: str | Path) -> list[Json]:
    """The objects of a .jsonl, which may be missing or still written to; a line that a kill cut short is left out."""
    try:
        text = Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return []
    return [value for line in text.split("\n") if (value := _object(line))]


def _object(text: str) -> Json:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def not_followed(path: str | Path, flags: int) -> int:
    """os.open for what is added to in place; OSError for a link. An `opener` of `open`."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def append(path: Path, value: Json) -> None:
    """One more line of a .jsonl, in one write."""
    with contextlib.closing(Lines(path)) as lines:
        lines.write(value)


class Lines:
    """A .jsonl, open at its end; a line that a kill cut short is ended first, so that the next one stays whole.

    A link is not followed. What cannot be written, as on a full disk, is kept: `write` and `flush` raise OSError, and
    the next call writes it first.
    """

    def __init__(self, path: Path):
        self.path, self._left = path, b""
        self._fd = not_followed(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        end = os.lseek(self._fd, 0, os.SEEK_END)
        if end and os.pread(self._fd, 1, end - 1) != b"\n":
            self._left = b"\n"

    def write(self, value: Json) -> None:
        """Raises ValueError for NaN and infinities: see `plain`."""
        self._left += json_line(value).encode("utf-8", "backslashreplace")
        self.flush()

    def flush(self) -> None:
        with _naming(self.path):
            while self._left:
                self._left = self._left[os.write(self._fd, self._left) :]

    def sync(self) -> None:
        """Makes everything written so far durable."""
        self.flush()
        with _naming(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        """What could not be written is lost: `flush` first."""
        os.close(self._fd)


def json_line(value: Json) -> str:
    """A value as a line of a .jsonl. Raises ValueError for NaN and infinities: see `plain`."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


# --- the copy on disk of a run that is stored in a bucket ---


def mirror(home: Place) -> Path:
    """Where this machine keeps the small files of a run in a store, since a store cannot append to them."""
    return MIRRORS.expanduser() / hashlib.sha256(str(home).encode()).hexdigest()[:16]


def fetch(home: Place, folder: Path) -> None:
    """Makes `folder` hold what a run in a store holds, but for its checkpoints and its locks."""
    for old in folder.iterdir():
        if old.name != LOCK:
            _delete(old)
    for name in paths.sizes(home):
        if not name.startswith(("ckpt/", LOCK)) and ".." not in name.split("/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((home / name).read_bytes())


def put(folder: Path, home: Place, known: dict[str, tuple[int, int]]) -> None:
    """Copies the files that changed since they were `known`, by size and time, to a run in a store."""
    for name, size in paths.sizes(folder).items():
        stamp = (size, (folder / name).stat().st_mtime_ns)
        if name != LOCK and known.get(name) != stamp:
            (home / name).write_bytes((folder / name).read_bytes())
            known[name] = stamp
