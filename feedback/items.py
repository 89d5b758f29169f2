"""Reads and checks items. An item is a prompt with two to four answers, which people compare."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.errors import UserError
from common.types import Json
from data import messages, sources

LETTERS = "ABCD"
SCALE = 5  # the highest rating; the lowest is 1
LONGEST = 8 << 20  # maximum length of an item, in characters


@dataclass(frozen=True)
class Item:
    """`content` has prompt (text or messages) and answers [{text, model, sampling}]. Optional keys are judge {model,
    ranks, why}, gold (ranks that are known to be right), aspects (names of qualities to rate), and id. The best rank is
    1. A rank of None means that the answer was not judged."""

    content: Json

    @cached_property
    def hash(self) -> str:
        """Returns a hash of the texts that an annotator sees: the prompt and the answers."""
        seen = json.dumps([self.content["prompt"], self.texts], ensure_ascii=False)
        return hashlib.sha256(seen.encode()).hexdigest()[:16]

    @property
    def texts(self) -> list[str]:
        return [answer["text"] for answer in self.content["answers"]]

    @property
    def aspects(self) -> list[str]:
        return self.content.get("aspects", [])

    @property
    def gold(self) -> list[int | None] | None:
        return self.content.get("gold")

    @property
    def judge(self) -> Json | None:
        return self.content.get("judge")

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Returns (role, text) for each turn of the prompt."""
        prompt = self.content["prompt"]
        turns = [("user", prompt)] if isinstance(prompt, str) else [(t["role"], t["content"]) for t in prompt]
        return [(role, text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)) for role, text in turns]

    def answered(self, text: str) -> str | list[Json]:
        """Returns an answer for a training row, in the same form as the prompt: a text or a list of messages."""
        return text if isinstance(self.content["prompt"], str) else [{"role": "assistant", "content": text}]


def read(spec: str, aspects: Sequence[str] = ()) -> Iterator[Item]:
    """Yields the items of a file. If an item lists no aspects, it gets `aspects`. Raises UserError with the position of
    the first invalid item."""
    for row in sources.rows(spec):
        if row.record is None:
            raise UserError(row.reason, row.where)
        try:
            yield item({"aspects": [*aspects]} | row.record)
        except UserError as e:
            raise UserError(e.what, e.where or row.where, e.fix) from None


def item(record: Json) -> Item:
    """Makes an item from a record. Raises UserError if the record is not a valid item."""
    if missing := {"prompt", "answers"} - record.keys():
        raise UserError(f"no column {min(missing)!r}", "", "an item needs the columns 'prompt' and 'answers'")
    prompt, answers = record["prompt"], messages.parsed(record["answers"])
    if not isinstance(prompt, str):
        prompt = messages.messages(prompt, "prompt")
    if not isinstance(answers, list) or not 2 <= len(answers) <= len(LETTERS):
        raise UserError(f"column 'answers' is not a list of 2 to {len(LETTERS)} answers")
    out: Json = {"prompt": prompt, "answers": [_answer(answer, i) for i, answer in enumerate(answers)]}
    count = len(answers)
    if record.get("gold") is not None:
        out["gold"] = ranks(messages.parsed(record["gold"]), count, "gold")
    if judge := messages.parsed(record.get("judge")):
        if not isinstance(judge, dict):
            raise UserError("column 'judge' is not an object with 'ranks'")
        texts = {key: str(judge[key]) for key in ("model", "why") if judge.get(key)}
        out["judge"] = {"ranks": ranks(judge.get("ranks"), count, "judge.ranks"), **texts}
    if aspects := messages.parsed(record.get("aspects")):
        if not isinstance(aspects, list) or not all(isinstance(a, str) and a.strip() for a in aspects):
            raise UserError("column 'aspects' is not a list of names")
        out["aspects"] = list(dict.fromkeys(aspects))
    if record.get("id") is not None:
        out["id"] = str(record["id"])
    if len(json.dumps(out, ensure_ascii=False)) > LONGEST:
        raise UserError(f"the item has more than {LONGEST >> 20} million characters", "", "shorten its answers")
    return Item(out)


def _answer(value: Any, i: int) -> Json:
    value = {"text": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise UserError(f"answers[{i}] is neither a text nor an object with 'text'")
    return {"text": value["text"]} | {key: value[key] for key in ("model", "sampling") if value.get(key) is not None}


def ranks(value: Any, count: int, name: str) -> list[int | None]:
    """Checks a list of ranks, and renumbers them so that they have no gaps: [2, 7, None, 2] becomes [1, 2, None, 1]."""
    if not isinstance(value, list) or len(value) != count:
        raise UserError(f"{name} is not a list of {count} ranks, one for each answer")
    if not all(rank is None or (type(rank) is int and rank >= 1) for rank in value):
        raise UserError(f"{name} must contain only whole numbers from 1 upward, or null")
    return dense(value)


def dense(values: list[Any]) -> list[Any]:
    """Converts values to ranks: the smallest value gets rank 1, and None stays None."""
    order = sorted({value for value in values if value is not None})
    return [None if value is None else order.index(value) + 1 for value in values]
