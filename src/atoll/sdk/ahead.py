"""A stream that is open before its command is wanted: a program that runs one command after the other waits for no handshake.

Kept from a client's second command on: most clients run one. What waits is used once, and closed when no command came for a while.
"""

from __future__ import annotations

import asyncio
import contextlib

from atoll.model import codec
from atoll.model.errors import AtollError, OutcomeUnknown, Unavailable
from atoll.model.ports.control_plane import TAKEN, Channel
from atoll.model.streams import Kind, NextCommand, unpack
from atoll.sdk.streams import error_of
from atoll.sdk.transport import Address, Transport, path

KEPT_S = 60.0
"""How long one waits for a command; less than the server has it wait."""
FOLLOW_S = 0.02
"""How long after a command began the next stream is opened: the command goes first."""
ANSWER_S = 10.0
"""How long the server may take to say that the command was asked for, its node's own time to answer included."""
REFUSED_S = 60.0
"""How long none is opened after the server would not have one: it is from before such streams, or has enough of them."""


class Ahead:
    """One stream at most, for the project that the last command was for, at the server that all calls go to."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._commands = 0
        self._at: tuple[str, Address] | None = None
        """The project and the server that it is for."""
        self._waits: asyncio.Task[Channel] | None = None
        self._not_before = float("-inf")
        self._expiry: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def command(self, project: str, wanted: NextCommand) -> Channel | None:
        """Ask for a command on the stream that waits; None where none does, and nothing was asked for.

        Raises what the server answers, and OutcomeUnknown when it does not: the command may run then.
        """
        said = codec.encode(wanted)
        at = (project, self._transport.address)
        self._commands += 1
        channel = self._taken(at)
        try:
            return None if channel is None else await _asked(channel, said)
        finally:
            if self._commands > 1:
                self._keep(at)

    async def close(self) -> None:
        self._not_before = float("inf")
        self._drop()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _taken(self, at: tuple[str, Address]) -> Channel | None:
        waits = self._waits
        if waits is None or self._at != at or not waits.done() or _failed(waits):
            return None
        self._waits = None
        return waits.result()

    def _keep(self, at: tuple[str, Address]) -> None:
        if self._waits is not None and self._at == at and not _failed(self._waits):
            return
        self._drop()
        loop = asyncio.get_running_loop()
        if loop.time() < self._not_before:
            return
        self._at = at
        self._waits = asyncio.ensure_future(self._open(at[0]))
        self._expiry = loop.call_later(KEPT_S, self._drop)

    async def _open(self, project: str) -> Channel:
        await asyncio.sleep(FOLLOW_S)
        try:
            return await self._transport.channel(path("projects", project, "commands", "next"))
        except Unavailable:
            raise
        except AtollError:
            self._not_before = max(self._not_before, asyncio.get_running_loop().time() + REFUSED_S)
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


async def _asked(channel: Channel, said: bytes) -> Channel | None:
    try:
        answer = await _answer(channel, said)
        if answer == TAKEN:
            return channel
    except BaseException:
        await channel.close()
        raise
    await channel.close()
    if answer is None:
        return None
    kind, payload = unpack(answer)
    raise error_of(payload) if kind is Kind.ERROR else OutcomeUnknown(f"the server answered {kind.name}; the command may run")


async def _answer(channel: Channel, said: bytes) -> bytes | None:
    """Return what the server says first; None where the stream was closed while it waited. Raises OutcomeUnknown."""
    try:
        await channel.send(said)
    except Unavailable:
        return None
    try:
        async with asyncio.timeout(ANSWER_S):
            answer = await channel.receive()
    except TimeoutError:
        raise OutcomeUnknown(f"the server did not answer within {ANSWER_S:g} s; the command may run") from None
    except Unavailable as error:
        raise OutcomeUnknown(f"{error.message}; the command may run") from None
    if answer is None:
        raise OutcomeUnknown("the server ended the stream; the command may run")
    return answer
