"""Types that every package names."""

from collections.abc import ItemsView
from typing import Any, Protocol

Leaf = bool | int | float | str | tuple | None  # what a key of a config holds
Json = dict[str, Any]  # an object of a JSON file or request


class Config(Protocol):
    """A run's config or a group of it, by attribute: `cfg.optim.lr`. At run time it is an ml_collections.ConfigDict.

    Which keys there are, and their types, is said by configs/base.py and checked before a config gets this far.
    """

    def __getattr__(self, key: str, /) -> Any: ...

    def __setattr__(self, key: str, value: Any, /) -> None: ...

    def __getitem__(self, key: str, /) -> Any: ...

    def __contains__(self, key: object, /) -> bool: ...

    def get(self, key: str, default: Any = None, /) -> Any: ...

    def items(self) -> ItemsView[str, Any]: ...
