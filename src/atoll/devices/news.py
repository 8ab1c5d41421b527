"""What befell the devices, on its way to whoever reads it."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator

import structlog

from atoll.model.ports.devices import DeviceEvent

EVENTS_MAX = 1024
"""News that nobody read yet; beyond that the oldest is dropped, since the inventory has the truth anyway."""

log = structlog.get_logger()


class News:
    def __init__(self) -> None:
        self._unread: collections.deque[DeviceEvent] = collections.deque(maxlen=EVENTS_MAX)
        self._told = asyncio.Event()

    def tell(self, event: DeviceEvent) -> None:
        log.info("device event", trouble=event.trouble, device=event.device, code=event.code, message=event.message)
        self._unread.append(event)
        self._told.set()

    async def read(self) -> AsyncIterator[DeviceEvent]:
        """Yield news for ever, each once; two readers would share them between them."""
        while True:
            while self._unread:
                yield self._unread.popleft()
            self._told.clear()
            await self._told.wait()  # for ever: news come when they come
