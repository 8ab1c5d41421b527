"""`State`: the store's records, decoded and kept current in memory, for control loops, joins and fan-out.

    async with State(store, {keys.APPS: App, keys.INSTANCES: Instance}) as state:
        apps = state.records(App)                    # live view: "project/name" → Held[App], in no order
        held = state.get(Instance, "default/web-k3x9")
        revision = await store.put(…)
        await state.reach(revision)                  # now the cache has seen that write
        async for deltas in state.changes():         # every change from now on, gapless, in order
            …

All kinds are at one revision at any moment in which no `await` lies: what a reader takes from several kinds without awaiting is
one consistent snapshot. One watch serves all kinds and all consumers. A consumer that falls behind by more than the window gets
Compacted from `changes` and starts again from `records`; nothing is ever skipped in silence.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Iterator, Mapping, Set
from types import MappingProxyType, TracebackType
from typing import Any, Generic, Self, TypeVar, cast

import structlog
from msgspec import Struct

from atoll.model import stored
from atoll.model.errors import AtollError, Compacted, Invalid, Unavailable
from atoll.model.ports.store import Change, Consistency, KeyValue, Revision, Store
from atoll.model.records.basis import Record
from atoll.store.index import By, Index
from atoll.store.window import Window

T = TypeVar("T")

DELTAS_MAX = 4_096
"""Revisions of deltas that are kept for consumers that are behind."""
DELTA_BYTES = 512
"""What one delta is counted as towards the window's bytes, beside its record."""
RECORD_FACTOR = 5
"""What a decoded record takes in memory for each byte of its JSON: measured with apps of twenty variables."""
DELTAS_BYTES_MAX = 16 << 20
"""Bytes of deltas that are kept at most, so counted; beside the records, they are most of what a busy server holds."""
RETRY_MIN_S = 0.1
RETRY_MAX_S = 5.0
"""Between attempts to reach a store that does not answer; doubled from the one to the other."""

log = structlog.get_logger()


class Held(Struct, Generic[T], frozen=True, gc=False):
    """A record and where it stands: `revision` last changed it, `created` made it. Pass `revision` to `unchanged`."""

    record: T
    revision: Revision
    created: Revision
    beside: dict[str, Any] | None = None
    """Of a record of which people say one part at a time: its fields that this version does not know (`stored.encode_over`)."""


class Delta(Struct, frozen=True, gc=False):
    """One record's change. `old` None: it is new; `new` None: it is gone. `key` is what stands behind the kind's prefix."""

    kind: type[Any]
    key: str
    old: Held[Any] | None
    new: Held[Any] | None


class Deltas(Struct, frozen=True):
    """All changes of one revision; after the cache had to list again, all that changed meanwhile."""

    revision: Revision
    deltas: tuple[Delta, ...]


class State:
    """A current, typed copy of part of the store. `kinds` maps prefix → record type; no type and no prefix twice.

    A record that does not decode is logged and counts as absent, so that it never stops a control loop; `broken` tells it from
    one that is gone, which nobody may take it for who would end something.
    """

    def __init__(self, store: Store, kinds: Mapping[str, type[Any]]) -> None:
        if len(set(kinds.values())) != len(kinds):
            raise Invalid("a record type is given twice")
        self._store = store
        self._prefixes = {prefix.split("/", 1)[0] + "/": (prefix, kind) for prefix, kind in kinds.items()}
        if len(self._prefixes) != len(kinds) or any(prefix != first for first, (prefix, _) in self._prefixes.items()):
            raise Invalid("a kind's prefix is one word and a slash")
        self._records: dict[type[Any], dict[str, Held[Any]]] = {kind: {} for kind in kinds.values()}
        self._broken: dict[type[Any], set[str]] = {kind: set() for kind in kinds.values()}
        self._views: dict[type[Any], Mapping[str, Held[Any]]] = {k: MappingProxyType(v) for k, v in self._records.items()}
        self._indexes: dict[type[Any], dict[By, Index]] = {kind: {} for kind in kinds.values()}
        self._window: Window[tuple[Revision, tuple[Delta, ...]]] = Window(
            Revision(-1), floor=Revision(0), entries_max=DELTAS_MAX, bytes_max=DELTAS_BYTES_MAX
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load everything, then follow in a task. Raises what the store raises; then nothing runs."""
        await self._list()
        self._task = asyncio.create_task(self._run(), name="store cache")

    async def close(self) -> None:
        """Stop following; whoever waits gets Unavailable. Safe to repeat."""
        self._window.close("the cache is closed")
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    @property
    def revision(self) -> Revision:
        """The store's revision that every record here is current to."""
        return self._window.newest

    def records(self, kind: type[T]) -> Mapping[str, Held[T]]:
        """Return a live, read-only view: key behind the prefix → record. Copy it before you await in a loop over it."""
        return cast(Mapping[str, Held[T]], self._views[kind])

    def copy(self, kind: type[T]) -> dict[str, Held[T]]:
        """Return what `records` shows now, for whoever awaits or works in a thread: quick, whatever there is."""
        return self._records[kind].copy()

    def get(self, kind: type[T], key: str) -> Held[T] | None:
        return self._records[kind].get(key)

    def found(self, kind: type[T], by: By, value: Hashable) -> Mapping[str, Held[T]]:
        """Return a live, read-only view of the records that are found by `value`: what `records` has, without looking at the rest.

        `by` is a module-level function (see `store.index`); the first call with it looks at all records, later ones at none.
        """
        index = self._indexes[kind].get(by)
        if index is None:
            index = self._indexes[kind][by] = Index(by, self._records[kind])
        return index.found(value)

    def broken(self, kind: type[Any]) -> Set[str]:
        """Return the keys under which something stands that is no `kind` that this version understands; a live view."""
        return self._broken[kind]

    async def reach(self, revision: Revision) -> Revision:
        """Return once the cache has seen `revision`, with the revision that it has. The caller sets the deadline.

        Raises Unavailable when the cache is closed.
        """
        await self._window.reach(revision)
        return self._window.newest

    async def wait_past(self, revision: Revision) -> Revision:
        """Return the new revision once it is above `revision`; for level-triggered loops. Raises as `reach`."""
        return await self.reach(Revision(revision + 1))

    def unchanged_since(self, revision: int) -> bool:
        """Return whether nothing here has changed after `revision`; False where that is too long ago to tell."""
        try:
            return not self._window.read(Revision(revision + 1), 1)
        except Compacted:
            return False

    def changes(self, start: Revision | None = None) -> AsyncIterator[Deltas]:
        """Return all changes from revision `start` on; without it, all after this call.

        Raises Compacted from the iterator when `start` is older than this cache, or the reader is too far behind: start
        again from `records`. Raises Unavailable when the cache is closed.
        """
        return self._follow(Revision(self.revision + 1) if start is None else start)

    def since(self, start: Revision) -> Iterator[Deltas]:
        """Yield all changes from revision `start` on that are here now; read it without awaiting. Raises Compacted as `changes`."""
        for revision, (since, deltas) in self._window.read(start):
            if start > since + 1:
                raise Compacted(f"revision {start} is among those that the cache had to list as one")
            yield Deltas(revision, deltas)
            start = Revision(revision + 1)

    async def _follow(self, position: Revision) -> AsyncIterator[Deltas]:
        while True:
            await self._window.reach(position)
            newest = self._window.newest
            for deltas in self.since(position):
                yield deltas
            position = Revision(newest + 1)

    async def _run(self) -> None:
        """Follow the store for ever; what goes wrong is logged and tried again."""
        retry_s = RETRY_MIN_S
        while True:
            began = self.revision
            try:
                await self._watch()
            except Compacted:
                log.info("the cache fell behind the store's history and lists again", revision=self.revision)
                retry_s = await self._relist(retry_s)
            except Exception as error:  # noqa: BLE001 (the outer edge: whatever breaks a watch, the cache must come back)
                cause = error.message if isinstance(error, AtollError) else repr(error)
                log.warning("the cache lost its watch", cause=cause, revision=self.revision, retry_s=retry_s)
                retry_s = RETRY_MIN_S if self.revision > began else min(2 * retry_s, RETRY_MAX_S)
                await asyncio.sleep(retry_s)

    async def _watch(self) -> None:
        async for batch in self._store.watch("", start=Revision(self.revision + 1)):
            self._apply(batch.changes, batch.revision)
        raise Unavailable("the watch ended")

    async def _relist(self, retry_s: float) -> float:
        try:
            await self._list()
        except AtollError as error:
            log.warning("the cache could not list", cause=error.message, retry_s=retry_s)
            await asyncio.sleep(retry_s)
            return min(2 * retry_s, RETRY_MAX_S)
        return RETRY_MIN_S

    async def _list(self) -> None:
        """Load every kind as of one revision, and enter what differs from before as one change."""
        newest = await self._store.revision()
        # Much is read here, which one member may give alone: the watch brings what it does not know yet. But it must know what
        # was there when this began.
        if not await self._load(newest, Consistency.SERIALIZABLE):
            await self._load(newest, Consistency.LINEARIZABLE)

    async def _load(self, oldest: Revision, consistency: Consistency) -> bool:
        """Load all as of some revision that is no older than `oldest`, and return whether there was such a one to be had."""
        loaded: dict[type[Any], dict[str, Held[Any]]] = {}
        broken: dict[type[Any], set[str]] = {kind: set() for kind in self._records}
        at: Revision | None = None
        for prefix, kind in self._prefixes.values():
            records = loaded[kind] = {}
            after = ""
            while True:
                page = await self._store.range(prefix, after=after, at=at, consistency=consistency)
                at = page.revision
                if at < oldest:
                    return False
                for item in page.items:
                    held = _decode(item, kind)
                    if held is not None:
                        records[item.key.removeprefix(prefix)] = held
                    else:
                        broken[kind].add(item.key.removeprefix(prefix))
                if not page.more:
                    break
                after = page.items[-1].key
        revision = at if at is not None else oldest
        first = self.revision < 0
        self._broken = broken
        deltas = self._differences(loaded)
        for delta in deltas:
            self._set(delta.kind, delta.key, delta.new)
        self._enter(revision, [] if first else deltas, 0, listed=True)
        if first:
            self._window.forget_before(Revision(revision + 1))
        return True

    def _differences(self, loaded: dict[type[Any], dict[str, Held[Any]]]) -> list[Delta]:
        deltas: list[Delta] = []
        for kind, new in loaded.items():
            old = self._records[kind]
            deltas.extend(Delta(kind, key, old[key], None) for key in old if key not in new)
            for key, held in new.items():
                before = old.get(key)
                if before is None or before.revision != held.revision:
                    deltas.append(Delta(kind, key, before, held))
        return deltas

    def _apply(self, changes: tuple[Change, ...], revision: Revision) -> None:
        deltas: list[Delta] = []
        size_bytes = 0
        for change in changes:
            place = change.key.find("/") + 1
            prefix_kind = self._prefixes.get(change.key[:place])
            if prefix_kind is None:
                continue
            kind = prefix_kind[1]
            key = change.key[place:]
            new = _decode(change.item, kind) if change.item is not None else None
            (self._broken[kind].add if change.item is not None and new is None else self._broken[kind].discard)(key)
            old = self._records[kind].get(key)
            if old is not None or new is not None:
                deltas.append(Delta(kind, key, old, new))
                size_bytes += RECORD_FACTOR * len(change.item.value) if change.item is not None else 0
                self._set(kind, key, new)
        self._enter(revision, deltas, size_bytes)

    def _set(self, kind: type[Any], key: str, new: Held[Any] | None) -> None:
        records = self._records[kind]
        for index in self._indexes[kind].values():
            index.change(key, records.get(key), new)
        if new is None:
            records.pop(key, None)
        else:
            records[key] = new

    def _enter(self, revision: Revision, deltas: list[Delta], size_bytes: int, *, listed: bool = False) -> None:
        """Tell consumers; a list stands for all revisions since the last."""
        if deltas:
            since = self.revision if listed else Revision(revision - 1)
            self._window.append(revision, (since, tuple(deltas)), size_bytes + DELTA_BYTES * len(deltas))
        else:
            self._window.pass_by(revision)


def _decode(item: KeyValue, kind: type[T]) -> Held[T] | None:
    try:
        beside = stored.beside(item.value, kind) if issubclass(kind, Record) and kind.PIECEMEAL else None
        return Held(stored.decode(item.value, kind), item.mod_revision, item.create_revision, beside)
    except Invalid as error:
        log.error("a record does not decode and is left out", key=item.key, kind=kind.__name__, cause=error.message)
        return None
