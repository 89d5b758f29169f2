"""Scores 1 if the reference, which is a regular expression, matches somewhere in the answer."""

import functools
import re

from common import regexes


def score(answer: str, reference: str) -> float:
    return float(pattern(reference).search(answer) is not None)


def check(reference: str) -> None:
    """Raises UserError for a reference that is not a usable regular expression."""
    pattern(reference)


@functools.cache
def pattern(reference: str) -> re.Pattern[str]:
    return regexes.bounded(reference, "scorer regex")
