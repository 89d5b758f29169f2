"""Types used in every package."""

from collections.abc import ItemsView
from typing import Any, Protocol

Leaf = bool | int | float | str | tuple | None  # the value of a config key
Json = dict[str, Any]  # a JSON object, from a file or a request


class Config(Protocol):
    """The config of a run, or a group of keys in a config. Values are read as attributes, as in `cfg.optim.lr`. At run
    time, a Config is an ml_collections.ConfigDict.

    configs/base.py declares all keys and their types, and all values are checked before a Config is used.
    """

    def __getattr__(self, key: str, /) -> Any: ...

    def __setattr__(self, key: str, value: Any, /) -> None: ...

    def __getitem__(self, key: str, /) -> Any: ...

    def __contains__(self, key: object, /) -> bool: ...

    def get(self, key: str, default: Any = None, /) -> Any: ...

    def items(self) -> ItemsView[str, Any]: ...
