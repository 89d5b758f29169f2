"""Chat templates are programs that come with a model: they run in a sandbox, with bounded work and output."""

import json
import threading
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from common.errors import UserError

BUDGET = 1 << 25  # characters made by one rendering; a turn of a loop or macro counts as TURN of them
TURN = 64
MAX_TEMPLATE = 1 << 20  # characters
TEMPLATES = Path(__file__).with_name("templates")  # by the families that use them; all mark what is learnt
# fmt: off
FILTERS = [
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int",
    "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim", "unique",
    "upper",
]
STRING_METHODS = {
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isspace",
    "istitle", "isupper", "join", "lower", "lstrip", "removeprefix", "removesuffix", "replace", "rfind",
    "rindex", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
}
# fmt: on


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` puts marks around what the model would write."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller):
        left, right = self.environment.globals["_marks"]
        return left + caller() + right


class Counted(NodeTransformer):
    """Makes loops, macros, `~` and new containers report to the budget."""

    def visit_For(self, node):
        return self._ticking(node)

    def visit_Macro(self, node):
        return self._ticking(node)

    def visit_CallBlock(self, node):
        return self._ticking(node)

    def _ticking(self, node):
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([nodes.Call(nodes.Name("_tick", "load"), [], [], None, None)]))
        return node

    def visit_List(self, node):
        return self._built(node)

    def visit_Dict(self, node):
        return self._built(node)

    def visit_Tuple(self, node):
        return self._built(node) if node.ctx == "load" else node

    def _built(self, node):
        self.generic_visit(node)
        return nodes.Call(nodes.Name("_built", "load"), [node], [], None, None)

    def visit_Concat(self, node):
        self.generic_visit(node)
        return nodes.Call(nodes.Name("_concat", "load"), node.nodes, [], None, None)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as chat templates use it, less everything that could read outside its arguments or run away."""

    intercepted_binops = frozenset(["+", "*", "**", "%", "//", "/"])

    def __init__(self):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=self._finalize
        )
        self.lock = threading.Lock()
        self.left = BUDGET
        self.filters = {name: self.filters[name] for name in FILTERS if name in self.filters}
        self.filters["tojson"] = lambda value, **options: self._spent(_tojson(self._built(value), **options))
        self.filters["string"] = self._text
        self.filters["replace"] = lambda value, old, new, count=-1: self._replace(str(value), old, new, count)
        plain_join = self.filters["join"]
        self.filters["join"] = lambda *args: self._spent(str(plain_join.__wrapped__(self, *args)))
        self.globals = {
            "range": self._range,
            "namespace": self.globals["namespace"],
            "dict": dict,
            "raise_exception": _raise,
            "strftime_now": lambda layout: self._spent(datetime.now().strftime(str(layout)[:100])),
            "_tick": self._tick,
            "_concat": lambda *parts: self._spent("".join(self._text(part) for part in parts)),
            "_built": self._built,
            "_marks": ("", ""),
        }

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise SecurityError("the template does too much work")

    def _spent(self, value):
        if isinstance(value, (str, list, tuple)):
            self.spend(len(value))
        return value

    def _built(self, value):
        """Pays for everything inside, so that lists of lists cannot double for free."""
        self.spend(len(value) if isinstance(value, str) else TURN // 4)
        if isinstance(value, dict):
            value_and_keys = [*value.keys(), *value.values()]
        else:
            value_and_keys = value if isinstance(value, (list, tuple, set)) else ()
        for part in value_and_keys:
            self._built(part)
        return value

    def _text(self, value) -> str:
        return value if isinstance(value, str) else str(self._built(value))

    def _finalize(self, value):
        return self._spent(self._text(value))

    def wrap_str_format(self, value):
        return None  # then `is_safe_attribute` refuses str.format, whose widths can be huge

    def _tick(self) -> str:
        self.spend(TURN)
        return ""

    def _range(self, *bounds):
        return list(range(*self._checked(range(*bounds))))

    def _checked(self, numbers: range) -> tuple[int, int, int]:
        self.spend(len(numbers))
        return numbers.start, numbers.stop, numbers.step

    def _replace(self, value: str, old, new, count=-1) -> str:
        self.spend(len(value) + value.count(str(old)) * len(str(new)))
        return value.replace(str(old), str(new), -1 if count is None else count)

    def call_binop(self, context, operator, left, right):
        sizes = [len(x) if isinstance(x, (str, list, tuple)) else None for x in (left, right)]
        if operator == "*" and any(size is not None for size in sizes):
            size, times = (sizes[0], right) if sizes[0] is not None else (sizes[1], left)
            self.spend(size * max(int(times), 0))
        if operator == "**" or (operator == "%" and sizes[0] is not None):
            raise SecurityError(f"operator {operator} is not for templates")
        if operator in "*+" and all(isinstance(x, int) and abs(x) > 1 << 64 for x in (left, right)):
            raise SecurityError("numbers this large are not for templates")
        return self._spent(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj, attr, value):
        if isinstance(obj, str):
            return attr in STRING_METHODS
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context, obj, *args, **kwargs):
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str) and obj.__name__ == "replace":
            return self._replace(owner, *args)
        if isinstance(owner, str) and obj.__name__ == "join":
            args = ([str(part) for part in args[0]],)
            self.spend(sum(map(len, args[0])) + len(owner) * len(args[0]))
        return self._spent(super().call(context, obj, *args, **kwargs))


@lru_cache(maxsize=16)
def _compiled(template: str):
    if len(template) > MAX_TEMPLATE:
        raise UserError("the chat template is longer than 1 MiB")
    environment = Sandbox()
    tree = Counted().visit(environment.parse(template))
    return environment, environment.template_class.from_code(
        environment, environment.compile(tree), environment.globals
    )


def render(template: str, marks: tuple[str, str] = ("", ""), **variables) -> str:
    """The text a template makes of its variables; `marks` go around its `{% generation %}` blocks.

    Raises UserError for a template that is broken, refuses the messages, or does what the sandbox forbids.
    """
    try:
        environment, compiled = _compiled(template)
        with environment.lock:
            environment.left = BUDGET
            environment.globals["_marks"] = marks
            return compiled.render(**variables)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{type(error).__name__}: {error}", "chat template") from None


def with_system(template: str, system: str) -> str:
    """The template, with a system text for chats that begin with none."""
    text = json.dumps(system, ensure_ascii=False)
    head = "{% if not messages or messages[0]['role'] not in ['system', 'developer'] %}{% set messages = "
    return f"{head}[{{'role': 'system', 'content': {text}}}] + messages %}}{{% endif %}}{template}"


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
        raise UserError("holds no chat template", str(path))
    _compiled(text)
    return text


def _raise(message):
    raise TemplateError(str(message))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    if indent is not None and int(indent) > 16:
        raise SecurityError("indent is at most 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
