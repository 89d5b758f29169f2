"""Code shared by all commands: it parses options, sets exit codes, and prints a user error as one line.

If output can no longer be written, the command keeps running, and further output is discarded.
"""

import argparse
import errno
import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from common import exits, files, jobs
from common.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """Parses the options of `python -m NAME`, and prints the module's docstring for --help. Raises UserError for
    invalid options."""

    def __init__(self, name: str, doc: str | None):
        super().__init__(prog=f"python -m {name}", description=doc, allow_abbrev=False)
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def parse_args(self, argv: Sequence[str], namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        found, rest = self.parse_known_args(argv)
        if rest:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            word = rest[0].partition("=")[0]
            raise UserError(f"unknown argument {rest[0]}", self.prog, did_you_mean(word, known, "see --help"))
        return found

    def error(self, message: str) -> NoReturn:
        raise UserError(message, self.prog, "see --help")


def command(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], int]:
    """Decorates the `main(argv)` of a command. The decorated function returns an exit code, and prints a UserError
    instead of raising it."""

    @functools.wraps(main)
    def shell(argv: list[str]) -> int:
        jobs.follow_parent()
        keep_console()
        logging.basicConfig(format="%(message)s")  # print messages without the prefix "WARNING:root:"
        try:
            return main(argv) or exits.DONE
        except UserError as e:
            print(e, file=sys.stderr)
            return exits.INPUT
        except KeyboardInterrupt:
            return exits.INTERRUPTED
        except Exception as e:
            if not (problem := full_disk(e)):
                raise
            print(problem, file=sys.stderr)
            return exits.INPUT

    return shell


def full_disk(error: BaseException | None) -> UserError | None:
    """Returns a UserError if an error was caused by a full disk, else None. Rust and C++ libraries do not raise
    OSError, so this function also looks for the error number in the text of error messages."""
    fix = "make room and run the same command again"
    while error is not None:
        if isinstance(error, OSError) and error.errno in files.FULL:
            return UserError(os.strerror(error.errno), str(error.filename or ""), fix)
        if any(f"os error {number}" in str(error).lower() for number in files.FULL):
            return UserError(os.strerror(errno.ENOSPC), "", fix)
        error = error.__cause__ or error.__context__
    return None


# --- the console ---


def table(
    rows: Iterable[Sequence[object]], heads: Sequence[str] = (), title: str = "", width: int | None = None
) -> None:
    """Prints a table. Square brackets in cells are printed, not interpreted as markup. `width` is the number of
    characters per line; by default, it is the width of the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table(*heads, show_header=bool(heads), title=Text(title) if title else None)
    for row in rows:
        out.add_row(*(Text(str(cell)) for cell in row))
    Console(highlight=False, width=width).print(out)


def keep_console() -> None:
    """Prevents a command from failing when its output cannot be printed. If a pipe is closed or a disk is full, the
    output is discarded. Characters that the terminal's encoding cannot represent are escaped."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # otherwise the next file to be opened would get the number of this closed descriptor
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is sys.__stdout__:  # if they differ, the caller captures the output
        sys.stdout = _kept(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _kept(sys.stderr, 2)


def _kept(stream: TextIO | None, fd: int) -> TextIO:
    encoding = stream.encoding if stream else "utf-8"
    if stream:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lossy(fd, "w", closefd=False)),
        encoding,
        "backslashreplace",
        line_buffering=bool(stream and stream.line_buffering),
    )


class _Lossy(io.FileIO):
    """An output file descriptor. When a write to it fails, it is redirected to /dev/null. If it is stdout, one warning
    is printed."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as e:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if self.fileno() == 1:
                print(f"warning: cannot write to the console ({e.strerror}): further output is lost", file=sys.stderr)
            return len(data)


# --- types of options ---


def count(text: str) -> int:
    """Option type: a non-negative integer."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a non-negative integer")
    return int(text)


def counts(text: str) -> list[int]:
    """Option type: parses "0,4" into [0, 4]."""
    return [count(part) for part in text.split(",")]


def listed(text: str) -> list[str]:
    """Option type: parses "a, b" into ["a", "b"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def named(text: str) -> dict[str, str]:
    """Parses "[NAME=]FOLDER,..." into {name: folder}. If NAME is missing, the folder's name is used. Raises UserError
    if two folders get the same name."""
    out: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        name, given, folder = item.rpartition("=")
        name = name if given else Path(folder).expanduser().resolve().name
        if name in out:
            raise UserError(f"two adapters have the name {name!r}", "--adapters", "write NAME=FOLDER")
        out[name] = folder
    return out
