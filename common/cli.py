"""The shell of every command line: its options, its exit codes, and errors that the user can fix as one line."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import exits
from common.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """Options of `python -m NAME`, whose --help is the module's docstring. A mistake is a UserError."""

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

    def error(self, message: str) -> Any:
        raise UserError(message, self.prog, "see --help")


def command(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], int]:
    """`main(argv)` as a command: returns its exit code, and prints a UserError instead of raising it."""

    @functools.wraps(main)
    def shell(argv: list[str]) -> int:
        try:
            return main(argv) or exits.DONE
        except UserError as e:
            print(e, file=sys.stderr)
            return exits.INPUT
        except KeyboardInterrupt:
            return exits.INTERRUPTED
        except BrokenPipeError:  # the reader has left, as `head` does; what is buffered is flushed at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return exits.DONE

    return shell


def count(text: str) -> int:
    """The type of an option: a whole number, not negative."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def counts(text: str) -> list[int]:
    """The type of an option: "0,4" -> [0, 4]."""
    return [count(part) for part in text.split(",")]


def listed(text: str) -> list[str]:
    """The type of an option: "a, b" -> ["a", "b"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def named(text: str) -> dict[str, str]:
    """Folders by name, of "[NAME=]FOLDER,...". Raises UserError for a name that is taken twice."""
    out: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        name, given, folder = item.rpartition("=")
        name = name if given else Path(folder).expanduser().resolve().name
        if name in out:
            raise UserError(f"two adapters have the name {name!r}", "--adapters", "write NAME=FOLDER")
        out[name] = folder
    return out
