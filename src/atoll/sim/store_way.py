"""A server's way to the store: over the network to one member after another, slow and sometimes failing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from atoll.model.errors import OutcomeUnknown, Unavailable
from atoll.model.ports.store import (
    LINEARIZABLE,
    RANGE_LIMIT_MAX,
    Compare,
    Consistency,
    KeyValue,
    Lease,
    LeaseId,
    Op,
    Range,
    Revision,
    Store,
    TxnResult,
    WatchBatch,
)
from atoll.sim.faults import Faults, Life
from atoll.sim.members import Cluster, Door
from atoll.sim.net import Net
from atoll.sim.story import Story

T = TypeVar("T")
WATCH_LATE_S = 3.0
"""The longest that a batch of a watch comes late."""
STALL_S = 8.0
SILENT_S = 1.5
"""The longest wait for a member that does not answer."""
DEAF_S = 10.0
"""The longest that a watch waits on a silent connection."""


class ServerStore:
    """Implements `Store`. Reads and writes go to one member, and on to another where that did not take them."""

    def __init__(
        self, cluster: Cluster, server: str, life: Life, net: Net, faults: Faults, story: Story, choose: random.Random
    ) -> None:
        self._cluster = cluster
        self._server = server
        self._life = life
        self._net = net
        self._faults = faults
        self._story = story
        self._choose = choose
        self._names = sorted(cluster.members, key=lambda name: (net.site_of(name) != net.site_of(server), name))
        self._at = 0
        self.stalled_until = 0.0

    @property
    def _member(self) -> str:
        return self._names[self._at]

    def _move(self) -> None:
        if len(self._names) > 1:
            self._at = (self._at + 1) % len(self._names)
            self._story.mark("store: another member is asked")

    async def _before(self) -> Door:
        """Come to a member. Raises Unavailable where none can be reached."""
        self._life.check()
        await self._faults.pause()
        stall_s = self.stalled_until - asyncio.get_running_loop().time()
        if stall_s > 0:
            await asyncio.sleep(stall_s)
        self._life.check()
        if self._faults.hit(self._faults.profile.store_fails):
            self._story.mark("store: unavailable")
            raise Unavailable("the store does not answer")
        for _ in self._names:
            door = self._cluster.door(self._member)
            if door.member.alive and self._net.talk(self._server, self._member):
                return door
            if door.member.alive:
                await asyncio.sleep(self._choose.random() * SILENT_S)
                self._life.check()
            self._move()
        raise Unavailable("no member of the store can be reached")

    async def _after(self, door: Door) -> None:
        await self._faults.pause()
        if not self._life.alive:
            raise OutcomeUnknown("the server was killed while it wrote")
        if not self._net.reaches(door.member.name, self._server):
            raise OutcomeUnknown("the answer was lost")
        if self._faults.hit(self._faults.profile.store_fails):
            self._story.mark("store: outcome unknown")
            raise OutcomeUnknown("the store did not say")

    async def _read(self, call: Callable[[Store], Awaitable[T]]) -> T:
        door = await self._before()
        try:
            return await call(door)
        except Unavailable:
            self._move()
            raise

    async def _write(self, call: Callable[[Store], Awaitable[T]]) -> T:
        # On its way to the store a write goes on when its writer has given up, as any request on a wire does.
        write = asyncio.ensure_future(self._written(call))
        write.add_done_callback(_let_go)
        return await asyncio.shield(write)

    async def _written(self, call: Callable[[Store], Awaitable[T]]) -> T:
        door = await self._before()
        try:
            result = await call(door)
        except (Unavailable, OutcomeUnknown):
            self._move()
            raise
        await self._after(door)
        return result

    async def revision(self) -> Revision:
        return await self._read(lambda store: store.revision())

    async def get(self, key: str, *, consistency: Consistency = LINEARIZABLE) -> KeyValue | None:
        return await self._read(lambda store: store.get(key, consistency=consistency))

    async def range(
        self,
        prefix: str,
        *,
        after: str = "",
        limit: int = RANGE_LIMIT_MAX,
        at: Revision | None = None,
        consistency: Consistency = LINEARIZABLE,
    ) -> Range:
        return await self._read(lambda store: store.range(prefix, after=after, limit=limit, at=at, consistency=consistency))

    async def put(self, key: str, value: bytes, *, lease: LeaseId = LeaseId(0)) -> Revision:
        return await self._write(lambda store: store.put(key, value, lease=lease))

    async def delete(self, key: str) -> Revision:
        return await self._write(lambda store: store.delete(key))

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        return await self._write(lambda store: store.txn(compare, then, otherwise))

    async def watch(self, prefix: str, *, start: Revision) -> AsyncIterator[WatchBatch]:
        here = Revision(0)
        self._life.check()
        door = self._cluster.door(self._member)
        name = door.member.name
        if not door.member.alive or not self._net.talk(self._server, name):
            self._move()
            raise Unavailable(f"{name} cannot be reached")
        with self._net.connection(self._server, name) as broken:
            async for batch in door.watch(prefix, start=start):
                if batch.revision > here:
                    await self._faults.pause()
                    if self._faults.hit(self._faults.profile.slow_watch):
                        self._story.mark("watch: late")
                        await self._faults.dawdle(WATCH_LATE_S)
                    try:
                        async with asyncio.timeout(DEAF_S):
                            await self._net.arrives(name, self._server)
                    except TimeoutError:
                        self._move()
                        raise Unavailable("the watch fell silent") from None
                    # What was written meanwhile comes along at once.
                    here = self._cluster.machine.newest
                self._life.check()
                if broken.done() or self._faults.hit(self._faults.profile.store_fails):
                    self._story.mark("watch: cut")
                    self._move()
                    raise Unavailable("the watch was cut")
                yield batch

    async def lease_grant(self, ttl_s: float) -> Lease:
        return await self._write(lambda store: store.lease_grant(ttl_s))

    async def lease_keep_alive(self, lease: LeaseId) -> None:
        await self._read(lambda store: store.lease_keep_alive(lease))

    async def lease_revoke(self, lease: LeaseId) -> None:
        await self._write(lambda store: store.lease_revoke(lease))

    async def compact(self, revision: Revision) -> None:
        await self._write(lambda store: store.compact(revision))

    async def close(self) -> None: ...


def _let_go(write: asyncio.Future[T]) -> None:
    """Look at the outcome, which may interest nobody any more."""
    if not write.cancelled():
        write.exception()
