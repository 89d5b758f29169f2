"""Chat templates are programs that come with a model: they run in a process of their own, with bounded work and output.

Those that stand in this repository are rendered here.
"""

import atexit
import json
import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.text import sandbox
from data.text.tokenizer import DEFAULT_TEMPLATE

TEMPLATES = Path(__file__).with_name("templates")  # by the families that use them; all mark the tokens of the loss
FAMILIES = {  # template of TEMPLATES -> what a template of its family writes; the first that fits
    "deepseek_r1": ("<｜Assistant｜>", "<think>"),
    "qwen3": ("<|im_start|>", "<think>"),
    "chatml": ("<|im_start|>",),
    "llama3": ("<|start_header_id|>",),
    "gemma": ("<start_of_turn>",),
    "phi3": ("<|assistant|>", "<|end|>"),
    "mistral": ("[INST]",),
}
MAX_CHAT = 1 << 24  # bytes of JSON
PLACE = "chat template"
_RENDERER = sandbox.Renderer()
_OWN: set[str] = set()  # templates that are not foreign programs
atexit.register(_RENDERER.close)
os.register_at_fork(after_in_child=_RENDERER.forget)


class TemplateLimit(UserError):
    """A template takes more time or memory than is allowed, or writes more: a fault of it, not of one chat."""


def render(template: str, marks: tuple[str, str] = ("", ""), **variables: Any) -> str:
    """Renders a template with its variables; `marks` go around its `{% generation %}` blocks.

    Raises UserError for a template that is broken, refuses the messages, or does what the sandbox forbids, and its
    TemplateLimit.
    """
    if not is_own(template):
        return _asked(template, marks, variables)
    from data.text import jinja

    try:
        return jinja.rendered(template, marks, variables)
    except Exception as error:
        raise UserError(f"{type(error).__name__}: {error}", PLACE) from None


def _asked(template: str, marks: tuple[str, str], variables: dict[str, Any] | None) -> str:
    """`render` in the process; "" for no variables, when the template compiles."""
    try:
        request = sandbox.encoded([template, marks, variables])
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{type(error).__name__}: {error}", PLACE) from None
    if len(request) > MAX_CHAT:
        raise UserError(f"the chat has more than {MAX_CHAT >> 20} MiB", PLACE)
    kind, text = _RENDERER.ask(request)
    if kind == "limit":
        name = " ".join(template.split())[:60]
        raise TemplateLimit(text, f"{PLACE} {name!r}", "choose another by data.chat_template")
    if kind == "error":
        raise UserError(text, PLACE)
    return text


def is_own(template: str) -> bool:
    """Whether it is one of this repository's, perhaps behind a system text."""
    if not _OWN:
        _OWN.update([DEFAULT_TEMPLATE, *(path.read_text("utf-8") for path in TEMPLATES.glob("*.jinja"))])
    return template in _OWN


def with_system(template: str, system: str) -> str:
    """The template, with a system text for chats that begin with none."""
    text = json.dumps(system, ensure_ascii=False)
    head = "{% if not messages or messages[0]['role'] not in ['system', 'developer'] %}{% set messages = "
    out = f"{head}[{{'role': 'system', 'content': {text}}}] + messages %}}{{% endif %}}{template}"
    if is_own(template):
        _OWN.add(out)
    return out


def twin(text: str) -> str:
    """The name in TEMPLATES of a template to train with in place of this one; "" where none is of its family."""
    return next((name for name, marks in FAMILIES.items() if all(mark in text for mark in marks)), "")


def named(spec: str) -> str | None:
    """The template that `spec` names: a file, or one of data/text/templates; None for "none"."""
    if spec == "none":
        return None
    path = Path(spec).expanduser()
    known = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    if spec in known:
        path = TEMPLATES / f"{spec}.jinja"
    if not path.is_file():
        raise UserError(
            "no such file or template", f"data.chat_template={spec}", f"none, {', '.join(known)}, or a FILE"
        )
    text = path.read_text("utf-8")
    if path.suffix == ".json":  # as transformers once wrote it
        text = json.loads(text).get("chat_template", "")
    if not isinstance(text, str) or not text.strip():
        raise UserError("the file has no chat template", str(path))
    if not is_own(text):
        _asked(text, ("", ""), None)
    return text
