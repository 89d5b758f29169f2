"""Files of a folder that a config chooses from: the name in the config is that of the file, without a registry."""

import importlib
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from common.types import Config


def find(package: str, cfg: Config) -> Callable:
    """The `make` of a file by its name, with the config's other keys as keyword arguments."""
    folder = Path(__file__).resolve().parents[1].joinpath(*package.split("."))
    known = sorted(p.stem for p in folder.glob("[!_]*.py"))
    if cfg.name not in known:  # a config read from a run folder is data: it must not name any other module
        raise UserError(f"no {cfg.name!r} in {package}", "config", f"known: {', '.join(known)}")
    make = importlib.import_module(f"{package}.{cfg.name}").make
    kwargs = {k: v for k, v in cfg.items() if k != "name" and v is not None}
    return lambda *args: make(*args, **kwargs)
