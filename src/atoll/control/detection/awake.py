"""Time as this process lives it: while it is paused, none passes. Pure.

A process that the machine stopped for three seconds has heard nobody for three seconds, and knows nothing of anybody. By this
clock it has merely blinked. (Lifeguard's local health, in one number: Dadgar, Phillips, Currey, 2018, arXiv:1707.00788.)
"""

from __future__ import annotations

STEP_MAX_S = 0.3
"""More than this between two ticks was a pause, and only so much of it counts. Three ticks may be missed."""
BEHIND_MAX_S = 10.0
"""So much more time behind than not, and it is no burst that passes: time goes on again, and what is heard says little."""


class AwakeClock:
    def __init__(self, monotonic: float) -> None:
        self._last = monotonic
        self._passed = 0.0
        self.paused_s = 0.0
        """Of all pauses together."""
        self.overrun = False
        """Whether who is behind has been so for `BEHIND_MAX_S` and has not caught up for as long."""
        self._behind_s = 0.0

    def tick(self, monotonic: float, *, behind: bool = False) -> float:
        """Take in that it is `monotonic` now, and return the time awake. Called at least every `STEP_MAX_S` by one who is.

        Who is `behind` with what it is told is not awake either: what it has not heard may be waiting for it. But anybody can send
        more than is taken, and time must not stand still for that for ever: see `overrun`. Who is behind half of the time or less
        is never overrun, and its time goes at half speed or faster.
        """
        step = monotonic - self._last
        self._last = monotonic
        counted = min(max(step, 0.0), STEP_MAX_S)
        self._behind_s = min(max(self._behind_s + (counted if behind else -counted), 0.0), BEHIND_MAX_S)
        self.overrun = self._behind_s > 0.0 if self.overrun else self._behind_s >= BEHIND_MAX_S
        if behind and not self.overrun:
            counted = 0.0
        self.paused_s += step - counted
        self._passed += counted
        return self._passed

    def now(self) -> float:
        """Return the time awake at the last tick."""
        return self._passed
