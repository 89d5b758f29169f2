"""Scores F1 over the fields of two JSON objects. A field matches if its path and its value are equal in both.

The first object in the answer is used, so it may be surrounded by words or a code fence.
"""

import json
from collections.abc import Iterator

from common.errors import UserError
from evals.scorers import f1

DECODER = json.JSONDecoder()


def score(answer: str, reference: str) -> float:
    said, wanted = first(answer), first(reference)
    if said is None or wanted is None:
        return 0.0
    ours, theirs = dict(fields(said)), dict(fields(wanted))
    return f1(sum(theirs.get(path, ...) == value for path, value in ours.items()), len(ours), len(theirs))


def check(reference: str) -> None:
    """Raises UserError for a reference that is not a JSON object."""
    if first(reference) is None:
        raise UserError("the answer contains no JSON object")


def first(text: str) -> dict | None:
    """The first JSON object in a text."""
    at = text.find("{")
    while at >= 0:
        try:
            return DECODER.raw_decode(text, at)[0]
        except (ValueError, RecursionError):
            at = text.find("{", at + 1)
    return None


def fields(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yields (path, value) for every leaf of a JSON value. When these values are compared, 1 equals 1.0 but not true,
    and spaces around strings are ignored."""
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from fields(inner, f"{path}/{key}")
    elif value != {} or path:
        yield path, (type(value) is bool, value.strip() if isinstance(value, str) else value)
