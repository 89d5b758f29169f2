"""Decides which item a person gets next."""

import threading
from collections.abc import Iterator

from feedback.fold import disputed
from feedback.items import Item
from feedback.store import Store


class Queue:
    """Hands out items in the order in which they were added, so the order of the items in a file is their priority. An
    item has enough votes when `wanted` people (0: everybody) have decided on it or are looking at it. Gold items are
    shown to everybody."""

    def __init__(self, store: Store, wanted: int):
        self.store, self.wanted = store, wanted
        self.looking: dict[str, str] = {}  # annotator: item
        self.lock = threading.Lock()

    def take(self, annotator: str) -> Item | None:
        """The next item for this person, which stays the same until the person decides on it."""
        with self.lock:
            found = next(self.open(annotator), None)
            self.looking[annotator] = found.hash if found else ""
            return found

    def open(self, annotator: str) -> Iterator[Item]:
        """The items that this person may decide on, in the order in which they were added."""
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
        """Returns (number of items that the annotator has decided, this number plus the number of items still open to
        them)."""
        with self.lock:
            state = self.store.state
            done = sum(annotator in state.votes.get(name, {}) for name in self.store.items)
            return done, done + sum(1 for _ in self.open(annotator))

    def disputed(self) -> list[str]:
        """Unresolved items on which people contradict each other."""
        state = self.store.state
        return [n for n in self.store.items if disputed(state.votes.get(n, {})) and n not in state.resolved]
