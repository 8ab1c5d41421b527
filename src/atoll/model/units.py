"""Quantities as people write them (`"256MiB"`, `"1m30s"`, `0.5` cores) and as the code holds them."""

from __future__ import annotations

import math
import re

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(B|[kKMGTP]i?B?)?")
_FACTOR = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4, "p": 1000**5}
_BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_SPAN = re.compile(r"(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m(?!s))?(?:([0-9]+(?:\.[0-9]+)?)s)?(?:([0-9]+)ms)?")

BYTES_MAX = 1 << 50
SECONDS_MAX = 366 * 86_400.0
CORES_MAX = 4096


class Bytes(int):
    """A size in bytes, 0 to 1 PiB. Written as a whole number or as `"512MiB"`, `"1.5GB"`."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Bytes:
        """Raise ValueError with the mend for anything that is not a size."""
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(f"expected a size such as 268435456 or '256MiB', got {value!r}")
        if isinstance(value, str):
            match = _SIZE.fullmatch(value.strip())
            if match is None:
                raise ValueError(f"{value!r} is not a size; write a whole number of bytes or e.g. '256MiB'")
            unit = (match[2] or "").lower().removesuffix("b")
            factor = _BINARY[unit[0]] if unit.endswith("i") else _FACTOR[unit]
            number = float(match[1]) * factor
            if number > BYTES_MAX:
                raise ValueError(f"a size must lie between 0 and 1 PiB, got {value[:40]!r}")
            value = int(number)
        if not 0 <= value <= BYTES_MAX:
            raise ValueError(f"a size must lie between 0 and 1 PiB, got {value}")
        return cls(value)


class Seconds(float):
    """A span of time in seconds, 0 to one year. Written as a number or as `"500ms"`, `"1m30s"`, `"2h"`."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Seconds:
        """Raise ValueError with the mend for anything that is not a span of time."""
        if isinstance(value, str):
            match = _SPAN.fullmatch(value.strip())
            if match is None or not any(match.groups()):
                raise ValueError(f"{value!r} is not a duration; write seconds as a number or e.g. '500ms', '1m30s'")
            days, hours, minutes, seconds, millis = (float(part or 0) for part in match.groups())
            value = ((days * 24 + hours) * 60 + minutes) * 60 + seconds + millis / 1000
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"expected a duration such as 30 or '30s', got {value!r}")
        if not (math.isfinite(value) and 0 <= value <= SECONDS_MAX):
            raise ValueError(f"a duration must lie between 0 and 366 days, got {value}")
        return cls(value)


class Cores(float):
    """An amount of processor in cores, 0.01 to 4096, held exactly to a thousandth."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Cores:
        """Raise ValueError with the mend for anything that is not an amount of cores."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"expected cores as a number such as 0.5, got {value!r}")
        if not (math.isfinite(value) and 0.01 <= value <= CORES_MAX):
            raise ValueError(f"cores must lie between 0.01 and {CORES_MAX}, got {value}")
        return cls(round(value, 3))

    @property
    def milli(self) -> int:
        """Thousandths of a core, the unit that the scheduler counts in."""
        return round(self * 1000)


def format_bytes(value: int) -> str:
    """Return `value` as people read it: `format_bytes(268435456) == "256.0MiB"`."""
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f}{unit}" if unit == "B" else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}TiB"


def format_count(count: int, what: str) -> str:
    """Return so many of something: `format_count(1, "file") == "1 file"`, `format_count(3, "file") == "3 files"`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def format_seconds(value: float) -> str:
    """Return a span as people read it: `"0.5s"`, `"3m10s"`, `"2d4h"`."""
    if value < 60:
        return f"{value:.1f}s" if value < 10 else f"{value:.0f}s"
    minutes, seconds = divmod(int(value), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours}h"
