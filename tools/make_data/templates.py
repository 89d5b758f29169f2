"""Makes questions from English sentences with templates, such as "X is a Y". Each answer is a span of the sentence."""

import re
from collections.abc import Iterator

from infer.retrieve.chunks import SENTENCE, Chunk

ASIDE = re.compile(r" ?\([^()]*\)")
BLANKS = 4  # fill-in-the-blank questions are made only from this many sentences at the start of a chunk
MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
DATE = rf"(?:\d{{1,2}} )?(?:{MONTH})(?: \d{{1,2}},)? \d{{3,4}}"
DONE = (
    "built|completed|created|discovered|established|founded|introduced|invented|made|opened|published|released|written"
)
PERSON = (
    "actor|actress|artist|author|composer|dictator|economist|emperor|engineer|explorer|general|historian|inventor|king|"
    "leader|lawyer|mathematician|musician|painter|philosopher|physicist|poet|politician|president|queen|scientist|"
    "sculptor|singer|statesman|writer"
)
IS = re.compile(
    r"\b(?P<verb>is|was|are|were) (?P<answer>(?:an?|the|one of the) [^.;]{8,}?)(?=[.;]|, (?:which|who|but|where)\b|$)"
)
WHO = re.compile(rf"(?:an?|the) (?:[\w-]+,? ){{0,3}}?(?:and )?(?:{PERSON})\b")
BORN = re.compile(rf"\((?:[^()]*?\bborn )?(?P<answer>{DATE})(?: [–-]|\))")
DIED = re.compile(rf"\([^()]* [–-] (?P<answer>{DATE})\)")
YEAR = re.compile(rf"\b(?P<verb>was|were) (?P<done>(?:first )?(?:{DONE}))\b[^.;,]{{0,40}}?\bin (?P<answer>\d{{4}})\b")
PLACE = re.compile(
    r"\b(?P<verb>is|are) (?:\w+ ){0,3}?(?:located|situated|found) (?:in|on|off|near) "
    r"(?P<answer>[^,.;]{3,50})(?=[,.;]|$)"
)
BLANK = re.compile(
    r"\b(?:\d[\d,.]* (?:percent|million|billion|(?:kilo)?met(?:er|re)s|km|species|people|years)|\d{4}|"
    r"(?:[A-Z][\w'-]+)(?: (?:of |the )?[A-Z][\w'-]+){1,3})"
)


def rows(chunk: Chunk) -> Iterator[tuple[str, str, str]]:
    """Yields (template, question, answer) for each question made from a chunk."""
    name, sentences = ASIDE.sub("", chunk.title.split(" · ")[0]), SENTENCE.split(" ".join(chunk.text.split()))
    if name:
        yield from _about(name, sentences)
    about = f" about {name}" * bool(name)
    for sentence in sentences[:BLANKS]:
        if found := BLANK.search(sentence, 12):  # a blank near the beginning leaves too little context
            blank = f"{sentence[: found.start()]}____{sentence[found.end() :]}"
            yield "blank", f"Complete the sentence{about}: {blank}", found[0]


def _about(name: str, sentences: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yields questions about the document's subject `name`, which the first sentence is assumed to define."""
    first = sentences[0]
    born, died = BORN.search(first), DIED.search(first)
    if found := IS.search(ASIDE.sub("", first)):
        who = "Who" if born or died or WHO.match(found["answer"]) else "What"
        yield "definition", f"{who} {found['verb']} {name}?", found["answer"]
    if born:
        yield "born", f"When was {name} born?", born["answer"]
    if died:
        yield "died", f"When did {name} die?", died["answer"]
    for sentence in sentences[:2]:
        if found := YEAR.search(sentence):
            yield "year", f"In which year {found['verb']} {name} {found['done']}?", found["answer"]
        if found := PLACE.search(sentence):
            yield "place", f"Where {found['verb']} {name}?", found["answer"]
