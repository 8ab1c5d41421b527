"""Points in time, in words."""

from __future__ import annotations

from datetime import UTC, datetime

_END_OF_TIME_S = 253_402_300_799.0
"""31 December 9999: more than a calendar takes is shown as this."""


def clock_time(at: float) -> str:
    """Return a time (seconds since the epoch) as `2026-01-31 12:30:05 UTC`."""
    return f"{datetime.fromtimestamp(min(max(at, 0.0), _END_OF_TIME_S), UTC):%Y-%m-%d %H:%M:%S} UTC"
