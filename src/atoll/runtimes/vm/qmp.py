"""QEMU's machine protocol (QMP): one command over one connection, with a deadline; its answers are bounded.

QEMU documentation: interop/qmp-spec. A monitor may have been taken over by its guest: nothing that it says is trusted to end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from atoll.model.errors import DeadlineExceeded, RuntimeFailed, Unavailable
from atoll.runtimes.vm.sockets import open_socket

ANSWER_S_MAX = 10.0
LINES_MAX = 1_000
"""Events that are read past while waiting for an answer."""


async def command(
    path: Path, name: str, arguments: Mapping[str, Any] | None = None, *, deadline_s: float = ANSWER_S_MAX
) -> dict[str, Any]:
    """Return what the command `name` returned. Raises Unavailable (nobody listens), DeadlineExceeded, RuntimeFailed (refused)."""
    try:
        async with asyncio.timeout(deadline_s):
            try:
                reader, writer = await open_socket(path)
            except OSError as error:
                raise Unavailable(f"the machine's monitor does not listen: {error}") from None
            try:
                await _answer(reader, "QMP")
                await _ask(reader, writer, "qmp_capabilities", {})
                return await _ask(reader, writer, name, arguments or {})
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except TimeoutError:
        raise DeadlineExceeded(f"the machine's monitor did not answer {name} within {deadline_s:.0f} s") from None


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
