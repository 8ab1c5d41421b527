"""QEMU's machine protocol (QMP): commands over a connection, with a deadline; its answers are bounded.

QEMU documentation: interop/qmp-spec. A monitor may have been taken over by its guest: nothing that it says is trusted to end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from atoll.model.errors import DeadlineExceeded, RuntimeFailed, Unavailable
from atoll.runtimes.vm.sockets import open_socket

ANSWER_S_MAX = 10.0
LINES_MAX = 1_000
"""Events that are read past while waiting for an answer."""


Opening = Callable[[Path], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class Session:
    """One connection, which the monitor has greeted. Each call raises Unavailable (it went away), RuntimeFailed (refused)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, name: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what the command `name` returned."""
        return await _ask(self._reader, self._writer, name, arguments or {})


@contextlib.asynccontextmanager
async def session(
    path: Path, *, deadline_s: float = ANSWER_S_MAX, what: str = "", opening: Opening = open_socket
) -> AsyncIterator[Session]:
    """Give a connection for several commands, within one deadline. Raises Unavailable (nobody listens), DeadlineExceeded.

    `opening` connects, and may wait for a monitor that does not listen yet.
    """
    try:
        async with asyncio.timeout(deadline_s):
            try:
                reader, writer = await opening(path)
            except OSError as error:
                raise Unavailable(f"the machine's monitor does not listen: {error}") from None
            try:
                await _answer(reader, "QMP")
                await _ask(reader, writer, "qmp_capabilities", {})
                yield Session(reader, writer)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except TimeoutError:
        raise DeadlineExceeded(f"the machine's monitor did not answer {what} within {deadline_s:.0f} s") from None


async def command(
    path: Path, name: str, arguments: Mapping[str, Any] | None = None, *, deadline_s: float = ANSWER_S_MAX
) -> dict[str, Any]:
    """Return what the command `name` returned. Raises Unavailable (nobody listens), DeadlineExceeded, RuntimeFailed (refused)."""
    async with session(path, deadline_s=deadline_s, what=name) as monitor:
        return await monitor.ask(name, arguments)


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    writer.write(msgspec.json.encode({"execute": name, "arguments": arguments}) + b"\n")
    await writer.drain()
    answer = await _answer(reader, "return", "error")
    if "error" in answer:
        raise RuntimeFailed(f"QEMU refused {name}: {answer['error'].get('desc', '')}"[:300])
    found = answer["return"]
    return found if isinstance(found, dict) else {"value": found}


async def _answer(reader: asyncio.StreamReader, *keys: str) -> dict[str, Any]:
    for _ in range(LINES_MAX):
        try:
            line = await reader.readuntil(b"\n")
            message = msgspec.json.decode(line)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, msgspec.DecodeError, OSError) as error:
            raise Unavailable(f"the machine's monitor went away: {error}") from None
        if isinstance(message, dict) and any(key in message for key in keys):
            return message
    raise Unavailable("the machine's monitor does not come to an answer")
