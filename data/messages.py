"""Converts chats in the formats of OpenAI, Mistral, TRL, LLaMA-Factory, axolotl and ShareGPT to one format. In the
common format, messages have the fields role, content, tool_calls and reasoning_content, and any other fields that a
chat template may use."""

import json

from common.errors import UserError

Message = dict[str, object]

ROLES = {
    "assistant": "gpt bing chatgpt bard model ai bot",
    "user": "human prompter",
    "tool": "observation function function_response tool_response tool_result ipython",
    "call": "function_call tool_call",  # an assistant turn whose text is a tool call
}
ROLE = {name: role for role, names in ROLES.items() for name in (role, *names.split())} | {"system": "system"}
TEXT = ("text", "input_text", "output_text", "refusal")  # types of content parts that contain text
THOUGHT = ("thinking", "reasoning")
IDLE = {
    "annotations",
    "audio",
    "id",
    "index",
    "logprobs",
    "function_call",
    "refusal",
    "from",
    "value",
    "train",
    "weight",
}


def messages(value: object, column: str) -> list[Message]:
    """Reads the turns of a chat from a column, which contains a list of objects or the JSON text of such a list. Raises
    a UserError that names the first invalid turn."""
    value = parsed(value)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"column {column!r} is not a list of messages")
    return [_message(without_nulls(turn), f"{column}[{i}]") for i, turn in enumerate(value)]


def are_turns(value: object) -> bool:
    """Whether a value looks like a list of messages."""
    keys = {"role", "from"}
    return (
        isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and keys & turn.keys() for turn in value)
    )


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def tools(value: object) -> list[dict] | None:
    """Returns the functions that a model may call, in OpenAI's format. `value` is a list, the JSON text of a list, or a
    list of JSON texts."""
    value = without_nulls(parsed(value))
    value = [value] if isinstance(value, dict) else value
    if not value:
        return None
    found = [parsed(tool) for tool in value] if isinstance(value, list) else [None]
    if not all(isinstance(tool, dict) for tool in found):
        raise UserError("column 'tools' is not a list of functions")
    return [tool if "function" in tool or "name" not in tool else _wrapped(tool) for tool in found]


def parsed(value: object) -> object:
    """Parses a JSON text that contains a list or an object. Any other value is returned unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def without_nulls(value: object) -> object:
    """Returns a value without its null fields. Arrow and pandas give all objects in a column the same fields, and set
    the fields that an object lacks to null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _message(given: dict, where: str) -> Message:
    role = given.get("role", given.get("from"))
    if not isinstance(role, str) or not role.strip():
        raise UserError("a message without a role", where)
    role = ROLE.get(role.strip().lower(), role)
    content, thought = _content(given.get("content", given.get("value")), role, where)
    calls = given.get("tool_calls") or given.get("function_call")
    if role == "call":
        role, calls, content = "assistant", content, ""
    found = {"role": role, "content": content or given.get("refusal", "")}
    if calls := _calls(calls, where):
        found["tool_calls"] = calls
    thoughts = [given.get(name) for name in ("reasoning_content", *THOUGHT)]
    thought = next((text for text in [*thoughts, thought] if isinstance(text, str) and text.strip()), "")
    if thought:
        found["reasoning_content"] = thought
    learns = [given[name] for name in ("weight", "train") if name in given]
    if role == "assistant" and any(value not in (0, 1) for value in learns):
        raise UserError("a weight that is not 0 or 1", where)
    if role == "assistant" and 0 in learns:
        found["weight"] = 0  # OpenAI, Mistral and axolotl exclude turns of weight 0 from the loss
    elif role != "assistant" and 1 in learns:
        found["train"] = True  # axolotl can train on user turns; this project cannot, and reports the field as unused
    if not (found["content"] or calls or thought or "content" in given or "value" in given):
        raise UserError("a message without text", where)
    known = {"role", "content", "tool_calls", "reasoning_content", "weight", *THOUGHT, *IDLE}
    return found | {key: value for key, value in given.items() if key not in known}


def _content(value: object, role: str, where: str) -> tuple[str, str]:
    """Returns (text, reasoning) for the content of a message, which may be a text, a list of parts, or the result of a
    tool."""
    if value is None or isinstance(value, str):
        return value or "", ""
    if isinstance(value, list) and all(isinstance(p, str) or (isinstance(p, dict) and "type" in p) for p in value):
        said = [_part(part, where) for part in value]
        return "".join(text for text, _ in said), "".join(thought for _, thought in said)
    if role in ("tool", "call"):
        return json.dumps(value, ensure_ascii=False), ""
    raise UserError("content that is not text", where)


def _part(part: str | dict, where: str) -> tuple[str, str]:
    if isinstance(part, str):
        return part, ""
    kind = part["type"]
    if kind in THOUGHT:
        return "", _content(part.get(kind, part.get("text")), "assistant", where)[0]
    text = part.get("refusal" if kind == "refusal" else "text")
    if kind not in TEXT or not isinstance(text, str):
        raise UserError(f"content of type {kind!r}, not text", where)
    return text, ""


def _calls(value: object, where: str) -> list[dict]:
    value = parsed(value)
    value = [value] if isinstance(value, dict) else value or []
    found = [parsed(call) for call in value] if isinstance(value, list) else [None]
    found = [call if isinstance(call, dict) and "function" in call else {"function": call} for call in found]
    for call in found:
        function = call["function"] = parsed(call["function"])
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError("a tool call without a function name", where)
        call["function"] = {"name": function["name"], "arguments": parsed(function.get("arguments") or {})}
        call.setdefault("type", "function")
    return found


def _wrapped(function: dict) -> dict:
    return {"type": "function", "function": function}
