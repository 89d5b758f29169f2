"""The exception for errors that the user can fix."""

import contextlib
import difflib
import functools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVar

P, R = ParamSpec("P"), TypeVar("R")
warn = logging.getLogger("kungfu").warning  # prints only the message; logging.warning adds "WARNING:root:"
LONGEST = 1000  # maximum characters of `what`, `where` and `fix`, which may contain text from malicious files


class UserError(ValueError):
    """An error in the user's input. The message is one line that says where the error is, what the problem is, and how
    to fix it. Commands print the message and exit with code 2."""

    def __init__(self, what: str, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = map(clipped, (what, where, fix))
        super().__init__(" · ".join(part for part in (self.where, self.what, self.fix) if part))
        self.__suppress_context__ = True

    def _render_traceback_(self) -> list[str]:
        """Returns the text that Jupyter notebooks show instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def clipped(text: str) -> str:
    """Shortens a text for display as one line: joins its lines and, if it is long, replaces its middle with "..."."""
    text = " ".join(text.splitlines()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def outermost(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function of the public API. If the function raises a UserError, the traceback shows neither internal
    stack frames nor the exceptions that caused the error."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UserError as e:
            raise e.with_traceback(None) from None

    return called


@contextlib.contextmanager
def reading(where: object, fix: str = "") -> Iterator[None]:
    """A context manager for reading a file that may be damaged or malicious. Any error becomes a UserError that states
    the cause.

    PanicException, which Rust libraries raise, also becomes a UserError, although it is not a subclass of Exception.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"cannot be read: {reason(error)}", str(where), fix) from error


# A pattern for the report that Rust prints on a panic: the location, the message, and possibly a stack backtrace.
PANIC = rb"\n?thread '[^\n]* panicked at [^\n]*\n[^\n]*\n(stack backtrace:\n( +[^\n]*\n)*)?(note: [^\n]*\n)?"


class _Panics:
    """A context manager that hides the panic reports that Rust libraries print, because they also raise each panic as
    an exception. Other output to stderr is held back until all threads have left the context."""

    def __init__(self) -> None:
        self._lock, self._inside, self._held = threading.Lock(), 0, -1

    def __enter__(self) -> None:
        with self._lock, contextlib.suppress(OSError, AttributeError):  # memfd_create exists only on Linux
            self._inside += 1
            if self._inside == 1:
                self._stderr, self._held = os.dup(2), os.memfd_create("stderr")
                os.dup2(self._held, 2)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._held >= 0:
                os.dup2(self._stderr, 2)
                os.lseek(self._held, 0, os.SEEK_SET)
                with open(self._held, "rb") as file:
                    text = re.sub(PANIC, b"", file.read())
                os.close(self._stderr)
                self._held = -1
                if text:
                    os.write(2, text)


panics_unprinted = _Panics()


def reason(error: BaseException) -> str:
    """The type and message of an error in one short line."""
    if isinstance(error, UserError):
        return str(error)
    said = (str(error).strip().splitlines() or [""])[0][:200]
    name = "" if type(error) is ValueError else type(error).__name__
    return ": ".join(part for part in (name, said) if part) or "ValueError"


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Suggests "did you mean X?", where X is a known word or dotted path that has the same last part as `word` or a
    similar spelling. Returns `otherwise` if no known word is similar."""
    known, last = list(known), word.rpartition(".")[2]
    tails = {k.rpartition(".")[2]: k for k in reversed(known)}
    near = [k for k in known if k.rpartition(".")[2] == last] or difflib.get_close_matches(word, known, 1, 0.75)
    near = near or [tails[t] for t in difflib.get_close_matches(last, tails, 1, 0.75)]
    return f"did you mean {' or '.join(near[:3])}?" if near else otherwise
