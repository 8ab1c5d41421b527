"""The store in memory, for tests, the simulator and cells that may forget."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from atoll.model.errors import Unavailable
from atoll.model.ports.clock import Clock, SystemClock
from atoll.model.ports.store import LINEARIZABLE, Consistency, KeyValue, LeaseId, Revision, TxnResult
from atoll.store.base import BaseStore, Changes
from atoll.store.transaction import Transaction, apply, check_key, remove_all, size_bytes
from atoll.store.window import Window

HISTORY_REVISIONS_MAX = 16_384
"""Revisions that a watch can resume from; up to a quarter more before the oldest go."""
HISTORY_BYTES_MAX = 64 << 20
"""What their changes take, in bytes."""


class _MemoryTable:
    """Items by key, with the keys in order beside them."""

    def __init__(self) -> None:
        self.items: dict[str, KeyValue] = {}
        self.keys: list[str] = []
        self.leases: dict[LeaseId, set[str]] = {}

    def get(self, key: str) -> KeyValue | None:
        return self.items.get(key)

    def under(self, prefix: str) -> Sequence[KeyValue]:
        return self.slice(prefix, "", len(self.keys))

    def slice(self, prefix: str, after: str, limit: int) -> list[KeyValue]:
        first = max(bisect_left(self.keys, prefix), bisect_right(self.keys, after))
        found: list[KeyValue] = []
        for index in range(first, len(self.keys)):
            key = self.keys[index]
            if len(found) == limit or not key.startswith(prefix):
                break
            found.append(self.items[key])
        return found

    def leased(self, lease: LeaseId) -> Sequence[KeyValue]:
        return [self.items[key] for key in sorted(self.leases.get(lease, ()))]

    def has_lease(self, lease: LeaseId) -> bool:
        return lease in self.leases

    def set(self, item: KeyValue) -> None:
        previous = self.items.get(item.key)
        if previous is None:
            insort(self.keys, item.key)
        elif previous.lease:
            self.leases[previous.lease].discard(item.key)
        if item.lease:
            self.leases[item.lease].add(item.key)
        self.items[item.key] = item

    def remove(self, key: str) -> None:
        item = self.items.pop(key)
        del self.keys[bisect_left(self.keys, key)]
        if item.lease:
            self.leases[item.lease].discard(key)


class MemoryStore(BaseStore):
    """`Store` in memory. What it forgets when the process ends is all that sets it apart."""

    def __init__(
        self,
        clock: Clock | None = None,
        *,
        history_revisions_max: int = HISTORY_REVISIONS_MAX,
        history_bytes_max: int = HISTORY_BYTES_MAX,
    ) -> None:
        window: Window[Changes] = Window(
            Revision(0), floor=Revision(0), entries_max=history_revisions_max, bytes_max=history_bytes_max
        )
        super().__init__(clock or SystemClock(), window)
        self._table = _MemoryTable()
        self._lease_count = 0
        self._open = True

    async def get(self, key: str, *, consistency: Consistency = LINEARIZABLE) -> KeyValue | None:
        self._check_open()
        check_key(key)
        return self._table.get(key)

    async def close(self) -> None:
        self._open = False
        await super().close()

    def _check_open(self) -> None:
        if not self._open:
            raise Unavailable("the store is closed")

    @contextmanager
    def _snapshot(self) -> Iterator[Revision]:
        self._check_open()
        yield self._window.newest

    def _items(self, prefix: str, after: str, limit: int) -> list[KeyValue]:
        return self._table.slice(prefix, after, limit)

    def _since(self, start: Revision) -> list[tuple[Revision, Changes]]:
        return self._window.read(start)

    @property
    def _floor(self) -> Revision:
        return self._window.floor

    def _log(self, start: Revision, count_max: int) -> list[tuple[Revision, Changes]]:
        return self._window.read(start, count_max)

    async def _commit(self, transaction: Transaction) -> TxnResult:
        self._check_open()
        applied = apply(self._table, transaction, self._window.newest)
        self._append(applied.changes)
        return applied.result

    async def _grant(self, ttl_s: float) -> LeaseId:
        self._check_open()
        self._lease_count += 1
        lease = LeaseId(self._lease_count)
        self._table.leases[lease] = set()
        return lease

    async def _revoke(self, lease: LeaseId) -> None:
        self._check_open()
        self._append(tuple(remove_all(self._table, self._table.leased(lease))))
        self._table.leases.pop(lease, None)

    async def _compact(self, revision: Revision) -> None:
        self._check_open()

    def _append(self, changes: Changes) -> None:
        if changes:
            self._window.append(Revision(self._window.newest + 1), changes, size_bytes(changes))
