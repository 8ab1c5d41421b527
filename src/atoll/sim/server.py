"""One server: the API's service, its cache, and the leader's loops, over a disk that outlives it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from atoll.api.service.context import KINDS as API_KINDS
from atoll.api.service.service import Service
from atoll.control.leader import Term, lead
from atoll.control.loop import Loop
from atoll.control.world import KINDS as CONTROL_KINDS
from atoll.model.errors import AtollError, OutcomeUnknown, Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import (
    RANGE_LIMIT_MAX,
    Compare,
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
from atoll.sim.story import Story
from atoll.store.cache import State

KINDS: dict[str, type[Any]] = {**API_KINDS, **CONTROL_KINDS}
SECRET_KEY = bytes(range(32))
WATCH_LATE_S = 3.0
"""The longest that a batch of a watch comes late."""
STALL_S = 8.0
START_RETRY_S = 0.5


class ServerStore:
    """A server's way to the disk: slow, sometimes failing, and over when the server is killed. Implements `Store`."""

    def __init__(self, disk: Store, life: Life, faults: Faults, story: Story) -> None:
        self._disk = disk
        self._life = life
        self._faults = faults
        self._story = story
        self.stalled_until = 0.0

    async def _before(self) -> None:
        self._life.check()
        await self._faults.pause()
        stall_s = self.stalled_until - asyncio.get_running_loop().time()
        if stall_s > 0:
            await asyncio.sleep(stall_s)
        self._life.check()
        if self._faults.hit(self._faults.profile.store_fails):
            self._story.mark("store: unavailable")
            raise Unavailable("the disk does not answer")

    async def _after(self) -> None:
        await self._faults.pause()
        if not self._life.alive:
            raise OutcomeUnknown("the server was killed while it wrote")
        if self._faults.hit(self._faults.profile.store_fails):
            self._story.mark("store: outcome unknown")
            raise OutcomeUnknown("the disk did not say")

    async def revision(self) -> Revision:
        await self._before()
        return await self._disk.revision()

    async def get(self, key: str) -> KeyValue | None:
        await self._before()
        return await self._disk.get(key)

    async def range(self, prefix: str, *, after: str = "", limit: int = RANGE_LIMIT_MAX, at: Revision | None = None) -> Range:
        await self._before()
        return await self._disk.range(prefix, after=after, limit=limit, at=at)

    async def put(self, key: str, value: bytes, *, lease: LeaseId = LeaseId(0)) -> Revision:
        await self._before()
        revision = await self._disk.put(key, value, lease=lease)
        await self._after()
        return revision

    async def delete(self, key: str) -> Revision:
        await self._before()
        revision = await self._disk.delete(key)
        await self._after()
        return revision

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        # On its way to the disk a write goes on when its writer has given up, as any request on a wire does.
        write = asyncio.ensure_future(self._txn(compare, then, otherwise))
        write.add_done_callback(_let_go)
        return await asyncio.shield(write)

    async def _txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op]) -> TxnResult:
        await self._before()
        result = await self._disk.txn(compare, then, otherwise)
        await self._after()
        return result

    async def watch(self, prefix: str, *, start: Revision) -> AsyncIterator[WatchBatch]:
        here = Revision(0)
        async for batch in self._disk.watch(prefix, start=start):
            if batch.revision > here:
                await self._faults.pause()
                if self._faults.hit(self._faults.profile.slow_watch):
                    self._story.mark("watch: late")
                    await self._faults.dawdle(WATCH_LATE_S)
                # What was written meanwhile comes along at once.
                here = await self._disk.revision()
            self._life.check()
            if self._faults.hit(self._faults.profile.store_fails):
                self._story.mark("watch: cut")
                raise Unavailable("the watch was cut")
            yield batch

    async def lease_grant(self, ttl_s: float) -> Lease:
        await self._before()
        return await self._disk.lease_grant(ttl_s)

    async def lease_keep_alive(self, lease: LeaseId) -> None:
        await self._before()
        await self._disk.lease_keep_alive(lease)

    async def lease_revoke(self, lease: LeaseId) -> None:
        await self._before()
        await self._disk.lease_revoke(lease)
        await self._after()

    async def compact(self, revision: Revision) -> None:
        await self._before()
        await self._disk.compact(revision)

    async def close(self) -> None: ...


def _let_go(write: asyncio.Future[TxnResult]) -> None:
    """Look at the outcome, which may interest nobody any more."""
    if not write.cancelled():
        write.exception()


class Server:
    """The server's place; `start` and `crash` give it one life after another."""

    def __init__(
        self,
        disk: Store,
        clock: Clock,
        choose: random.Random,
        faults: Faults,
        story: Story,
        *,
        through: Callable[[Store], Store] = lambda store: store,
    ) -> None:
        self._disk = disk
        self._clock = clock
        self._choose = choose
        self._faults = faults
        self._story = story
        self._through = through
        self._lives = 0
        self._task: asyncio.Task[None] | None = None
        self.life = Life("the server")
        self.life.end()
        self.service: Service | None = None
        """None while it does not serve."""
        self._rivals: list[Life] = []
        self.store: ServerStore | None = None

    def start(self) -> None:
        if self.life.alive:
            return
        self._lives += 1
        self.life = Life(f"server life {self._lives}")
        self._story.tell("the server starts", life=self._lives)
        self._task = asyncio.create_task(self._run(self.life), name=f"server {self._lives}")

    async def crash(self) -> None:
        """Kill it; when this returns, nothing of it runs any more."""
        if not self.life.alive:
            return
        self._story.tell("the server is killed")
        self.service = None
        self.life.end()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def kill_rivals(self) -> None:
        """Kill them; what they still try has no effect."""
        for life in self._rivals:
            life.end()

    def stall(self) -> None:
        """Let its disk hang for a while, longer than a leader's lease."""
        if self.store is not None:
            self.store.stalled_until = asyncio.get_running_loop().time() + STALL_S

    async def rival(self, span_s: float) -> None:
        """Let a second server stand for leader for a while, then kill it: only one of the two may ever write as leader."""
        if self.service is None:
            return
        heard = self.service.heartbeats.last_seen()
        life = Life("the rival")
        self._rivals.append(life)
        store = self._through(ServerStore(self._disk, life, self._faults, self._story))

        async def work(term: Term) -> None:
            self._story.mark("leader: rival's term")
            await Loop(store, state, self._clock, self._choose, heard, term).run()

        try:
            async with asyncio.timeout(span_s), State(store, KINDS) as state:
                await lead(store, self._clock, "rival", work)
        except (AtollError, TimeoutError):
            self._story.tell("the rival is gone")
        finally:
            life.end()

    async def _run(self, life: Life) -> None:
        while True:
            try:
                await self._serve(life)
            except AtollError as error:
                # As a supervisor would: what could not start is started again.
                self._story.tell("the server could not start", cause=error.message)
                await asyncio.sleep(START_RETRY_S)

    async def _serve(self, life: Life) -> None:
        self.store = ServerStore(self._disk, life, self._faults, self._story)
        store = self._through(self.store)
        async with State(store, KINDS) as state:
            service = Service(
                store, state, self._clock, self._choose, SECRET_KEY, entropy=lambda count: self._choose.randbytes(count)
            )
            async with service:
                self.service = service
                heard = service.heartbeats.last_seen()

                async def work(term: Term) -> None:
                    self._story.mark("leader: term")
                    await Loop(store, state, self._clock, self._choose, heard, term).run()

                await lead(store, self._clock, "server", work)
