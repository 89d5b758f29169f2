"""Jinja for chat templates, restricted to features that cannot read anything but the template's arguments."""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE = 1 << 20  # characters
MAX_TEXT = 1 << 24  # maximum characters of one rendered chat
RANDOM = ("random",)  # filters with random results


class TooLong(Exception):
    """Raised when a template, or the text that it renders, is longer than allowed."""


class Generation(Extension):
    """Implements the block `{% generation %} ... {% endgeneration %}`. In a template, this block encloses the text that
    the model would write. Rendering the block puts marks around the text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @pass_context
    def _mark(self, context, caller):
        left, right = context["_marks"]
        return left + caller() + right


class Sandbox(ImmutableSandboxedEnvironment):
    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.filters = {name: call for name, call in self.filters.items() if name not in RANDOM} | {"tojson": _tojson}
        self.globals = {name: self.globals[name] for name in ("range", "namespace", "dict", "cycler", "joiner")}
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda layout: datetime.now().strftime(layout)}

    def wrap_str_format(self, value):
        return None  # without a wrapper, `is_safe_attribute` refuses str.format, which could read attributes

    def is_safe_attribute(self, obj, attr, value):
        return not (isinstance(obj, str) and attr.startswith("format")) and super().is_safe_attribute(obj, attr, value)


def _raise(message):
    raise TemplateError(str(message))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def compiled(template: str) -> Any:
    """Compiles a template to a jinja2.Template. Raises TooLong or jinja2.TemplateError if the template cannot be
    compiled."""
    if len(template) > MAX_TEMPLATE:
        raise TooLong(f"the template is longer than {MAX_TEMPLATE:,} characters")
    return Sandbox().from_string(template)


def rendered(template: str, marks: tuple[str, str], variables: dict[str, Any]) -> str:
    """Renders a template with its variables. Raises TooLong, or any error that the template raises."""
    pieces, size = [], 0
    for piece in compiled(template).generate(variables, _marks=marks):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_TEXT:
            raise TooLong(f"the template writes more than {MAX_TEXT:,} characters")
    return "".join(pieces)
