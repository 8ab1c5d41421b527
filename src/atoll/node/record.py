"""The agent's local record: what this node was told to run and how far it came, so that a new agent can adopt it.

Written before the action that it describes. A write survives `kill -9` at once, and loss of power but for the last
moments, after which no process is left to adopt.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from atoll.model import codec
from atoll.model.errors import AtollError, Corrupt, Invalid, Unavailable
from atoll.model.records import Assignment
from atoll.node.record_room import give_room, keep_room, make_room
from atoll.node.transitions import State

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS assignment (id TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (id TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS secrets (id TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
"""
_MEND = "free some disk space"


class Entry(Struct, frozen=True):
    assignment: Assignment
    state: State
    secrets: dict[str, str] | None = None
    """As they were last read, so that a crashed process starts again while the control plane is away."""


class LocalRecord(Protocol):
    """Synchronous and fast (tens of µs), since each decision is recorded where it is made. Writes raise Unavailable."""

    def load(self) -> list[Entry]: ...

    def put_assignment(self, assignment: Assignment) -> None: ...

    def put_state(self, id: str, state: State) -> None: ...

    def put_secrets(self, id: str, secrets: dict[str, str]) -> None: ...

    def remove(self, id: str) -> None:
        """Forget the instance; an unknown id is no error."""
        ...

    def close(self) -> None: ...


class MemoryRecord:
    """Outlives an agent only within one process: for tests and the simulator."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def load(self) -> list[Entry]:
        return list(self.entries.values())

    def put_assignment(self, assignment: Assignment) -> None:
        id = assignment.instance.id
        known = self.entries.get(id)
        self.entries[id] = Entry(assignment, known.state if known else State(), known.secrets if known else None)

    def put_state(self, id: str, state: State) -> None:
        known = self.entries[id]
        self.entries[id] = Entry(known.assignment, state, known.secrets)

    def put_secrets(self, id: str, secrets: dict[str, str]) -> None:
        known = self.entries[id]
        self.entries[id] = Entry(known.assignment, known.state, secrets)

    def remove(self, id: str) -> None:
        self.entries.pop(id, None)

    def close(self) -> None: ...


class SqliteRecord:
    """One file, mode 0600 since secrets are in it. Raises Corrupt for a damaged one, Unavailable where it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            give_room(path)
        except OSError as error:
            raise Unavailable(f"cannot open the agent's record {path}: {error}", mend=_MEND) from None
        try:
            self._database = self._open()
        except sqlite3.DatabaseError as error:
            raise self._broken(error) from None

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, isolation_level=None, timeout=5.0)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA_VERSION):
                raise Corrupt(f"{self._path} is of version {version}, this agent knows {SCHEMA_VERSION}", mend="use a newer Atoll")
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            database.executescript(_SCHEMA)
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            make_room(database, self._path)
        except BaseException:
            database.close()
            raise
        return database

    def load(self) -> list[Entry]:
        """Return everything; of what a newer agent has written, as much as this one knows."""
        query = """SELECT a.body, s.body, x.body FROM assignment a
                   LEFT JOIN state s ON s.id = a.id LEFT JOIN secrets x ON x.id = a.id ORDER BY a.id"""
        try:
            return [
                Entry(
                    codec.decode_known(assignment, Assignment),
                    codec.decode_known(state, State) if state else State(),
                    codec.decode(secrets, dict[str, str]) if secrets else None,
                )
                for assignment, state, secrets in self._database.execute(query)
            ]
        except sqlite3.DatabaseError as error:
            raise self._broken(error) from None
        except Invalid as error:
            raise self._corrupt(error) from None

    def put_assignment(self, assignment: Assignment) -> None:
        self._write("INSERT OR REPLACE INTO assignment VALUES (?, ?)", assignment.instance.id, codec.encode(assignment))

    def put_state(self, id: str, state: State) -> None:
        self._write("INSERT OR REPLACE INTO state VALUES (?, ?)", id, codec.encode(state))

    def put_secrets(self, id: str, secrets: dict[str, str]) -> None:
        self._write("INSERT OR REPLACE INTO secrets VALUES (?, ?)", id, codec.encode(secrets))

    def remove(self, id: str) -> None:
        try:
            with self._database:
                self._database.execute("BEGIN")
                for table in ("assignment", "state", "secrets"):
                    self._database.execute(f"DELETE FROM {table} WHERE id = ?", (id,))  # noqa: S608 - names from above
        except sqlite3.Error as error:
            raise self._unavailable(error) from None

    def close(self) -> None:
        self._database.close()
        keep_room(self._path)

    def _write(self, statement: str, id: str, body: bytes) -> None:
        try:
            self._database.execute(statement, (id, body))
        except sqlite3.Error as error:
            raise self._unavailable(error) from None

    def _unavailable(self, error: sqlite3.Error) -> Unavailable:
        return Unavailable(f"cannot write the agent's record {self._path}: {error}", mend=_MEND)

    def _broken(self, error: sqlite3.DatabaseError) -> AtollError:
        """What SQLite does not say to be damage is the disk's or the system's, and passes."""
        if isinstance(error, sqlite3.OperationalError):
            return Unavailable(f"cannot open the agent's record {self._path}: {error}", mend=_MEND)
        return self._corrupt(error)

    def _corrupt(self, error: Exception) -> Corrupt:
        mend = "move the file away; instances that run here then count as unknown, are removed, and are started anew"
        return Corrupt(f"the agent's record {self._path} is damaged: {error}", mend=mend)
