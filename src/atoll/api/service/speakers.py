"""Which process of an ingress is heard: each counts from its own start, and a report of one that has ended may come late."""

from __future__ import annotations

from collections.abc import Container

LATE_S = 15.0
"""What a process sent before its end has come, or never does."""


class Speakers:
    """Tells the processes of one name apart by when each was started. That is a date, and the next one's may be earlier."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[float, float]] = {}
        """Name → when its process was started, and when that one was heard last."""

    def hears(self, name: str, started: float, now: float) -> bool:
        """Return whether a process is the one that is heard from `now` (monotonic seconds) on.

        One that was started at another date is another process. The earlier of two takes over when the later one has been silent
        for `LATE_S`: before, it may be the one that has ended.
        """
        before, at = self._heard.get(name, (started, now))
        if started < before and now - at < LATE_S:
            return False
        self._heard[name] = (started, now)
        return True

    def keep(self, names: Container[str]) -> None:
        """Forget all others."""
        self._heard = {name: heard for name, heard in self._heard.items() if name in names}
