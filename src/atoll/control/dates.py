"""Since when the dates of a clock have gone forward only. What was stamped before one was set back may be still to come."""

from __future__ import annotations


class Dates:
    """Follows one clock; `look` at least once a second, or a date that was set back by less goes unseen."""

    def __init__(self, now: float) -> None:
        self.forward_since = now
        """In seconds since the epoch, as the clock counts now: the last time that it was set back, or when this began."""
        self._last = now

    def look(self, now: float) -> None:
        if now < self._last:
            self.forward_since = now
        self._last = now
