"""Times of the day and the week in which an app has at least so many instances. Pure."""

from __future__ import annotations

from msgspec import Struct

from atoll.model.cron import tick_after, tick_before
from atoll.model.spec import Scale, ScaleWindow


class Floor(Struct, frozen=True, kw_only=True):
    least: int
    """The most of all windows that are open; 0 without one."""
    until: float | None
    """When that may change, in seconds since the epoch."""


def floor_of(scale: Scale, now: float) -> Floor:
    """Return what the windows of `scale` ask for at `now`, in seconds since the epoch."""
    least, changes = 0, []
    for window in scale.windows:
        if is_open(window, now):
            least = max(least, window.replicas)
        changes += [tick_after(each, window.timezone, now) for each in (window.start, window.end)]
    return Floor(least=least, until=min((at for at in changes if at is not None), default=None))


def is_open(window: ScaleWindow, now: float) -> bool:
    """Whether it has begun and not ended since. Where both come at once, it begins."""
    start = tick_before(window.start, window.timezone, now)
    end = tick_before(window.end, window.timezone, now)
    return start is not None and (end is None or start >= end)
