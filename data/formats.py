"""Records of any usual shape to examples: text, prompt and completion, messages, a preference pair, answers, tags."""

import math

from common.errors import UserError
from data.examples import Chat, Completion, Example, Group, Pair, Scored, Tagged, Text

# Format -> the kind of batch that its records make (data.rows.batch.KINDS); the rules of a config read this too.
FORMATS = {
    "auto": "",
    "text": "lm",
    "messages": "lm",
    "prompt_completion": "lm",
    "alpaca": "lm",
    "sharegpt": "lm",
    "tagged": "lm",
    "labelled": "lm",
    "rated": "lm",
    "preference": "pair",
    "ranked": "group",
}
# "auto" takes the first shape whose columns are all there.
SHAPES = {
    "preference": {"chosen", "rejected"},
    "ranked": {"prompt", "answers"},
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "prompt_completion": {"prompt", "completion"},
    "alpaca": {"instruction", "output"},
    "text": {"text"},
    "tagged": {"tokens", "tags"},
}
SCORED = {"labelled": "label", "rated": "rating"}  # one of the shapes of text or chat, and this column
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant"}
ROLES |= {"observation": "tool", "function_response": "tool", "model": "assistant"}


def parse_fields(spec: str) -> dict[str, str]:
    """ "prompt=question,completion=answer" -> {"prompt": "question", "completion": "answer"}"""
    pairs = [part.partition("=") for part in spec.split(",") if part.strip()]
    for ours, equals, theirs in pairs:
        if not (ours.strip() and equals and theirs.strip()):
            raise UserError("fields are name=column pairs", f"data.fields={spec}", "prompt=question,completion=answer")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def detect(record: dict) -> str:
    for name, columns in SHAPES.items():
        if columns <= record.keys():
            return name
    raise UserError(f"no known shape has the columns {', '.join(map(str, record)) or '(none)'}", "", "set data.fields")


def example(record: dict, form: str = "auto", fields: dict[str, str] | None = None) -> Example:
    """The example in a record; raises UserError that says which column is missing, empty or of the wrong type."""
    fields = fields or {}
    for ours, theirs in fields.items():
        if theirs not in record:
            raise UserError(f"no column {theirs!r} (for {ours})")
    record = record | {ours: record[theirs] for ours, theirs in fields.items()}
    if form not in FORMATS:
        raise UserError(f"unknown format {form!r}", "data.format", f"one of {' '.join(FORMATS)}")
    form = detect(record) if form == "auto" else form
    if form in SCORED:
        return _scored(record, SCORED[form])
    for column in sorted(SHAPES[form]):
        if record.get(column) is None:
            raise UserError(f"no column {column!r}")
    return READERS[form](record)


def _scored(record: dict, column: str) -> Scored:
    value = _number(record.get(column), column)
    found = example(record)
    if not isinstance(found, Text | Completion | Chat):
        raise UserError(f"a {found.kind} record takes no {column}")
    return Scored(found, column, value)


def _text(record: dict) -> Text:
    return Text(_string(record, "text"))


def _messages(record: dict) -> Chat:
    return Chat(messages(record["messages"], "messages"), 0, _tools(record))


def _sharegpt(record: dict) -> Chat:
    turns = messages(record["conversations"], "conversations")
    if isinstance(system := record.get("system"), str) and system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return Chat(turns, 0, _tools(record))


def _alpaca(record: dict) -> Chat:
    """Instruction and input become the user's turn, parted by an empty line."""
    ask = _string(record, "instruction")
    if isinstance(given := record.get("input"), str) and given.strip():
        ask = f"{ask}\n\n{given}"
    return Chat([_turn("user", ask), _turn("assistant", _string(record, "output"))])


def _prompt_completion(record: dict) -> Completion | Chat:
    return _answer(record["prompt"], record["completion"], "completion", _tools(record))


def _preference(record: dict) -> Pair:
    chosen, rejected = record["chosen"], record["rejected"]
    if type(chosen) is not type(rejected):
        raise UserError("chosen and rejected differ in type")
    if chosen == rejected:
        raise UserError("chosen equals rejected")
    prompt = record.get("prompt")
    if prompt is None:
        split = _common_messages if isinstance(chosen, list) else _common_text
        prompt, chosen, rejected = split(chosen, rejected)
    tools = _tools(record)
    return Pair(_answer(prompt, chosen, "chosen", tools), _answer(prompt, rejected, "rejected", tools))


def _ranked(record: dict) -> Group:
    """The answers to a prompt, and their `ranks` (1 is the best) or `ratings`."""
    column = "rank" if record.get("ranks") is not None else "rating"
    found, values = record["answers"], record.get(column + "s")
    if not isinstance(found, list) or len(found) < 2:
        raise UserError("column 'answers' is not a list of two or more")
    if not isinstance(values, list) or len(values) != len(found):
        raise UserError("no column 'ranks' or 'ratings' with a number for each answer")
    tools = _tools(record)
    answers = tuple(_answer(record["prompt"], answer, "answers", tools) for answer in found)
    return Group(answers, column, tuple(_number(value, column + "s") for value in values))


def _tagged(record: dict) -> Tagged:
    words, tags = record["tokens"], record["tags"]
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise UserError("column 'tokens' is not a list of words")
    if not isinstance(tags, list) or len(tags) != len(words):
        raise UserError("column 'tags' has not one number for each of the tokens")
    if not all(type(tag) is int and -1 <= tag < 1 << 15 for tag in tags):
        raise UserError("column 'tags' holds something else than whole numbers from -1 to 32767")
    return Tagged(tuple(words), tuple(tags))


def _number(value: object, column: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"no number in column {column!r}")
    return float(value)


READERS = {
    "text": _text,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "preference": _preference,
    "ranked": _ranked,
    "tagged": _tagged,
}


def _answer(prompt: object, completion: object, column: str, tools: list | None) -> Completion | Chat:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise UserError(f"column {column!r} is empty")
        return Completion(prompt, completion)
    before = [_turn("user", prompt)] if isinstance(prompt, str) else messages(prompt, "prompt")
    after = [_turn("assistant", completion)] if isinstance(completion, str) else messages(completion, column)
    return Chat(before + after, len(before), tools)


def _common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt that both answers repeat; cut before a word, or behind the last turn marker of a transcript."""
    size = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    common, marker = chosen[:size], "\n\nAssistant:"
    if marker in common:
        size = common.rindex(marker) + len(marker)
    else:
        size = max(common.rfind(space) for space in " \n") if size < min(len(chosen), len(rejected)) else size
    size = max(min(size, len(chosen) - 1, len(rejected) - 1), 0)
    return chosen[:size], chosen[size:], rejected[size:]


def _common_messages(chosen: list, rejected: list) -> tuple[list, list, list]:
    size = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if size == 0:
        raise UserError("chosen and rejected share no prompt")
    return chosen[:size], chosen[size:], rejected[size:]


def messages(value: object, column: str) -> list[dict]:
    """Role and content of each turn, whichever of the two spellings (role/content, from/value) is used."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"column {column!r} is not a list of messages")
    return [_message(turn, column, i) for i, turn in enumerate(value)]


def _message(turn: dict, column: str, i: int) -> dict:
    where = f"{column}[{i}]"
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str):
        raise UserError("a message without a role", where)
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise UserError("a message without text", where)
    extra = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}
    return {"role": ROLES.get(role, role), "content": content, **extra}


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise UserError("content that is not text", where)
    return part["text"]


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _string(record: dict, column: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise UserError(f"column {column!r} is a {type(value).__name__}, not text")
    if not value.strip():
        raise UserError(f"column {column!r} is empty")
    return value


def _tools(record: dict) -> list | None:
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise UserError("column 'tools' is not a list")
    return tools or None
