"""Who opens a connection and says too little on it is hung up on; who is only slow is not."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
from control_cell import LoopClock, run_virtual
from uvicorn import Config
from uvicorn.server import ServerState

from atoll.api.http.app import BODY_SILENT_S, create_app
from atoll.api.http.serve import HEADER_S, KEEP_ALIVE_S, BoundedProtocol
from atoll.api.service import KINDS, Service
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
BODY = b"{}" + b" " * 48
JOIN = b"POST /v1/identity/join HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)


class Wire(asyncio.Transport):
    """What the server answers."""

    def __init__(self) -> None:
        super().__init__()
        self.said = b""
        self.closed_at: float | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.said += bytes(data)

    def is_closing(self) -> bool:
        return self.closed_at is not None

    def close(self) -> None:
        self.closed_at = asyncio.get_running_loop().time()


Stranger = Callable[[BoundedProtocol, Wire], Awaitable[None]]


def meeting(stranger: Stranger) -> None:
    async def main() -> None:
        clock = LoopClock()
        store = MemoryStore(clock)
        async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32)) as service:
            config = Config(create_app(service), log_config=None, lifespan="off", timeout_keep_alive=KEEP_ALIVE_S)  # type: ignore[arg-type]
            config.load()
            wire = Wire()
            protocol = BoundedProtocol(config, ServerState(), {}, asyncio.get_running_loop())
            protocol.connection_made(wire)
            await stranger(protocol, wire)
            protocol.connection_lost(None)
        await store.close()

    run_virtual(main())


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("beginning", [b"G", b"\r\n", HEALTH[:-2], JOIN[:20]])
def test_a_second_request_has_as_long_for_its_headers_as_the_first(beginning: bytes) -> None:
    async def stranger(protocol: BoundedProtocol, wire: Wire) -> None:
        protocol.data_received(HEALTH)
        await asyncio.sleep(1)
        assert wire.said.startswith(b"HTTP/1.1 200")
        begun = now()
        protocol.data_received(beginning)
        await asyncio.sleep(HEADER_S - 1)
        assert wire.closed_at is None
        await asyncio.sleep(2)
        assert wire.closed_at == pytest.approx(begun + HEADER_S)

    meeting(stranger)


def test_a_connection_is_kept_for_request_after_request_and_one_that_comes_in_pieces() -> None:
    async def stranger(protocol: BoundedProtocol, wire: Wire) -> None:
        for _ in range(20):
            protocol.data_received(HEALTH[:9])
            await asyncio.sleep(HEADER_S - 1)
            protocol.data_received(HEALTH[9:])
            await asyncio.sleep(KEEP_ALIVE_S - 1)
        assert wire.said.count(b"HTTP/1.1 200") == 20
        assert wire.closed_at is None

    meeting(stranger)


def test_a_body_that_does_not_come_is_waited_for_so_long_and_its_connection_ends() -> None:
    async def stranger(protocol: BoundedProtocol, wire: Wire) -> None:
        protocol.data_received(JOIN)
        await asyncio.sleep(BODY_SILENT_S - 1)
        assert wire.said == b""
        await asyncio.sleep(2)
        assert wire.said.startswith(b"HTTP/1.1 503")
        assert b"nothing came of the body" in wire.said
        await asyncio.sleep(KEEP_ALIVE_S)
        assert wire.closed_at is not None

    meeting(stranger)


def test_a_body_that_comes_slowly_is_waited_for() -> None:
    async def stranger(protocol: BoundedProtocol, wire: Wire) -> None:
        protocol.data_received(JOIN)
        for place in range(len(BODY)):
            assert wire.said == b""
            await asyncio.sleep(BODY_SILENT_S - 1)
            protocol.data_received(BODY[place : place + 1])
        await asyncio.sleep(1)
        assert wire.said.startswith(b"HTTP/1.1 400")
        assert wire.closed_at is None

    meeting(stranger)
