"""What the leader's loop needs of the cell, kept ready on every server that may lead next.

To join the records of 100,000 instances and to count them for the scheduler takes seconds, and just when the cell has no leader.
A server that waits does it beforehand and follows the changes, at the cost of the leader's own indexes in memory: when it begins
to lead there is nothing to load, and it knows which owners changed last, where the leader before it may have left something undone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Self

import structlog

from atoll.control.placement import Placement
from atoll.control.world import Owner, World
from atoll.model.errors import Compacted, Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import Revision
from atoll.scheduling.snapshot import Snapshot
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
        self._next = Revision(0)
        """The revision that is taken over next."""
        self.whole = False
        """Whether everything is there, and nothing has tripped over it since."""
        self.told: Callable[[Deltas], None] = lambda deltas: None
        """Called with what has been taken over."""

    def rebuild(self) -> None:
        """Start from the cache as it is now."""
        for _ in self._rebuilding():
            pass

    async def begin(self) -> None:
        """As `rebuild`, giving way to others now and then."""
        for _ in self._rebuilding():
            await asyncio.sleep(0)

    def _rebuilding(self) -> Iterator[None]:
        """What changes in a pause is found by the next `pull`, whether it was seen or not."""
        self.whole = False
        self._next = Revision(self._state.revision + 1)
        self.world.rebuild()
        yield from self.placement.rebuilding()
        self.whole = True

    def pull(self) -> None:
        """Take over all that the cache has by now. Raises Compacted: start again; so does every call after one that tripped, for it
        may have left a change half taken over."""
        if not self.whole:
            raise Compacted("what is joined is not whole")
        self.whole = False
        for deltas in self._state.since(self._next):
            self.world.apply(deltas)
            self.placement.apply(deltas)
            self._next = Revision(deltas.revision + 1)
            self.told(deltas)
        self._next = Revision(self._state.revision + 1)
        self.whole = True

    async def follow(self) -> None:
        """Take over whatever changes, for ever. Raises Compacted, and Unavailable when the cache is closed."""
        while True:
            # Without a deadline: a quiet cell has no changes.
            await self._state.reach(self._next)
            self.pull()

    def copy(self, like: Snapshot | None = None) -> Snapshot | None:
        """Return a copy of the scheduler's snapshot as the cache is now, for a dry run; None while there is none. See
        `Snapshot.copy`."""
        if not self.whole:
            return None
        try:
            self.pull()
        except Compacted:
            return None
        except Exception:  # whoever keeps these starts them afresh; a dry run does without
            log.exception("what is kept ready to lead tripped in a dry run")
            return None
        return self.placement.copy(like)


class Heir:
    """Keeps joins while another server leads: `async with`, and `take` them when this one does; `begin` again afterwards."""

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self._clock = clock
        self.joins = Joins(state, clock)
        """Those that are kept now, here or by who has taken them."""
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
            self.joins = Joins(self._state, self._clock)
            self._ready.clear()
            self._recent.clear()
            self._task = asyncio.create_task(self._run(), name="control: heir")

    def copy(self, like: Snapshot | None = None) -> Snapshot | None:
        """As `Joins.copy`, whoever keeps them now."""
        return self.joins.copy(like)

    async def take(self, at: Revision) -> Joins:
        """Return the joins as the cache is now; from here on they are the caller's to keep.

        They hold all that was written before revision `at`, at which a term has begun: decided without the last writes of the
        leader before, a node is given away twice. What changed last is decided about first, and then all there is.
        """
        # Without a deadline: the term ends when its lease does.
        await self._state.reach(at)
        self.begin()
        await self._ready.wait()
        await self._stop()
        joins, world = self.joins, self.joins.world
        try:
            joins.pull()
        except Compacted:
            joins.rebuild()
        self._note()
        joins.told = lambda deltas: None
        world.revision = self._state.revision
        world.dirty.update(dict.fromkeys(reversed(self._recent)))
        world.later.update(dict.fromkeys(world.owners()))
        return joins

    async def _run(self) -> None:
        joins = self.joins
        joins.told = lambda deltas: self._note()
        while True:
            self._ready.clear()
            try:
                await joins.begin()
                self._note()
                self._ready.set()
                await joins.follow()
            except Compacted:
                log.info("what is kept ready to lead fell behind the cache and starts afresh")
            except Unavailable:
                return  # the cache is closed: nobody leads any more
            except Exception:  # the outer edge: who is to lead must not wait for ever for what one record has broken
                log.exception("what is kept ready to lead tripped and starts afresh", retry_s=RETRY_S)
                self._ready.clear()  # nobody takes it meanwhile
                await asyncio.sleep(RETRY_S)

    async def _stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _note(self) -> None:
        """Remember what has changed, and forget what changed long ago."""
        now, world = self._clock.monotonic(), self.joins.world
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
