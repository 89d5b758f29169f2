"""Reads the arguments of objectives, PEFT methods, quantizers and views from their source code, without importing jax.

The keyword-only arguments of the function `make` in such a file become keys of a config group, such as `peft`.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from common.types import Leaf

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"objective": "train/objectives", "peft": "model/peft", "quant": "model/quant", "data.view": "data/views"}
TASKS = "evals/tasks"
TYPES = {"int": int, "float": float, "bool": bool, "str": str, "tuple": tuple}


class Key(NamedTuple):
    """One key of a config. If the type is None, the value is not checked. A required key has no default."""

    type: type | None
    default: Leaf = None
    nullable: bool = False
    required: bool = False
    choices: tuple = ()


class Method(NamedTuple):
    arguments: dict[str, Key]
    batch: str = ""  # the kind of batch (data.rows.batch.KINDS) that an objective reads: the constant BATCH in its file
    head: str = ""  # the file in model/heads that an objective needs: the constant HEAD in its file


def names(folder: str, function: str) -> list[str]:
    """Returns the names of the files in a folder that define `function`, or an empty list if the folder does not
    exist."""
    return sorted(p.stem for p in (ROOT / folder).glob("[!_]*.py") if _find(p, function))


def method(kind: str, name: str) -> Method:
    """Returns the arguments of an existing method, and the kind of batch and the head that it needs. `kind` is the
    config group that names the method, a key of FOLDERS."""
    path = ROOT / FOLDERS[kind] / f"{name}.py"
    make = _find(path, "make")
    assert make, f"{path} has no make"
    args = zip(make.args.kwonlyargs, make.args.kw_defaults, strict=True)
    return Method(
        {a.arg: _key(a.annotation, default) for a, default in args},
        constant(path, "BATCH", ""),
        constant(path, "HEAD", ""),
    )


def constant(path: Path, name: str, default: Leaf) -> Leaf:
    """Returns the literal that a file assigns to `name` at module level, or `default` if the file does not assign
    one."""
    for node in _body(path):
        match node:
            case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                return ast.literal_eval(value)
    return default


def _find(path: Path, function: str) -> ast.FunctionDef | None:
    return next((n for n in _body(path) if isinstance(n, ast.FunctionDef) and n.name == function), None)


def _body(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text("utf-8"), str(path)).body


def _key(annotation: ast.expr | None, default: ast.expr | None) -> Key:
    kind, nullable, choices = _annotation(annotation)
    if default is None:
        return Key(kind, None, nullable, True, choices)
    try:
        value = ast.literal_eval(default)
    except ValueError:  # this default is computed at import time, so the source does not show its value
        return Key(kind, None, True, False, choices)
    if kind is None and type(value) in TYPES.values():
        kind = type(value)
    return Key(kind, value, nullable or value is None, False, choices)


def _annotation(node: ast.expr | None) -> tuple[type | None, bool, tuple]:
    """Returns (type, whether None is allowed, choices) for an annotation such as float, int | None, tuple[str, ...] or
    Literal["a", "b"]."""
    match node:
        case ast.Name(id=name):
            return TYPES.get(name), False, ()
        case ast.Subscript(value=ast.Name(id="tuple")):
            return tuple, False, ()
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            values = ast.literal_eval(inner)
            values = values if isinstance(values, tuple) else (values,)
            return type(values[0]), False, values
        case ast.BinOp(op=ast.BitOr(), left=left, right=ast.Constant(value=None)):
            kind, _, choices = _annotation(left)
            return kind, True, choices
    return None, False, ()
