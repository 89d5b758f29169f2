"""Reads LLaMA-Factory's dataset_info.json, which describes the columns of the files in its folder."""

import functools
import json
from pathlib import Path

from common.errors import UserError, warn
from data.files import Row

# Column names for rows in the alpaca format: {LLaMA-Factory's name: this project's name}.
OURS = {"query": "input", "response": "output", "prompt": "instruction", "kto_tag": "label"}
TURNS = {  # {formatting: default names of a turn's fields}, used if an entry does not name the fields
    "sharegpt": {"role_tag": "from", "content_tag": "value"},
    "openai": {"role_tag": "role", "content_tag": "content"},
}
ROLES = {"user": "user", "assistant": "assistant", "observation": "tool", "function": "function_call"}
ROLES |= {"system": "system"}
SELECTS = ("split", "subset", "folder", "num_samples")  # options by which LLaMA-Factory selects rows


def mapping(path: Path) -> dict | None:
    """The entry for a file in the dataset_info.json of the file's folder, or None if there is no such entry."""
    place = path.parent / "dataset_info.json"
    if not place.is_file():
        return None
    try:
        entries = json.loads(place.read_text("utf-8")).items()
        found = {name: e for name, e in entries if isinstance(e, dict) and e.get("file_name") == path.name}
    except (ValueError, AttributeError) as error:
        raise UserError(f"not readable: {error}", str(place)) from None
    if not found:
        return None
    name, entry = next(iter(found.items()))
    if any(other != entry for other in found.values()):
        raise UserError(f"{', '.join(found)} describe {path.name} differently", str(place), "keep only one of them")
    if unused := [key for key in SELECTS if entry.get(key) is not None]:
        _warn(f"{place}: {', '.join(unused)} of {name} is not supported and is ignored: all rows are read")
    return entry


@functools.cache
def _warn(line: str) -> None:
    """Prints a warning only once, although the entry of a file is looked up several times."""
    warn(line)


def mapped(row: Row, entry: dict) -> Row:
    """Renames the columns of a row, and the fields and roles of its turns, to the names that data.formats reads."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if row.record is None or not (columns or tags):
        return row
    fields = TURNS.get(entry.get("formatting", ""))
    ours = {"messages": "conversations"} if fields else OURS
    if not fields and not columns.keys() & {"response", "chosen"}:
        ours = ours | {"prompt": "text"}  # rows without an answer are used as texts for pretraining
    record = {name: value for name, value in row.record.items() if name not in columns.values()}
    named = {theirs: column for theirs, column in columns.items() if column in row.record}
    record |= {ours.get(theirs, theirs): row.record[column] for theirs, column in named.items()}
    tags = (fields or {}) | tags
    for column in ("conversations", "chosen", "rejected") if fields else ():
        value = record.get(column)
        if isinstance(value, dict):
            record[column] = _turn(value, tags)
        elif isinstance(value, list):
            record[column] = [_turn(turn, tags) for turn in value]
    return row._replace(record=record)


def _turn(turn: object, tags: dict) -> object:
    role, content = tags["role_tag"], tags["content_tag"]
    if not isinstance(turn, dict) or role not in turn:
        return turn
    known = {tags[f"{name}_tag"]: ours for name, ours in ROLES.items() if f"{name}_tag" in tags}
    rest = {field: value for field, value in turn.items() if field not in (role, content)}
    return rest | {"role": known.get(turn[role], turn[role]), "content": turn.get(content)}
