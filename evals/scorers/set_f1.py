"""Scores F1 over the items of two sets. A set is either a JSON list or a text that is split at commas, semicolons, line
breaks and "and"."""

import re

from data.messages import parsed
from evals.scorers import f1, normalized

BETWEEN = re.compile(r"[,;\n]|\band\b")


def score(answer: str, reference: str) -> float:
    said, wanted = items(answer), items(reference)
    return f1(len(said & wanted), len(said), len(wanted))


def items(text: str) -> set[str]:
    """The items of a list, each normalized as in SQuAD."""
    found = parsed(text.strip())
    parts = map(str, found) if isinstance(found, list) else BETWEEN.split(text)
    return {item for part in parts if (item := normalized(part))}
