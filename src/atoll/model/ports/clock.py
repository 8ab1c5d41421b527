"""Time and randomness as ports, so that the simulator owns both."""

from __future__ import annotations

import random
import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since the epoch (UTC), for records. May jump."""
        ...

    def monotonic(self) -> float:
        """Seconds that never jump, for measuring spans and deadlines."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


def system_random() -> random.Random:
    """Return a generator seeded by the operating system; the simulator passes a seeded one instead."""
    return random.Random()
