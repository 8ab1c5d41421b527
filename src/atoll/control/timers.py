"""When to look at each owner again though nothing has happened to it."""

from __future__ import annotations

import heapq

from atoll.control.world import Owner

STALE_MAX = 1_000
"""Entries beyond twice those in force after which the heap is made anew."""


class Timers:
    """At most one time for each owner; the last one that was set counts."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, Owner]] = []
        self._due: dict[Owner, float] = {}

    def set(self, owner: Owner, at: float | None) -> None:
        """Look at `owner` at `at`, in seconds since the epoch; None: not by itself."""
        if at is None:
            self._due.pop(owner, None)
            return
        if self._due.get(owner) == at:
            return
        self._due[owner] = at
        heapq.heappush(self._heap, (at, owner))
        if len(self._heap) > 2 * len(self._due) + STALE_MAX:
            self._heap = [(at, owner) for owner, at in self._due.items()]
            heapq.heapify(self._heap)

    def set_sooner(self, owner: Owner, at: float) -> None:
        """As `set`, but for an owner whose time comes before `at` anyway."""
        if at < self._due.get(owner, at + 1):
            self.set(owner, at)

    def next(self) -> float | None:
        """Return the earliest time of all."""
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now: float) -> list[Owner]:
        """Return the owners whose time has come, each once."""
        found: list[Owner] = []
        while (at := self.next()) is not None and at <= now:
            owner = heapq.heappop(self._heap)[1]
            del self._due[owner]
            found.append(owner)
        return found
