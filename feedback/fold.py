"""Computes the current state of all decisions from an append-only list of events."""

import copy
from collections.abc import Iterable
from typing import NamedTuple

from common.types import Json


class Event(NamedTuple):
    """One event. `kind` is vote, resolve (the owner resolves a disagreement), undo (withdraws the annotator's decision
    about the same item) or erase (withdraws all earlier decisions of the annotator).

    `version` is the number of earlier events of the annotator for the same item. The content of a vote has choice
    (ranks, bad or skip), ranks, ratings {aspect: [1 to 5 or None]}, edits and flags {answer: text}, order (of the
    answers on the page), ms (milliseconds that the page was visible before the decision), guidelines (the version of
    the guidelines), informed (whether the annotator had seen the judge's ranks), key (identifies the request), and the
    model and sampling settings of each answer.
    """

    id: int
    time: float
    kind: str
    annotator: str
    item: str
    version: int
    content: Json

    @property
    def ranks(self) -> list[int | None] | None:
        return self.content["ranks"] if self.content["choice"] == "ranks" else None


class State:
    """The state after all events so far. `votes[item][annotator]` and `resolved[item]` are the decisions that still
    apply; decisions that were undone, erased or replaced are left out.

    Other threads may read a state while `followed` computes the next one. Therefore the dicts of a state never change.
    """

    def __init__(self) -> None:
        self.last = 0  # id of the newest event
        self.votes: dict[str, dict[str, Event]] = {}
        self.resolved: dict[str, Event] = {}
        self.versions: dict[tuple[str, str], int] = {}
        self.newest: dict[str, Event] = {}  # each annotator's newest vote or resolution

    def followed(self, events: Iterable[Event]) -> "State":
        """Returns the state after further events. This state does not change."""
        new = State()
        for name, value in vars(self).items():
            setattr(new, name, copy.copy(value))
        for event in events:
            new._apply(event)
        return new

    def _apply(self, event: Event) -> None:
        self.last = event.id
        where = (event.annotator, event.item)
        self.versions[where] = event.version + 1
        if event.kind == "vote":
            self.votes[event.item] = self.votes.get(event.item, {}) | {event.annotator: event}
            self.newest[event.annotator] = event
        elif event.kind == "resolve":
            self.resolved[event.item] = event
            self.newest[event.annotator] = event
        elif event.kind == "undo":
            self._drop(event.annotator, event.item)
        elif event.kind == "erase":
            for item in [*self.votes, *self.resolved]:
                self._drop(event.annotator, item)
        if event.kind in ("undo", "erase"):
            self.newest.pop(event.annotator, None)
            resolved = [e for e in self.resolved.values() if e.annotator == event.annotator]
            if left := [*self.of(event.annotator), *resolved]:
                self.newest[event.annotator] = max(left)

    def _drop(self, annotator: str, item: str) -> None:
        if annotator in (votes := self.votes.get(item, {})):
            self.votes[item] = {name: event for name, event in votes.items() if name != annotator}
        if item in self.resolved and self.resolved[item].annotator == annotator:
            del self.resolved[item]

    def decision(self, annotator: str, item: str) -> Event | None:
        """Returns the annotator's current decision about an item."""
        if event := self.votes.get(item, {}).get(annotator):
            return event
        event = self.resolved.get(item)
        return event if event and event.annotator == annotator else None

    def of(self, annotator: str) -> list[Event]:
        """Returns the annotator's votes, oldest first."""
        found = [votes[annotator] for votes in self.votes.values() if annotator in votes]
        return sorted(found, key=lambda event: event.id)


def relation(ranks: list[int | None] | None, i: int, j: int) -> int | None:
    """Returns 1 if answer i is preferred to answer j, -1 if answer j is preferred, 0 for a tie, and None if the two
    were not compared."""
    if ranks is None or ranks[i] is None or ranks[j] is None:
        return None
    return (ranks[i] < ranks[j]) - (ranks[i] > ranks[j])  # type: ignore[operator]


def disputed(votes: dict[str, Event]) -> bool:
    """Returns whether any two people contradict each other on an item. A person who skipped the item contradicts
    nobody."""
    given = [event for event in votes.values() if event.content["choice"] != "skip"]
    if len(given) < 2:
        return False
    if len({event.content["choice"] for event in given}) > 1:
        return True
    count = len(given[0].content["ranks"])
    pairs = [(i, j) for i in range(count) for j in range(i)]
    return any(len({relation(event.ranks, i, j) for event in given} - {None}) > 1 for i, j in pairs)
