"""Decides which item a person gets next."""

import threading
from collections.abc import Iterator

from feedback.fold import disputed
from feedback.items import Item
from feedback.store import Store


class Queue:
    """Hands out items in the order in which they were added, so the first items of a file get votes first. An item is
    not given to more people once `wanted` people have decided on it or are looking at it; if `wanted` is 0, everybody
    gets every item. Gold items are always shown to everybody."""

    def __init__(self, store: Store, wanted: int):
        self.store, self.wanted = store, wanted
        self.looking: dict[str, str] = {}  # annotator: item
        self.lock = threading.Lock()

    def take(self, annotator: str) -> Item | None:
        """Returns the next item for this person. It stays the same until the person decides on it."""
        with self.lock:
            found = next(self.open(annotator), None)
            self.looking[annotator] = found.hash if found else ""
            return found

    def open(self, annotator: str) -> Iterator[Item]:
        """Yields the items on which this person may still decide, in the order in which they were added."""
        state, looking = self.store.state, {}
        for name, item in self.looking.items():
            looking.setdefault(item, set()).add(name)
        for item in self.store.items.values():
            votes = state.votes.get(item.hash, {})
            busy = votes.keys() | looking.get(item.hash, set())
            free = item.gold or not self.wanted or annotator in busy or len(busy) < self.wanted
            if free and annotator not in votes:
                yield item

    def progress(self, annotator: str) -> tuple[int, int]:
        """Returns (done, total). `done` is the number of items on which the annotator has decided. `total` is `done`
        plus the number of items on which the annotator may still decide."""
        with self.lock:
            state = self.store.state
            done = sum(annotator in state.votes.get(name, {}) for name in self.store.items)
            return done, done + sum(1 for _ in self.open(annotator))

    def disputed(self) -> list[str]:
        """Returns the hashes of the unresolved items on which people contradict each other."""
        state = self.store.state
        return [n for n in self.store.items if disputed(state.votes.get(n, {})) and n not in state.resolved]
