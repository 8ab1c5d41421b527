"""What happened, for people to read."""

from __future__ import annotations

import enum
from typing import Any

from atoll.model.records.basis import Record


class Severity(enum.StrEnum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def event_id(at: float, rest: str) -> str:
    """Return an event's id: its time leads, so that ids sort as they happened; `rest` tells those of one moment apart."""
    return f"{int(at * 1000):013d}-{rest}"


class Event(Record, frozen=True, kw_only=True):
    """Something that happened to a subject, for people to read. Kept for a bounded time and count.

    `subject` is `app/NAME`, `job/NAME`, `instance/ID`, `node/NAME` or `ingress/NAME`; `code` is stable, kebab-case.
    """

    id: str
    at: float
    project: str
    subject: str
    code: str
    message: str
    severity: Severity = Severity.INFO
    node: str | None = None
    data: dict[str, Any] = {}
