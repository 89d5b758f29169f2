"""Where a command may die or find the disk full: before and after every write, fsync, rename, truncation and deletion.

`install` puts itself between Python and the system, for the files below one folder. What libraries in C++ and Rust
write is not seen here: kills at random moments and a small tmpfs reach that.
"""

import builtins
import errno
import functools
import io
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROWS = ("write", "pwrite", "fsync", "mkdir", "create")  # what a full disk refuses
OTHERS = ("ftruncate", "rename", "replace", "unlink", "rmdir")


class Points:
    """Counts the points below `root`, of this process and of those that it forks. At number `at` this process is
    killed, or from then on the disk is full; `names`, a file, gets a line for each, as "before write metrics.jsonl".

    Where the disk is to be full, only what a full disk refuses counts, and only in this process.
    """

    def __init__(self, root: Path, kind: str = "", at: int = -1, names: Path | None = None):
        self.root, self.kind, self.at, self.pid = f"{root.resolve()}/", kind, at, os.getpid()
        self._count = mmap.mmap(-1, 8)
        self._names = os.open(names, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND) if names else None
        self._write = os.write  # as it is before `install`

    def pass_by(self, what: str, place: str, action: Callable[[], Any]) -> Any:
        """Does what the system was asked for, unless this is the point."""
        if not place.startswith(self.root) or (self.kind == "full" and os.getpid() != self.pid):
            return action()
        place = place.removeprefix(self.root)
        if self.kind == "full":
            number = self._passed(f"{what} {place}") if what in GROWS else -1
            if 0 <= self.at <= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return action()
        self._point(f"before {what} {place}")
        result = action()
        self._point(f"after {what} {place}")
        return result

    def _passed(self, name: str) -> int:
        """The number of this point."""
        if self._names is not None:
            self._write(self._names, f"{name}\n".encode())
        number = int.from_bytes(self._count[:], "little")
        self._count[:] = (number + 1).to_bytes(8, "little")
        return number

    def _point(self, name: str) -> None:
        if self._passed(name) == self.at and self.kind == "kill":
            os.kill(self.pid, signal.SIGKILL)


def install(points: Points) -> None:
    for what in (*GROWS, *OTHERS):
        if hasattr(os, what):
            setattr(os, what, _watched(points, what, getattr(os, what)))
    builtins.open = io.open = functools.partial(_open, points)  # pathlib asks for the one, the rest for the other


def _watched(points: Points, what: str, call: Callable) -> Callable:
    @functools.wraps(call)
    def watched(where: Any, *args: Any, **kwargs: Any) -> Any:
        return points.pass_by(what, _place(where, kwargs), lambda: call(where, *args, **kwargs))

    return watched


def _place(where: Any, kwargs: dict[str, Any]) -> str:
    """The path behind a descriptor, or a path that is relative to one."""
    try:
        if isinstance(where, int):
            return os.readlink(f"/proc/self/fd/{where}")
        within = kwargs.get("dir_fd")
        return os.path.join(_place(within, {}) if within is not None else os.getcwd(), os.fsdecode(where))
    except OSError:
        return ""


class _File(io.FileIO):
    def __init__(self, points: Points, *args: Any):
        super().__init__(*args)
        self._points = points

    def write(self, data: Any) -> int | None:
        write = super().write
        return self._points.pass_by("write", _place(self.fileno(), {}), lambda: write(data))


def _open(
    points: Points,
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Callable | None = None,
) -> Any:
    """`open`, whose files pass by the points when they write."""
    if not set(mode) & set("wax+"):
        return _REAL_OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
    arguments = (points, file, mode.replace("b", "").replace("t", ""), closefd, opener)
    raw = points.pass_by("create", _place(file, {}), lambda: _File(*arguments))
    if buffering == 0:
        return raw
    buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)


_REAL_OPEN = io.open
