"""Live streams from the client's side: a command in an instance, its log, files in and out."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from atoll.model import codec
from atoll.model.errors import AtollError, Invalid, Unavailable
from atoll.model.ports.control_plane import Channel
from atoll.model.streams import MESSAGE_BYTES_MAX, ErrorBody, Kind, LogLine, Resize, pack, unpack
from atoll.sdk import answers

PART_BYTES_MAX = MESSAGE_BYTES_MAX // 2
"""The most that is put into one message."""


class Exec:
    """A command that runs in an instance. Iterate its output; then `code` is its exit status."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.code: int | None = None

    async def send(self, data: bytes) -> None:
        """Write to the command's input. Raises Unavailable when it is gone."""
        for start in range(0, len(data), PART_BYTES_MAX):
            await self._channel.send(pack(Kind.STDIN, data[start : start + PART_BYTES_MAX]))

    async def end_input(self) -> None:
        await self._channel.send(pack(Kind.STDIN_END))

    async def resize(self, rows: int, columns: int) -> None:
        await self._channel.send(pack(Kind.RESIZE, codec.encode(Resize(rows, columns))))

    async def signal(self, name: str) -> None:
        """Send a signal, such as `SIGINT`, to the command."""
        await self._channel.send(pack(Kind.SIGNAL, name.encode()))

    async def __aiter__(self) -> AsyncIterator[tuple[Kind, bytes]]:
        """Yield STDOUT and STDERR parts until the command has ended.

        Raises what the node reports, or Unavailable when the stream breaks first: the command may still run.
        """
        while (message := await self._channel.receive()) is not None:
            kind, payload = unpack(message)
            match kind:
                case Kind.STDOUT | Kind.STDERR:
                    yield kind, payload
                case Kind.EXIT:
                    self.code = _status(payload)
                    return
                case Kind.ERROR:
                    raise error_of(payload)
                case _:
                    raise Invalid(f"an exec stream has no {kind.name} from the node")
        raise Unavailable("the stream ended before the command did; it may still run")

    async def close(self) -> None:
        await self._channel.close()


def _status(payload: bytes) -> int:
    try:
        return int(payload)
    except ValueError:
        raise Invalid(f"{payload[:40]!r} is not an exit status") from None


def error_of(payload: bytes) -> AtollError:
    """Return the error in an ERROR message."""
    return answers.from_body(codec.decode(payload, ErrorBody))


async def log_lines(channel: Channel) -> AsyncIterator[LogLine]:
    """Yield lines until the node says that there are no more. Raises Unavailable when the stream breaks first."""
    while (message := await channel.receive()) is not None:
        kind, payload = unpack(message)
        match kind:
            case Kind.LOG:
                yield codec.decode(payload, LogLine)
            case Kind.END:
                return
            case Kind.ERROR:
                raise error_of(payload)
            case _:
                raise Invalid(f"a log stream has no {kind.name}")
    raise Unavailable("the log stream broke")


async def receive_files(channel: Channel) -> AsyncIterator[bytes]:
    """Yield the parts of a tar stream, and tell the node when all have come. Raises what the node reports."""
    while (message := await channel.receive()) is not None:
        kind, payload = unpack(message)
        match kind:
            case Kind.DATA:
                yield payload
            case Kind.END:
                with contextlib.suppress(Unavailable):  # all has come; a node that left already needs no answer
                    await channel.send(pack(Kind.END))
                return
            case Kind.ERROR:
                raise error_of(payload)
            case _:
                raise Invalid(f"a files stream has no {kind.name}")
    raise Unavailable("the stream broke before all files came")


async def send_files(channel: Channel, parts: AsyncIterator[bytes]) -> None:
    """Send a tar stream and wait until the node has unpacked it. Raises what the node reports, with what came before kept."""
    try:
        async for part in parts:
            for start in range(0, len(part), PART_BYTES_MAX):
                await channel.send(pack(Kind.DATA, part[start : start + PART_BYTES_MAX]))
        await channel.send(pack(Kind.END))
    except Unavailable:
        pass  # the node closed early: why is in the message it sent last
    while (message := await channel.receive()) is not None:
        kind, payload = unpack(message)
        match kind:
            case Kind.END:
                return
            case Kind.ERROR:
                raise error_of(payload)
            case _:
                raise Invalid(f"a files stream has no {kind.name}")
    raise Unavailable("the stream broke before all files were taken; copy again")
