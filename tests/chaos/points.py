"""Where a command may die or find the disk full: before and after every write, fsync, rename, truncation and deletion.

`install` puts itself between Python and the system, for the files below one folder. What libraries in C++ and Rust
write is not seen here: kills at random moments and a small tmpfs reach that.
"""

import builtins
import errno
import functools
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROWS = ("write", "pwrite", "fsync", "mkdir", "create")  # what a full disk refuses
OTHERS = ("ftruncate", "rename", "replace", "unlink", "rmdir")


class Points:
    """Counts the points below `root`. At number `at` the process dies, or from then on the disk is full.

    `names` lists what was passed, as "before write metrics.jsonl"; in a process that finds the disk full, only what a
    full disk refuses counts.
    """

    def __init__(self, root: Path, kind: str = "", at: int = -1):
        self.root, self.kind, self.at = str(root.resolve()), kind, at
        self.names: list[str] = []

    def pass_by(self, what: str, place: str, action: Callable[[], Any]) -> Any:
        """Does what the system was asked for, unless this is the point."""
        if not place.startswith(self.root + "/"):
            return action()
        if self.kind == "full":
            if what in GROWS:
                self.names.append(f"{what} {place.removeprefix(self.root)}")
                if 0 <= self.at < len(self.names):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return action()
        self._point(f"before {what} {place.removeprefix(self.root)}")
        result = action()
        self._point(f"after {what} {place.removeprefix(self.root)}")
        return result

    def _point(self, name: str) -> None:
        self.names.append(name)
        if self.kind == "kill" and len(self.names) == self.at + 1:
            os.kill(os.getpid(), signal.SIGKILL)


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
