"""Finds a method, such as a PEFT method or an objective, by its name in a config. The name of a method is the name of
its file in a package, so no registry is needed."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from common.errors import UserError
from common.types import Config


def known(package: str) -> list[str]:
    """The names of the modules in a package such as "model.heads", without those that begin with an underscore."""
    folder = Path(__file__).resolve().parents[1].joinpath(*package.split("."))
    return sorted(p.stem for p in folder.glob("[!_]*.py"))


def module(package: str, name: str) -> ModuleType:
    """Imports a module of a package. Raises UserError if `known` does not list the name; this check keeps the config of
    an untrusted run folder from importing arbitrary modules."""
    if name not in known(package):
        raise UserError(f"{package} has no {name!r}", "config", f"known: {', '.join(known(package))}")
    return importlib.import_module(f"{package}.{name}")


def find(package: str, cfg: Config) -> Callable:
    """The `make` function of the module named `cfg.name`, with the other keys of `cfg` bound as keyword arguments."""
    make = module(package, cfg.name).make
    kwargs = {k: v for k, v in cfg.items() if k != "name" and v is not None}
    return lambda *args: make(*args, **kwargs)
