"""A stream of batches from a control plane in memory: every change goes to all who watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from atoll.model.errors import Unavailable

B = TypeVar("B")


class FakeFeed(Generic[B]):
    """`available = False` breaks every watch and refuses new ones."""

    def __init__(self) -> None:
        self.watches = 0
        """How often a watch was begun."""
        self._available = True
        self._revision = 1
        self._queues: set[asyncio.Queue[B | None]] = set()

    @property
    def available(self) -> bool:
        return self._available

    @available.setter
    def available(self, value: bool) -> None:
        self._available = value
        if not value:
            for queue in self._queues:
                queue.put_nowait(None)

    async def _watch(self, first: Callable[[], B]) -> AsyncIterator[B]:
        """Yield `first()`, then what is sent. Raises Unavailable."""
        self._check()
        self.watches += 1
        queue: asyncio.Queue[B | None] = asyncio.Queue()
        self._queues.add(queue)
        try:
            yield first()
            while (batch := await queue.get()) is not None:
                yield batch
            raise Unavailable("the control plane has gone away")
        finally:
            self._queues.discard(queue)

    def _send(self, batch: Callable[[int], B]) -> None:
        """Send `batch` of the next revision."""
        self._revision += 1
        made = batch(self._revision)
        for queue in self._queues:
            queue.put_nowait(made)

    def _check(self) -> None:
        if not self._available:
            raise Unavailable("the control plane does not answer")
