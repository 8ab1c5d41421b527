"""`GET /v1/watch`: records as they change, for people's tools. Resumable by revision, bounded for slow readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import msgspec

from atoll.api.service.access import EVERY_PROJECT, Caller
from atoll.api.service.context import KINDS, Context
from atoll.model import codec
from atoll.model.errors import Compacted, Invalid, Unavailable
from atoll.model.ports.store import Revision
from atoll.model.views import WatchLine
from atoll.store.cache import Deltas, Held
from atoll.store.index import by_project

WATCHED = {
    "projects",
    "apps",
    "app-statuses",
    "releases",
    "jobs",
    "job-statuses",
    "instances",
    "statuses",
    "nodes",
    "sites",
    "node-policies",
    "node-liveness",
    "maintenances",
    "reservations",
    "events",
    "ingresses",
}
"""Kinds that may be watched: none that holds a secret or a token."""
CELL_WIDE = {"nodes", "sites", "node-policies", "node-liveness", "maintenances", "reservations", "ingresses"}
"""Kinds that belong to no project."""
BOOKMARK_S = 5.0
"""The longest silence of a stream."""
LINES_AT_ONCE = 1_000
"""Lines that are joined into one piece of a stream."""
SHARED_MAX = 256
"""Revisions whose encoded lines are kept for the other watchers."""

_KINDS = {prefix.rstrip("/"): kind for prefix, kind in KINDS.items()}
_NAMES = {kind: name for name, kind in _KINDS.items()}


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """What one watcher wants. `project` None: everything that the caller may see."""

    kinds: frozenset[str]
    project: str | None = None
    start: int | None = None

    def wants(self, name: str, key: str) -> bool:
        if name not in self.kinds:
            return False
        return self.project is None or name in CELL_WIDE or key == self.project or key.startswith(self.project + "/")


def wanted(caller: Caller, kinds: str, project: str | None, start: str | None) -> Watch:
    """Return what the query of a watch asks for. Raises Invalid. The project has been checked against the token."""
    names = frozenset(kinds.split(",")) if kinds else frozenset(WATCHED)
    unknown = sorted(names - WATCHED)
    if unknown:
        raise Invalid(f"kinds: unknown kind {unknown[0][:40]!r}", field="kinds", mend=f"use some of {', '.join(sorted(WATCHED))}")
    if start is not None and (not start.isascii() or not start.isdecimal() or len(start) > 18):
        raise Invalid(f"from: {start[:40]!r} is not a revision", field="from")
    if project is None and caller.project != EVERY_PROJECT:
        project = caller.project
    return Watch(kinds=names, project=project, start=int(start) if start is not None else None)


class Watching:
    """Streams of changes, as lines of JSON ready to send. Watchers share the encoding of what they have in common."""

    def __init__(self, context: Context) -> None:
        self._state = context.state
        self._shared: dict[int, list[tuple[str, str, bytes]]] = {}
        self._closed = asyncio.Event()

    def close(self) -> None:
        """End every stream."""
        self._closed.set()

    async def stream(self, watch: Watch) -> AsyncIterator[bytes]:
        """Return the stream: without `start`, the state first; then changes, with bookmarks in silence.

        Raises Compacted when `start` is no longer held, or lies in a future that this store does not know; the stream itself
        raises it for a reader that is too slow, and Unavailable when the server stops.
        """
        if self._closed.is_set():
            raise Unavailable("the server is stopping", mend="connect again")
        if watch.start is None:
            revision = self._state.revision
            found = [
                (name, key, held)
                for name in sorted(watch.kinds)
                for key, held in self._records(name, watch).items()
                if watch.wants(name, key)
            ]
            return self._follow(watch, self._state.changes(Revision(revision + 1)), _snapshot(found, int(revision)), int(revision))
        if watch.start > self._state.revision + 1:
            raise Compacted(
                f"revision {watch.start} is not there; the newest is {self._state.revision}", mend="watch without 'from'"
            )
        changes = self._state.changes(Revision(watch.start))
        first: asyncio.Future[Deltas] | None = None
        if watch.start <= self._state.revision:
            # Whether the past is still held shows on the first step, which answers at once if there is anything to read.
            first = asyncio.ensure_future(anext(changes))
            await asyncio.wait((first,), timeout=0.01)
            if first.done():
                first.result()
        return self._follow(watch, changes, (), watch.start - 1, first)

    async def _follow(
        self,
        watch: Watch,
        changes: AsyncIterator[Deltas],
        snapshot: Iterable[bytes],
        revision: int,
        pending: asyncio.Future[Deltas] | None = None,
    ) -> AsyncIterator[bytes]:
        closed = asyncio.ensure_future(self._closed.wait())
        seen = revision
        try:
            for piece in snapshot:
                yield piece
            while True:
                if pending is None:
                    pending = asyncio.ensure_future(anext(changes))
                await asyncio.wait((pending, closed), timeout=BOOKMARK_S, return_when=asyncio.FIRST_COMPLETED)
                if closed.done():
                    raise Unavailable("the server is stopping", mend="connect again")
                if not pending.done():
                    # What the cache had one silence ago has surely come through here; what it has now may be on its way.
                    revision, seen = max(revision, seen), int(self._state.revision)
                    yield _bookmark(revision)
                    continue
                deltas, pending = pending.result(), None
                revision = int(deltas.revision)
                lines = [line for name, key, line in self._lines(deltas) if watch.wants(name, key)]
                for first in range(0, len(lines), LINES_AT_ONCE):
                    yield b"".join(lines[first : first + LINES_AT_ONCE])
        finally:
            closed.cancel()
            if pending is not None:
                pending.cancel()

    def _records(self, name: str, watch: Watch) -> Mapping[str, Held[Any]]:
        kind = _KINDS[name]
        if watch.project is None or name in CELL_WIDE:
            return self._state.records(kind)
        return self._state.found(kind, by_project, watch.project)

    def _lines(self, deltas: Deltas) -> list[tuple[str, str, bytes]]:
        revision = int(deltas.revision)
        lines = self._shared.get(revision)
        if lines is None:
            lines = []
            for delta in deltas.deltas:
                name = _NAMES[delta.kind]
                if name in WATCHED:
                    lines.append((name, delta.key, _line(name, delta.key, revision, delta.new.record if delta.new else None)))
            self._shared[revision] = lines
            if len(self._shared) > SHARED_MAX:
                del self._shared[next(iter(self._shared))]
        return lines


def _snapshot(found: list[tuple[str, str, Held[Any]]], revision: int) -> Iterable[bytes]:
    for first in range(0, len(found), LINES_AT_ONCE):
        part = found[first : first + LINES_AT_ONCE]
        yield b"".join(_line(name, key, int(held.revision), held.record) for name, key, held in part)
    yield _bookmark(revision)


def _line(name: str, key: str, revision: int, record: Any) -> bytes:
    return codec.encode(WatchLine(revision=revision, kind=name, key=key, record=record)) + b"\n"


def _bookmark(revision: int) -> bytes:
    return codec.encode(WatchLine(revision=revision)) + b"\n"
