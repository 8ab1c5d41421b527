"""What one member of the store has: its log, how much of it is on its disk, and what the log means."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from atoll.model.ports.store import (
    LeaseId,
    Revision,
)
from atoll.store.memory import MemoryStore

T = TypeVar("T")


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run to its end what never waits, as a memory store's calls do not."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise AssertionError("it waits")


class Machine(MemoryStore):
    """What the log means. Leases end only when the log says so: without a majority nobody's lease runs out."""

    def _begin_expiry(self) -> None: ...

    @property
    def newest(self) -> Revision:
        return self._window.newest

    @property
    def floor(self) -> Revision:
        """The oldest revision that is held."""
        return self._window.floor

    def forget(self) -> None:
        """End all watches: what they tell of is no longer so."""
        self._window.close("the store has forgotten")

    def ends(self) -> dict[LeaseId, float]:
        """Return lease → when it ends, by the leader's clock."""
        return self._ends

    async def expire(self, at: float) -> None:
        """Remove the leases that were over `at`, unless they have been renewed since."""
        for lease in [lease for lease, end in self._ends.items() if end <= at]:
            await self.lease_revoke(lease)

    def renew_leases(self) -> None:
        """Give every lease its whole time again, as a new leader does."""
        for id, lease in self._leases.items():
            self._ends[id] = self._clock.monotonic() + lease.ttl_s


Apply = Callable[[Machine], Coroutine[Any, Any, Any]]


class Entry:
    """One change in the log. `answer` is who asked for it, as long as its leader leads."""

    __slots__ = ("answer", "apply", "term")

    def __init__(self, term: int, apply: Apply, answer: asyncio.Future[Any] | None) -> None:
        self.term = term
        self.apply = apply
        self.answer = answer


class Member:
    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.full = False
        self.learning = False
        """It has lost its disk, and may not vote until it has caught up."""
        self.log: list[Entry] = []
        self.durable = 0
        """How many entries are on its disk."""
        self.life = 1
        self.heard = True
        """Whether it hears the leader."""
        self.seen = Revision(0)
        """The revision that it had heard of when it last did."""

    @property
    def up(self) -> bool:
        return self.alive and not self.paused
