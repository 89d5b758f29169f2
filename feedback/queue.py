"""Which item a person gets next."""

import threading

from feedback.fold import State, disputed
from feedback.items import Item
from feedback.store import Store


class Queue:
    """Items in their order, so that a router decides what is asked first. An item has enough votes when `wanted`
    people (0: all) have decided on it or are looking at it; gold items are for everybody."""

    def __init__(self, store: Store, wanted: int):
        self.store, self.wanted = store, wanted
        self.looking: dict[str, str] = {}  # annotator: item
        self.lock = threading.Lock()

    def take(self, annotator: str) -> Item | None:
        """The same one until it is decided."""
        with self.lock:
            state = self.store.state
            found = next((item for item in self.store.items.values() if self.open(state, annotator, item)), None)
            self.looking[annotator] = found.hash if found else ""
            return found

    def open(self, state: State, annotator: str, item: Item) -> bool:
        votes = state.votes.get(item.hash, {})
        if annotator in votes:
            return False
        if item.gold or not self.wanted or self.looking.get(annotator) == item.hash:
            return True
        others = {name for name, looked in self.looking.items() if looked == item.hash and name != annotator}
        return len(votes.keys() | others) < self.wanted

    def progress(self, annotator: str) -> tuple[int, int]:
        """How many the annotator has decided, and the sum of these and of those that are open."""
        with self.lock:
            state = self.store.state
            done = sum(annotator in state.votes.get(name, {}) for name in self.store.items)
            return done, done + sum(self.open(state, annotator, item) for item in self.store.items.values())

    def disputed(self) -> list[str]:
        """Items on which people contradict each other and that are not resolved yet."""
        state = self.store.state
        return [n for n in self.store.items if disputed(state.votes.get(n, {})) and n not in state.resolved]
