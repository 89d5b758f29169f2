"""Splits documents into chunks: at headings, then at empty lines, then at the ends of sentences."""

import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from common.errors import UserError
from common.types import Json
from data import sources

WORDS = 160  # maximum words per chunk: about 220 tokens, which is below the limit of small encoders
HEADING = re.compile(r"#{1,6}\s+(.+?)\s*#*")
SENTENCE = re.compile(r"(?<=[.!?])\s+")
TITLES = ("title", "name", "heading")  # columns of a record that may contain the title
TEXTS = ("text", "content", "body", "document", "extract")


class Chunk(NamedTuple):
    document: str  # where the document is from: a file, or a file and a line
    title: str  # title of the document, followed by the headings above the chunk
    text: str

    @property
    def id(self) -> str:
        """A hash of the chunk's content. It identifies unchanged chunks when an index is updated."""
        return hashlib.sha256("\0".join(self).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def passage(self) -> str:
        """The title and the text of the chunk, which are searched and shown together."""
        return f"{self.title}\n{self.text}" if self.title else self.text


def of_source(spec: str, words: int = WORDS) -> Iterator[Chunk]:
    """Yields the chunks of a source (see data.sources), in the order of its records. Raises UserError if a record has
    no text."""
    for row in sources.rows(spec):
        if row.record is None:
            raise UserError(row.reason, row.where)
        yield from of_record(row.record, row.where, words)


def of_record(record: Json, where: str, words: int = WORDS) -> Iterator[Chunk]:
    """Yields the chunks of a record. `where` says where the record is from. Raises UserError if the record has no
    text."""
    text = _first(record, TEXTS)
    if not text:
        raise UserError("the record has no text", where, f"add a column named {' or '.join(TEXTS)}")
    yield from (Chunk(where, *part) for part in split(text, _first(record, TITLES), words))


def split(text: str, title: str = "", words: int = WORDS) -> Iterator[tuple[str, str]]:
    """Yields (title with headings, text) for chunks of at most `words` words. A sentence of more than `words` words is
    split between words."""
    for headings, section in _sections(text):
        name = " · ".join(filter(None, (title, *headings)))
        kept: list[str] = []
        for piece in _pieces(section, words):
            if kept and _count(kept) + _count([piece]) > words:
                yield name, "\n".join(kept)
                kept = []
            kept.append(piece)
        if kept:
            yield name, "\n".join(kept)


def _sections(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields (headings above the section, text of the section) for each section between Markdown headings."""
    headings: list[tuple[int, str]] = []
    lines: list[str] = []
    for line in text.splitlines():
        if not (found := HEADING.fullmatch(line.strip())):
            lines.append(line)
            continue
        yield tuple(name for _, name in headings), "\n".join(lines)
        level = len(line.strip()) - len(line.strip().lstrip("#"))
        headings, lines = [*(h for h in headings if h[0] < level), (level, found[1])], []
    yield tuple(name for _, name in headings), "\n".join(lines)


def _pieces(section: str, words: int) -> Iterator[str]:
    """Yields the paragraphs of a section. A paragraph of more than `words` words is split into sentences. A sentence of
    more than `words` words is split between words."""
    for paragraph in filter(None, (p.strip() for p in re.split(r"\n\s*\n", section))):
        if _count([paragraph]) <= words:
            yield paragraph
            continue
        for sentence in SENTENCE.split(paragraph):
            spelled = sentence.split()
            yield from (" ".join(spelled[at : at + words]) for at in range(0, len(spelled), words))


def _count(texts: list[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _first(record: Json, columns: tuple[str, ...]) -> str:
    return next((record[c].strip() for c in columns if isinstance(record.get(c), str) and record[c].strip()), "")
