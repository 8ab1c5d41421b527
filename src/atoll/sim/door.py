"""The store through one of its members, as a server has it. Part of `members`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from atoll.model.errors import OutcomeUnknown, Unavailable
from atoll.model.ports.store import (
    LINEARIZABLE,
    RANGE_LIMIT_MAX,
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
from atoll.sim.member import Apply, Member
from atoll.sim.replication import PATIENCE_S
from atoll.store.transaction import Transaction, check_transaction

if TYPE_CHECKING:
    from atoll.sim.members import Cluster

T = TypeVar("T")
DEAF_LOOK_S = 0.5
DEAF_LOOKS_MAX = 6
"""A watch at a member that hears no leader is silent for so many looks, then it ends."""


class Door:
    """The store through one of its members. Implements `Store`; the way there is the caller's to model."""

    def __init__(self, cluster: Cluster, member: Member) -> None:
        self.cluster = cluster
        self.member = member

    async def _ask(self, apply: Apply) -> Any:
        await self.cluster.led(self.member)
        return await self._outcome(self.cluster.propose(apply))

    async def _outcome(self, answer: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(5 * PATIENCE_S):
                return await answer
        except TimeoutError:
            raise OutcomeUnknown("the store did not say in time") from None

    async def revision(self) -> Revision:
        await self.cluster.led(self.member, to_read=True)
        return await self.cluster.machine.revision()

    async def get(self, key: str, *, consistency: Consistency = LINEARIZABLE) -> KeyValue | None:
        if consistency is Consistency.SERIALIZABLE and (at := self._behind()) is not None:
            page = await self.cluster.machine.range(key, limit=1, at=at)
            return next((item for item in page.items if item.key == key), None)
        await self._may_read(consistency)
        return await self.cluster.machine.get(key)

    async def range(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = RANGE_LIMIT_MAX,
        at: Revision | None = None,
        consistency: Consistency = LINEARIZABLE,
    ) -> Range:
        if consistency is Consistency.SERIALIZABLE and (known := self._behind()) is not None:
            if at is not None and at > known:
                raise Unavailable(f"{self.member.name} has not come to revision {at} yet")
            at = known if at is None else at
        else:
            await self._may_read(consistency)
        return await self.cluster.machine.range(prefix, after=after, limit=limit, at=at)

    async def _may_read(self, consistency: Consistency) -> None:
        if consistency is Consistency.LINEARIZABLE:
            await self.cluster.led(self.member, to_read=True)

    def _behind(self) -> Revision | None:
        """Return the revision that a member which hears no leader knows; None where it knows the newest."""
        if self.cluster.hears(self.member):
            return None
        return max(self.member.seen, self.cluster.machine.floor)

    async def put(self, key: str, value: bytes, *, lease: LeaseId = LeaseId(0)) -> Revision:
        return (await self.txn((), (Put(key, value, lease),))).revision

    async def delete(self, key: str) -> Revision:
        return (await self.txn((), (Delete(key),))).revision

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        check_transaction(Transaction(compare, then, otherwise))
        result: TxnResult = await self._ask(lambda machine: machine.txn(compare, then, otherwise))
        return result

    async def watch(self, prefix: str, *, start: Revision) -> AsyncIterator[WatchBatch]:
        life = self.member.life
        async for batch in self.cluster.machine.watch(prefix, start=start):
            waits = 0
            while batch.revision > self.member.seen and not self.cluster.hears(self.member):
                self._check(life)
                if waits == DEAF_LOOKS_MAX:
                    raise Unavailable(f"{self.member.name} hears no leader")
                waits += 1
                await asyncio.sleep(DEAF_LOOK_S)
            self._check(life)
            yield batch

    def _check(self, life: int) -> None:
        if self.member.life != life:
            raise Unavailable(f"{self.member.name} was killed")

    async def lease_grant(self, ttl_s: float) -> Lease:
        lease: Lease = await self._ask(lambda machine: machine.lease_grant(ttl_s))
        return lease

    async def lease_keep_alive(self, lease: LeaseId) -> None:
        await self.cluster.led(self.member)
        await self.cluster.machine.lease_keep_alive(lease)

    async def lease_revoke(self, lease: LeaseId) -> None:
        await self._ask(lambda machine: machine.lease_revoke(lease))

    async def compact(self, revision: Revision) -> None:
        await self._ask(lambda machine: machine.compact(revision))

    async def close(self) -> None: ...
