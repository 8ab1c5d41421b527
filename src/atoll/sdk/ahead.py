"""A stream that is open before its command is wanted: a program that runs one command after the other waits for no handshake.

Kept from a client's second command on: most clients run one. What waits is used once, and closed when no command came for a while.
"""

from __future__ import annotations

import asyncio
import contextlib

from atoll.model import codec
from atoll.model.errors import AtollError, DeadlineExceeded, Unavailable
from atoll.model.ports.control_plane import TAKEN, Channel
from atoll.model.streams import Kind, NextCommand, unpack
from atoll.sdk.streams import error_of
from atoll.sdk.transport import Transport, path

KEPT_S = 60.0
"""How long one waits for a command; less than the server has it wait."""
FOLLOW_S = 0.02
"""How long after a command began the next stream is opened: the command goes first."""
ANSWER_S = 10.0
"""How long the server may take to say that the command was asked for, its node's own time to answer included."""


class Ahead:
    """One stream at most, for the project that the last command was for."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._commands = 0
        self._project = ""
        self._waits: asyncio.Task[Channel] | None = None
        self._over = False
        self._expiry: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def command(self, project: str, wanted: NextCommand) -> Channel | None:
        """Ask for a command on the stream that waits; None where none does, and nothing was asked for.

        Raises what the server answers, and Unavailable or DeadlineExceeded when it does not: the command may run then.
        """
        self._commands += 1
        channel = self._taken(project)
        try:
            return None if channel is None else await _asked(channel, wanted)
        finally:
            if self._commands > 1 and not self._over:
                self._keep(project)

    async def close(self) -> None:
        self._over = True
        self._drop()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _taken(self, project: str) -> Channel | None:
        waits = self._waits
        if waits is None or self._project != project or not waits.done() or _failed(waits):
            return None
        self._waits = None
        return waits.result()

    def _keep(self, project: str) -> None:
        if self._waits is not None and self._project == project and not _failed(self._waits):
            return
        self._drop()
        self._project = project
        self._waits = asyncio.ensure_future(self._open(project))
        self._expiry = asyncio.get_running_loop().call_later(KEPT_S, self._drop)

    async def _open(self, project: str) -> Channel:
        await asyncio.sleep(FOLLOW_S)
        try:
            return await self._transport.channel(path("projects", project, "commands", "next"))
        except Unavailable:
            raise
        except AtollError:
            self._over = True  # a server from before such streams, or one that has enough of them
            raise

    def _drop(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        waits, self._waits = self._waits, None
        if waits is not None:
            task = asyncio.ensure_future(_let_go(waits))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def _failed(waits: asyncio.Task[Channel]) -> bool:
    return waits.done() and (waits.cancelled() or waits.exception() is not None)


async def _let_go(waits: asyncio.Task[Channel]) -> None:
    waits.cancel()
    with contextlib.suppress(asyncio.CancelledError, AtollError):
        await (await waits).close()


async def _asked(channel: Channel, wanted: NextCommand) -> Channel | None:
    try:
        await channel.send(codec.encode(wanted))
    except Unavailable:  # it was closed while it waited
        await channel.close()
        return None
    try:
        async with asyncio.timeout(ANSWER_S):
            answer = await channel.receive()
        if answer == TAKEN:
            return channel
        if answer is None:
            raise Unavailable("the server ended the stream; the command may run")
        kind, payload = unpack(answer)
        raise error_of(payload) if kind is Kind.ERROR else Unavailable(f"the server answered {kind.name} to a command")
    except TimeoutError:
        await channel.close()
        raise DeadlineExceeded(f"the server did not answer within {ANSWER_S:g} s; the command may run") from None
    except BaseException:
        await channel.close()
        raise
