"""What the stores of one process have in common: watches from a window, leases by the clock, single writes as transactions."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager

import structlog

from atoll.model.errors import AtollError, Compacted, Invalid, NotFound, Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import (
    LINEARIZABLE,
    RANGE_LIMIT_MAX,
    Change,
    Compare,
    Consistency,
    Delete,
    KeyValue,
    Lease,
    LeaseId,
    Op,
    Put,
    Range,
    Revision,
    TxnResult,
    WatchBatch,
)
from atoll.store.transaction import Transaction, check_limit, check_prefix, check_transaction
from atoll.store.window import Window

WATCH_READ_REVISIONS = 1_000
"""Revisions that a watch takes up at a time, so that one far behind neither holds the event loop nor much memory."""
RANGE_AT_REVISIONS_MAX = 16_384
"""How far behind the newest revision a listing `at` a revision may be: a page costs as much as what has changed since."""
LEASE_TTL_MIN_S = 1.0
LEASE_TTL_MAX_S = 86_400.0
LEASE_SLACK_S = 0.001
"""The shortest wait for a lease's end: a remainder that is lost in rounding must not be waited for again and again."""
LEASE_RETRY_S = 1.0
"""After a failed attempt to remove what an expired lease held."""

log = structlog.get_logger()

Changes = tuple[Change, ...]


class BaseStore(abc.ABC):
    """The shared half of `Store`; a subclass says how to read, to commit and to keep.

    Leases count by `clock.monotonic()`; a lease that is found at start gets its whole time again.
    """

    def __init__(self, clock: Clock, window: Window[Changes], leases: Sequence[Lease] = ()) -> None:
        self._clock = clock
        self._window = window
        self._leases = {lease.id: lease for lease in leases}
        self._ends = {lease.id: clock.monotonic() + lease.ttl_s for lease in leases}
        self._expired: list[LeaseId] = []
        self._lease_change = asyncio.Event()
        self._expiry: asyncio.Task[None] | None = None
        if leases:
            self._begin_expiry()

    @abc.abstractmethod
    async def get(self, key: str, *, consistency: Consistency = LINEARIZABLE) -> KeyValue | None: ...

    @abc.abstractmethod
    async def _commit(self, transaction: Transaction) -> TxnResult:
        """Make a checked transaction durable, append it to the window, and only then return."""

    @abc.abstractmethod
    async def _grant(self, ttl_s: float) -> LeaseId: ...

    @abc.abstractmethod
    async def _revoke(self, lease: LeaseId) -> None:
        """Delete the lease and its keys, in one revision; nothing if it is not there."""

    @abc.abstractmethod
    async def _compact(self, revision: Revision) -> None: ...

    @abc.abstractmethod
    def _snapshot(self) -> AbstractContextManager[Revision]:
        """Hold still what `_items` and `_since` see, which is everything up to the revision that this gives."""

    @abc.abstractmethod
    def _items(self, prefix: str, after: str, limit: int) -> list[KeyValue]:
        """Return up to `limit` of the newest items, in key order; `limit` may exceed what callers may ask for."""

    @abc.abstractmethod
    def _since(self, start: Revision) -> list[tuple[Revision, Changes]]:
        """Return all changes from revision `start` on, oldest first."""

    @property
    @abc.abstractmethod
    def _floor(self) -> Revision:
        """The oldest revision that a watch can start from."""

    @abc.abstractmethod
    def _log(self, start: Revision, count_max: int) -> list[tuple[Revision, Changes]]:
        """Return changes from `start` on, oldest first: at least one revision if there is one. Raises Compacted."""

    async def revision(self) -> Revision:
        return self._window.newest

    async def range(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = RANGE_LIMIT_MAX,
        at: Revision | None = None,
        consistency: Consistency = LINEARIZABLE,
    ) -> Range:
        """See `Store.range`."""
        check_prefix(prefix)
        check_prefix(after)
        check_limit(limit)
        with self._snapshot() as newest:
            if at is None or at == newest:
                items = self._items(prefix, after, limit + 1)
                return Range(tuple(items[:limit]), newest, len(items) > limit)
            self._check_at(at, newest)
            return self._range_then(prefix, after, limit, at)

    async def put(self, key: str, value: bytes, *, lease: LeaseId = LeaseId(0)) -> Revision:
        return (await self.txn((), (Put(key, value, lease),))).revision

    async def delete(self, key: str) -> Revision:
        return (await self.txn((), (Delete(key),))).revision

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        """See `Store.txn`."""
        transaction = Transaction(compare, then, otherwise)
        check_transaction(transaction)
        for op in (*then, *otherwise):
            if isinstance(op, Put) and op.lease:
                self._check_lease(op.lease)
        return await self._commit(transaction)

    async def watch(self, prefix: str, *, start: Revision) -> AsyncIterator[WatchBatch]:
        """See `Store.watch`. Each batch is one revision."""
        check_prefix(prefix)
        position = start
        while True:
            await self._window.reach(position)
            for revision, changes in self._log(position, WATCH_READ_REVISIONS):
                position = Revision(revision + 1)
                wanted = changes if not prefix else tuple(change for change in changes if change.key.startswith(prefix))
                if wanted:
                    yield WatchBatch(wanted, revision)
            # Even where nothing was for this watch, let others run before the next part.
            await asyncio.sleep(0)

    async def lease_grant(self, ttl_s: float) -> Lease:
        """See `Store.lease_grant`."""
        if not LEASE_TTL_MIN_S <= ttl_s <= LEASE_TTL_MAX_S:
            raise Invalid(f"a lease lasts {LEASE_TTL_MIN_S:g} to {LEASE_TTL_MAX_S:g} s, not {ttl_s:g}", field="ttl_s")
        lease = Lease(await self._grant(ttl_s), ttl_s)
        self._leases[lease.id] = lease
        self._ends[lease.id] = self._clock.monotonic() + ttl_s
        self._begin_expiry()
        return lease

    async def lease_keep_alive(self, lease: LeaseId) -> None:
        """See `Store.lease_keep_alive`."""
        self._check_lease(lease)
        self._ends[lease] = self._clock.monotonic() + self._leases[lease].ttl_s

    async def lease_revoke(self, lease: LeaseId) -> None:
        """See `Store.lease_revoke`."""
        await self._revoke(lease)
        self._leases.pop(lease, None)
        self._ends.pop(lease, None)

    async def expire_leases(self) -> None:
        """Remove every lease whose time is over, with its keys. The store's own task calls this; it is safe to repeat."""
        now = self._clock.monotonic()
        for lease in [lease for lease, end in self._ends.items() if end <= now]:
            # From here on it cannot be kept alive or written under, even when removing its keys fails at first.
            del self._leases[lease], self._ends[lease]
            self._expired.append(lease)
        for lease in tuple(self._expired):
            await self._revoke(lease)
            if lease in self._expired:
                self._expired.remove(lease)

    async def compact(self, revision: Revision) -> None:
        """See `Store.compact`."""
        if revision > self._window.newest:
            raise Invalid(f"revision {revision} is not there yet; the newest is {self._window.newest}")
        if revision <= self._floor:
            raise Compacted(f"all before revision {self._floor} is forgotten already")
        await self._compact(revision)
        self._window.forget_before(revision)

    async def close(self) -> None:
        """End the watches (with Unavailable) and the leases' task; the data stays. Safe to repeat."""
        self._window.close("the store is closed")
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)
            self._expiry = None

    def _check_lease(self, lease: LeaseId) -> None:
        """Raise NotFound for a lease whose time is over, whether or not its keys are removed yet."""
        end = self._ends.get(lease)
        if end is None or end <= self._clock.monotonic():
            raise NotFound(f"lease {lease} is not there; it has expired or was revoked")

    def _check_at(self, at: Revision, newest: Revision) -> None:
        if at > newest:
            raise Invalid(f"revision {at} is not there yet; the newest is {newest}", field="at")
        oldest = max(self._floor, newest - RANGE_AT_REVISIONS_MAX)
        if at < oldest:
            raise Compacted(f"revision {at} is too old to be listed; the oldest is {oldest}")

    def _check_start(self, start: Revision) -> None:
        if start < self._floor:
            raise Compacted(f"revision {start} is no longer held; the oldest is {self._floor}")

    def _range_then(self, prefix: str, after: str, limit: int, at: Revision) -> Range:
        """Undo on the newest items what has changed since `at`: the first change of a key tells what was there."""
        before: dict[str, KeyValue | None] = {}
        for _, changes in self._since(Revision(at + 1)):
            for change in changes:
                if change.key.startswith(prefix) and change.key > after:
                    before.setdefault(change.key, change.previous)
        # Of so many items, at least limit + 1 are as they were at `at`, so that nothing is missed between them.
        now = self._items(prefix, after, limit + 1 + len(before))
        items = {item.key: item for item in now if item.key not in before}
        items.update((key, item) for key, item in before.items() if item is not None)
        ordered = sorted(items.values(), key=lambda item: item.key)
        return Range(tuple(ordered[:limit]), at, len(ordered) > limit)

    def _begin_expiry(self) -> None:
        self._lease_change.set()
        if self._expiry is None:
            self._expiry = asyncio.create_task(self._run_expiry(), name="store lease expiry")

    async def _run_expiry(self) -> None:
        """Sleep until the next lease could end. A renewed lease only wakes this task once too early."""
        while True:
            self._lease_change.clear()
            next_end = min(self._ends.values(), default=None)
            wait_s = None if next_end is None else next_end - self._clock.monotonic()
            try:
                if wait_s is None or wait_s > 0:
                    # Without a lease there is no deadline: the next one to be granted wakes this task.
                    await asyncio.wait_for(self._lease_change.wait(), wait_s and max(wait_s, LEASE_SLACK_S))
                else:
                    await self.expire_leases()
            except TimeoutError:
                continue
            except Unavailable as error:
                log.warning("leases could not be expired; trying again", cause=error.message, retry_s=LEASE_RETRY_S)
                await asyncio.sleep(LEASE_RETRY_S)
            except AtollError as error:
                log.error("leases could not be expired; trying again", cause=error.message, retry_s=LEASE_RETRY_S)
                await asyncio.sleep(LEASE_RETRY_S)
