"""What the leader's loop needs of the cell, kept ready on every server that may lead next.

To join the records of 100,000 instances and to count them for the scheduler takes seconds, and just when the cell has no leader.
A server that waits does it beforehand and follows the changes, at the cost of the leader's own indexes in memory: when it begins
to lead there is nothing to load, and it knows which owners changed last, where the leader before it may have left something undone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Self

import structlog

from atoll.control.placement import Placement
from atoll.control.world import Owner, World
from atoll.model.errors import Compacted, Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import Revision
from atoll.store.cache import Deltas, State

RECENT_S = 10.0
"""Owners that changed within so long are decided about first by one who begins to lead: longer than a lease runs on."""
RETRY_S = 1.0

log = structlog.get_logger()


class Joins:
    """The cache's records, joined, and the scheduler's side of them. Between two awaits both are at one revision."""

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self.world = World(state, clock.monotonic)
        self.placement = Placement(self.world)

    def rebuild(self) -> None:
        """Start from the cache as it is now."""
        for _ in self.rebuilding():
            pass

    def rebuilding(self) -> Iterator[None]:
        """As `rebuild`, with pauses, as `Placement.rebuilding`: what changes in them is to be told by `apply` afterwards."""
        self.world.rebuild()
        yield from self.placement.rebuilding()

    async def begin(self) -> AsyncIterator[Deltas]:
        """Start from the cache, giving way to others now and then, and return all changes since."""
        changes = self._state.changes()
        for _ in self.rebuilding():
            await asyncio.sleep(0)
        return changes

    def apply(self, deltas: Deltas) -> None:
        """Take over one revision's changes."""
        self.world.apply(deltas)
        self.placement.apply(deltas)

    def catch_up(self) -> None:
        """Take over all that the cache has by now."""
        try:
            for deltas in self._state.since(Revision(self.world.revision + 1)):
                self.apply(deltas)
        except Compacted:
            self.rebuild()
        self.world.revision = self._state.revision


class Heir:
    """Keeps joins while another server leads: `async with`, and `take` them when this one does; `begin` again afterwards."""

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self._clock = clock
        self._joins = Joins(state, clock)
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._recent: dict[Owner, float] = {}
        """Owner → when it changed last, on the monotonic clock; the last one last."""

    async def __aenter__(self) -> Self:
        self.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    def begin(self) -> None:
        """Start afresh, and follow until `take`. Safe to repeat."""
        if self._task is None:
            self._joins = Joins(self._state, self._clock)
            self._ready.clear()
            self._recent.clear()
            self._task = asyncio.create_task(self._run(), name="control: heir")

    async def take(self, at: Revision) -> tuple[Joins, AsyncIterator[Deltas]]:
        """Return the joins as the cache is now, and all changes from here on; from now on they are the caller's to keep.

        They hold all that was written before revision `at`, at which a term has begun: decided without the last writes of the
        leader before, a node is given away twice. What changed last is decided about first, and then all there is.
        """
        # Without a deadline: the term ends when its lease does.
        await self._state.reach(at)
        self.begin()
        await self._ready.wait()
        await self._stop()
        joins, self._joins = self._joins, Joins(self._state, self._clock)
        changes = self._state.changes()
        joins.catch_up()
        self._note(joins.world)
        joins.world.dirty.update(dict.fromkeys(reversed(self._recent)))
        joins.world.later.update(dict.fromkeys(joins.world.owners()))
        return joins, changes

    async def _run(self) -> None:
        joins = self._joins
        while True:
            self._ready.clear()
            try:
                changes = await joins.begin()
                self._ready.set()
                # Without a deadline: a quiet cell has no changes.
                async for deltas in changes:
                    joins.apply(deltas)
                    self._note(joins.world)
            except Compacted:
                log.info("what is kept ready to lead fell behind the cache and starts afresh")
            except Unavailable:
                return  # the cache is closed: nobody leads any more
            except Exception:  # the outer edge: who is to lead must not wait for ever for what one record has broken
                log.exception("what is kept ready to lead tripped and starts afresh", retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)

    async def _stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _note(self, world: World) -> None:
        """Remember what has changed, and forget what changed long ago."""
        now = self._clock.monotonic()
        for owner in world.dirty:
            self._recent.pop(owner, None)
            self._recent[owner] = now
        world.dirty.clear()
        world.later.clear()
        while self._recent:
            oldest = next(iter(self._recent))
            if now - self._recent[oldest] <= RECENT_S:
                break
            del self._recent[oldest]
