"""Records of any usual shape to one of four examples: text, prompt and completion, messages, or a preference pair."""

from typing import NamedTuple

from common.errors import UserError

FORMATS = ("auto", "text", "messages", "prompt_completion", "alpaca", "sharegpt", "preference")
# "auto" takes the first shape whose columns are all there.
SHAPES = {
    "preference": {"chosen", "rejected"},
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "prompt_completion": {"prompt", "completion"},
    "alpaca": {"instruction", "output"},
    "text": {"text"},
}
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant"}
ROLES |= {"observation": "tool", "function_response": "tool", "model": "assistant"}


class Text(NamedTuple):
    text: str


class Completion(NamedTuple):
    prompt: str
    completion: str


class Chat(NamedTuple):
    """Assistant turns from message `first` on are learnt."""

    messages: list[dict]
    first: int = 0
    tools: list | None = None


class Pair(NamedTuple):
    """Two answers to one prompt, each a Completion or a Chat."""

    chosen: Completion | Chat
    rejected: Completion | Chat


Example = Text | Completion | Chat | Pair


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
    for column in sorted(SHAPES[form]):
        if record.get(column) is None:
            raise UserError(f"no column {column!r}")
    return READERS[form](record)


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


READERS = {
    "text": _text,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "preference": _preference,
}


def _answer(prompt, completion, column: str, tools) -> Completion | Chat:
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


def messages(value, column: str) -> list[dict]:
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


def _part(part, where: str) -> str:
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
