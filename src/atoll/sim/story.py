"""What happened in a run: a readable account, a fingerprint of it, and which situations were met."""

from __future__ import annotations

import asyncio
import hashlib
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

import structlog

LINES_MAX = 4_000
"""Newest lines of the account that are kept."""
_SHOWN_MAX = 300


class Broken(Exception):
    """A promise was broken: of the whole (an invariant), or of the simulator's own parts."""


class Story:
    """The account of one run. Lines are put into words only when someone reads them."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._lines: deque[tuple[float, str, Mapping[str, Any]]] = deque(maxlen=LINES_MAX)
        self._digest = hashlib.sha256()
        self.marks: Counter[str] = Counter()
        """Situations that were met, by name."""
        self.broken: list[str] = []
        self.failed = asyncio.Event()

    def clock(self, now: Callable[[], float]) -> None:
        """Tell the time by `now` from here on."""
        self._now = now

    def tell(self, what: str, /, **details: Any) -> None:
        self._lines.append((self._now(), what, details))

    def mark(self, name: str) -> None:
        self.marks[name] += 1

    def imprint(self, *parts: object) -> None:
        """Make the fingerprint depend on `parts`, now."""
        self._digest.update(repr((round(self._now(), 6), *parts)).encode())

    def breaks(self, promise: str) -> None:
        """Note a broken promise; the run ends soon, and has failed."""
        self.failed.set()
        if len(self.broken) < 20:
            self.broken.append(f"{self._now():.3f} s: {promise}")
        self.tell(f"BROKEN: {promise}")

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()[:16]

    def lines(self) -> list[str]:
        return [f"{at:10.3f}  {what}{_in_words(details)}" for at, what, details in self._lines]


def _in_words(details: Mapping[str, Any]) -> str:
    return "".join(f"  {name}={str(value)[:_SHOWN_MAX]}" for name, value in details.items())


def listen(story: Story) -> None:
    """Let all logs of the process go into `story`; an exception that was logged breaks it, for no part may meet a surprise."""

    def take(logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        what = str(event.pop("event", ""))
        story.marks[f"log: {what}"] += 1
        if event.pop("exc_info", None):
            story.breaks(f"a surprise was logged: {what} {_exception()}")
        elif method in ("warning", "error", "critical", "info"):
            story.tell(f"[{method}] {what}", **event)
        raise structlog.DropEvent

    structlog.configure(processors=[take], cache_logger_on_first_use=False)


def _exception() -> str:
    return traceback.format_exc(limit=-6)
