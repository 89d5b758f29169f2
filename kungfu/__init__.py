"""The public package: `from kungfu import load` works in any folder, and the command `kungfu` lists all commands.

Kungfu's packages have everyday names, such as `data`, `train` and `tools`. Importing `kungfu` makes `data`, `train` and
`tools` refer to the packages of this checkout, even if the current folder has modules with these names. A foreign
module `data` that was imported before `kungfu` keeps working in the code that imported it.
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
    """Finds the packages of the checkout before Python searches sys.path, which begins with the current folder."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [str(ROOT)]) if fullname in PACKAGES else None


def _foreign(name: str) -> bool:
    """Returns whether the imported module with this name comes from outside the checkout. The check also reads
    __path__, since a namespace package has no __file__."""
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
    import infer  # imported late, so that the command `kungfu` starts without importing numpy

    return getattr(infer, name)


_take_over()
