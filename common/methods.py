"""Finds methods by name: a name in a config is the name of a file in a package, so no registry is needed."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from common.errors import UserError
from common.types import Config


def known(package: str) -> list[str]:
    """Names of the modules of a package, such as "model.heads", except private ones."""
    folder = Path(__file__).resolve().parents[1].joinpath(*package.split("."))
    return sorted(p.stem for p in folder.glob("[!_]*.py"))


def module(package: str, name: str) -> ModuleType:
    """A module of a package. Raises UserError for an unknown name, so that a config from a run folder cannot import
    arbitrary modules."""
    if name not in known(package):
        raise UserError(f"{package} has no {name!r}", "config", f"known: {', '.join(known(package))}")
    return importlib.import_module(f"{package}.{name}")


def find(package: str, cfg: Config) -> Callable:
    """The `make` function of the named module, with the config's other keys bound as keyword arguments."""
    make = module(package, cfg.name).make
    kwargs = {k: v for k, v in cfg.items() if k != "name" and v is not None}
    return lambda *args: make(*args, **kwargs)
