"""Prepares chat messages in OpenAI's format for a chat template.

A request with a field that the model's chat template would drop is refused with the reason, so that no field is
silently ignored.
"""

import json

from common.errors import UserError
from data.text import chat
from infer.lm import LM, Message
from infer.serve import Refused

ROLES = {"system", "developer", "user", "assistant", "tool"}
THOUGHTS = {"reasoning_content", "reasoning", "thinking"}  # templates drop the reasoning of earlier turns on purpose
LINKS = {"tool_call_id"}  # redundant, since the order of the turns shows to which call a result belongs
FIELDS = {"role", "content", "name", "tool_calls"} | THOUGHTS | LINKS


def turns(value: object) -> list[Message]:
    """Reads the messages of a request, and converts their contents to text. Raises Refused if a message is invalid."""
    if not isinstance(value, list) or not value:
        raise Refused(400, "messages must be a list of at least one message", "messages")
    return [_turn(message, f"messages[{i}]") for i, message in enumerate(value)]


def encode(lm: LM, messages: list[Message]) -> list[int]:
    """Converts messages to the token ids of a prompt. Raises Refused if the chat template would drop a field, and
    UserError if the template rejects a turn."""
    extra = sorted({field for m in messages for field in m} - {"role", "content"} - LINKS)
    template = lm.tokenizer.chat_template
    if template is None:
        if extra:
            raise Refused(400, f"the model has no chat template that could render {extra[0]!r}", "messages")
        return lm.encode("\n".join(m["content"] for m in messages))
    for i, message in enumerate(messages):
        rest = json.dumps({k: v for k, v in message.items() if k in extra}, ensure_ascii=False)
        if found := lm.tokenizer.control_tokens(rest):
            raise Refused(400, f"messages[{i}] contains the control token {found[0]!r}", f"messages[{i}]")
    ids = lm.encode(messages)
    _refuse_dropped(lm, messages, [f for f in extra if f not in THOUGHTS or f not in template])
    return ids


def _refuse_dropped(lm: LM, messages: list[Message], fields: list[str]) -> None:
    """Raises Refused if the rendered chat stays the same when one of the fields is removed, or when all messages of one
    role are removed."""
    roles = {m["role"] for m in messages} & {"system", "developer", "tool"}
    if not fields and not roles:
        return
    text = chat.render(messages, lm.tokenizer, True)

    def same(shorter: list[Message]) -> bool:
        try:
            return chat.render(shorter, lm.tokenizer, True) == text
        except UserError:  # the template requires the removed part
            return False

    for field in fields:
        if same([{k: v for k, v in m.items() if k != field} for m in messages]):
            raise Refused(400, f"the model's chat template does not render {field!r}", "messages")
    for role in sorted(roles):
        shown = all(m["content"].strip() in text for m in messages if m["role"] == role)
        if not shown and same([m for m in messages if m["role"] != role]):
            raise Refused(400, f"the model's chat template does not render messages of role {role!r}", "messages")


def _turn(message: object, where: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise Refused(400, f"{where} needs a role, one of {', '.join(sorted(ROLES))}", where)
    given = {k: v for k, v in message.items() if v is not None and v != []}
    _only(given, FIELDS, where)
    out = given | {"content": _content(message.get("content"), "tool_calls" in given, where)}
    if "tool_calls" in given:
        if not isinstance(given["tool_calls"], list):
            raise Refused(400, f"{where}.tool_calls must be a list", f"{where}.tool_calls")
        out["tool_calls"] = [_call(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(given["tool_calls"])]
    for field in given.keys() - {"content", "tool_calls"}:
        if not isinstance(given[field], str):
            raise Refused(400, f"{where}.{field} must be a string", f"{where}.{field}")
    return out


def _content(content: object, optional: bool, where: str) -> str:
    """Converts the content of a message, which is a string or OpenAI's list of text parts, to text."""
    if content is None and optional:
        return ""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise Refused(400, f"{where}.content: only text parts are supported, not {kind!r:.60}", where)
            _only(part, {"type", "text"}, f"{where}.content")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Refused(400, f"{where}.content must be a string or a list of text parts", f"{where}.content")
    return content


def _call(call: object, where: str) -> dict:
    """Checks a tool call, and converts its arguments to an object, as chat templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(400, f"{where} needs a function with a name", where)
    if call.get("type", "function") != "function":
        raise Refused(400, f"{where}: only calls of type 'function' are supported", where)
    _only(call, {"id", "type", "function", "index"}, where)
    _only(function, {"name", "arguments"}, f"{where}.function")
    arguments = function.get("arguments") or {}
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise Refused(400, f"{where}.function.arguments must be a JSON object", where)
    return call | {"type": "function", "function": function | {"arguments": arguments}}


def _only(given: dict, known: set[str], where: str) -> None:
    if unknown := sorted(given.keys() - known):
        raise Refused(400, f"{where}.{unknown[0]} is not supported", f"{where}.{unknown[0]}")
