"""Filling an empty etcd: under a mark that keeps servers away until all of it is there, and that no second filling shares."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import structlog
from aetcd import rpc
from msgspec.structs import replace

from atoll.model.errors import AtollError, Conflict, OutcomeUnknown, Unavailable
from atoll.model.ports.store import KeyValue, LeaseId
from atoll.store.base import LEASE_TTL_MAX_S, LEASE_TTL_MIN_S
from atoll.store.etcd.store import FILLING, EtcdStore
from atoll.store.etcd.translate import ALL, FIRST_KEY
from atoll.store.snapshot import Counting, Digest, Snapshot

PUTS_MAX = 256
PUT_BYTES_MAX = 1 << 20
"""Keys and values of one transaction, beside its first item: with that, within etcd's own default limit of a request."""
TRIES = 8
TRY_PAUSE_S = 1.0
KEEP_S = 0.5
"""How often leases are kept alive while their keys arrive, so that none runs out before all is compared."""

log = structlog.get_logger()


class Filling:
    """A context: begins by marking the etcd, and leaves the mark where it is unless `end` was called.

    Raises Conflict on entry where the etcd is not empty. What an earlier filling left that was broken off is removed.
    """

    def __init__(self, store: EtcdStore) -> None:
        self._store = store
        self._mark = secrets.token_hex(16).encode()
        self._keeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Filling:
        found = await self._store.members.call(lambda m: m.kv.Range, rpc.RangeRequest(key=FILLING), repeat=True)
        begin = rpc.RequestOp(request_put=rpc.PutRequest(key=FILLING, value=self._mark))
        if found.kvs:
            log.info("what an earlier attempt left is removed")
            away = rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=FIRST_KEY, range_end=ALL))
            done = await self._txn([_equal(found.kvs[0].value)], [away, begin])
        else:
            # Holds when no key at all lies in the range.
            empty = rpc.Compare(
                result=rpc.Compare.EQUAL, target=rpc.Compare.CREATE, key=FIRST_KEY, range_end=ALL, create_revision=0
            )
            done = await self._txn([empty, _absent()], [begin])
        if not done:
            raise Conflict(
                "this etcd is not empty, or is being filled by another process",
                mend="a cell needs an etcd of its own, new and empty",
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def bring(self, snapshot: Snapshot) -> Digest:
        """Write all of `snapshot`. Raises Conflict: another filling has taken over."""
        leases: dict[LeaseId, LeaseId] = {}
        for id, ttl_s in snapshot.leases.items():
            leases[id] = (await self._store.lease_grant(min(max(LEASE_TTL_MIN_S, ttl_s), LEASE_TTL_MAX_S))).id
        self._keeping = asyncio.create_task(self._keep_alive(tuple(leases.values())), name="leases while an etcd is filled")
        counting = Counting()
        async for batch in _batches(snapshot):
            for item in batch:
                counting.add(item)
            await self._put([replace(item, lease=leases.get(item.lease, LeaseId(0))) for item in batch])
        return counting.digest()

    async def end(self) -> None:
        """Remove the mark: from now on servers may open the store."""
        away = rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=FILLING))
        try:
            ended = await self._txn([_equal(self._mark)], [away])
        except OutcomeUnknown:
            mark = await self._store.members.call(lambda m: m.kv.Range, rpc.RangeRequest(key=FILLING), repeat=True)
            ended = not mark.kvs or await self._txn([_equal(self._mark)], [away])
        if not ended:
            raise Conflict("another process has begun to fill this etcd")

    async def _put(self, items: Sequence[KeyValue]) -> None:
        puts = [
            rpc.RequestOp(request_put=rpc.PutRequest(key=item.key.encode(), value=item.value, lease=item.lease)) for item in items
        ]
        for attempt in range(TRIES):
            try:
                if not await self._txn([_equal(self._mark)], puts):
                    raise Conflict("another process has begun to fill this etcd")
                return
            except (Unavailable, OutcomeUnknown) as error:
                # The same once more does no harm: nobody else writes here, and nobody reads yet.
                if attempt == TRIES - 1:
                    raise
                log.warning("a write is tried again", cause=error.message)
                await asyncio.sleep(TRY_PAUSE_S)

    async def _txn(self, compare: Sequence[Any], then: Sequence[Any]) -> bool:
        request = rpc.TxnRequest(compare=compare, success=then)
        return bool((await self._store.members.call(lambda m: m.kv.Txn, request, repeat=False)).succeeded)

    async def _keep_alive(self, leases: Sequence[LeaseId]) -> None:
        while leases:
            for lease in leases:
                with contextlib.suppress(AtollError):  # a lease that is lost shows in the comparison at the end
                    await self._store.lease_keep_alive(lease)
            await asyncio.sleep(KEEP_S)


async def _batches(snapshot: Snapshot) -> AsyncIterator[list[KeyValue]]:
    batch: list[KeyValue] = []
    size_bytes = 0
    async for item in snapshot.items():
        own_bytes = len(item.key) + len(item.value)
        if batch and (len(batch) == PUTS_MAX or size_bytes + own_bytes > PUT_BYTES_MAX):
            yield batch
            batch, size_bytes = [], 0
        batch.append(item)
        size_bytes += own_bytes
    if batch:
        yield batch


def _equal(mark: bytes) -> Any:
    return rpc.Compare(result=rpc.Compare.EQUAL, target=rpc.Compare.VALUE, key=FILLING, value=mark)


def _absent() -> Any:
    return rpc.Compare(result=rpc.Compare.EQUAL, target=rpc.Compare.CREATE, key=FILLING, create_revision=0)
