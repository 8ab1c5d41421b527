"""The cron expressions that workerd reads, checked before a worker with one is deployed: workerd ends at once over a bad one.

Its dialect is not that of a job's schedule (`cron.py`): weekdays are 1 to 7 from Sunday, the day of the month also takes `L`, `LW`,
`L-3`, `L-3W` and `15W`, the weekday `L`, `6L` and `2#1`. No range goes down, no `*` is in a list, and what never comes is refused.
The rules are those at the head of workerd's `cron.js`, its dialect Cloudflare's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct

from atoll.model.errors import Invalid

MEND = "write minute, hour, day, month and weekday (1 to 7 from Sunday, or SUN to SAT), as in '*/5 * * * *' or '0 2 * * MON-FRI'"
OFFSET_MAX = 30
WEEKS_MAX = 5
LONGEST = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
"""Days that each month has at most."""


class _Field(Struct, frozen=True):
    name: str
    first: int
    last: int
    words: tuple[str, ...] = ()


_MINUTE = _Field("minute", 0, 59)
_HOUR = _Field("hour", 0, 23)
_DAY = _Field("day", 1, 31)
_MONTH = _Field("month", 1, 12, ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"))
_WEEKDAY = _Field("weekday", 1, 7, ("sun", "mon", "tue", "wed", "thu", "fri", "sat"))


def check_worker_crons(expressions: Sequence[str], *, field: str) -> None:
    """Raise Invalid, naming `field` and the place in it, for the first expression that workerd would not take."""
    for index, expression in enumerate(expressions):
        try:
            _check(expression)
        except ValueError as error:
            place = f"{field}[{index}]"
            raise Invalid(f"{place}: {expression!r} is no cron expression of workers: {error}", field=place, mend=MEND) from None


def _check(expression: str) -> None:
    fields = expression.split()
    if len(fields) != 5:
        raise ValueError(f"{len(fields)} fields, and there are five")
    minute, hour, day, month, weekday = fields
    _values(minute, _MINUTE)
    _values(hour, _HOUR)
    needed = _days_needed(day)
    months = _values(month, _MONTH)
    _check_weekday(weekday)
    # Where both days are said either is enough, and every weekday comes in every month.
    if weekday == "*" and needed > max(LONGEST[number - 1] for number in months):
        raise ValueError("it never comes")


def _days_needed(text: str) -> int:
    """Return how many days a month must have for this day of the month to be in it."""
    if text in ("L", "LW"):
        return 1
    if (offset := re.fullmatch(r"L-([0-9]+)W?", text)) is not None:
        back = int(offset[1])
        if not 1 <= back <= OFFSET_MAX:
            raise ValueError(f"the day is {text}, and goes back 1 to {OFFSET_MAX}")
        return back + 1
    if text.endswith("W"):
        return _value(text[:-1], _DAY)
    return min(_values(text, _DAY))


def _check_weekday(text: str) -> None:
    if text == "L":
        return
    if text.endswith("L"):
        _value(text[:-1], _WEEKDAY)
    elif "#" in text:
        day, _, nth = text.partition("#")
        _value(day, _WEEKDAY)
        if (count := _digits(nth)) is None or not 1 <= count <= WEEKS_MAX:
            raise ValueError(f"the weekday is {text}, and '#' is followed by 1 to {WEEKS_MAX}")
    else:
        _values(text, _WEEKDAY)


def _values(text: str, field: _Field) -> set[int]:
    """Return what a list of values, ranges and steps names."""
    found: set[int] = set()
    items = text.split(",")
    for item in items:
        if item == "*" and len(items) > 1:
            raise ValueError(f"the {field.name} has '*' in a list")
        span, slash, every = item.partition("/")
        step = _digits(every) if slash else 1
        if step is None or not 1 <= step <= field.last - field.first:
            raise ValueError(f"the {field.name} has a bad step: {item}")
        first, last = field.first, field.last
        if span != "*":
            begin, dash, end = span.partition("-")
            first = _value(begin, field)
            last = _value(end, field) if dash else field.last if slash else first
        if first > last:
            raise ValueError(f"the {field.name} has a range that goes down: {item}")
        found.update(range(first, last + 1, step))
    return found


def _value(text: str, field: _Field) -> int:
    number = field.first + field.words.index(text.lower()) if text.lower() in field.words else _digits(text)
    if number is None or not field.first <= number <= field.last:
        raise ValueError(f"the {field.name} is {text!r}, and {field.first} to {field.last} are there")
    return number


def _digits(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None
