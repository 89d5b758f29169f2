"""Converts records of all common formats to examples: texts, prompts with completions, chats, preference pairs, groups
of answers, questions with passages, and tagged words."""

import math
from collections.abc import Iterable

from common.errors import UserError
from common.seen import Seen, holds
from data.examples import Chat, Completion, Example, Group, Match, Pair, Scored, Tagged, Text
from data.messages import Message, are_turns, messages, parsed, turn
from data.messages import tools as functions

# {format: the kind of batch (data.rows.batch.KINDS) that is made from its records}. The table FORMATS is also used to
# check configs.
FORMATS = {
    "auto": "",
    "text": "lm",
    "messages": "lm",
    "prompt_completion": "lm",
    "alpaca": "lm",
    "sharegpt": "lm",
    "tagged": "lm",
    "labelled": "labelled",
    "rated": "rated",
    "preference": "pair",
    "match": "match",
    "ranked": "group",
}
# The columns of each format, under this project's own names. "auto" selects the first format in this table whose
# columns are all present in the record. If there is none, it tries PUBLISHED.
SHAPES = {
    "preference": {"chosen", "rejected"},
    "ranked": {"prompt", "answers"},
    "match": {"query", "passage"},
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "prompt_completion": {"prompt", "completion"},
    "alpaca": {"instruction", "output"},
    "text": {"text"},
    "tagged": {"tokens", "tags"},
}
# The column names that published datasets use: (format, {name in SHAPES: published name}).
PUBLISHED = (
    ("preference", {"chosen": "chosen_response", "rejected": "rejected_response"}),
    ("preference", {"chosen": "response_j", "rejected": "response_k"}),
    ("preference", {"chosen": "preferred_output", "rejected": "non_preferred_output"}),
    ("ranked", {"prompt": "prompt", "answers": "responses"}),
    ("ranked", {"prompt": "prompt", "answers": "generations"}),
    ("ranked", {"prompt": "instruction", "answers": "generations"}),
    ("ranked", {"prompt": "instruction", "answers": "completions"}),
    ("messages", {"messages": "conversation"}),
    ("alpaca", {"instruction": "instruction", "output": "response"}),
    ("alpaca", {"instruction": "instruction", "output": "completion"}),
    ("alpaca", {"instruction": "INSTRUCTION", "output": "RESPONSE"}),
    ("prompt_completion", {"prompt": "prompt", "completion": "generation"}),
    ("prompt_completion", {"prompt": "prompt", "completion": "response"}),
    ("prompt_completion", {"prompt": "question", "completion": "answer"}),
    ("prompt_completion", {"prompt": "question", "completion": "response"}),
    ("prompt_completion", {"prompt": "question", "completion": "completion"}),
    ("prompt_completion", {"prompt": "query", "completion": "response"}),
    ("prompt_completion", {"prompt": "input", "completion": "output"}),
    ("prompt_completion", {"prompt": "article", "completion": "summary"}),
    ("text", {"text": "content"}),
    ("match", {"query": "anchor", "passage": "positive"}),
    ("match", {"query": "question", "passage": "passage"}),
)
# Formats in which each text or chat has a label or a rating: {format: possible names of the column that contains it}.
SCORED = {"labelled": ("label", "kto_tag"), "rated": ("rating",)}
# Columns that may hold the prompt of a preference pair.
PROMPTS = ("prompt", "question", "instruction", "query", "conversations", "messages", "input")
SYSTEM, GIVEN, TOOLS = ("system", "system_prompt"), ("input", "context"), ("tools", "functions")
RANKS, RATINGS = ("ranks", "rank"), ("ratings", "rating", "scores", "overall_score", "score")
ANSWER = ("answer", "response", "content", "text")
# Columns that identify or describe a record. The report lists unused columns, except for these.
IRRELEVANT = {
    "", "unnamed: 0", "__index_level_0__", "id", "idx", "index", "uid", "uuid", "hash", "prompt_id", "conversation_id",
    "message_id", "source", "dataset", "url", "split", "timestamp", "created", "date", "lang", "language", "license",
    "meta", "metadata", "tags", "model", "name", "year", "title", "author",
}  # fmt: skip


class Record(Seen):
    """A record that remembers which of its columns were read."""

    def first(self, columns: Iterable[str]) -> object:
        """The value of the first column in `columns` that is not empty."""
        return next((self.get(column) for column in columns if dict.get(self, column) not in (None, "")), None)


def parse_fields(spec: str) -> dict[str, str]:
    """Parses "prompt=question,completion=answer" into {"prompt": "question", "completion": "answer"}."""
    pairs = [part.partition("=") for part in spec.split(",") if part.strip()]
    for ours, equals, theirs in pairs:
        if not (ours.strip() and equals and theirs.strip()):
            raise UserError("fields are name=column pairs", f"data.fields={spec}", "prompt=question,completion=answer")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def detect(record: dict, form: str = "auto") -> tuple[str, dict[str, str]]:
    """Detects the format of a record. Returns the format and the dict {this project's column name: column name in the
    record}."""
    there = {column for column, value in record.items() if value is not None}
    known = [(name, {column: column for column in columns}) for name, columns in SHAPES.items()]
    for name, columns in (*known, *PUBLISHED):
        if form in ("auto", name) and set(columns.values()) <= there:
            return name, columns
    nearest = next((columns for columns in SHAPES.values() if columns <= record.keys()), None)
    if form == "auto" and nearest is None:
        what = f"no known format has the columns {', '.join(map(str, record)) or '(none)'}"
        columns = [*map(str, record), "COLUMN", "COLUMN"]
        raise UserError(what, "", f"name them: --config.data.fields=prompt={columns[0]},completion={columns[1]}")
    raise UserError(f"no column {min((nearest or SHAPES[form]) - there)!r}")


def example(record: dict, form: str = "auto", fields: dict[str, str] | None = None) -> Example:
    """Converts a record to an example. Raises a UserError that says which column is missing, empty or of the wrong
    type."""
    return read(record, form, fields)[0]


def read(record: dict, form: str = "auto", fields: dict[str, str] | None = None) -> tuple[Example, set[str]]:
    """Converts a record to an example. Returns the example and the non-empty columns that the example does not use."""
    fields = fields or {}
    for ours, theirs in fields.items():
        if theirs not in record:
            raise UserError(f"no column {theirs!r} (for {ours}); the columns are {', '.join(map(str, record))}")
    if form not in FORMATS:
        raise UserError(f"unknown format {form!r}", "data.format", f"one of {' '.join(FORMATS)}")
    seen = Record(record | {ours: record[theirs] for ours, theirs in fields.items()})
    seen.used |= set(fields.values())
    found = _scored(seen, SCORED[form]) if form in SCORED else _plain(seen, form)
    unused = seen.unused(IRRELEVANT)
    said = _said(found) if unused else []  # unused columns that only repeat the prompt or the text are not reported
    return found, {name for name in unused if not _repeated(said, dict.get(seen, name))}


def _said(found: Example) -> list[str]:
    parts = [part.texts() or [turn["content"] for turn in getattr(part, "messages", ())] for part in found.parts()]
    return [text for part in parts for text in part if text]


def _repeated(said: list[str], value: object) -> bool:
    return isinstance(value, str) and bool(said) and (value in said or all(text in value for text in said))


def _plain(record: Record, form: str) -> Example:
    form, names = detect(record, form)
    for ours, theirs in names.items():
        value = record[theirs]
        if ours != theirs:
            record[ours] = value
            record.used.add(ours)
    return READERS[form](record)


def _scored(record: Record, columns: tuple[str, ...]) -> Scored:
    name = columns[0]
    value = _number(record.first(columns), name)
    found = _plain(record, "auto")
    if not isinstance(found, Text | Completion | Chat):
        raise UserError(f"a {found.kind} record cannot have a {name}")
    return Scored(found, name, value)


def _text(record: Record) -> Text:
    return Text(_string(record, "text"))


def _messages(record: Record) -> Chat:
    return Chat(_with_system(record, messages(record["messages"], "messages")), 0, _tools(record))


def _sharegpt(record: Record) -> Chat:
    return Chat(_with_system(record, messages(record["conversations"], "conversations")), 0, _tools(record))


def _alpaca(record: Record) -> Chat:
    """Joins the instruction and the input with an empty line to form the user's turn. Earlier turns do not count in the
    loss."""
    asked = _question(record, "instruction")
    before = _with_system(record, _history(record))
    answer = _string(record, "output")
    return Chat([*before, turn("user", asked), turn("assistant", answer)], len(before) and len(before) + 1)


def _question(record: Record, column: str) -> str:
    given = record.first(GIVEN) if column == "instruction" else None
    asked = _string(record, column)
    return f"{asked}\n\n{given}" if isinstance(given, str) and given.strip() else asked


def _prompt_completion(record: Record) -> Completion | Chat:
    prompt, completion = _turns(record["prompt"]), _turns(record["completion"])
    before = _with_system(record, _history(record))
    if before:
        prompt = [*before, *([turn("user", prompt)] if isinstance(prompt, str) else messages(prompt, "prompt"))]
    return _answer(prompt, completion, "completion", _tools(record))


def _with_system(record: Record, turns: list[Message]) -> list[Message]:
    """Inserts the system prompt from a separate column as the first message, unless the messages already begin with a
    system prompt."""
    text = record.first(SYSTEM)
    if not isinstance(text, str) or not text.strip() or (turns and turns[0]["role"] in ("system", "developer")):
        return turns
    return [turn("system", text), *turns]


def _history(record: Record) -> list[Message]:
    """Reads the earlier turns of a chat, from a list of (question, answer) pairs as in LLaMA-Factory, or from
    messages."""
    found = parsed(record.get("history")) or []
    if are_turns(found):
        return messages(found, "history")
    if not isinstance(found, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in found):
        raise UserError("column 'history' is not a list of questions and answers")
    return [turn(role, str(text)) for pair in found for role, text in zip(("user", "assistant"), pair, strict=True)]


# ---- pairs and ranked answers ----


def _preference(record: Record) -> Pair:
    chosen, rejected = _turns(record["chosen"]), _turns(record["rejected"])
    if type(chosen) is not type(rejected):
        raise UserError("chosen and rejected have different types")
    if chosen == rejected:
        raise UserError("chosen equals rejected")
    column = next((name for name in PROMPTS if holds(dict.get(record, name))), "")
    prompt = _asked(record, column)
    if isinstance(chosen, str) and isinstance(prompt, str):
        if not column:
            prompt, chosen, rejected = _common_text(chosen, rejected)
        elif all(_repeats(answer, prompt) for answer in (chosen, rejected)):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    elif isinstance(chosen, list):
        prompt, chosen, rejected = _common_messages(
            _as_turns(prompt, "prompt"), messages(chosen, "chosen"), messages(rejected, "rejected")
        )
    tools = _tools(record)
    numbers = tuple((name, _number(record[name], name)) for name in ("margin", "tie") if record.get(name) is not None)
    return Pair(_answer(prompt, chosen, "chosen", tools), _answer(prompt, rejected, "rejected", tools), numbers)


def _asked(record: Record, column: str) -> str | list[Message]:
    """The prompt of a preference pair, including the system prompt and earlier turns from separate columns. Returns ""
    if the record has no prompt."""
    value = parsed(record[column]) if column in ("input", "prompt") else record.get(column, "")
    if isinstance(value, dict) and "messages" in value:  # OpenAI's format: {"messages": [...], "tools": [...]}
        record.setdefault("tools", value.get("tools"))
        value = value["messages"]
    value = _turns(value)
    if isinstance(value, str) and column == "instruction":
        value = _question(record, column)
    before = _with_system(record, _history(record)) if isinstance(value, str) else []
    if before:
        return [*before, *_as_turns(value, column)]
    return value if isinstance(value, str) else _with_system(record, messages(value, column))


def _as_turns(prompt: str | list[Message], column: str) -> list[Message]:
    if isinstance(prompt, str):
        return [turn("user", prompt)] if prompt else []
    return messages(prompt, column)


def _repeats(answer: str, prompt: str) -> bool:
    """Whether an answer begins with a copy of its prompt, and this copy does not end in the middle of a word."""
    at = len(prompt)
    return answer.startswith(prompt) and len(answer) > at and (prompt[-1:].isspace() or not answer[at].isalnum())


def _common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Splits off the prompt that both answers begin with. The prompt ends between two words, or after the last
    "Assistant:" of a transcript."""
    size = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    common, marker = chosen[:size], "\n\nAssistant:"
    if marker in common:
        size = common.rindex(marker) + len(marker)
    else:
        size = max(common.rfind(space) for space in " \n") if size < min(len(chosen), len(rejected)) else size
    size = max(min(size, len(chosen) - 1, len(rejected) - 1), 0)
    return chosen[:size], chosen[size:], rejected[size:]


def _common_messages(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Returns the prompt, and the two answers without the prompt. The prompt may be in its own column, at the beginning
    of both answers, or in both places.

    If the prompt in the column differs from the beginning of the answers, the beginning of the answers is used as the
    prompt, as in TRL. A system prompt is kept even if only the column contains it.
    """
    size = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    inside = chosen[:size]
    if not inside or (prompt and inside[0]["role"] == "assistant"):
        if not prompt:
            raise UserError("chosen and rejected do not begin with the same prompt")
        return prompt, chosen, rejected
    system = prompt[:1] if prompt and prompt[0]["role"] == "system" and inside[0]["role"] != "system" else []
    return system + inside, chosen[size:], rejected[size:]


def _ranked(record: Record) -> Group:
    """Reads several answers to a prompt with their ranks (1 is the best) or ratings. The ranks or ratings are in a
    separate column, or are fields of the answers."""
    answers = parsed(record["answers"])
    if not isinstance(answers, list) or len(answers) < 2:
        raise UserError("column 'answers' is not a list of two or more answers")
    column, values = "rank", parsed(record.first(RANKS))
    if values is None:
        column, values = "rating", parsed(record.first(RATINGS))
    if all(isinstance(answer, dict) and "role" not in answer for answer in answers):
        values, column = _within(answers) if values is None else (values, column)
        answers = [next((answer[key] for key in ANSWER if key in answer), None) for answer in answers]
    if not isinstance(values, list) or len(values) != len(answers):
        raise UserError("no column 'ranks' or 'ratings' with a number for each answer")
    prompt, tools = _turns(record["prompt"]), _tools(record)
    before = _with_system(record, [])
    prompt = [*before, *_as_turns(prompt, "prompt")] if before else prompt
    found = tuple(_answer(prompt, _turns(answer), "answers", tools) for answer in answers)
    return Group(found, column, tuple(_number(value, column + "s") for value in values))


def _within(answers: list[dict]) -> tuple[list | None, str]:
    for column, names in (("rank", RANKS), ("rating", RATINGS)):
        for name in names:
            if all(answer.get(name) is not None for answer in answers):
                return [answer[name] for answer in answers], column
    return None, "rating"


def _match(record: Record) -> Match:
    return Match(Text(_string(record, "passage")), Text(_string(record, "query")))


def _tagged(record: Record) -> Tagged:
    words, tags = record["tokens"], record["tags"]
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise UserError("column 'tokens' is not a list of words")
    if not isinstance(tags, list) or len(tags) != len(words):
        raise UserError("column 'tags' does not have one number per token")
    if not all(type(tag) is int and -1 <= tag < 1 << 15 for tag in tags):
        raise UserError("column 'tags' must hold whole numbers from -1 to 32767")
    return Tagged(tuple(words), tuple(tags))


READERS = {
    "text": _text,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "preference": _preference,
    "ranked": _ranked,
    "match": _match,
    "tagged": _tagged,
}


# ---- cells ----


def _answer(prompt: object, completion: object, column: str, tools: list | None) -> Completion | Chat:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise UserError(f"column {column!r} is empty")
        return Completion(prompt, completion)
    before = [turn("user", prompt)] if isinstance(prompt, str) else messages(prompt, "prompt")
    after = [turn("assistant", completion)] if isinstance(completion, str) else messages(completion, column)
    return Chat(before + after, len(before), tools)


def _turns(value: object) -> object:
    """Converts a JSON text or a single turn to a list of turns. Any other value is returned unchanged."""
    found = parsed(value)
    if isinstance(found, dict) and are_turns([found]):
        return [found]
    return found if are_turns(found) else value


def _number(value: object, column: str) -> float:
    """Converts a number, or a string that contains a number (as in a CSV file), to a float."""
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    try:
        found = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"no number in column {column!r}")
    return found


def _string(record: Record, column: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise UserError(f"column {column!r} is a {type(value).__name__}, not text")
    if not value.strip():
        raise UserError(f"column {column!r} is empty")
    return value


def _tools(record: Record) -> list[dict] | None:
    return functions(record.first(TOOLS))
