"""How one server learns within milliseconds that another's process has died: its kernel says so.

An idle connection to the other server breaks when the process ends, and where its port then refuses another, nobody is there any
more. Anything else (silence, a host without power, a cut, a proxy) says nothing, and the lease decides.
"""

from __future__ import annotations

import asyncio

from atoll.model.membership import Server
from atoll.sdk.transport import Address
from atoll.store.cache import State

CONNECT_S = 1.0
"""The longest wait for a connection."""
RETRY_S = 0.5
"""Between two tries to connect, and between two connections that end soon, again and again."""
RETRY_FIRST_S = 0.01
"""The same at first, doubled from there: one that is dying may take a connection for a moment, or break it off."""
STRANGE_MAX = 3
"""Tries in a row to connect anew that say neither that it lives nor that it is dead, after which nothing can be told."""
READ_BYTES = 4_096

Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Deaths:
    """`state` holds the records of the servers."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def of(self, id: str) -> None:
        """Return when the process of the server `id` has ended, if it was seen to run before. Raises nothing; cancel it."""
        while True:
            address = self._address(id)
            if address is not None and await _saw_it_die(address):
                return
            await asyncio.sleep(RETRY_S)

    def _address(self, id: str) -> Address | None:
        held = self._state.get(Server, id)
        return Address.parse(held.record.urls[0]) if held is not None and held.record.urls else None


async def _saw_it_die(address: Address) -> bool:
    """Return True when the process that first answered there has died; False where it cannot be told any more."""
    loop = asyncio.get_running_loop()
    seen, strange, pause_s = False, 0, RETRY_FIRST_S
    try:
        while True:
            began = loop.time()
            line = await _connect(address)
            if line is not None:
                seen, strange = True, 0
                await _end_of(line)
            elif not seen or strange == STRANGE_MAX:
                return False
            else:
                strange += 1
            # A server that lives hangs up, too, on one who says nothing: after 15 s, or with TLS after 60 s.
            if loop.time() - began >= RETRY_S:
                pause_s = RETRY_FIRST_S
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(RETRY_S, 2 * pause_s)
    except ConnectionRefusedError:
        # Refused from the start is no death that was seen: a rule of a firewall refuses, too.
        return seen


async def _connect(address: Address) -> Line | None:
    """Return a connection, or None where there is none in time. Raises ConnectionRefusedError."""
    try:
        async with asyncio.timeout(CONNECT_S):
            return await asyncio.open_connection(address.host, address.port)
    except ConnectionRefusedError:
        raise
    except (OSError, TimeoutError):
        return None


async def _end_of(line: Line) -> None:
    reader, writer = line
    try:
        # Without a deadline: the other server ends it, by hanging up or by its death.
        while await reader.read(READ_BYTES):
            pass
    except OSError:
        pass
    finally:
        writer.close()
