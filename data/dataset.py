"""One source, tokenised: records -> examples -> documents of ids, with a report of all that was left out."""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from common.errors import UserError
from data import cache, formats, sources
from data.cache import Document
from data.formats import Chat, Completion, Example, Pair, Text
from data.text import chat
from data.text.tokenizer import Tokenizer

VERSION = 1  # goes up when the same input gives other documents
KINDS = {Text: "text", Completion: "completion", Chat: "completion", Pair: "pair"}
SHOWN = 5  # bad rows kept in the report


@dataclass(frozen=True)
class Dataset:
    """Documents of one kind: "text" (all learnt, may be cut into pieces), "completion", or "pair" (two a item)."""

    stored: cache.Stored
    folder: Path

    @property
    def kind(self) -> str:
        return self.stored.index["kind"]

    @property
    def fingerprint(self) -> str:
        return self.stored.index["fingerprint"]

    @property
    def report(self) -> dict:
        """documents, tokens, learnt (tokens in the loss), bad, first_bad."""
        return self.stored.index["report"]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.stored.offsets)

    def __len__(self) -> int:
        """Documents; pairs count once."""
        return len(self.stored.hashes) // (2 if self.kind == "pair" else 1)

    def split(self, holdout: float) -> tuple[np.ndarray, np.ndarray]:
        """Document numbers for training and held out. A document's side depends on its own text alone.

        With 2 documents or more and holdout > 0, one at least is held out.
        """
        hashes = self.stored.hashes[:: 2 if self.kind == "pair" else 1]
        out = hashes < np.uint64(min(int(holdout * 2**64), 2**64 - 1))
        if holdout > 0 and not out.any() and len(hashes) > 1:
            out = hashes == hashes.min()
        if len(hashes) and out.all():
            raise UserError("nothing is left to train on", f"data.holdout={holdout}", "hold out less, or add records")
        return np.flatnonzero(~out), np.flatnonzero(out)


def prepare(
    source: str,
    tokenizer: Tokenizer,
    *,
    folder: str | Path,
    form: str = "auto",
    fields: str = "",
    max_bad: float = 0.001,
) -> Dataset:
    """The tokenised source, from its cache below `folder` or made now.

    Raises UserError when more than `max_bad` of the records are bad, or none is left.
    """
    parts = [VERSION, sources.content_id(source), tokenizer.fingerprint, form, formats.parse_fields(fields)]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = Path(folder).expanduser() / fingerprint[:24]
    if path.exists():
        try:
            found = Dataset(cache.read(path), path)
            _check(found.report, source, max_bad)
            return found
        except cache.Broken as error:
            logging.warning("made again: %s", error)
            shutil.rmtree(path)
    index = {"version": VERSION, "fingerprint": fingerprint, "source": source, "kind": ""}
    index["report"] = {"documents": 0, "tokens": 0, "learnt": 0, "bad": 0, "first_bad": []}
    documents = _documents(source, tokenizer, form, formats.parse_fields(fields), index)
    cache.write(path, documents, index, tokenizer.vocab_size, lambda: _check(index["report"], source, max_bad))
    return Dataset(cache.read(path), path)


def _check(report: dict, source: str, max_bad: float) -> None:
    total = report["documents"] + report["bad"]
    if report["bad"] > max_bad * total:
        shown = "; ".join(report["first_bad"])
        raise UserError(
            f"{report['bad']} of {total} records are bad: {shown}", source, "mend them, or raise data.max_bad"
        )
    if not report["documents"]:
        raise UserError("no records", source)


def has_chats(source: str, form: str = "auto", fields: str = "") -> bool:
    """Whether the first readable record is a chat."""
    first = next(_examples(source, form, fields), None)
    return isinstance(first.chosen if isinstance(first, Pair) else first, Chat)


def texts(source: str, form: str = "auto", fields: str = "") -> Iterator[str]:
    """The plain text of every readable record; what a tokenizer is trained on."""
    for found in _examples(source, form, fields):
        yield _plain(found.chosen if isinstance(found, Pair) else found)


def _examples(source: str, form: str, fields: str) -> Iterator[Example]:
    """Those of the readable records; `prepare` counts the others."""
    names = formats.parse_fields(fields)
    for row in sources.rows(source):
        with contextlib.suppress(UserError):
            yield formats.example(row.record or {}, form, names)


def _plain(found: Text | Completion | Chat) -> str:
    if isinstance(found, Chat):
        return "\n".join(message["content"] for message in found.messages)
    return "".join(found)


# ---- records to documents ----


def _documents(source: str, tokenizer: Tokenizer, form: str, fields: dict, index: dict) -> Iterator[Document]:
    """Fills `index` (kind, report) while it goes."""
    report = index["report"]

    def bad(where: str, reason: str) -> None:
        report["bad"] += 1
        if len(report["first_bad"]) < SHOWN:
            report["first_bad"].append(f"{where}: {reason}")

    rows = sources.rows(source)
    while block := list(islice(rows, 256)):
        examples = [_example(row, form, fields, bad) for row in block]
        plain = iter(tokenizer.encode_batch([e.text for e in examples if isinstance(e, Text)]))
        for row, found in zip(block, examples):
            if found is None:
                continue
            index["kind"] = index["kind"] or KINDS[type(found)]
            try:
                if KINDS[type(found)] != index["kind"]:
                    raise UserError(f"a {KINDS[type(found)]} record among {index['kind']} records")
                documents = _tokenise(found, tokenizer, plain)
            except UserError as error:
                bad(row.where, str(error))
                continue
            report["documents"] += 1
            for document in documents:
                report["tokens"] += len(document.ids)
                report["learnt"] += _learnt(document)
                yield document


def _example(row: sources.Row, form: str, fields: dict, bad) -> Example | None:
    if row.record is None:
        bad(row.where, row.reason)
        return None
    try:
        return formats.example(row.record, form, fields)
    except UserError as error:
        bad(row.where, str(error))
        return None


def _tokenise(found: Example, tokenizer: Tokenizer, plain: Iterator[list[int]]) -> list[Document]:
    if isinstance(found, Text):
        ids = [*_start(tokenizer), *next(plain), *_end(tokenizer)]
        documents = [Document(ids, None, _hash(found.text))]
    elif isinstance(found, Pair):
        documents = [_answer(side, tokenizer) for side in found]
    else:
        documents = [_answer(found, tokenizer)]
    if not all(map(_learnt, documents)):
        raise UserError("no token to learn")
    return documents


def _answer(found: Completion | Chat, tokenizer: Tokenizer) -> Document:
    """The completion or the assistant's turns are learnt, and their end token even where padding has the same id."""
    if isinstance(found, Chat):
        ids, learnt = chat.tokens_and_mask(found.messages, tokenizer, found.tools, found.first)
        return Document(ids, learnt, _hash(json.dumps(found.messages[: found.first] or found.messages)))
    prompt = [*_start(tokenizer), *tokenizer.encode(found.prompt)]
    completion = [*tokenizer.encode(found.completion), *_end(tokenizer)]
    learnt = [0] * len(prompt) + [1] * len(completion)
    return Document(prompt + completion, learnt, _hash(found.prompt or found.completion))


def _start(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.add_bos else []


def _end(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


def _learnt(document: Document) -> int:
    """Tokens that are a target and count; the first token of a document is no target."""
    return len(document.ids) - 1 if document.learnt is None else sum(document.learnt[1:])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
