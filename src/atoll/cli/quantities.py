"""Values of options as people write them: spans of time, moments, and times that come again."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import click

from atoll.model.cron import NAMED, zone_of
from atoll.model.errors import Invalid
from atoll.model.units import Seconds

DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_TIME = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])")


class Span(click.ParamType[Seconds]):
    """`10m`, `1h30m`, `90s`, or a number of seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Seconds:
        if isinstance(value, Seconds):
            return value
        try:
            return Seconds.parse(float(value) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", str(value)) else value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SPAN = Span()


def moment(text: str, option: str) -> float:
    """Return `2026-12-06 02:00 UTC`, or the same in ISO 8601, as seconds since the epoch; without a zone it is here.
    `option` is what it was given as.

    Raises Invalid.
    """
    words = text.strip()
    last = words.split()[-1] if words else ""
    try:
        if len(words.split()) > 1 and not _TIME.match(last):
            at = datetime.fromisoformat(words[: -len(last)].strip()).replace(tzinfo=zone_of(last))
        else:
            at = datetime.fromisoformat(words)
            at = at if at.tzinfo is not None else at.astimezone()
    except (ValueError, Invalid):
        mend = "write for example '2026-12-06 02:00 UTC', or 2026-12-06T02:00:00Z"
        raise Invalid(f"{option}: {text[:60]!r} is no moment", field=option.strip("-"), mend=mend) from None
    return at.astimezone(UTC).timestamp()


def again(text: str) -> tuple[str, str]:
    """Return `Sun 02:00 UTC`, `02:00`, `Mon,Thu 22:30 Europe/Berlin`, or a cron expression, as (cron expression, time zone).

    Raises Invalid. Without a zone it is UTC.
    """
    words = text.split()
    if text.strip().lower() in NAMED or len(words) == 5 or (len(words) == 6 and not _TIME.fullmatch(words[1])):
        fields = words[:1] if text.strip().startswith("@") else words[:5]
        return " ".join(fields), (words[5] if len(words) == 6 else "UTC")
    at = next((index for index, word in enumerate(words[:2]) if _TIME.fullmatch(word)), None)
    days = words[0].lower().split(",") if at == 1 else []
    if at is None or len(words) > at + 2 or any(day[:3] not in DAYS for day in days):
        mend = (
            "write for example 'Sun 02:00 UTC', 'Mon,Thu 22:30 Europe/Berlin', '02:00', or a cron expression such as '0 2 * * SUN'"
        )
        raise Invalid(f"--every: {text[:60]!r} does not say when it comes again", field="every", mend=mend)
    hour, minute = words[at].split(":")
    weekdays = ",".join(day[:3].upper() for day in days) or "*"
    return f"{int(minute)} {int(hour)} * * {weekdays}", (words[at + 1] if len(words) > at + 1 else "UTC")
