"""Streams that are open before anybody wants one: who then wants a command in a sandbox waits for no dialling.

Kept while the node has a sandbox. The server sends its request as the first message of one that waits; what the agent says first is
that it has it. A server that knows of no such streams answers NotFound, and all streams are dialled as they are wanted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from atoll.model import codec
from atoll.model.errors import AtollError, NotFound, Unavailable
from atoll.model.ports.control_plane import NEXT_STREAM, TAKEN, Channel, ControlPlane, StreamRequest
from atoll.node.report import retry_delay

SPARES = 2
"""Streams that wait; each that is taken is followed by another."""
OPEN_S = 10.0
FOLLOW_S = 0.1
"""How long after one was taken another is dialled: the node is first of all for who has taken it."""

log = structlog.get_logger()


class Spares:
    """`serve` is spawned for each stream that is taken; `wanted` says whether any are to wait at all."""

    def __init__(
        self,
        node: str,
        control: ControlPlane,
        choose: random.Random,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        serve: Callable[[StreamRequest, Channel], Coroutine[Any, Any, None]],
        wanted: Callable[[], bool],
    ) -> None:
        self._node = node
        self._control = control
        self._choose = choose
        self._spawn = spawn
        self._serve = serve
        self._wanted = wanted
        self._keeping: set[asyncio.Task[None]] = set()

    def look(self) -> None:
        """Begin to keep them, or end that; call it whenever a sandbox has come or gone."""
        if not self._wanted():
            for task in self._keeping:
                task.cancel()
            self._keeping.clear()  # not when they have ended: a sandbox may come meanwhile
            return
        for _ in range(SPARES - len(self._keeping)):
            task = self._spawn(self._keep())
            self._keeping.add(task)
            task.add_done_callback(self._keeping.discard)

    async def _keep(self) -> None:
        failures = 0
        while True:
            try:
                await self._one()
                failures = 0
                await asyncio.sleep(FOLLOW_S)
            except NotFound:
                return
            except (AtollError, TimeoutError) as error:
                log.debug("no spare stream", node=self._node, error=str(error) or "timed out")
                await asyncio.sleep(retry_delay(failures, self._choose))
                failures += 1
            except Exception:  # the outer edge of a task: the node does without
                log.exception("no spare stream", node=self._node)
                return

    async def _one(self) -> None:
        """Open one, and hand it on when it is taken. Raises NotFound, Unavailable, TimeoutError."""
        async with asyncio.timeout(OPEN_S):
            channel = await self._control.open_stream(self._node, NEXT_STREAM)
        try:
            message = await channel.receive()  # until somebody wants one: the connection's own pings see to its end
            if message is None:
                raise Unavailable("the server ended a stream that waited")
            request = codec.decode(message, StreamRequest)
            await channel.send(TAKEN)
        except BaseException:
            await channel.close()
            raise
        self._spawn(self._serve(request, channel))
