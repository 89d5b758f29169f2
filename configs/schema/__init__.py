"""Turns a command line into a checked and locked config, without importing jax.

    loaded = load(sys.argv[1:], flags={"plan": False})

Keys, types, defaults and meanings come from `base.py`. In the groups `objective`, `peft`, `quant` and `data.view`, the
key `name` selects a file, and the other keys are the keyword arguments of the function `make` in that file. The
resolved config includes the defaults of these arguments, so the config that a run folder stores is complete.
"""

import contextlib
import copy
import difflib
import functools
import hashlib
import inspect
import json
import runpy
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from common import files
from common.errors import UserError, did_you_mean
from common.types import Config, Json, Leaf
from configs.schema import describe, methods, overrides, rules
from configs.schema.keys import base_keys, flatten
from configs.schema.keys import unknown as unknown
from configs.schema.methods import Key
from configs.schema.problems import ConfigError, Problem, show

USAGE = "python -m train.main --config=configs/X.py[:ARG] --workdir=DIR [--config.key=value ...] [--plan]"

ELSEWHERE = {  # {option in other libraries: key in this project}
    "learning_rate": "optim.lr", "warmup_steps": "optim.warmup", "warmup_ratio": "optim.warmup",
    "lr_scheduler_type": "optim.schedule", "max_grad_norm": "optim.clip", "optimizer": "optim.name",
    "per_device_train_batch_size": "data.batch_size", "gradient_accumulation_steps": "accum", "max_steps": "steps",
    "num_train_epochs": "epochs", "max_length": "data.seq_len", "max_seq_length": "data.seq_len",
    "lora_r": "peft.rank", "lora_alpha": "peft.alpha", "logging_steps": "log_every", "save_steps": "ckpt.every",
    "eval_steps": "eval_every", "model": "init", "model_name_or_path": "init", "dataset": "data.source",
}  # fmt: skip


class Loaded(NamedTuple):
    config: Config  # locked
    path: str
    arg: str
    overrides: dict[str, Leaf]  # {"optim.lr": value}
    workdir: str | None
    flags: dict[str, Any]  # values of additional options, each of the same type as its default


def load(argv: list[str], flags: Mapping[str, Leaf] | None = None, usage: str | None = None) -> Loaded:
    """Parses a command line into a config; `flags` maps the names of additional options to their defaults.

    `--help` prints `usage` and every key, then exits with code 0. Raises ConfigError, which lists all problems, or
    UserError if the config file cannot be read.
    """
    args = overrides.parse_args(argv, flags or {})
    if args.help:
        print(describe.help_text(usage or USAGE))
        raise SystemExit(0)
    if not args.config:
        raise ConfigError([*args.problems, Problem("--config", "", "missing", "write --config=configs/X.py")])
    config, values = resolve(read(args.config, args.arg), args.overrides, args.problems, args.config)
    if "steps" in values and "epochs" not in values:
        config.epochs = 0  # otherwise the file's `epochs` would override `steps` from the command line
    return Loaded(config, args.config, args.arg, values, args.workdir, args.flags)


def read(path: str, arg: str = "") -> Config:
    """Returns the result of a config file's `get_config(arg)`, or the config stored in a run folder. Its keys are not
    checked."""
    file = Path(path)
    if (file / "config.json").exists():
        file = file / "config.json"
    if not file.is_file():
        known = (str(p.relative_to(overrides.CHECKOUT)) for p in (overrides.CHECKOUT / "configs").rglob("*.py"))
        near = difflib.get_close_matches(path, known, 1)
        raise UserError("no such config file", path, f"did you mean {near[0]}?" if near else "")
    if file.suffix == ".json":
        try:
            return from_dict(files.load_json(file))
        except (ValueError, AttributeError) as e:
            raise UserError(f"not a config: {e}", str(file)) from e
    return _run(file, arg)


def _run(file: Path, arg: str) -> ConfigDict:
    with running(file):
        get_config = runpy.run_path(str(file)).get("get_config")
        if get_config is None:
            raise UserError("the file does not define get_config", str(file))
        takes = bool(inspect.signature(get_config).parameters)
        if arg and not takes:
            raise UserError(f"get_config takes no argument, but was given {arg!r}", str(file))
        config = get_config(arg) if takes else get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config returned a {type(config).__name__}, not a ConfigDict", str(file))
    return config


@contextlib.contextmanager
def running(file: Path) -> Iterator[None]:
    """A context in which to run the code of a config file. Any exception in this code becomes a UserError that names
    the line."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        reason = (str(e).splitlines() or [""])[0][:200]
        raise UserError(f"{type(e).__name__}: {reason}", _where(e, str(file))) from e


def _where(error: Exception, file: str) -> str:
    """Returns the "file:line" at which an error occurred: the line of the config file or, if a file has a syntax error,
    the line of that error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}:{lines[-1]}" if lines else file


def resolve(
    config: Config, changes: Mapping[str, Leaf] | None = None, found: Iterable[Problem] = (), where: str = ""
) -> tuple[Config, dict[str, Leaf]]:
    """Applies changes such as {"optim.lr": "1e-3"}, fills in the defaults of the methods, and checks the whole config.

    Returns the locked config, and a dict of the changes with parsed values. Raises ConfigError, which lists all
    problems, including those that the caller has found before (`found`).
    """
    config, changes, problems = copy.deepcopy(config), dict(changes or {}), list(found)
    schema, loose = _schema(config, changes, problems)
    values = _apply(config, changes, schema, loose, problems)
    leaves = _check_leaves(flatten(config), schema, loose, problems)
    bad = {p.key.removeprefix("config.") for p in problems}
    problems += rules.check_between(leaves, lambda *paths: all(p in leaves and p not in bad for p in paths))
    if problems:
        raise ConfigError(problems, where)
    return _build(leaves, schema).lock(), values


def _schema(config: ConfigDict, changes: dict, problems: list[Problem]) -> tuple[dict[str, Key], set[str]]:
    """Returns the keys that this config may have, and the groups, such as `peft`, that name an unknown method. The
    arguments of an unknown method cannot be checked.

    If a change selects another method, the old method's arguments that the new method does not take are deleted from
    the config.
    """
    keys, loose = dict(base_keys()), set()
    for kind, folder in methods.FOLDERS.items():
        group = config
        for part in kind.split("."):
            group = group.get(part) if isinstance(group, ConfigDict) else None
        old = group.get("name") if isinstance(group, ConfigDict) else None
        name = changes.get(f"{kind}.name", old)
        if not name and kind in ("peft", "quant"):
            arguments = {}
        elif name in (known := methods.names(folder, "make")):
            arguments = methods.method(kind, name).arguments
        else:
            fix = did_you_mean(str(name), known, f"{folder} has {', '.join(known) or 'none yet'}")
            problems.append(Problem(f"config.{kind}.name", show(name), f"no file {folder}/{name}.py with make()", fix))
            loose.add(kind)
            continue
        keys |= {f"{kind}.{argument}": key for argument, key in arguments.items()}
        if name != old and isinstance(group, ConfigDict):
            with group.unlocked():
                for argument in set(group) - {"name", *arguments}:
                    del group[argument]
    return keys, loose


def _apply(
    config: ConfigDict, changes: dict, schema: dict[str, Key], loose: set[str], problems: list[Problem]
) -> dict[str, Leaf]:
    """Changes the given config in place, so that fields that refer to a changed field change as well. Returns the
    parsed values."""
    values = {}
    for path, raw in changes.items():
        *groups, name = path.split(".")
        key = schema.get(path)
        if key is None and ".".join(groups) not in loose:
            problems.append(_unknown(path, raw, schema))
            continue
        try:
            kind, nullable = (key.type, key.nullable) if key else (None, True)
            values[path] = overrides.parse(raw, kind, nullable) if isinstance(raw, str) else raw
            group = functools.reduce(lambda c, k: c[k], groups, config)
            with group.unlocked(), group.ignore_type():
                group[name] = values[path]
        except ValueError as e:
            problems.append(Problem(f"config.{path}", show(raw), str(e)))
        except (KeyError, TypeError, AttributeError):  # the config lacks this group, which _check_leaves reports
            continue
    return values


def _unknown(path: str, value: object, schema: Mapping[str, Key]) -> Problem:
    kind, _, name = path.rpartition(".")
    inside = [k for k in schema if k.startswith(path + ".")]
    if inside:
        return Problem(f"config.{path}", show(value), "is a group, not a key", f"its keys: {', '.join(inside)}")
    if kind in methods.FOLDERS:
        arguments = [k.removeprefix(f"{kind}.") for k in schema if k.startswith(f"{kind}.") and k != f"{kind}.name"]
        fix = f"it takes {', '.join(arguments)}" if arguments else "it takes none"
        near = did_you_mean(name, arguments, fix)
        return Problem(f"config.{path}", show(value), f"not an argument of the chosen {kind}", near)
    known = [f"config.{k}" for k in schema]
    near = did_you_mean(f"config.{ELSEWHERE.get(name, path)}", known, "see --help")
    return Problem(f"config.{path}", show(value), "unknown key", near)


def _check_leaves(
    given: dict[str, Leaf], schema: dict[str, Key], loose: set[str], problems: list[Problem]
) -> dict[str, Leaf]:
    """Returns the values of all keys, converted to their exact types and completed with the defaults of the methods."""
    reported = {p.key.removeprefix("config.") for p in problems}  # to report only one problem per key
    leaves = {}
    for path, value in given.items():
        key = schema.get(path)
        if path in reported or path.rpartition(".")[0] in loose:
            leaves[path] = value
        elif key is None:
            problems.append(_unknown(path, value, schema))
        else:
            try:
                leaves[path] = value = fit(value, key)
                wrong = () if value is None else rules.check_value(path, value, key.choices)
            except ValueError as e:
                wrong = [(str(e), "")]
            problems += (Problem(f"config.{path}", show(value), text, fix) for text, fix in wrong)
    for path, key in schema.items():
        kind = path.rpartition(".")[0]
        if path in given or path in reported or _inside(path, given):
            continue
        if key.required:
            problems.append(Problem(f"config.{path}", "", f"missing; the chosen {kind} needs it", f"set config.{path}"))
        elif path in base_keys():
            problems.append(Problem(f"config.{path}", "", "missing", "start from base.get_config()"))
        else:
            leaves[path] = _tuples(key.default)
    return leaves


def _inside(path: str, leaves: Iterable[str]) -> bool:
    """Returns whether the config has a plain value, such as a number, in place of a group that contains `path`."""
    parts = path.split(".")
    return any(".".join(parts[:n]) in leaves for n in range(1, len(parts)))


def fit(value: object, key: Key) -> Leaf:
    """Converts a value to the exact type of its key: 1 to a float, 1e3 to an integer, a list to a tuple. A boolean is
    not accepted as an integer.

    Raises ValueError for any other type.
    """
    value, kind = _tuples(value), key.type
    if kind is None or (value is None and key.nullable):
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not kind:
        raise ValueError(f"must be {overrides.TYPE_NAMES[kind]}" + (" or none" if key.nullable else ""))
    return value


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _build(leaves: Mapping[str, Leaf], schema: Mapping[str, Key]) -> ConfigDict:
    """Builds a nested config from {path: value}. None becomes a placeholder that keeps the key's type."""
    config = ConfigDict()
    for path, value in leaves.items():
        *groups, name = path.split(".")
        group = config
        for part in groups:
            if part not in group:
                group[part] = ConfigDict()
            group = group[part]
        kind = schema[path].type if path in schema else None
        group[name] = placeholder(kind) if value is None and kind else value
    return config


def to_dict(config: Config | Mapping) -> Json:
    """Converts a config to plain dicts with sorted keys, for JSON. Tuples become lists."""

    def plain(value: object) -> object:
        if isinstance(value, ConfigDict | dict):
            return {k: plain(value[k]) for k in sorted(value)}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(config)


def from_dict(d: Json) -> Config:
    """Converts the result of `to_dict` back to a config, which is neither locked nor checked. Lists become tuples.

    A key that did not exist when the config was written gets its default, because the defaults of new keys keep the
    behavior of older versions.
    """
    given = flatten(d)
    newer = {path: key.default for path, key in base_keys().items() if path not in given and not _inside(path, given)}
    return _build({path: _tuples(value) for path, value in (given | newer).items()}, base_keys())


def recorded(d: object, where: str) -> Config:
    """Converts the config stored in a run folder, and checks each key, because the folder may come from someone else.
    Raises UserError if the config is invalid."""
    problems: list[Problem] = []
    if not isinstance(d, dict):
        raise UserError("the file is not a config", where)
    try:
        config = from_dict(d)
        schema, loose = _schema(config, {}, problems)
        leaves = _check_leaves(flatten(config), schema, loose, problems)
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"the file is not a config: {error}", where) from None
    if problems:
        raise ConfigError(problems, where)
    return _build(leaves, schema)


def diff(a: Config | Json, b: Config | Json) -> list[tuple[str, Leaf, Leaf]]:
    """Returns (path, value in a, value in b) for the keys with different values, sorted by path. A missing key counts
    as None."""
    old, new = (flatten(from_dict(to_dict(c))) for c in (a, b))
    return [(k, old.get(k), new.get(k)) for k in sorted(old | new) if old.get(k) != new.get(k)]


def digest(config: Config | Json) -> str:
    """Returns a hash of a config, as 16 hexadecimal digits."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
