"""One task that follows the cache for whoever must tell others of its changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import structlog

from atoll.model.errors import Compacted, Unavailable
from atoll.store.cache import Deltas, State

RETRY_S = 1.0

log = structlog.get_logger()


class Following:
    """Calls `rebuild` at first, and again after it lost track, and `apply` for all changes from then on, gapless and in order."""

    def __init__(self, state: State, name: str, apply: Callable[[Deltas], None], rebuild: Callable[[], None]) -> None:
        self._state = state
        self._name = name
        self._apply = apply
        self._rebuild = rebuild
        self._task: asyncio.Task[None] | None = None
        self.closed = False
        self._applied = 0
        self._moved = asyncio.Event()
        """Set, and another put in its place, whenever more was applied."""

    @property
    def revision(self) -> int:
        """Up to which all changes were applied. The cache may be further on, though not by what changed nothing that it holds."""
        return int(self._state.revision) if self._state.unchanged_since(self._applied) else self._applied

    async def reach(self, revision: int) -> None:
        """Return once all changes up to `revision`, which the cache has seen, were applied."""
        while self.revision < revision:
            await self._moved.wait()

    def start(self) -> None:
        """Begin to follow; safe to repeat. Must be called where the event loop runs."""
        if self._task is None and not self.closed:
            changes = self._anew()
            self._task = asyncio.create_task(self._run(changes), name=f"api {self._name}")

    async def close(self) -> None:
        self.closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self, changes: AsyncIterator[Deltas]) -> None:
        while True:
            try:
                async for deltas in changes:
                    self._apply(deltas)
                    self._note(int(deltas.revision))
            except Unavailable:
                return
            except Compacted:
                log.warning("a feed fell behind the cache and tells everything anew", feed=self._name)
            except Exception:
                # The outer edge: whoever listens must go on hearing, whatever one record did.
                log.exception("a feed tripped and tells everything anew", feed=self._name, retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
            changes = self._anew()

    def _anew(self) -> AsyncIterator[Deltas]:
        """Take all as it is, and return what changes after that: both in one moment, so that no change falls in between."""
        changes = self._state.changes()
        self._rebuild()
        self._note(int(self._state.revision))
        return changes

    def _note(self, revision: int) -> None:
        self._applied = revision
        self._moved.set()
        self._moved = asyncio.Event()
