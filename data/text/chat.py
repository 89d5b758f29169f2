"""Messages to text to ids, and which ids the assistant wrote: one path for training, evaluation and serving."""

import re
import secrets
from itertools import pairwise

from common.errors import UserError
from data.text import template
from data.text.tokenizer import DEFAULT_TEMPLATE, Tokenizer

Messages = list[dict]
Tools = list[dict] | None  # the functions that a template may show to the model
Span = tuple[int, int]  # characters [start, end) of a rendered chat


def render(messages: Messages, tokenizer: Tokenizer, add_generation_prompt: bool = False, tools: Tools = None) -> str:
    """The chat as text, by the tokenizer's template. BOS is in it where the template writes one: never add another.

    Refuses content that spells a control token, which could end or open a turn.
    """
    return _render(messages, tokenizer, add_generation_prompt, tools)


def encode(
    messages: Messages, tokenizer: Tokenizer, add_generation_prompt: bool = True, tools: Tools = None
) -> list[int]:
    """The ids a model is asked to continue."""
    return tokenizer.encode(render(messages, tokenizer, add_generation_prompt, tools), special=True)


def tokens_and_mask(
    messages: Messages, tokenizer: Tokenizer, tools: Tools = None, first: int = 0
) -> tuple[list[int], list[int]]:
    """Ids of the whole chat, and 1 on those of assistant turns with their end tokens (from message `first` on).

    Decoding the masked ids gives the assistant's texts and end tokens; that is checked here, for every chat.
    """
    text, spans = assistant_spans(messages, tokenizer, tools, first)
    if not spans:
        raise UserError("no assistant turn, so no token would be learnt")
    ids, mask = mask_ids(text, spans, tokenizer)
    _check(text, spans, ids, mask, tokenizer)
    return ids, mask


def assistant_spans(
    messages: Messages, tokenizer: Tokenizer, tools: Tools = None, first: int = 0
) -> tuple[str, list[Span]]:
    """The rendered chat and the characters that the model would have written."""
    if "endgeneration" in (tokenizer.chat_template or ""):
        return _spans_by_marks(messages, tokenizer, tools, first)
    text = _render(messages, tokenizer, False, tools)
    turns = [i for i in range(first, len(messages)) if messages[i].get("role") == "assistant"]
    return text, [_span(messages, i, text, tokenizer, tools) for i in turns]


def _spans_by_marks(messages: Messages, tokenizer: Tokenizer, tools: Tools, first: int) -> tuple[str, list[Span]]:
    nonce = secrets.token_hex(8)
    left, right = f"<{nonce}(>", f"<{nonce})>"
    marked = _render(messages, tokenizer, False, tools, (left, right))
    text, spans = "", []
    for piece in re.split(f"({re.escape(left)}.*?{re.escape(right)})", marked, flags=re.S):
        inside = piece.startswith(left)
        piece = piece.removeprefix(left).removesuffix(right)
        if inside and piece:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    earlier = sum(m.get("role") == "assistant" for m in messages[:first])
    return text, spans[earlier:]


def _span(messages: Messages, i: int, text: str, tokenizer: Tokenizer, tools: Tools) -> Span:
    """Turn i starts where its prompt ends, and ends behind its first end token."""
    prompt = _render(messages[:i], tokenizer, True, tools)
    upto = text if i + 1 == len(messages) else _render(messages[: i + 1], tokenizer, False, tools)
    for prefix in (prompt, upto):
        if not text.startswith(prefix):
            raise UserError(
                f"a part of the chat is not a prefix of the whole: {prefix[-120:]!r} against {text[:4000][-120:]!r}",
                f"chat template, turn {i}",
                "use a template with {% generation %} blocks",
            )
    ends = [tokenizer.core.id_to_token(e) for e in tokenizer.eos_ids]
    found = [at + len(end) for end in ends if (at := text.find(end, len(prompt), len(upto))) >= 0]
    return len(prompt), min(found, default=len(upto))


def mask_ids(text: str, spans: list[Span], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of `text`, 1 on those inside a span; no token crosses an edge of a span.

    The parts are encoded one by one, as at inference, where the prompt ends before the answer is known. Where that
    gives other ids than the whole (a prefix space, a merge), the whole wins unless one of its tokens crosses an edge.
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
    """decode(masked ids) == the assistant's own text, span by span."""
    runs, before = [], 0
    for i, inside in zip(ids, mask):
        if inside and not before:
            runs.append([])
        if inside:
            runs[-1].append(i)
        before = inside
    learnt = "".join(tokenizer.decode(run).strip() for run in runs)
    wanted = "".join(text[a:b].strip() for a, b in spans)
    if learnt != wanted:  # a normalizer may have written the text anew: composed accents, lower case
        wanted = "".join(tokenizer.decode(tokenizer.encode(text[a:b], special=True)).strip() for a, b in spans)
    if not learnt or learnt != wanted:
        raise UserError(f"the loss mask covers {learnt[:120]!r}, the assistant wrote {wanted[:120]!r}", "chat template")


def _render(
    messages: Messages,
    tokenizer: Tokenizer,
    add_generation_prompt: bool,
    tools: Tools,
    marks: tuple[str, str] = ("", ""),
) -> str:
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError("a message needs a role and a content", f"message {i}")
        _refuse_control_tokens(message.get("content"), tokenizer, i)
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return template.render(
        tokenizer.chat_template or DEFAULT_TEMPLATE,
        marks,
        messages=messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        **{name: "" if i is None else tokenizer.core.id_to_token(i) for name, i in names.items()},
    )


def _refuse_control_tokens(content: object, tokenizer: Tokenizer, i: int) -> None:
    if isinstance(content, str) and (found := tokenizer.control_tokens(content)):
        raise UserError(f"the text spells the control token {found[0]!r}", f"message {i}", "remove or rephrase it")
