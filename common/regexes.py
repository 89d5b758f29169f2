"""Compiles regular expressions from untrusted files, but refuses patterns that could be slow on short names."""

import re
from collections.abc import Iterator
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from common.errors import UserError

# Limits of a pattern: the number of characters (LONGEST); of long repeats (WIDE), each of which may multiply the time
# by the text's length; of repeats and branches (CHOICES), each of which may double the time.
LONGEST, WIDE, CHOICES = 2000, 4, 16
REPEATS = {op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT}
DIGITS = [(op.IN, [(op.CATEGORY, op.CATEGORY_DIGIT)])]


def bounded(pattern: str, where: str) -> re.Pattern[str]:
    """Compiles `pattern`. Raises UserError when it is invalid, or when backtracking could take long, because it repeats
    an ambiguous pattern, as in (a+)+, or has many long repeats."""
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
    """(maximum count, repeated pattern) of each repeat in a parsed pattern, (0, None) of each branch."""
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
    """The patterns in a node's arguments."""
    if isinstance(value, parser.SubPattern):
        return [value]
    return [part for item in value for part in _parts(item)] if isinstance(value, tuple | list) else []
