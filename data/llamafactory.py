"""LLaMA-Factory's dataset_info.json: which columns of a file beside it hold what."""

import json
from pathlib import Path

from common.errors import UserError
from data.files import Row

OURS = {"query": "input", "response": "output", "prompt": "instruction", "kto_tag": "label"}  # of alpaca rows


def mapping(path: Path) -> dict | None:
    """What the dataset_info.json in a file's folder says of the file; None where there is nothing."""
    place = path.parent / "dataset_info.json"
    if not place.is_file():
        return None
    try:
        entries = json.loads(place.read_text("utf-8")).values()
        return next((e for e in entries if isinstance(e, dict) and e.get("file_name") == path.name), None)
    except (ValueError, AttributeError) as error:
        raise UserError(f"not readable: {error}", str(place)) from None


def mapped(row: Row, entry: dict) -> Row:
    """A row with its columns, and the fields and roles of its turns, by the names that are read here."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if row.record is None or not (columns or tags):
        return row
    shared = entry.get("formatting") == "sharegpt"
    record = dict(row.record)
    for theirs, column in columns.items():
        if column in record:
            record[("conversations" if theirs == "messages" else theirs) if shared else OURS.get(theirs, theirs)] = (
                record.pop(column)
            )
    if shared:
        for column in ("conversations", "chosen", "rejected"):
            value = record.get(column)
            if isinstance(value, dict | list):
                turns = [_turn(turn, tags) for turn in (value if isinstance(value, list) else [value])]
                record[column] = turns if isinstance(value, list) else turns[0]
    return row._replace(record=record)


def _turn(turn: object, tags: dict) -> object:
    if not isinstance(turn, dict):
        return turn
    role, content = turn.get(tags.get("role_tag", "from")), turn.get(tags.get("content_tag", "value"))
    roles = {"user": "user", "assistant": "assistant", "observation": "tool", "function": "function_call"}
    known = {
        tags[f"{name}_tag"]: ours for name, ours in (roles | {"system": "system"}).items() if f"{name}_tag" in tags
    }
    return {"role": known.get(role, role), "content": content}
