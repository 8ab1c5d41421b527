"""A store in memory whose word of what was written may be held back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from atoll.model.ports.store import Revision, WatchBatch
from atoll.store.memory import MemoryStore


class Late(MemoryStore):
    """What it tells those that watch comes only while `flows`."""

    def __init__(self, clock: object) -> None:
        super().__init__(clock)  # type: ignore[arg-type]
        self.flows = asyncio.Event()
        self.flows.set()

    def watch(self, prefix: str, *, start: Revision) -> AsyncIterator[WatchBatch]:
        return self._late(super().watch(prefix, start=start))

    async def _late(self, batches: AsyncIterator[WatchBatch]) -> AsyncIterator[WatchBatch]:
        async for batch in batches:
            await self.flows.wait()
            yield batch
