"""Checks the decisions that a page sends. Also rearranges their values, which are in the order of the answers on the
page, to the order of the answers in the item."""

import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from common.files import strict
from common.types import Json
from feedback.items import SCALE, Item, ranks

CHOICES = ("ranks", "bad", "skip")
REASON = 2000  # maximum length of a flag, and of a judge's reason on the page, in characters
DAY = 86_400_000  # milliseconds


def order(annotator: str, item: str) -> random.Random:
    """Returns a random generator that gives the same order of answers in all browser tabs of a person."""
    return random.Random(hashlib.sha256(f"{annotator}/{item}".encode()).digest())


def shown(annotator: str, item: Item) -> list[int]:
    """Returns the indices of the answers, in the order in which a person sees the answers."""
    numbers = list(range(len(item.texts)))
    order(annotator, item.hash).shuffle(numbers)
    return numbers


def parse(body: bytes) -> Json:
    """Parses the body of a request. Raises UserError if the body is not a JSON object."""
    try:
        value = strict(body.decode())
        json.dumps(value, ensure_ascii=False).encode()  # raises ValueError for an unpaired surrogate
    except ValueError as e:
        raise UserError(f"the request is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError("the request is not a JSON object")
    return value


def decision(given: Json, item: Item, at: list[int], newest: int) -> Json:
    """Makes the content of a vote from the decision `given`, which a page has sent. `at` is the order of the answers on
    the page, and `newest` is the newest version of the guidelines. Raises UserError if the decision is invalid."""
    choice, count = given.get("choice"), len(at)
    if choice not in CHOICES:
        raise UserError("the choice must be ranks, bad or skip")
    places = ranks(given.get("ranks"), count, "ranks") if choice == "ranks" else [None] * count
    out: Json = {"choice": choice, "ranks": _moved(places, at)}
    out["ratings"] = {name: _moved(_rating(given, name, count), at) for name in item.aspects}
    out["edits"] = _texts(given, "edits", at)
    out["edits"] = {i: text for i, text in out["edits"].items() if text != item.texts[int(i)]}
    out["flags"] = {i: text[:REASON] for i, text in _texts(given, "flags", at).items()}
    rated = any(value is not None for values in out["ratings"].values() for value in values)
    if choice == "ranks" and sum(place is not None for place in places) < 2:
        if not (rated or out["edits"] or out["flags"]):
            raise UserError("the decision is empty", "", "rank at least two answers, or rate, correct or flag one")
        out["ranks"] = [None] * count
    answers = item.content["answers"]
    models = {key: [answer.get(key) for answer in answers] for key in ("model", "sampling")}
    seen = {"order": at, "ms": _number(given, "ms", DAY), "guidelines": _number(given, "guidelines", newest)}
    return out | seen | models | {"key": str(given.get("key", ""))[:64]}


def _moved(values: list[Any], at: list[int]) -> list[Any]:
    out = list(values)
    for place, answer in enumerate(at):
        out[answer] = values[place]
    return out


def _rating(given: Json, name: str, count: int) -> list[int | None]:
    values = _object(given, "ratings").get(name, [None] * count)
    fits = isinstance(values, list) and len(values) == count
    if not fits or not all(v is None or (type(v) is int and 1 <= v <= SCALE) for v in values):
        raise UserError(f"the ratings of {name!r} must be {count} numbers from 1 to {SCALE}, or null")
    return values


def _texts(given: Json, name: str, at: list[int]) -> dict[str, str]:
    """Returns {index of the answer in the item: text}. In `given`, the keys are the positions of the answers on the
    page."""
    out = {}
    for place, text in _object(given, name).items():
        if place not in map(str, range(len(at))) or not isinstance(text, str):
            raise UserError(f"{name} must map positions of answers on the page to texts")
        out[str(at[int(place)])] = text
    return dict(sorted(out.items()))


def _object(given: Json, name: str) -> Mapping[str, Any]:
    value = given.get(name, {})
    if not isinstance(value, dict):
        raise UserError(f"{name} is not an object")
    return value


def _number(given: Json, name: str, most: int) -> int:
    value = given.get(name, 0)
    if type(value) is not int or value < 0:
        raise UserError(f"{name} is not a whole number")
    return min(value, most)


def undone(content: Json) -> Json:
    """Converts a decision that was undone into a draft, with the answers in the order of the page."""
    at = content["order"]
    places = {str(answer): str(place) for place, answer in enumerate(at)}
    texts = {name: {places[i]: text for i, text in content[name].items()} for name in ("edits", "flags")}
    ratings = {name: [values[i] for i in at] for name, values in content["ratings"].items()}
    return {"choice": content["choice"], "ranks": [content["ranks"][i] for i in at], "ratings": ratings, **texts}
