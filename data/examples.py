"""Classes of training examples, which are made from records. The method `texts` of an example lists the texts that must
be tokenized, and `documents` builds documents from the resulting token ids."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from data.cache import Document
from data.rows import batch as batches
from data.text import chat
from data.text.chat import Asked
from data.text.tokenizer import Tokenizer

MOST = 1 << 20  # maximum number of tokens in a passage
ADJECTIVES = {"label": "labelled", "rating": "rated"}


class Example:
    """The base class of training examples. An example is made from one record. All examples of a source have the same
    `kind` (a name for error messages), the same `sides` (names of their documents) and the same columns."""

    kind: str
    sides: tuple[str, ...] = (batches.ONE,)

    def parts(self) -> tuple["Example", ...]:
        """The examples that this example consists of, such as the two answers of a preference pair. For a text, a chat
        or a completion, this is only the example itself."""
        return (self,)

    def each(self, change: Callable[["Example"], "Example"]) -> "Example":
        """A copy of this example in which `change` has been applied to each example in `parts()`."""
        return change(self)

    def plain(self) -> str:
        """The text of this example, for training a tokenizer."""
        raise NotImplementedError

    def texts(self) -> list[str]:
        """The texts of this example that must be tokenized. The texts of many examples are tokenized in one call."""
        return []

    def documents(
        self, tokenizer: Tokenizer, encoded: Iterator[list[int]], asked: Asked | None = None
    ) -> list[Document]:
        """Builds one document for each example in `parts()`. `encoded` yields the token ids of each text in `texts()`.
        Raises UserError for a chat that the chat template cannot render."""
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Example):
    """A plain text, in which every token counts in the loss. A long text may be split into pieces."""

    text: str
    kind: ClassVar[str] = "text"

    def plain(self) -> str:
        return self.text

    def texts(self) -> list[str]:
        return [self.text]

    def documents(
        self, tokenizer: Tokenizer, encoded: Iterator[list[int]], asked: Asked | None = None
    ) -> list[Document]:
        ids, start, end = next(encoded), _start(tokenizer), _end(tokenizer)
        if tokenizer.reads_control:  # a rendered chat may already contain the start and end tokens
            start = [] if start == ids[: len(start)] else start
            end = [] if end and self.text.rstrip().endswith(tokenizer.core.id_to_token(end[0])) else end
        return [Document([*start, *ids, *end], None, _hash(self.text))]


@dataclass(frozen=True)
class Completion(Example):
    """A prompt and its completion. Only the completion and its end token count in the loss, even if the padding token
    has the same id as the end token."""

    prompt: str
    completion: str
    kind: ClassVar[str] = "completion"

    def plain(self) -> str:
        return self.prompt + self.completion

    def texts(self) -> list[str]:
        return [self.prompt, self.completion]

    def documents(
        self, tokenizer: Tokenizer, encoded: Iterator[list[int]], asked: Asked | None = None
    ) -> list[Document]:
        prompt = [*_start(tokenizer), *next(encoded)]
        completion = [*next(encoded), *_end(tokenizer)]
        learnt = [0] * len(prompt) + [1] * len(completion)
        return [Document(prompt + completion, learnt, _hash(self.prompt or self.completion))]


@dataclass(frozen=True)
class Chat(Example):
    """A chat, of which only the assistant's messages count in the loss. Messages before the index `first` never
    count."""

    messages: chat.Messages
    first: int = 0
    tools: list | None = None
    kind: ClassVar[str] = "completion"

    def plain(self) -> str:
        return "\n".join(message["content"] for message in self.messages)

    def documents(
        self, tokenizer: Tokenizer, encoded: Iterator[list[int]], asked: Asked | None = None
    ) -> list[Document]:
        ids, learnt = chat.tokens_and_mask(self.messages, tokenizer, self.tools, self.first, asked)
        return [Document(ids, learnt, _hash(json.dumps(self.messages[: self.first] or self.messages)))]


@dataclass(frozen=True)
class Tagged(Example):
    """A sequence of words, each with a tag (a class number), as in named-entity recognition. The first token of each
    word gets the word's tag."""

    words: tuple[str, ...]
    tags: tuple[int, ...]
    kind: ClassVar[str] = "tagged"

    def plain(self) -> str:
        return " ".join(self.words)

    def documents(
        self, tokenizer: Tokenizer, encoded: Iterator[list[int]], asked: Asked | None = None
    ) -> list[Document]:
        text = self.plain()
        ids, offsets = tokenizer.encode_offsets(text)
        starts, at = {}, 0  # {position of a word's first character: the word's tag}
        for word, tag in zip(self.words, self.tags, strict=True):
            starts[at], at = tag, at + len(word) + 1
        tags = []
        for begin, end in offsets:
            found = next((at for at in range(begin, end) if at in starts), None)
            tags.append(-1 if found is None else starts.pop(found))
        before, behind = _start(tokenizer), _end(tokenizer)
        tags = [-1] * len(before) + tags + [-1] * len(behind)
        return [Document([*before, *ids, *behind], None, _hash(text), tags=tags)]


class Parts(Example):
    """An example that consists of other examples. Its documents may have numeric columns."""

    def columns(self) -> tuple[dict[str, float], ...]:
        """Returns the numeric columns of each document, as one dict per example in `parts()`."""
        return ({},) * len(self.sides)

    def plain(self) -> str:
        return self.parts()[0].plain()

    def texts(self) -> list[str]:
        return [text for part in self.parts() for text in part.texts()]

    def documents(
        self, tokenizer: Tokenizer, encoded: Iterator[list[int]], asked: Asked | None = None
    ) -> list[Document]:
        made = [document for part in self.parts() for document in part.documents(tokenizer, encoded, asked)]
        return [document._replace(columns=columns) for document, columns in zip(made, self.columns(), strict=True)]


@dataclass(frozen=True)
class Pair(Parts):
    """A preference pair: a chosen and a rejected answer to one prompt."""

    chosen: Completion | Chat
    rejected: Completion | Chat
    # (column, value) for each of the columns "margin" and "tie" that the record has.
    numbers: tuple[tuple[str, float], ...] = ()
    sides: ClassVar[tuple[str, ...]] = batches.KINDS["pair"].sides

    @property
    def kind(self) -> str:
        return " with ".join(["pair", *(name for name, _ in self.numbers)])

    def parts(self) -> tuple[Completion | Chat, ...]:
        return self.chosen, self.rejected

    def each(self, change: Callable[[Example], Example]) -> "Pair":
        return replace(self, chosen=change(self.chosen), rejected=change(self.rejected))

    def columns(self) -> tuple[dict[str, float], ...]:
        return (dict(self.numbers),) * 2


@dataclass(frozen=True)
class Match(Parts):
    """A question and a passage that answers the question. Both texts are tokenized with the special tokens that an
    encoder model expects."""

    passage: Text
    query: Text
    kind: ClassVar[str] = "match"
    sides: ClassVar[tuple[str, ...]] = batches.KINDS["match"].sides

    def parts(self) -> tuple[Text, Text]:
        return self.passage, self.query

    def documents(
        self, tokenizer: Tokenizer, encoded: Iterator[list[int]], asked: Asked | None = None
    ) -> list[Document]:
        ids = tokenizer.encode_inputs(self.texts(), MOST)
        return [Document(row, None, _hash(self.query.text)) for row in ids]


@dataclass(frozen=True)
class Group(Parts):
    """Several answers to one prompt, each with a rank or each with a rating. `column` says which of the two: "rank" (1
    is the best) or "rating"."""

    answers: tuple[Completion | Chat, ...]
    column: str
    values: tuple[float, ...]

    @property
    def kind(self) -> str:
        return f"{len(self.answers)}-answer {self.column}"

    @property
    def sides(self) -> tuple[str, ...]:
        return batches.answers(len(self.answers))

    def parts(self) -> tuple[Completion | Chat, ...]:
        return self.answers

    def each(self, change: Callable[[Example], Example]) -> "Group":
        return replace(self, answers=tuple(map(change, self.answers)))

    def columns(self) -> tuple[dict[str, float], ...]:
        return tuple({self.column: value} for value in self.values)


@dataclass(frozen=True)
class Scored(Parts):
    """A text, completion or chat together with a score. `column` is the kind of score: "label" or "rating"."""

    example: Text | Completion | Chat
    column: str
    value: float

    @property
    def kind(self) -> str:
        return f"{ADJECTIVES[self.column]} {self.example.kind}"

    def parts(self) -> tuple[Text | Completion | Chat]:
        return (self.example,)

    def each(self, change: Callable[[Example], Example]) -> "Scored":
        return replace(self, example=change(self.example))

    def columns(self) -> tuple[dict[str, float]]:
        return ({self.column: self.value},)


def wrapped(found: Example) -> Example:
    """Converts a prompt and its completion to the turns of a chat, for models with a chat template. Examples of any
    other class are returned unchanged.

    If the prompt is a transcript of a dialog, as in Anthropic's datasets, the transcript is split into turns.
    """
    if not isinstance(found, Completion):
        return found
    pieces = re.split(r"\n\n(Human|Assistant):", found.prompt)
    before = [{"role": "user", "content": found.prompt.strip()}]
    if len(pieces) > 2 and not pieces[0].strip() and pieces[-2] == "Assistant" and not pieces[-1].strip():
        roles = ["user" if name == "Human" else "assistant" for name in pieces[1:-2:2]]
        before = [{"role": role, "content": text.strip()} for role, text in zip(roles, pieces[2:-2:2], strict=True)]
    return Chat([*before, {"role": "assistant", "content": found.completion.strip()}], len(before))


def _start(tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer.prefix)


def _end(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
