"""Events: what happened, for people to read. Bounded by count and by age."""

from __future__ import annotations

import contextlib
import heapq
from collections import Counter
from collections.abc import Iterator
from typing import Any

from msgspec.structs import replace

from atoll.api.service.access import Caller
from atoll.api.service.context import Context
from atoll.api.service.projects import require_project
from atoll.model import codec, keys
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import Put
from atoll.model.records import App, Event, event_id
from atoll.model.views import Page
from atoll.store.cache import Held
from atoll.store.index import by_project

MESSAGE_CHARS_MAX = 2_000
DATA_ITEMS_MAX = 32
DATA_BYTES_MAX = 4_096
"""Of all its items as they are kept; those that go beyond it are left out."""
PER_MINUTE_MAX = 600
"""Events of one node that a server takes in a minute: more than half of what is kept of a project."""
MINUTE_S = 60.0


def bounded(event: Event) -> Event:
    """Return `event` cut to its bounds."""
    data: dict[str, Any] = {}
    left_bytes = DATA_BYTES_MAX
    for name, value in list(event.data.items())[:DATA_ITEMS_MAX]:
        size_bytes = len(codec.encode({name: value}))
        if size_bytes <= left_bytes:
            left_bytes -= size_bytes
            data[name] = value
    if len(event.message) <= MESSAGE_CHARS_MAX and len(data) == len(event.data):
        return event
    return replace(event, message=event.message[:MESSAGE_CHARS_MAX], data=data)


class Allowance:
    """How many events each node may still write, `PER_MINUTE_MAX` in a minute; and how many more it would have, to be told once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.monotonic()
        self._taken: Counter[str] = Counter()
        self._over: Counter[str] = Counter()
        self._untold: Counter[str] = Counter()

    @contextlib.contextmanager
    def of(self, node: str, wanted: int) -> Iterator[tuple[int, int]]:
        """Yield how many of `wanted` events may be written now, and how many of minutes before were left out and are to be told.

        What raises in it was not written: nothing counts then, for it will be said again.
        """
        if self._clock.monotonic() - self._began >= MINUTE_S:
            self._began = self._clock.monotonic()
            self._untold.update(self._over)
            self._taken.clear()
            self._over.clear()
        room = min(wanted, PER_MINUTE_MAX - self._taken[node])
        untold = self._untold.pop(node, 0)
        self._taken[node] += room
        try:
            yield room, untold
        except BaseException:
            self._taken[node] = max(0, self._taken[node] - room)
            self._untold[node] += untold
            raise
        self._over[node] += wanted - room


class Events:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state

    def all(self, project: str, *, subject: str | None = None, limit: int, after: str = "") -> Page[Event]:
        """Return the project's events, or those of one subject (`app/NAME` has its instances' too), newest first."""
        require_project(self._context, project)
        found = [
            (_order(held), held)
            for held in self._state.found(Event, by_project, project).values()
            if subject is None or concerns(held.record, subject)
        ]
        if after:
            mark = self._state.get(Event, f"{project}/{after}")
            limit_order = _order(mark) if mark is not None else (float("inf"), 0, "")
            found = [item for item in found if item[0] < limit_order]
        newest = heapq.nlargest(limit, found, key=lambda item: item[0])
        items = tuple(held.record for _, held in newest)
        return Page(items=items, revision=self._state.revision, next=items[-1].id if len(found) > limit else None)


def told_by(context: Context, caller: Caller, app: App, code: str, message: str) -> Put:
    """Return what records that a user did something to an app, to be written together with it.

    Of one app and code there is one event in a second, the last, so that who repeats it in a loop fills no store.
    """
    at = context.clock.now()
    id = event_id(int(at), f"{app.name}-{code}")
    who = caller.name or caller.id
    event = Event(
        id=id, at=at, project=app.project, subject=f"app/{app.name}", code=code, message=f"{message}, by {who}", data={"by": who}
    )
    return Put(keys.event(app.project, id), codec.encode(event))


def concerns(event: Event, subject: str) -> bool:
    """An app's story is also that of its instances, which name it in `data`."""
    if event.subject == subject:
        return True
    kind, _, name = subject.partition("/")
    return kind in ("app", "job") and event.data.get(kind) == name


def _order(held: Held[Event]) -> tuple[float, int, str]:
    return held.record.at, held.created, held.record.id
