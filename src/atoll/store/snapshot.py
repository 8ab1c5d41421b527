"""All that a store holds at one revision, read from wherever it lies: what a backup keeps, and what a migration carries."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self
from urllib.parse import quote

from msgspec import Struct

from atoll.model.errors import Corrupt, NotFound, Unsupported
from atoll.model.ports.store import Consistency, KeyValue, LeaseId, Revision
from atoll.store.database import APPLICATION_ID, BUSY_TIMEOUT_MS, SCHEMA_VERSION, SqliteTable, translate
from atoll.store.lock import unavailable

if TYPE_CHECKING:
    from atoll.store.etcd.store import EtcdStore

PAGE_ITEMS = 1_000


class Digest(Struct, frozen=True):
    """What two stores with the same content have in common, whatever their revisions and the ids of their leases."""

    items: int
    leased: int
    bytes: int
    sha256: str


class Counting:
    """Makes the digest of items that come by in key order."""

    def __init__(self) -> None:
        self._items = self._leased = self._bytes = 0
        self._hash = hashlib.sha256()

    def add(self, item: KeyValue) -> None:
        key = item.key.encode()
        self._items += 1
        self._leased += bool(item.lease)
        self._bytes += len(key) + len(item.value)
        self._hash.update(b"%d:%d:%d:" % (len(key), len(item.value), bool(item.lease)))
        self._hash.update(key)
        self._hash.update(item.value)

    def digest(self) -> Digest:
        return Digest(self._items, self._leased, self._bytes, self._hash.hexdigest())


class Snapshot(Protocol):
    """Everything as of `revision`. `leases` has the time in seconds that each lease was granted for."""

    @property
    def revision(self) -> Revision: ...

    @property
    def leases(self) -> dict[LeaseId, float]: ...

    def items(self) -> AsyncIterator[KeyValue]:
        """Yield all items in key order; it may be asked for more than once, and brings the same."""
        ...


async def digest_of(snapshot: Snapshot, look: Callable[[KeyValue], None] | None = None) -> Digest:
    """Read a whole snapshot, show each item to `look`, and return what identifies its content."""
    counting = Counting()
    async for item in snapshot.items():
        counting.add(item)
        if look is not None:
            look(item)
    return counting.digest()


class SqliteSnapshot:
    """A SQLite store's newest state, read beside whoever has it open; a context. Nothing is written.

    Raises NotFound, Corrupt, Unsupported, Unavailable.
    """

    def __init__(self, path: Path) -> None:
        try:
            there = path.is_file()
        except OSError as error:
            raise unavailable(path, error) from None
        if not there:
            raise NotFound(f"there is no store in {path}")
        self._path = path
        self._connection: sqlite3.Connection | None = None
        try:
            self._open()
        except sqlite3.Error as error:
            self.close()
            raise translate(path, error) from None
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        connection = sqlite3.connect(f"file:{quote(str(self._path))}?mode=ro", uri=True, isolation_level=None)
        self._connection = connection
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        application, version = (int(connection.execute(f"PRAGMA {n}").fetchone()[0]) for n in ("application_id", "user_version"))
        if application != APPLICATION_ID:
            raise Unsupported(f"{self._path} is no store of Atoll")
        if version > SCHEMA_VERSION:
            raise Unsupported(f"{self._path} has schema {version}, made by a newer Atoll", mend="use the newer Atoll")
        connection.execute("BEGIN")
        self._table = SqliteTable(connection)
        self.revision = self._table.revision()
        self.leases = {lease.id: lease.ttl_s for lease in self._table.leases()}
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise Corrupt(f"the database {self._path} is damaged: {verdict}", mend="restore it from a backup")

    def close(self) -> None:
        """Safe to repeat."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def items(self) -> AsyncIterator[KeyValue]:
        """See `Snapshot.items`."""
        after = ""
        try:
            while page := self._table.slice("", after, PAGE_ITEMS):
                for item in page:
                    yield item
                after = page[-1].key
        except sqlite3.Error as error:
            raise translate(self._path, error) from None


class EtcdSnapshot:
    """An etcd's state at one revision; make it with `take`. It stays readable until etcd's history has gone past it."""

    def __init__(self, store: EtcdStore, revision: Revision, leases: dict[LeaseId, float]) -> None:
        self._store = store
        self.revision = revision
        self.leases = leases
        self._lasting = 0
        """Its items without a lease."""

    @classmethod
    async def take(cls, store: EtcdStore) -> Self:
        """Return the newest state. Leases that have run out meanwhile are as those of their keys: not there."""
        snapshot = cls(store, await store.revision(), {})
        async for item in snapshot.items():
            snapshot._lasting += not item.lease
            if item.lease and item.lease not in snapshot.leases:
                snapshot.leases[item.lease] = await store.lease_ttl_s(item.lease) or 1.0
        return snapshot

    async def unchanged(self) -> bool:
        """Whether nobody has written to the etcd since. That leases run out is no change: with the servers, nobody keeps them."""
        newest = await self._store.revision()
        lasting = 0
        async for item in self._items(newest):
            if item.mod_revision > self.revision:
                return False
            lasting += not item.lease
        return lasting == self._lasting

    def items(self) -> AsyncIterator[KeyValue]:
        """See `Snapshot.items`. Raises Compacted."""
        return self._items(self.revision)

    async def _items(self, revision: Revision) -> AsyncIterator[KeyValue]:
        after = ""
        while True:
            page = await self._store.range("", after=after, limit=PAGE_ITEMS, at=revision, consistency=Consistency.SERIALIZABLE)
            for item in page.items:
                yield item
            if not page.more:
                return
            after = page.items[-1].key
