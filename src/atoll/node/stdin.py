"""What a client has sent for a command's stdin and the command has not read: what comes behind it is not to wait for that."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any

import structlog

from atoll.model.errors import AtollError
from atoll.model.ports.runtime import Execution

AHEAD_BYTES = 1 << 20
AHEAD_PIECES = 1_024
"""Beyond either nothing is read of the client until the command goes on reading, no signal and no change of size either."""

log = structlog.get_logger()


class Stdin:
    """Writes to `execution` what is put, one piece after the other, until `end`."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._pieces: deque[bytes | None] = deque()
        self._bytes = 0
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        self._task = asyncio.create_task(self._carry())

    def put(self, piece: bytes | None) -> None:
        """Take the next piece; None is the end."""
        self._pieces.append(piece)
        self._count(len(piece or b""))
        self._more.set()

    async def has_room(self, gone: Coroutine[Any, Any, None]) -> bool:
        """Return True once there is room for more, False if the client is `gone` before that."""
        if self._room.is_set():
            gone.close()
            return True
        waits = [asyncio.ensure_future(self._room.wait()), asyncio.ensure_future(gone)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        return self._room.is_set()

    def end(self) -> None:
        self._task.cancel()

    def _count(self, more: int) -> None:
        self._bytes += more
        if self._bytes < AHEAD_BYTES and len(self._pieces) < AHEAD_PIECES:
            self._room.set()
        else:
            self._room.clear()

    async def _carry(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            while self._pieces:
                piece = self._pieces.popleft()
                try:
                    await (self._execution.write(piece) if piece is not None else self._execution.close_stdin())
                except (AtollError, OSError) as error:
                    log.info("exec input ended", error=str(error))
                self._count(-len(piece or b""))
