"""Compiles regular expressions from untrusted files, and refuses patterns that could be slow even on short texts."""

import re
from collections.abc import Iterator
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from common.errors import UserError

# Limits for a pattern: LONGEST is the maximum number of characters. WIDE is the maximum number of long repeats, each of
# which may multiply the matching time by the length of the text. CHOICES is the maximum number of repeats and branches,
# each of which may double the matching time.
LONGEST, WIDE, CHOICES = 2000, 4, 16
REPEATS = {op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT}
DIGITS = [(op.IN, [(op.CATEGORY, op.CATEGORY_DIGIT)])]


def bounded(pattern: str, where: str) -> re.Pattern[str]:
    """Compiles `pattern`. Raises UserError if `pattern` is invalid, or if backtracking could take long because
    `pattern` repeats an ambiguous part, as in (a+)+, or has many long repeats."""
    try:
        if len(pattern) > LONGEST:
            raise ValueError(f"it has more than {LONGEST} characters")
        choices = list(_choices(parser.parse(pattern)))
        repeats = [c for c in choices if c[0]]
        if any(_several(body) for most, body in repeats if most > 1):
            raise ValueError("it repeats a pattern that itself repeats or branches, which can take forever")
        if sum(most > 16 and list(body) != DIGITS for most, body in repeats) > WIDE:
            raise ValueError(f"it has more than {WIDE} long repeats")
        if len(choices) > CHOICES:
            raise ValueError(f"it has more than {CHOICES} repeats and branches")
        return re.compile(pattern)
    except (re.error, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"the pattern {str(pattern)[:80]!r} is refused: {error}", where) from None


def _choices(tree: Any) -> Iterator[tuple[int, Any]]:
    """Yields (maximum count, repeated pattern) for each repeat in a parsed pattern, and (0, None) for each branch."""
    for kind, value in tree:
        if kind in REPEATS:
            yield int(value[1]), value[2]
        if kind is op.BRANCH:
            yield 0, None
        for part in _parts(value):
            yield from _choices(part)


def _several(tree: Any) -> bool:
    """Whether a text may match a parsed pattern in more than one way."""
    several = REPEATS | {op.BRANCH, op.GROUPREF}
    return any(kind in several or any(map(_several, _parts(value))) for kind, value in tree)


def _parts(value: Any) -> list[Any]:
    """The sub-patterns of a node in a parsed pattern, given the node's arguments."""
    if isinstance(value, parser.SubPattern):
        return [value]
    return [part for item in value for part in _parts(item)] if isinstance(value, tuple | list) else []
