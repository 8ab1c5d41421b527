"""Which connections of our unix sockets the other side has closed while nobody reads from them.

What it sent before lies in front of the end, and a body that is larger than the buffers hides it for ever. So the kernel is asked,
for no more than that both directions are closed: who has only said all that there is to say still waits for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Hangups:
    """Use it between `start` and `stop`."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._limits: dict[int, asyncio.Timeout] = {}
        """A descriptor of the connection's that is ours → what ends the wait."""

    def start(self) -> None:
        self._epoll = select.epoll()
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._look, self._epoll)

    def stop(self) -> None:
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    @asynccontextmanager
    async def ending(self, writer: asyncio.StreamWriter) -> AsyncIterator[None]:
        """Cancel what is waited for within once the connection is closed, and raise ConnectionError. Raises OSError."""
        if writer.is_closing():
            raise ConnectionError("who waited has hung up")
        # Of its own, so that a connection which breaks is not forgotten by the kernel before anybody has looked.
        descriptor = os.dup(writer.get_extra_info("socket").fileno())
        try:
            async with asyncio.timeout(None) as limit:
                self._limits[descriptor] = limit
                if self._epoll is not None:
                    self._epoll.register(descriptor, select.EPOLLONESHOT)  # that it is closed is told unasked
                yield
        except TimeoutError:
            if limit.expired():
                raise ConnectionError("who waited has hung up") from None
            raise
        finally:
            del self._limits[descriptor]
            if self._epoll is not None:
                with contextlib.suppress(OSError):  # it was not registered
                    self._epoll.unregister(descriptor)
            os.close(descriptor)

    def _look(self, epoll: select.epoll) -> None:
        for descriptor, _ in epoll.poll(0):
            if not (limit := self._limits[descriptor]).expired():
                limit.reschedule(asyncio.get_running_loop().time())
