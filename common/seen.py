"""A dict that records which of its keys are read, to find unused keys."""

from collections.abc import Collection
from typing import Any


class Seen(dict):
    """A dict that records, in the set `used`, each key that is read. The union of this dict with another dict shares
    the same set."""

    def __init__(self, content: dict, used: set[str] | None = None):
        super().__init__(content)
        self.used: set[str] = set() if used is None else used

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        return super().get(key, default)

    def __or__(self, other: dict) -> "Seen":
        return Seen({**self, **other}, self.used)

    def __ror__(self, other: dict) -> "Seen":
        return Seen({**other, **self}, self.used)

    def unused(self, irrelevant: Collection[str]) -> set[str]:
        """The keys that have a value but were never read. Keys whose names, in lower case, are in `irrelevant` are left
        out."""
        left = (key for key in self if key not in self.used and holds(dict.get(self, key)))
        return {key for key in left if str(key).lower() not in irrelevant}


def holds(value: object) -> bool:
    """Whether a value is neither null nor empty."""
    return value is not None and value != "" and value != [] and value != {}
