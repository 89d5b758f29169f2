"""The front door: `from kungfu import load` in any folder; `python -m kungfu` and the command `kungfu` list the rest.

Kungfu's packages have everyday names, such as `data`, `train` and `tools`. Once this package is imported, these names
mean the packages of this checkout, whatever the current folder holds. A module of yours that has such a name and was
imported before stays usable where it was imported.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infer import load, load_many

__all__ = ["load", "load_many"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "common", "configs", "data", "feedback", "kernels", "model", "infer", "evals", "train", "tools", "examples",
)  # fmt: skip


class Checkout(MetaPathFinder):
    """Finds the packages of the checkout before sys.path, which begins with the current folder, is searched."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [str(ROOT)]) if fullname in PACKAGES else None


def _foreign(name: str) -> bool:
    """Whether the module in sys.modules of this name is not the checkout's. A namespace package has no file."""
    module = sys.modules[name]
    places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
    return not any(Path(place).is_relative_to(ROOT) for place in places if place)


def _take_over() -> None:
    if not (ROOT / "configs" / "base.py").is_file():
        raise ImportError(f"{ROOT} is no checkout of Kungfu: install one in editable form, pip install -e CHECKOUT")
    foreign = [name for name in PACKAGES if name in sys.modules and _foreign(name)]
    for name in [n for n in sys.modules if n.partition(".")[0] in foreign]:
        del sys.modules[name]
    sys.meta_path.insert(0, Checkout())


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import infer  # only now: the command imports this package too, and needs no numpy to list its verbs

    return getattr(infer, name)


_take_over()
