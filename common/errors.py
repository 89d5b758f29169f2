"""The exception for errors that the user can fix."""

import difflib
import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P, R = ParamSpec("P"), TypeVar("R")


class UserError(ValueError):
    """Bad input: one line that says what is wrong, where, and the fix. Command lines print it and exit with code 2."""

    def __init__(self, what: str, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = what, where, fix
        super().__init__(" · ".join(part for part in (where, what, fix) if part))
        self.__suppress_context__ = True

    def _render_traceback_(self) -> list[str]:
        """The text that notebooks show."""
        return [f"{type(self).__name__}: {self}"]


def outermost(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function of the public interface: its UserErrors have no inner frames and no causes."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UserError as e:
            raise e.with_traceback(None) from None

    return called


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """ "did you mean X?", with the known word or dotted path that has the same last part or the nearest spelling; else
    `otherwise`."""
    known, last = list(known), word.rpartition(".")[2]
    tails = {k.rpartition(".")[2]: k for k in reversed(known)}
    near = [k for k in known if k.rpartition(".")[2] == last] or difflib.get_close_matches(word, known, 1, 0.75)
    near = near or [tails[t] for t in difflib.get_close_matches(last, tails, 1, 0.75)]
    return f"did you mean {' or '.join(near[:3])}?" if near else otherwise
