"""Determines the split to which a row of a file belongs. If the row has a column "split", its value is the split.
Otherwise, the split depends only on the row's question.

Rows with equal questions are then always in the same split, regardless of the order of the rows, other rows and other
columns.
"""

import hashlib

from common.errors import UserError
from data import formats
from data.examples import Chat, Completion, Text

VERSION = 1  # increased when a code change may move rows to another split
COLUMN = "split"
NAMES = {"train": "train", "training": "train", "test": "test"}
NAMES |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "heldout"), "validation")
SPLITS = ("train", "validation", "test")
TEST, VALIDATION = 0.2, 0.1  # fractions of the questions in these splits, if there is no column "split"


def of(record: dict) -> str:
    """The split of a row, one of SPLITS. Raises UserError if the column "split" has an unknown value."""
    if value := record.get(COLUMN):
        if (name := str(value).strip().lower()) not in NAMES:
            fix = f"one of {', '.join(SPLITS)}, or rename the column"
            raise UserError(f"column {COLUMN!r} has the unknown value {value!r}", "", fix)
        return NAMES[name]
    place = key(question(record)) / 2**64
    return "test" if place < TEST else "validation" if place < TEST + VALIDATION else "train"


def key(text: str) -> int:
    """A 64-bit hash of a text, which ignores case and differences in whitespace."""
    plain = " ".join(text.casefold().split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "big")


def question(record: dict) -> str:
    """The question of a record, which is the text before its last answer. If the record's format is unknown, all of its
    texts are the question."""
    try:
        found = formats.example(record).parts()[0]
    except UserError:
        found = None
    text = ""
    if isinstance(found, Completion):
        text = found.prompt
    elif isinstance(found, Text):
        text = found.text
    elif isinstance(found, Chat):
        end = max((i for i, turn in enumerate(found.messages) if turn["role"] == "assistant"), default=None)
        text = "\n".join(turn["content"] for turn in found.messages[:end] if turn["role"] != "system")
    return text if text.strip() else "\n".join(value for value in record.values() if isinstance(value, str))
