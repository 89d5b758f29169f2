"""Converts the messages of a chat to text and token ids, and finds the ids that the assistant wrote. Training,
evaluation and serving share this code."""

import functools
import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from common.errors import UserError
from data.text import template
from data.text.tokenizer import DEFAULT_TEMPLATE, Tokenizer

Messages = list[dict]
Tools = list[dict] | None
Span = tuple[int, int]  # the characters [start, end) of a rendered chat
OPENED = re.compile(r"\s*[<\[][^<>\[\]/]*(?:think|thought)[^<>\[\]]*[>\]]\s*", re.I)  # an opening tag such as <think>
READ = {"role", "content", "tool_calls", "reasoning_content", "weight"}  # message fields that this module handles
PIECEWISE = (
    "chats whose template renders earlier answers differently from the last: each was rendered as if it were the last"
)
LAST = "chats with only the last answer in the loss, since the template renders earlier answers differently"


@dataclass
class Asked:
    """Determines which answers of a chat count in the loss ("all" or only the "last"). Also collects remarks on the
    chats, and counts how often each remark applies."""

    learn: str = "all"
    # Message fields that the chat template does not use, with their counts.
    unused: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)


class Writer(NamedTuple):
    """Renders chats with a tokenizer's chat template and a list of tools that the model may call."""

    tokenizer: Tokenizer
    tools: Tools = None

    @property
    def template(self) -> str:
        own = self.tokenizer.tool_template if self.tools else None
        return own or self.tokenizer.chat_template or DEFAULT_TEMPLATE

    def text(self, messages: Messages, prompt: bool = False, marks: tuple[str, str] = ("", "")) -> str:
        """Renders a chat. If `prompt` is set, the text ends with the beginning of the next answer."""
        tok = self.tokenizer
        ids = {"bos_token": tok.bos_id, "eos_token": tok.eos_id, "pad_token": tok.pad_id}
        names = {name: "" if i is None else tok.core.id_to_token(i) for name, i in ids.items()}
        asked = {"messages": messages, "tools": self.tools, "add_generation_prompt": prompt}
        return template.render(self.template, marks, **asked, **names)


class NoPrefix(UserError):
    """Raised when a rendered chat does not begin with the rendering of its first turns."""


def render(messages: Messages, tokenizer: Tokenizer, add_generation_prompt: bool = False, tools: Tools = None) -> str:
    """Renders a chat to text with the tokenizer's chat template. If the template writes BOS, the text contains BOS, so
    callers must not add BOS again.

    Raises UserError if the content of a message spells a control token, which could begin or end a turn.
    """
    writer = Writer(tokenizer, tools)
    return writer.text(_fitted(messages, writer, Asked()), add_generation_prompt)


def encode(
    messages: Messages, tokenizer: Tokenizer, add_generation_prompt: bool = True, tools: Tools = None
) -> list[int]:
    """Renders a chat and returns its token ids, as a prompt for a model."""
    return tokenizer.encode(render(messages, tokenizer, add_generation_prompt, tools), special=True)


def tokens_and_mask(
    messages: Messages, tokenizer: Tokenizer, tools: Tools = None, first: int = 0, asked: Asked | None = None
) -> tuple[list[int], list[int]]:
    """Returns the token ids of the whole chat, and a mask that is 1 for the tokens that count in the loss: the
    assistant's turns with their end tokens. Turns before message `first` and turns of weight 0 do not count.

    Every chat is checked: decoding the ids where the mask is 1 must give the assistant's texts and end tokens.
    """
    asked, writer = asked or Asked(), Writer(tokenizer, tools)
    messages = _fitted(messages, writer, asked)
    turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    turns = [i for i in turns if messages[i].get("weight") != 0][-1 if asked.learn == "last" else 0 :]
    if not turns:
        raise UserError("the chat has no assistant turn, so no token would count in the loss")
    text, spans = _spans(messages, turns, writer, asked)
    _count_dropped(text, messages, turns, asked)
    ids, mask = mask_ids(text, spans, tokenizer)
    _check(text, spans, ids, mask, tokenizer)
    return ids, mask


# ---- the characters that the assistant wrote ----


def _spans(messages: Messages, turns: list[int], writer: Writer, asked: Asked) -> tuple[str, list[Span]]:
    """Returns the rendered chat, and the spans of the characters that the model would have written in the given turns.

    Some templates render an answer differently when further turns follow: Qwen3's template then drops the answer's
    thoughts. Others begin a thought in the prompt, and then drop the thought from the answer: DeepSeek-R1's template
    does this. If a template renders earlier answers differently, every answer of a chat is rendered as if the answer
    were the last turn. If this fails for one of the answers, only the last answer of the chat counts in the loss.
    """
    if "endgeneration" in writer.template:
        return _spans_by_marks(messages, turns, writer)
    try:
        text = writer.text(messages)
        return text, [_span(messages, i, text, writer) for i in turns]
    except NoPrefix as why:
        try:
            text, found = _piecewise(messages, writer)
            asked.notes[PIECEWISE] += 1
            return text, [found[i] for i in turns]
        except UserError:
            if len(messages) - 1 != turns[-1] or len(turns) == 1:
                raise why from None
        span = _span(messages, turns[-1], text, writer)
        asked.notes[f"{LAST} ({_advice(writer.template)} to learn all answers)"] += 1
        return text, [span]


def _advice(text: str) -> str:
    """The suggested fix for a template that renders earlier answers differently from the last answer."""
    name = template.twin(text)
    return f"set data.chat_template={name}" if name else "set data.chat_template=FILE with {% generation %} blocks"


def _spans_by_marks(messages: Messages, turns: list[int], writer: Writer) -> tuple[str, list[Span]]:
    nonce = secrets.token_hex(8)
    left, right = f"<{nonce}(>", f"<{nonce})>"
    marked = writer.text(messages, False, (left, right))
    text, spans = "", []
    for piece in re.split(f"({re.escape(left)}.*?{re.escape(right)})", marked, flags=re.S):
        inside = piece.startswith(left)
        piece = piece.removeprefix(left).removesuffix(right)
        if inside:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    written = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    owners = written
    if len(spans) != len(written):  # an answer may have several blocks: for its thought, its calls and its text
        upto = [writer.text(messages[: i + 1], False, (left, right)).count(left) for i in written]
        owners = [i for i, (a, b) in zip(written, pairwise([0, *upto]), strict=True) for _ in range(b - a)]
    if len(spans) != len(owners) or not set(written) <= set(owners):
        what = f"the chat template has {len(spans)} generation blocks for {len(written)} answers"
        raise UserError(what, "chat template", "put one block around each answer")
    merged: list[Span] = []
    for i, (start, end) in zip(owners, spans, strict=True):
        if i in turns and end > start:
            before = merged.pop() if merged and merged[-1][1] == start else (start, start)
            merged.append((before[0], end))
    return text, merged


def _span(messages: Messages, i: int, text: str, writer: Writer) -> Span:
    """The span of the answer in turn i. The span starts where the answer's prompt ends, and stops after the answer's
    end token."""
    prompt = writer.text(messages[:i], True)
    upto = text if i + 1 == len(messages) else writer.text(messages[: i + 1])
    same = _equal(text, upto)  # a template may write a token after the last turn of a chat
    end, ended = _end(text, len(prompt), same, messages[i], writer.tokenizer)
    for prefix in (prompt, upto):
        if not text.startswith(prefix) and (prefix is prompt or not ended):
            raise NoPrefix(
                f"the first turns are not a prefix of the whole chat: {prefix[-120:]!r} versus {text[:4000][-120:]!r}",
                f"chat template, turn {i}",
                _advice(writer.template),
            )
    return len(prompt), end


def _end(text: str, start: int, stop: int, message: dict, tokenizer: Tokenizer) -> tuple[int, bool]:
    """Returns the position where an answer ends, and whether the text before this position contains the whole content
    of the answer and an end token. An answer ends after the first end token that follows its content. If no end token
    follows, the answer ends at `stop`."""
    calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
    said = [part.strip() for part in (message["content"] or "", *calls) if part.strip()]
    thought = message.get("reasoning_content", "").strip()
    found = {part: text.rfind(part, start, stop) for part in [*said, *([thought] if thought else [])]}
    start = max([start, *(at + len(part) for part, at in found.items() if at >= 0)])
    ends = [tokenizer.core.id_to_token(e) for e in tokenizer.eos_ids]
    end = min((at + len(end) for end in ends if (at := text.find(end, start, stop)) >= 0), default=None)
    return (stop, False) if end is None else (end, all(found[part] >= 0 for part in said))


def _piecewise(messages: Messages, writer: Writer) -> tuple[str, dict[int, Span]]:
    """Renders a chat so that every answer is rendered as if it were the last turn. Returns the text and the span of
    each answer."""
    written = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    text, spans, before, ending = "", {}, None, ""
    for i in written:
        prompt = writer.text(messages[:i], True)
        if before is None:
            text = prompt
        else:
            behind = _behind(messages, before, i, writer)
            if not behind.startswith(ending):
                raise UserError("an answer ends differently when another answer follows", "chat template")
            text += behind[len(ending) :]
        ending = _behind(messages, i, i + 1, writer, last=True)
        answer = _answer(prompt, messages, i, ending, writer)
        spans[i] = len(text), len(text) + _end(answer, 0, len(answer), messages[i], writer.tokenizer)[0]
        text, before = text + answer, i
    if before + 1 < len(messages):
        text += _behind(messages, before, len(messages), writer, last=True)[len(ending) :]
    return text, spans


def _behind(messages: Messages, i: int, stop: int, writer: Writer, last: bool = False) -> str:
    """The text that follows the content of answer i. It consists of the end of the answer and the turns before `stop`.
    Unless `last` is set, the beginning of the next answer follows."""
    stand_in = secrets.token_hex(8)
    answer = {"role": "assistant", "content": stand_in}
    text = writer.text([*messages[:i], answer, *messages[i + 1 : stop]], not last)
    if stand_in not in text:
        raise UserError("an answer is missing from the rendered chat", "chat template")
    return text.rpartition(stand_in)[2]


def _answer(prompt: str, messages: Messages, i: int, ending: str, writer: Writer) -> str:
    """The text of answer i as the model would write it after the prompt, including the end token of the answer."""
    said, thought = messages[i]["content"], messages[i].get("reasoning_content", "").strip()
    whole = writer.text(messages[: i + 1])
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    if not thought and (answer := _without_thought(prompt, messages, i, writer)):
        return answer
    opened = prompt[_equal(prompt, whole) :]
    if not OPENED.fullmatch(opened) or messages[i].get("tool_calls"):
        raise UserError("the rendered chat does not begin with the prompt of an answer", "chat template")
    opens = opened.strip()
    closes = opens[0] + "/" + opens[1:]
    if closes in said:  # the content of the answer includes the thought
        return said.lstrip().removeprefix(opens).lstrip("\n") + ending
    return f"{thought}\n{closes}\n\n{said}{ending}"


def _without_thought(prompt: str, messages: Messages, i: int, writer: Writer) -> str:
    """Renders answer i with an empty thought. Returns "" unless the prompt begins a thought and the template renders
    the thought of the last answer."""
    stand_in = secrets.token_hex(8)
    answer = _thought_placed(messages[i] | {"reasoning_content": stand_in}, writer.template)
    shown = writer.text([*messages[:i], answer])
    written = shown[len(prompt) :] if shown.startswith(prompt) else ""
    return written.replace(stand_in, "", 1) if stand_in in written else ""


def _equal(one: str, two: str) -> int:
    """The length of the common prefix of two texts."""
    return next((at for at, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))


def _count_dropped(text: str, messages: Messages, turns: list[int], asked: Asked) -> None:
    """Counts messages whose content the chat template silently leaves out. Raises UserError if such a message is an
    answer that counts in the loss."""
    for i, message in enumerate(messages):
        thought, closes, said = (message["content"] or "").rpartition("</think>")
        thought = message.get("reasoning_content") or (closes and thought.rpartition("<think>")[2])
        if said.strip() not in text:
            if i in turns:
                raise UserError(
                    "the chat template leaves out the text of an answer", f"message {i}", "data.chat_template=FILE"
                )
            asked.unused[f"messages of {message['role']}"] += 1
        if i in turns and thought.strip() not in text:
            asked.unused["thoughts of answers"] += 1


# ---- ids ----


def mask_ids(text: str, spans: list[Span], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the token ids of `text`, and a mask that is 1 for the ids inside the spans. No token crosses the edge of
    a span.

    The text inside each span and the text between spans are tokenized separately. Inference does the same, because it
    tokenizes the prompt before the answer is known. If tokenizing the whole text gives different ids (because of a
    prefix space or a merge), the ids of the whole text are used, unless one of its tokens crosses the edge of a span.
    """
    cuts = [0, *(edge for span in spans for edge in span), len(text)]
    parts = [tokenizer.encode(text[a:b], special=True) for a, b in pairwise(cuts)]
    ids = [i for part in parts for i in part]
    mask = [odd % 2 for odd, part in enumerate(parts) for _ in part]
    whole, offsets = tokenizer.encode_offsets(text, special=True)
    if ids == whole or any(a < cut < b for cut in cuts for a, b in offsets):
        return ids, mask
    return whole, [int(any(a < end and b > start for start, end in spans)) for a, b in offsets]


def _check(text: str, spans: list[Span], ids: list[int], mask: list[int], tokenizer: Tokenizer) -> None:
    """Checks that the ids where the mask is 1 decode to the text that the assistant wrote."""
    runs, before = [], 0
    for i, inside in zip(ids, mask):
        if inside and not before:
            runs.append([])
        if inside:
            runs[-1].append(i)
        before = inside
    learnt = "".join(tokenizer.decode(run).strip() for run in runs)
    wanted = "".join(text[a:b].strip() for a, b in spans)
    if learnt != wanted:  # a normalizer may have changed the text, for example to lower case
        wanted = "".join(tokenizer.decode(tokenizer.encode(text[a:b], special=True)).strip() for a, b in spans)
    if not learnt or learnt != wanted:
        what = f"the loss mask covers {learnt[:120]!r}, but the assistant wrote {wanted[:120]!r}"
        raise UserError(what, "chat template")


# ---- messages in the form that a template expects ----


def _fitted(messages: Messages, writer: Writer, asked: Asked) -> Messages:
    """Moves the fields of messages to where the chat template reads them, and counts the fields that the template does
    not read.

    Raises UserError if the template drops a tool call, because the model would then be trained on an empty answer.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError("a message needs a role and a content", f"message {i}")
        _refuse_control_tokens(message, writer.tokenizer, f"message {i}")
    _refuse_control_tokens(writer.tools, writer.tokenizer, "tools")
    text = writer.template
    fitted = [_thought_placed(_role_placed(message, text), text) for message in messages]
    asked.unused.update({f"messages.{key}" for m in fitted for key in m if key not in READ and not _names(text, key)})
    if any("reasoning_content" in m for m in fitted) and not _names(text, "reasoning_content"):
        asked.unused["messages.reasoning_content"] += 1
    if writer.tools and not _names(text, "tools"):
        asked.unused["tools"] += 1
    if not any(message.get("tool_calls") for message in fitted):
        return fitted
    for variant in _variants(fitted):
        if _shows_calls(variant, writer):
            return variant
    raise UserError(
        "the chat template does not render tool calls", "chat template", "choose another with data.chat_template"
    )


def _names(text: str, name: str) -> bool:
    """Whether a template reads a field or a variable with a given name."""
    return bool(re.search(rf"\.{name}\b|['\"]{name}['\"]|[\s(]{name}\b", text))


def _role_placed(message: dict, text: str) -> dict:
    if message["role"] == "developer" and "developer" not in text:
        return message | {"role": "system"}
    return message


def _thought_placed(message: dict, text: str) -> dict:
    """Moves the thought of a message to the field that the template reads, or to the start of the content if the
    template looks for </think> in the content."""
    thought = message.get("reasoning_content")
    if not thought or _names(text, "reasoning_content"):
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    for name in ("thinking", "reasoning"):
        if _names(text, name):
            return rest | {name: thought}
    if "</think>" in text and _keeps_thoughts(text):
        return rest | {"content": f"<think>\n{thought.strip()}\n</think>\n\n{message['content']}"}
    return message


@functools.lru_cache(maxsize=16)
def _keeps_thoughts(text: str) -> bool:
    """Whether a template renders a thought that is part of the last answer's content."""
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "<think>\nkept\n</think>\n\na"}]
    try:
        return "kept" in template.render(text, messages=turns, tools=None, add_generation_prompt=False)
    except UserError:
        return False


def _variants(messages: Messages) -> Iterator[Messages]:
    """Yields four variants of the messages, since templates expect tool calls in different forms: the content of a turn
    with tool calls is "" or null, and the arguments of a call are an object or its JSON text."""
    for content in ("", None):
        for write in (None, functools.partial(json.dumps, ensure_ascii=False)):
            yield [_called(message, content, write) if message.get("tool_calls") else message for message in messages]


def _called(message: dict, content: str | None, write: Callable[[object], str] | None) -> dict:
    calls = [dict(call) for call in message["tool_calls"]]
    for call in calls:
        arguments = call["function"]["arguments"]
        if write and not isinstance(arguments, str):
            call["function"] = call["function"] | {"arguments": write(arguments)}
    return message | {"tool_calls": calls, "content": message["content"] or content}


def _shows_calls(messages: Messages, writer: Writer) -> bool:
    """Whether the template writes the name of every function that the messages call."""
    stand_in, probe = secrets.token_hex(8), []
    for message in messages:
        calls = [
            call | {"function": call["function"] | {"name": f"{stand_in}_{i}_"}}
            for i, call in enumerate(message.get("tool_calls", ()), len(probe))
        ]
        probe.append(message | ({"tool_calls": calls} if calls else {}))
    try:
        text = writer.text(probe)
    except UserError:
        return False
    return all(call["function"]["name"] in text for message in probe for call in message.get("tool_calls", ()))


def _refuse_control_tokens(value: object, tokenizer: Tokenizer, where: str) -> None:
    """Raises UserError if the text of a message or a tool spells a control token."""
    if tokenizer.reads_control:
        return
    if isinstance(value, str) and (found := tokenizer.control_tokens(value)):
        what = f"the text spells the control token {found[0]!r}"
        raise UserError(what, where, "rephrase it, or set data.read_control to read it as a control token")
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        _refuse_control_tokens(part, tokenizer, where)
