"""Finds a method by its name in a config. Each method is a file in a package, and its name is the file's name, so that
no registry is needed."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from common.errors import UserError
from common.types import Config


def known(package: str) -> list[str]:
    """The names of the modules in a package such as "model.heads", except names that begin with an underscore."""
    folder = Path(__file__).resolve().parents[1].joinpath(*package.split("."))
    return sorted(p.stem for p in folder.glob("[!_]*.py"))


def module(package: str, name: str) -> ModuleType:
    """Imports a module of a package. Raises UserError for an unknown name, so that a config from a run folder cannot
    import arbitrary modules."""
    if name not in known(package):
        raise UserError(f"{package} has no {name!r}", "config", f"known: {', '.join(known(package))}")
    return importlib.import_module(f"{package}.{name}")


def find(package: str, cfg: Config) -> Callable:
    """The `make` function of the module named `cfg.name`, with the other keys of `cfg` bound as keyword arguments."""
    make = module(package, cfg.name).make
    kwargs = {k: v for k, v in cfg.items() if k != "name" and v is not None}
    return lambda *args: make(*args, **kwargs)
