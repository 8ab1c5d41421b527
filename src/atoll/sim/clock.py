"""The clock port on a virtual loop."""

from __future__ import annotations

import asyncio

EPOCH = 1_800_000_040.0
"""When every simulation begins, in seconds since the epoch: 20 s before a full minute, so that a schedule's time comes soon."""


class VirtualClock:
    """Reads the loop's time; `skew_s` is how far this machine's idea of the date is off, and changes when its date is set."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, skew_s: float = 0.0) -> None:
        self._loop = loop
        self.skew_s = skew_s

    def now(self) -> float:
        return round(EPOCH + self._loop.time() + self.skew_s, 6)

    def monotonic(self) -> float:
        return self._loop.time()

    def jump(self, span_s: float) -> None:
        """Set the date forward, or back where `span_s` is negative."""
        self.skew_s += span_s
