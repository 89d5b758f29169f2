"""Stores items, people, guidelines, drafts and events in one SQLite file. Events are never changed or deleted."""

import contextlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.types import Json
from feedback.fold import Event, State
from feedback.items import Item

FORMAT = 1  # PRAGMA user_version
NAME = 0x6B756E67  # PRAGMA application_id
LONGEST = 100  # maximum length of a name, in characters
OWNER = "owner"  # the name of the person who sees everybody's decisions and resolves disagreements
SCHEMA = f"""
CREATE TABLE items (place INTEGER PRIMARY KEY, hash TEXT UNIQUE NOT NULL, content TEXT NOT NULL);
CREATE TABLE people (name TEXT PRIMARY KEY, token TEXT UNIQUE NOT NULL);
CREATE TABLE guidelines (version INTEGER PRIMARY KEY, time REAL NOT NULL, text TEXT NOT NULL);
CREATE TABLE drafts (annotator TEXT, item TEXT, content TEXT NOT NULL, PRIMARY KEY (annotator, item));
CREATE TABLE events (id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, annotator TEXT NOT NULL,
    item TEXT NOT NULL, version INTEGER NOT NULL, content TEXT NOT NULL, UNIQUE (annotator, item, version));
CREATE TRIGGER no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are only appended'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are only appended'); END;
PRAGMA application_id = {NAME};
PRAGMA user_version = {FORMAT};
"""


class Stale(Exception):
    """Raised for a decision that is out of date, because the annotator has decided on the item in the meantime, for
    example in another tab."""


class Guidelines(NamedTuple):
    version: int
    time: float
    text: str


class Store:
    """A database that several threads and several processes may use at the same time. When `append` returns, the
    decision is safely on disk."""

    def __init__(self, path: Path):
        """Opens the file, or creates it if it does not exist. Raises UserError if the file cannot be used."""
        self.path, self._lock, self._state = path, threading.RLock(), State()
        with self._reading():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # the file contains secret links
            self.db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
            self.db.execute("PRAGMA synchronous = FULL")
            with self._writing():
                if not self.db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in _statements(SCHEMA):
                        self.db.execute(statement)
            if self._pragma("application_id") != NAME:
                raise UserError("another program's database", str(path), "choose another --db")
            if self._pragma("user_version") != FORMAT:
                raise UserError(f"the database has format {self._pragma('user_version')}, not {FORMAT}", str(path))
            self.db.execute("PRAGMA journal_mode = WAL")
            self.items = self._items()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, OSError) as e:
            raise UserError(f"the database cannot be opened: {e}", str(self.path), "choose another --db") from e

    def _pragma(self, name: str) -> int:
        return self.db.execute(f"PRAGMA {name}").fetchone()[0]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Runs the block as a transaction, which is written completely or not at all. Only one transaction runs at a
        time."""
        with self._lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    def close(self) -> None:
        with self._lock:
            self.db.close()

    # --- items, people, guidelines ---

    def _items(self) -> dict[str, Item]:
        with self._lock:
            rows = self.db.execute("SELECT hash, content FROM items ORDER BY place").fetchall()
        return {name: Item(json.loads(content)) for name, content in rows}

    def add(self, items: Iterable[Item]) -> tuple[int, int]:
        """Adds items after those that are already in the database. Returns (number of new items, number of items that
        were already in the database)."""
        new = seen = 0
        with self._writing():
            for item in items:
                done = self.db.execute(
                    "INSERT OR IGNORE INTO items (hash, content) VALUES (?, ?)",
                    (item.hash, json.dumps(item.content, ensure_ascii=False)),
                )
                new, seen = new + done.rowcount, seen + 1 - done.rowcount
        self.items = self._items()
        return new, seen

    def link(self, name: str) -> str:
        """Returns the secret part of a person's link. The first call for a person creates it. Raises UserError if the
        name cannot be used."""
        if not name.isprintable() or "/" in name or not 0 < len(name) <= LONGEST:
            raise UserError(f"{name!r} cannot be a name", "annotators", f"up to {LONGEST} visible characters, but no /")
        with self._writing():
            self.db.execute("INSERT OR IGNORE INTO people VALUES (?, ?)", (name, secrets.token_urlsafe(24)))
            return self.db.execute("SELECT token FROM people WHERE name = ?", (name,)).fetchone()[0]

    def person(self, token: str) -> str | None:
        with self._lock:
            row = self.db.execute("SELECT name FROM people WHERE token = ?", (token,)).fetchone()
        return row[0] if row else None

    def people(self) -> list[str]:
        with self._lock:
            rows = self.db.execute("SELECT name FROM people WHERE name != ? ORDER BY name", (OWNER,)).fetchall()
        return [name for (name,) in rows]

    def guide(self, text: str) -> None:
        """Adds a new version of the guidelines, unless the text equals that of the newest version."""
        with self._writing():
            newest = self.db.execute("SELECT text FROM guidelines ORDER BY version DESC").fetchone()
            if not newest or newest[0] != text:
                self.db.execute("INSERT INTO guidelines (time, text) VALUES (?, ?)", (time.time(), text))

    def guidelines(self) -> list[Guidelines]:
        """Returns all versions of the guidelines, newest first."""
        with self._lock:
            rows = self.db.execute("SELECT * FROM guidelines ORDER BY version DESC").fetchall()
        return [Guidelines(*row) for row in rows]

    # --- drafts ---

    def draft(self, annotator: str, item: str) -> Json | None:
        with self._lock:
            where = (annotator, item)
            row = self.db.execute("SELECT content FROM drafts WHERE annotator = ? AND item = ?", where).fetchone()
        return json.loads(row[0]) if row else None

    def keep(self, annotator: str, item: str, content: Json) -> None:
        with self._writing():
            self.db.execute("REPLACE INTO drafts VALUES (?, ?, ?)", (annotator, item, _line(content)))

    # --- events ---

    @property
    def state(self) -> State:
        """The current state, including events that other processes have appended. A state that was returned never
        changes."""
        with self._lock:
            if events := self._events(self._state.last):
                self._state = self._state.followed(events)
            return self._state

    def _events(self, after: int = 0) -> list[Event]:
        rows = self.db.execute("SELECT * FROM events WHERE id > ? ORDER BY id", (after,)).fetchall()
        return [_event(row) for row in rows]

    def events(self) -> list[Event]:
        with self._lock:
            return self._events()

    def append(self, kind: str, annotator: str, item: str, version: int | None, content: Json) -> Event:
        """Appends an event, which is safely on disk when this method returns. `version` is the number of events that
        the annotator had for the item when the page was rendered, or None for the current number. Raises Stale if the
        annotator has added events for the item since then. If the same request is repeated, nothing changes and no
        error is raised."""
        with self._writing():
            known = self.state.versions.get((annotator, item), 0)
            version = known if version is None else version
            where = (annotator, item, version)
            sql = "SELECT * FROM events WHERE annotator = ? AND item = ? AND version = ?"
            if row := self.db.execute(sql, where).fetchone():
                event = _event(row)
                if event.kind == kind and event.content.get("key") == content.get("key"):
                    return event
            if version != known or (kind == "undo") != bool(self.state.decision(annotator, item)):
                raise Stale
            now = time.time()
            done = self.db.execute(
                "INSERT INTO events (time, kind, annotator, item, version, content) VALUES (?, ?, ?, ?, ?, ?)",
                (now, kind, annotator, item, version, _line(content)),
            )
            if kind in ("vote", "resolve"):
                self.db.execute("DELETE FROM drafts WHERE annotator = ? AND item = ?", (annotator, item))
        return Event(done.lastrowid or 0, now, kind, annotator, item, version, content)

    def erase(self, annotator: str) -> int:
        """Appends an event that withdraws all earlier decisions of the annotator. Returns the number of votes that it
        withdraws."""
        count = len(self.state.of(annotator))
        self.append("erase", annotator, "", None, {})
        with self._writing():
            self.db.execute("DELETE FROM drafts WHERE annotator = ?", (annotator,))
        return count


def _event(row: tuple[Any, ...]) -> Event:
    return Event._make((*row[:-1], json.loads(row[-1])))


def _line(content: Json) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def _statements(script: str) -> Sequence[str]:
    """Splits a script into its SQL statements. Splitting at semicolons would not work, because triggers contain
    semicolons."""
    out, part = [], ""
    for line in script.splitlines():
        part += line + "\n"
        if sqlite3.complete_statement(part):
            out.append(part)
            part = ""
    return out
