"""What every kind of answer is made of: pages, errors, and the lines of a watch."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from msgspec import Struct

from atoll.model.streams import ErrorBody

PAGE_LIMIT_MAX = 1_000
"""Items in one page; `next` is what to pass as `after` for the following page."""

T = TypeVar("T")


class ErrorAnswer(Struct, frozen=True):
    error: ErrorBody


class Page(Struct, Generic[T], frozen=True, kw_only=True):
    items: tuple[T, ...]
    revision: int
    next: str | None = None


class WatchLine(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of `GET /v1/watch`. A line without `kind` is a bookmark: all up to `revision` has been sent.

    `record` None is a deletion. Resume with `from = revision + 1` of the last line, after which nothing is lost or twice.
    """

    revision: int
    kind: str | None = None
    key: str | None = None
    """Behind the kind's prefix: `PROJECT/NAME` or `NAME`."""
    record: Any = None
