"""Times that come again: five fields as Debian's cron reads them (minute, hour, day, month, weekday), in a time zone.

The reading of the fields, and what happens when clocks are put forward or back, is that of `cronsim`, which follows Debian's cron:
a time that a change of the clock leaves out comes right after it, and one that comes twice is taken once.
Times are seconds since the epoch. Everything here is a pure function of its arguments.
"""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from atoll.model.errors import Invalid

NAMED = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
EXPRESSION_CHARS_MAX = 100
ZONE_CHARS_MAX = 64
COUNTED_MAX = 1_000
"""Times of an outage that are counted; beyond it there are "at least so many"."""


def check_cron(expression: str, zone: str, *, field: str, zone_field: str = "timezone") -> None:
    """Raise Invalid, naming `field`, for what is no expression, never comes, or names a time zone that nobody knows."""
    try:
        zone_of(zone)
    except Invalid as error:
        raise Invalid(f"{zone_field}: {error}", field=zone_field, mend=error.mend) from None
    mend = "write minute, hour, day, month and weekday, as in '*/5 * * * *' or '0 2 * * SUN', or one of " + ", ".join(sorted(NAMED))
    if len(expression) > EXPRESSION_CHARS_MAX:
        raise Invalid(f"{field}: over {EXPRESSION_CHARS_MAX} characters", field=field, mend=mend)
    try:
        comes = tick_after(expression, zone, 0.0)
    except (CronSimError, ValueError, OverflowError) as error:
        raise Invalid(f"{field}: {expression!r} is no cron expression: {error}", field=field, mend=mend) from None
    if comes is None:
        raise Invalid(f"{field}: {expression!r} never comes", field=field, mend=mend)


@lru_cache(maxsize=256)
def zone_of(name: str) -> tzinfo:
    """Return the time zone called `name`, as `Europe/Berlin`. Raises Invalid."""
    if name.upper() in ("UTC", "Z"):
        return UTC
    try:
        if len(name) > ZONE_CHARS_MAX:
            raise ValueError("too long")
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        # Not found is a KeyError; a directory of the data base, or one above it, an OSError or a ValueError.
        mend = "write UTC, or a name of the time zone data base such as Europe/Berlin"
        raise Invalid(f"no time zone {name[:60]!r}", mend=mend) from None


def tick_after(expression: str, zone: str, at: float) -> float | None:
    """Return the first time after `at`; None where there is none within 50 years."""
    return _tick(expression, zone, int(at // 1), reverse=False)


def tick_before(expression: str, zone: str, at: float) -> float | None:
    """Return the last time at or before `at`."""
    return _tick(expression, zone, int(at // 1) + 1, reverse=True)


@lru_cache(maxsize=8_192)
def _tick(expression: str, zone: str, at_s: int, *, reverse: bool) -> float | None:
    fields = NAMED.get(expression.strip().lower(), expression)
    if len(fields.split()) != 5:
        raise CronSimError(f"{len(fields.split())} fields, and there are five")
    try:
        return float(next(CronSim(fields, datetime.fromtimestamp(at_s, zone_of(zone)), reverse=reverse)).timestamp())
    except StopIteration:
        return None


def ticks_between(expression: str, zone: str, after: float, until: float) -> int:
    """Return how many times lie after `after` and at or before `until`, counted up to `COUNTED_MAX`."""
    count, at = 0, after
    while count < COUNTED_MAX:
        following = tick_after(expression, zone, at)
        if following is None or following > until:
            break
        count, at = count + 1, following
    return count
