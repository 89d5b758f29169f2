"""Reads the types, defaults, choices and meanings of all config keys from base.py and its source text."""

import ast
import functools
import io
import tokenize
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from common.errors import UserError, did_you_mean
from common.types import Leaf
from configs import base
from configs.schema.methods import Key
from configs.schema.problems import show


@functools.cache
def base_keys() -> dict[str, Key]:
    """Returns {path: Key} for all keys in base.py. A key with the default None also accepts the value None."""
    config, keys = base.get_config(), {}
    for path, value in flatten(config).items():
        *groups, name = path.split(".")
        group = functools.reduce(lambda c, k: c[k], groups, config)
        keys[path] = Key(group.get_type(name), value, value is None, choices=_choices().get(path, ()))
    return keys


@functools.cache
def docs() -> dict[str, str]:
    """Returns {path: the comment on the key's line in base.py}."""
    tokens = tokenize.generate_tokens(io.StringIO(_source()).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    paths = {path: comments.get(node.end_lineno, "") for path, node in _assignments().items()}
    named = {path if path in base_keys() else f"{path}.name": text for path, text in paths.items()}
    return {path: text for path, text in named.items() if path in base_keys()}


def unknown(path: str, value: object) -> UserError:
    """Returns the error for a value that is not one of the key's choices."""
    problem, fix = refusal(value, base_keys()[path].choices)
    return UserError(problem, f"config.{path} = {show(value)}", fix)


def refusal(value: object, choices: tuple) -> tuple[str, str]:
    """Returns (problem, fix) for a value that is not one of the choices."""
    known = "one of " + ", ".join(map(show, choices))
    near = did_you_mean(value, filter(None, choices), known) if isinstance(value, str) and value else known
    return "unknown choice", near


def flatten(config: ConfigDict | Mapping) -> dict[str, Leaf]:
    """Converts a config or nested dict to {dotted path: value}. A required placeholder that has not been set becomes
    None."""
    leaves = {}
    for name in config:
        try:
            value = config[name]
        except RequiredValueError:
            value = None
        if isinstance(value, ConfigDict | dict):
            leaves |= {f"{name}.{path}": leaf for path, leaf in flatten(value).items()}
        else:
            leaves[name] = value
    return leaves


def _source() -> str:
    return Path(base.__file__).read_text("utf-8")


@functools.cache
def _assignments() -> dict[str, ast.Assign]:
    """Returns {path: the syntax tree of its assignment, `c.path = ...`, in base.py}."""
    lines = [node for node in ast.walk(ast.parse(_source())) if isinstance(node, ast.Assign)]
    return {ast.unparse(n.targets[0]).partition(".")[2]: n for n in lines if isinstance(n.targets[0], ast.Attribute)}


@functools.cache
def _choices() -> dict[str, tuple]:
    """Returns {path: the arguments of the key's `one_of` call in base.py}."""
    out = {}
    for path, node in _assignments().items():
        match node.value:
            case ast.Call(func=ast.Name(id="one_of"), args=args):
                out[path] = tuple(map(ast.literal_eval, args))
    return out
