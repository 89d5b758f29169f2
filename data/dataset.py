"""Tokenizes one data source: its records become examples, and its examples become documents of token ids. A report
counts what was left out."""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from common import files
from common.errors import UserError, warn
from data import cache, formats, sources
from data.cache import Document
from data.examples import Chat, Completion, Example, wrapped
from data.text.chat import Asked
from data.text.template import TemplateLimit
from data.text.tokenizer import Tokenizer

# The keys of a dataset's report. A cache whose report lacks one of these keys is rebuilt; its documents stay the same.
REPORT = {"documents", "tokens", "learnt", "bad", "causes", "wrapped", "spelled", "answers", "ended", "unused", "notes"}
REPORT |= {"masks"}  # version of the rules that determine where answers end
VERSION = 1  # increased when a code change yields different documents for the same input
CAUSES = 100  # maximum number of reasons for bad rows that are counted separately
SHOWN = 5  # maximum number of reasons for bad rows that a message lists


@dataclass(frozen=True)
class Dataset:
    """The tokenized examples of one source, all of the same kind (see data.examples). An example consists of one or
    more named documents. For example, a preference pair consists of the documents "chosen" and "rejected"."""

    stored: cache.Stored
    folder: Path

    @property
    def kind(self) -> str:
        return self.stored.index["kind"]

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of the documents that make up each example: one name for texts and completions, two for pairs, and
        K for groups of K answers."""
        return tuple(self.stored.index["sides"])

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the numeric columns that every document has."""
        return tuple(self.stored.index["columns"])

    @property
    def fingerprint(self) -> str:
        return self.stored.index["fingerprint"]

    @property
    def report(self) -> dict:
        """A summary of what was read. Its counts are documents, tokens, `learnt` (tokens that count in the loss), bad
        rows, `wrapped` (prompts that were put into the chat template), `spelled` (rows whose text contains the name of
        a control token), answers, and `ended` (answers that end with an end token). It also has `causes` {reason:
        (number of bad rows, the first of these rows)}, `unused` {column: number of rows that have it}, `notes` {remark:
        number of rows}, and `system` (the first two different system prompts found, where "" means no system
        prompt)."""
        return self.stored.index["report"]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.stored.offsets)

    def __len__(self) -> int:
        """The number of examples. A pair counts as one example, and so does a group of answers."""
        return len(self.stored.hashes) // len(self.sides)

    def split(self, holdout: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns the indices of the training examples and the indices of the held-out examples. Whether an example is
        held out depends only on its prompt, or on its text if it has no prompt.

        If there are two or more examples and holdout > 0, at least one example is held out.
        """
        hashes = self.stored.hashes[:: len(self.sides)]
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
    learn: str = "all",
) -> Dataset:
    """Returns a tokenized source. If `folder` has a cache for the source, reads the cache; otherwise tokenizes the
    source and writes the cache.

    If the tokenizer has a chat template, prompts with completions are converted to chats. `learn` determines which
    answers of a chat count in the loss: "all" or only the "last". Raises UserError if the fraction of bad records is
    larger than `max_bad`, or if no record is left.
    """
    if missed := sources.passed_over(source):
        warn("%s: skipped these files: %s", source, ", ".join(missed))
    parts = [VERSION, sources.content_id(source), tokenizer.fingerprint, form, formats.parse_fields(fields)]
    wraps = tokenizer.chat_template is not None and _first_part(source, form, fields, Completion)
    parts += ["wrapped"] * wraps + [learn] * (learn != "all")
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = Path(folder).expanduser() / fingerprint[:24]
    files.clean(path.parent)  # deletes unfinished caches that killed processes left behind
    if path.exists():
        try:
            found = Dataset(cache.read(path), path)
            if found.report.keys() >= REPORT:
                _check(found.report, source, max_bad)
                return found
        except cache.Broken as error:
            warn("rebuilding the token cache: %s", error)
        shutil.rmtree(path)
    index = {"version": VERSION, "fingerprint": fingerprint, "source": source, "kind": "", "sides": ()}
    index["tokenizer"] = tokenizer.fingerprint
    index["report"] = {"documents": 0, "tokens": 0, "learnt": 0, "bad": 0, "causes": {}}
    index["report"] |= {
        "masks": 2,
        "wrapped": 0,
        "spelled": 0,
        "answers": 0,
        "ended": 0,
        "unused": {},
        "notes": {},
        "system": [],
    }
    documents = _documents(source, tokenizer, form, formats.parse_fields(fields), Asked(learn), index)
    cache.write(path, documents, index, tokenizer.vocab_size, lambda: _check(index["report"], source, max_bad))
    print(f"{source}: the tokens are cached in {path}", file=sys.stderr)
    return Dataset(cache.read(path), path)


def _check(report: dict, source: str, max_bad: float) -> None:
    total = report["documents"] + report["bad"]
    if report["bad"] > max_bad * total:
        problem = f"{report['bad']} of {total} records are bad: {'; '.join(causes(report['causes']))}"
        raise UserError(problem, source, "fix them, or raise data.max_bad")
    if not report["documents"]:
        raise UserError("no records", source, "check that the file has rows below its header")


def causes(found: dict[str, tuple[int, str]]) -> list[str]:
    """Returns one line for each of the most frequent reasons why rows are bad. The line has the reason, the number of
    rows and the first of these rows."""
    ordered = sorted(found.items(), key=lambda item: -item[1][0])
    lines = [f"{reason} ({n:,} row{'s' * (n > 1)}, first: {first})" for reason, (n, first) in ordered[:SHOWN]]
    return [*lines, f"and {len(ordered) - SHOWN} more reasons"] if len(ordered) > SHOWN else lines


def notes(report: dict, tokenizer: Tokenizer) -> list[str]:
    """Remarks on how the records were processed. A user should read them before training."""
    lines = [f"{count:,} {what}" for what, count in report["notes"].items()]
    if report["wrapped"]:
        lines.append(
            f"{report['wrapped']:,} prompts are wrapped in the chat template (data.chat_template=none leaves them raw)"
        )
    if report["spelled"]:
        fix = "data.read_control=True reads them as control tokens"
        what = "rows contain names of control tokens, which are read as plain text"
        lines.append(f"{report['spelled']:,} {what} ({fix})")
    if report["answers"] and not report["ended"]:
        ends = ", ".join(repr(tokenizer.core.id_to_token(i)) for i in tokenizer.eos_ids) or "none is known"
        lines.append(f"no answer ends with a token that ends generation ({ends}): the model will not learn to stop")
    return lines


def unused(report: dict) -> str:
    """A list of the unused columns and fields, with the number of rows in which each one occurs."""
    return ", ".join(f"{name} ({count:,} rows)" for name, count in sorted(report["unused"].items()))


def has_chats(source: str, form: str = "auto", fields: str = "") -> bool:
    """Whether the first readable record of a source is a chat."""
    return _first_part(source, form, fields, Chat)


def _first_part(source: str, form: str, fields: str, kind: type[Example]) -> bool:
    first = next(_examples(source, form, fields), None)
    return first is not None and isinstance(first.parts()[0], kind)


def texts(source: str, form: str = "auto", fields: str = "") -> Iterator[str]:
    """Yields the plain text of every readable record, for training a tokenizer."""
    for found in _examples(source, form, fields):
        yield found.plain()


def _examples(source: str, form: str, fields: str) -> Iterator[Example]:
    """Yields the examples of all readable records. Unreadable records are skipped; `prepare` counts them."""
    names = formats.parse_fields(fields)
    for row in sources.rows(source):
        with contextlib.suppress(UserError):
            yield formats.example(row.record or {}, form, names)


# ---- records to documents ----


def _documents(
    source: str, tokenizer: Tokenizer, form: str, fields: dict, asked: Asked, index: dict
) -> Iterator[Document]:
    """Yields the documents of a source, and updates the entries "kind", "sides" and "report" of `index` along the
    way."""
    report, rows = index["report"], sources.rows(source)
    report["unused"], report["notes"] = asked.unused, asked.notes
    while block := list(islice(rows, 256)):
        examples = [_example(row, form, fields, tokenizer, report) for row in block]
        texts = [found.texts() if found else [] for found in examples]
        encoded = iter(tokenizer.encode_batch([text for each in texts for text in each]))
        for row, found, own in zip(block, examples, texts, strict=True):
            ids = iter([next(encoded) for _ in own])
            if found is None:
                continue
            index["kind"], index["sides"] = index["kind"] or found.kind, index["sides"] or found.sides
            try:
                if found.kind != index["kind"]:
                    raise UserError(f"a {found.kind} record among {index['kind']} records")
                documents = found.documents(tokenizer, ids, asked)
                if not all(map(_learnt, documents)):
                    raise UserError("no token counts in the loss")
            except TemplateLimit:  # the template would exceed its limits for all following rows too
                raise
            except Exception as error:
                _bad(report, row.where, _reason(error))
                continue
            _count(report, found, own, documents, tokenizer)
            yield from documents


def _count(report: dict, found: Example, texts: list[str], documents: list[Document], tokenizer: Tokenizer) -> None:
    report["documents"] += 1
    report["spelled"] += not tokenizer.reads_control and any(map(tokenizer.control_tokens, texts))
    for part in found.parts():
        first = part.messages[0] if isinstance(part, Chat) else {"role": ""}
        text = first["content"] if first["role"] == "system" else ""
        if text not in report["system"] and len(report["system"]) < 2:
            report["system"].append(text)
    for document in documents:
        report["tokens"] += len(document.ids)
        report["learnt"] += _learnt(document)
        if document.learnt is not None:
            last = max(i for i, learnt in enumerate(document.learnt) if learnt)
            report["answers"] += 1
            report["ended"] += document.ids[last] in tokenizer.eos_ids


def _example(row: sources.Row, form: str, fields: dict, tokenizer: Tokenizer, report: dict) -> Example | None:
    if row.record is None:
        _bad(report, row.where, row.reason)
        return None
    try:
        found, unused = formats.read(row.record, form, fields)
    except Exception as error:
        _bad(report, row.where, _reason(error))
        return None
    report["unused"].update(unused)
    if tokenizer.chat_template is None or not isinstance(found.parts()[0], Completion):
        return found
    report["wrapped"] += 1
    return found.each(wrapped)


def _reason(error: Exception) -> str:
    """The reason why a record is bad. A record is bad if processing the record raises any exception."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _bad(report: dict, where: str, reason: str) -> None:
    report["bad"] += 1
    causes = report["causes"]
    reason = reason if reason in causes or len(causes) < CAUSES else "other reasons"
    count, first = causes.get(reason, (0, where))
    causes[reason] = (count + 1, first)


def _learnt(document: Document) -> int:
    """The number of tokens that count in the loss. The first token of a document never counts, because no token
    precedes it."""
    return len(document.ids) - 1 if document.learnt is None else sum(document.learnt[1:])
