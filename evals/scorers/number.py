"""Scores 1 if the last number of the answer, or the number after "####" (as in GSM8K), equals the number in the
reference."""

import math
import re

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
MARK = "####"


def score(answer: str, reference: str) -> float:
    said, wanted = value(answer), value(reference)
    return float(said is not None and wanted is not None and math.isclose(said, wanted, rel_tol=1e-6, abs_tol=1e-9))


def value(text: str) -> float | None:
    """Returns the number that a text states as its result: the first number after MARK or, if the text has no MARK, the
    last number in the text. Commas may separate thousands."""
    before, mark, behind = text.rpartition(MARK)
    found = NUMBER.findall(behind.replace("$", "")) if mark else NUMBER.findall(text.replace("$", ""))
    if mark and not found:
        return value(before)
    return float(found[0 if mark else -1].replace(",", "")) if found else None
