"""Parses the command line of a run: `--config=FILE[:ARG] --config.key=value ... --workdir=DIR --flag[=value]`.

`parse_args` returns values as text, and `parse` converts each value to the type of its key. absl's parser is not used,
because it stops at the first mistake, rejects 1e3 as an integer, cannot parse a tuple, and cannot set an optional key
back to none.
"""

import ast
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from common.errors import UserError, did_you_mean
from common.types import Leaf
from configs.schema.problems import Problem, show

CHECKOUT = Path(__file__).resolve().parents[2]
NONE = ("none", "null")
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", tuple: "a tuple"}


class Args(NamedTuple):
    config: str
    arg: str
    overrides: dict[str, str]  # {"optim.lr": text}, in the given order; if a key is repeated, its last value is used
    workdir: str | None
    flags: dict[str, Leaf]
    help: bool
    problems: list[Problem]


def parse_args(argv: list[str], flags: Mapping[str, Leaf]) -> Args:
    """Splits a command line without reading the config. `flags` maps each extra flag to its default, which also sets
    the flag's type.

    A flag is written `--name=value` or `--name value`; a boolean flag may omit the value.
    """
    found: dict[str, Leaf] = {"config": "", "workdir": None, **flags}
    overrides: dict[str, str] = {}
    problems: list[Problem] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if word in ("--help", "-h"):
            return Args("", "", {}, None, dict(flags), True, [])
        if not word.startswith("--"):
            problems.append(Problem(word, "", "unexpected argument", "options are written --name=value"))
            continue
        if not name.startswith("config.") and name not in found:
            known = [f"--{k}" for k in (*found, "help")]
            problems.append(Problem(f"--{name}", text, "unknown option", did_you_mean(f"--{name}", known)))
            continue
        if not equals and isinstance(found.get(name), bool):
            text = "true"
        elif not equals and (not rest or rest[0].startswith("--")):
            problems.append(Problem(f"--{name}", "", "needs a value", f"write --{name}=VALUE"))
            continue
        elif not equals:
            text = rest.pop(0)
        if name.startswith("config."):
            overrides[name.removeprefix("config.")] = text
            continue
        try:
            kind = type(flags[name]) if flags.get(name) is not None else str
            found[name] = parse(text, kind)
        except ValueError as e:
            problems.append(Problem(f"--{name}", show(text), str(e)))
    path, arg = split_arg(found.pop("config"))
    return Args(path, arg, overrides, found.pop("workdir"), found, False, problems)


def split_arg(config: str) -> tuple[str, str]:
    """Splits configs/x.py:rank=4 into ("configs/x.py", "rank=4"). If the file does not exist at this path, but exists
    in the checkout of Kungfu, its path in the checkout is returned."""
    head, colon, arg = config.partition(".py:")
    path = f"{head}.py" if colon else config
    beside = CHECKOUT / path
    return (path if Path(path).exists() or not beside.is_file() else str(beside)), arg


def parse(text: str, kind: type | None, nullable: bool = False) -> Leaf:
    """Converts text to a value of type `kind`. 1e3 and 1_000 are integers, `1,2` and `(1, 2)` are tuples, and `none` is
    None if `nullable` is True.

    If `kind` is str, the text is returned unchanged. If `kind` is None, the text is parsed as a Python literal if
    possible, and otherwise returned unchanged. Raises ValueError if the text does not fit the type.
    """
    if nullable and text.lower() in NONE:
        return None
    if kind is str:
        return text
    if kind is tuple:
        return _tuple(text)
    if kind is None:
        return _literal(text)
    try:
        if kind is bool:
            return BOOLS[text.lower()]
        if kind is int:
            return _int(text)
        return float(text)
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"must be {TYPE_NAMES[kind]}" + (" or none" if nullable else "")) from None


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


def _literal(text: str) -> Leaf:
    lower = text.lower()
    if lower in NONE:
        return None
    if lower in ("true", "false"):
        return lower == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _tuple(text: str) -> tuple:
    """Parses a literal tuple or list, or items separated by commas. Items that are not literals become strings, and
    brackets may be nested."""
    text = text.strip()
    if not text:
        return ()
    try:
        value = ast.literal_eval(text)
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    except (ValueError, SyntaxError):
        parts = _split(text)
    if len(parts) == 1 and _bracketed(text):
        parts = _split(text[1:-1])
    return tuple(_tuple(p) if _bracketed(p) and len(_split(p[1:-1])) > 1 else _literal(p) for p in parts)


def _bracketed(text: str) -> bool:
    return text[0] + text[-1] in ("()", "[]")


def _split(text: str) -> list[str]:
    """Splits text at the commas outside brackets and quotes. Items are stripped of spaces, and empty items are
    dropped."""
    items, depth, quote = [""], 0, ""
    for c in text:
        if quote or c in "\"'":
            quote = "" if c == quote else quote or c
        else:
            depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth and not quote:
            items.append("")
        else:
            items[-1] += c
    return [item.strip() for item in items if item.strip()]


def parse_arg(arg: str, **defaults: Leaf) -> SimpleNamespace:
    """Parses the argument of a config file: "rank=4,full" gives rank=4 and full=True. The defaults define the names and
    types of the arguments.

    A config file's `get_config(arg="")` calls this function first: `arg = parse_arg(arg, rank=16, full=False)`. Raises
    UserError for an unknown argument or an invalid value.
    """
    values = dict(defaults)
    for item in _split(arg):
        name, equals, text = item.partition("=")
        if name not in defaults:
            known = ", ".join(defaults)
            fix = did_you_mean(name, defaults, f"it takes {known}" if known else "it takes no arguments")
            raise UserError(f"unknown argument {name!r}", f"config file argument {arg!r}", fix)
        if not equals and not isinstance(defaults[name], bool):
            raise UserError(f"{name} needs a value", f"config file argument {arg!r}", f"write {name}=VALUE")
        kind = None if defaults[name] is None else type(defaults[name])
        try:
            values[name] = parse(text, kind) if equals else True
        except ValueError as e:
            raise UserError(f"{name} {e}", f"config file argument {arg!r}") from None
    return SimpleNamespace(**values)
