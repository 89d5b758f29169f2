"""Converts items and votes to and from the JSON formats of Argilla (records of SDK 2) and Label Studio (tasks).

Both tools store a decision as responses to named questions. The questions are ranking, verdict (bad or skip) and, for
each answer, a rating per aspect, a correction and a flag. For the first answer, these are named ASPECT_1, correction_1
and flag_1. Records that were created in Argilla or Label Studio may use other field names, and may contain only a
ranking or a pairwise choice. Other data of an item, for which the two formats have no field, are stored as JSON in one
text field, `kungfu`.
"""

import json
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError, reading
from common.files import strict
from common.types import Json
from feedback.fold import Event, State
from feedback.items import Item, dense, item
from feedback.rows import slug
from feedback.votes import decision

Votes = list[tuple[str, Json]]  # (annotator, content)
LARGEST = 1 << 30  # maximum size of a file, in bytes
PROMPT = ("prompt", "instruction", "question", "input", "text")
ANSWER = re.compile(r"(?:answer|response|generation|completion|candidate)[-_ ]?([1-4a-d])", re.I)


# --- decisions as responses to questions ---


def answers(event: Event, asked: Item) -> Json:
    content = event.content
    out: Json = {}
    if ranking := {f"answer_{i}": rank for i, rank in enumerate(event.ranks or [], 1) if rank is not None}:
        out["ranking"] = ranking
    elif content["choice"] != "ranks":
        out["verdict"] = content["choice"]
    for aspect in asked.aspects:
        values = enumerate(content["ratings"].get(aspect, []), 1)
        out |= {f"{slug(aspect)}_{i}": value for i, value in values if value is not None}
    out |= {f"correction_{int(i) + 1}": text for i, text in content["edits"].items()}
    return out | {f"flag_{int(i) + 1}": text for i, text in content["flags"].items()}


def vote(found: Json, asked: Item, seconds: float = 0) -> Json:
    """Converts responses {question: value} to the content of a vote. Raises UserError if they are not a valid vote."""
    count = len(asked.texts)
    ranking = found.get("ranking") or {}
    given: Json = {"choice": found.get("verdict", "ranks"), "ms": int(1000 * seconds)}
    given["ranks"] = dense([ranking.get(f"answer_{i + 1}") for i in range(count)])
    for name, key in (("edits", "correction"), ("flags", "flag")):
        texts = {str(i): found.get(f"{key}_{i + 1}") for i in range(count)}
        given[name] = {i: text for i, text in texts.items() if text is not None}
    given["ratings"] = {a: [found.get(f"{slug(a)}_{i + 1}") for i in range(count)] for a in asked.aspects}
    return decision(given, asked, list(range(count)), 0)


def extras(asked: Item) -> str:
    """Returns everything in an item except the prompt and the texts of the answers, as JSON."""
    rest = {key: value for key, value in asked.content.items() if key not in ("prompt", "answers")}
    rest["answers"] = [{k: v for k, v in answer.items() if k != "text"} for answer in asked.content["answers"]]
    return json.dumps(rest, ensure_ascii=False)


def made(prompt: Any, texts: list[str], kept: Any) -> Item:
    rest = strict(kept) if isinstance(kept, str) else {}
    more = rest.pop("answers", [])
    more = more if len(more) == len(texts) else [{}] * len(texts)
    return item(rest | {"prompt": prompt, "answers": [{"text": t} | m for t, m in zip(texts, more)]})


def fields(found: Json) -> tuple[Any, list[str]]:
    """Returns (prompt, answers) from a record's fields. The fields may have any of the names in PROMPT and ANSWER."""
    prompt = next((found[name] for name in PROMPT if found.get(name)), None)
    named = {m[1].lower(): text for name, text in found.items() if (m := ANSWER.fullmatch(name)) and text is not None}
    if prompt is None or len(named) < 2:
        raise UserError(f"there are not a prompt and two answers among the fields {', '.join(map(str, found))}")
    return prompt, [named[name] for name in sorted(named)]


# --- Argilla ---


def to_argilla(items: Iterable[Item], state: State) -> list[Json]:
    return [_record(asked, state.votes.get(asked.hash, {})) for asked in items]


def _record(asked: Item, votes: dict[str, Event]) -> Json:
    responses: dict[str, list[Json]] = {}
    for name, event in sorted(votes.items()):
        for question, value in answers(event, asked).items():
            value = _ranking(value) if question == "ranking" else value
            responses.setdefault(question, []).append({"value": value, "user_id": user(name)})
    suggestions: Json = {}
    if judge := asked.judge:
        value = _ranking({f"answer_{i + 1}": rank for i, rank in enumerate(judge["ranks"]) if rank is not None})
        suggestions = {"ranking": {"value": value, "score": None, "agent": judge.get("model")}}
    texts = {f"answer_{i + 1}": text for i, text in enumerate(asked.texts)}
    return {
        "id": asked.hash, "status": "completed" if votes else "pending", "vectors": {}, "suggestions": suggestions,
        "fields": {"prompt": asked.content["prompt"], **texts}, "responses": responses,
        "metadata": {"annotators": sorted(votes), "kungfu": extras(asked)},
    }  # fmt: skip


def user(name: str) -> str:
    """Returns a UUID for an annotator, because Argilla identifies users by UUIDs."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"kungfu:{name}"))


def _ranking(ranks: dict[str, int]) -> list[Any]:
    """Converts {name of an answer: rank} to Argilla's format: a list of the names, best first, as in the SDK. If the
    ranks have ties or gaps, each entry also contains the rank, as in the REST interface."""
    if sorted(ranks.values()) == list(range(1, len(ranks) + 1)):
        return sorted(ranks, key=lambda name: ranks[name])
    return [{"value": name, "rank": rank} for name, rank in ranks.items()]


def from_argilla(record: Json) -> tuple[Item, Votes]:
    metadata = record.get("metadata") or {}
    prompt, texts = fields(record["fields"])
    asked = made(prompt, texts, metadata.get("kungfu"))
    names = {user(name): name for name in metadata.get("annotators") or []}
    given: dict[str, Json] = {}
    for question, responses in (record.get("responses") or {}).items():
        for response in responses:
            value, who = response["value"], str(response.get("user_id"))
            if isinstance(value, list):
                question, value = "ranking", _ranks(value)
            given.setdefault(names.get(who, who), {})[question] = value
    return asked, [(name, vote(found, asked)) for name, found in given.items()]


def _ranks(value: list[Any]) -> dict[str, Any]:
    """Converts a ranking from Argilla to {answer_N: rank}. In the given list, the answers may have other names."""
    pairs = [(v["value"], v.get("rank", i)) if isinstance(v, dict) else (v, i) for i, v in enumerate(value, 1)]
    return {_named(name): rank for name, rank in pairs}


def _named(name: object) -> str:
    found = ANSWER.fullmatch(str(name)) or re.fullmatch(r"([1-4])", str(name))
    if not found:
        raise UserError(f"the ranking contains {str(name)!r}, which is not one of the answers")
    return f"answer_{' abcd'.find(found[1].lower()) if found[1].isalpha() else found[1]}"


# --- Label Studio ---


def to_label_studio(items: Iterable[Item], state: State) -> list[Json]:
    return [_task(i, asked, state.votes.get(asked.hash, {})) for i, asked in enumerate(items, 1)]


def _task(number: int, asked: Item, votes: dict[str, Event]) -> Json:
    listed = [{"id": f"answer_{i}", "title": f"Answer {i}", "body": text} for i, text in enumerate(asked.texts, 1)]
    names = [entry["id"] for entry in listed]
    annotations = [
        {
            "completed_by": {"email": name}, "lead_time": event.content["ms"] / 1000, "was_cancelled": False,
            "result": [_result(k, v, names) for k, v in answers(event, asked).items()],
        }
        for name, event in sorted(votes.items())
    ]  # fmt: skip
    predictions = []
    if judge := asked.judge:
        ranks = {name: rank for name, rank in zip(names, judge["ranks"]) if rank is not None}
        predictions = [{"model_version": judge.get("model"), "result": [_result("ranking", ranks, names)]}]
    data = {"prompt": asked.content["prompt"], "items": listed, "kungfu": extras(asked)}
    return {"id": number, "data": data, "annotations": annotations, "predictions": predictions}


def _result(question: str, value: Any, names: list[str]) -> Json:
    head = {"from_name": question, "to_name": "answers" if question == "ranking" else "prompt"}
    if question == "ranking":
        buckets = {str(rank): [n for n in names if value.get(n) == rank] for rank in sorted(set(value.values()))}
        return head | {"type": "ranker", "value": {"ranker": {"_": [n for n in names if n not in value], **buckets}}}
    if question == "verdict":
        return head | {"type": "choices", "value": {"choices": [value]}}
    if isinstance(value, int):
        return head | {"type": "rating", "value": {"rating": value}}
    return head | {"type": "textarea", "value": {"text": [value]}}


def from_label_studio(task: Json) -> tuple[Item, Votes]:
    data = task["data"]
    if isinstance(data.get("items"), list):
        prompt = next((data[name] for name in PROMPT if data.get(name)), None)
        names = [str(entry["id"]) for entry in data["items"]]
        texts = [entry.get("body") or entry.get("title") for entry in data["items"]]
    else:
        prompt, texts = fields(data)
        names = [f"answer_{i + 1}" for i in range(len(texts))]
    asked, votes = made(prompt, texts, data.get("kungfu")), []
    for annotation in task.get("annotations") or []:
        by = annotation.get("completed_by")
        name = str(by.get("email") or by.get("id")) if isinstance(by, dict) else str(by)
        found = dict(_answer(result, names) for result in annotation["result"])
        if annotation.get("was_cancelled"):
            found = {"verdict": "skip"}
        if found:
            votes.append((name, vote(found, asked, annotation.get("lead_time") or 0)))
    return asked, votes


def _answer(result: Json, names: list[str]) -> tuple[str, Any]:
    value, kind = result["value"], result["type"]
    if kind == "pairwise":
        return "ranking", dict(zip(("answer_1", "answer_2"), (1, 2) if value["selected"] == "left" else (2, 1)))
    if kind == "ranker":
        ranker = value["ranker"]
        levels = [[name] for name in ranker] if isinstance(ranker, list) else _levels(ranker)
        places = {name: f"answer_{i}" for i, name in enumerate(names, 1)}
        return "ranking", {places[str(name)]: rank for rank, level in enumerate(levels, 1) for name in level}
    if kind == "choices":
        return result["from_name"], value["choices"][0]
    if kind == "rating":
        return result["from_name"], value["rating"]
    text = value["text"]
    return result["from_name"], text[0] if isinstance(text, list) else text


def _levels(buckets: dict[str, list[str]]) -> list[list[str]]:
    """Converts Label Studio's buckets, into which people sort the answers, to a list of ranks, best first. Each rank is
    a list with the names of its answers. If the buckets' names are numbers, these are the ranks. If there is only one
    bucket, it contains the answers in order, from best to worst."""
    named = {name: entries for name, entries in buckets.items() if name != "_" and entries}
    if len(named) == 1 and not next(iter(named)).isdecimal():
        return [[entry] for entry in next(iter(named.values()))]
    if not all(name.isdecimal() for name in named):
        raise UserError(f"the order of the buckets {', '.join(named)} is not known", "", "name them 1, 2, 3")
    return [named[name] for name in sorted(named, key=int)] or [[entry] for entry in buckets.get("_", [])]


# --- files ---

WRITERS = {"argilla": to_argilla, "label-studio": to_label_studio}


def read(path: Path) -> Iterator[tuple[Item, Votes]]:
    """Yields each item and its votes from a file exported by Argilla or Label Studio. Raises UserError with the
    position of the first invalid record."""
    with reading(path):
        if path.stat().st_size > LARGEST:
            raise UserError(f"larger than {LARGEST >> 30} GiB", str(path), "split it")
        text = path.read_text("utf-8-sig")
        whole = text.lstrip()[:1] == "["
        listed = strict(text) if whole else [strict(line) for line in text.split("\n") if line.strip()]
    for i, record in enumerate(listed):
        with reading(f"{path}[{i}]"):
            if isinstance(record, dict) and "fields" in record:
                yield from_argilla(record)
            elif isinstance(record, dict) and "data" in record:
                yield from_label_studio(record)
            else:
                raise UserError("the record has neither 'fields' (Argilla) nor 'data' (Label Studio)", f"{path}[{i}]")
