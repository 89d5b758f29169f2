"""Renders chat templates. A template is an untrusted program that comes with a model, so it runs in a separate process
with limits on time, memory and output.

Only the templates in this repository are rendered in the main process.
"""

import atexit
import json
import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.text import sandbox
from data.text.tokenizer import DEFAULT_TEMPLATE

# One template per model family; each marks the text that counts in the loss.
TEMPLATES = Path(__file__).with_name("templates")
FAMILIES = {  # {name in TEMPLATES: texts that every template of the family contains}; the first match is used
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
_OWN: set[str] = set()  # the texts of the templates in this repository
atexit.register(_RENDERER.close)
os.register_at_fork(after_in_child=_RENDERER.forget)


class TemplateLimit(UserError):
    """Raised when a template exceeds its limits on time, memory or output. This is the fault of the template, not of
    the chat."""


def render(template: str, marks: tuple[str, str] = ("", ""), **variables: Any) -> str:
    """Renders a template with variables. The two `marks` are put before and after each `{% generation %}` block of the
    template.

    Raises UserError if the template is broken, refuses the messages or does something forbidden, and TemplateLimit if
    the template exceeds a limit.
    """
    if not is_own(template):
        return _asked(template, marks, variables)
    from data.text import jinja

    try:
        return jinja.rendered(template, marks, variables)
    except Exception as error:
        raise UserError(f"{type(error).__name__}: {error}", PLACE) from None


def _asked(template: str, marks: tuple[str, str], variables: dict[str, Any] | None) -> str:
    """Renders a template in the separate process. If `variables` is None, the template is only compiled, and the result
    is ""."""
    try:
        request = sandbox.encoded([template, marks, variables])
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{type(error).__name__}: {error}", PLACE) from None
    if len(request) > MAX_CHAT:
        raise UserError(f"the chat is larger than {MAX_CHAT >> 20} MiB", PLACE)
    kind, text = _RENDERER.ask(request)
    if kind == "limit":
        name = " ".join(template.split())[:60]
        raise TemplateLimit(text, f"{PLACE} {name!r}", "choose another with data.chat_template")
    if kind == "error":
        raise UserError(text, PLACE)
    return text


def is_own(template: str) -> bool:
    """Whether a template is from this repository, possibly with a system prompt added by `with_system`."""
    if not _OWN:
        _OWN.update([DEFAULT_TEMPLATE, *(path.read_text("utf-8") for path in TEMPLATES.glob("*.jinja"))])
    return template in _OWN


def with_system(template: str, system: str) -> str:
    """Adds a default system prompt to a template, for chats without a system prompt of their own."""
    text = json.dumps(system, ensure_ascii=False)
    head = "{% if not messages or messages[0]['role'] not in ['system', 'developer'] %}{% set messages = "
    out = f"{head}[{{'role': 'system', 'content': {text}}}] + messages %}}{{% endif %}}{template}"
    if is_own(template):
        _OWN.add(out)
    return out


def twin(text: str) -> str:
    """The name of the template in TEMPLATES for the model family of the given template. In training, it can replace the
    given template. Returns "" if there is no such template."""
    return next((name for name, marks in FAMILIES.items() if all(mark in text for mark in marks)), "")


def named(spec: str) -> str | None:
    """Reads the chat template that `spec` names: a file, or a template in data/text/templates. Returns None for
    "none"."""
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
    if path.suffix == ".json":  # the file format of older versions of transformers
        text = json.loads(text).get("chat_template", "")
    if not isinstance(text, str) or not text.strip():
        raise UserError("the file has no chat template", str(path))
    if not is_own(text):
        _asked(text, ("", ""), None)
    return text
