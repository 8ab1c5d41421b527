"""Whom the server pings over a WebSocket: who is silent, and nobody else."""

from __future__ import annotations

import asyncio
from typing import Any

from control_cell import run_virtual
from uvicorn import Config
from uvicorn.server import ServerState

from atoll.api.http.serve import StreamProtocol

PING_S = 20.0
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
PING, PONG = 0x89, 0x8A
MASK = bytes(4)
"""Under it a masked payload is the payload."""


class Wire(asyncio.Transport):
    """What the server writes, frame by frame."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if bytes(data[:4]) != b"HTTP":
            self.frames.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pings(self) -> list[bytes]:
        return [frame[2:] for frame in self.frames if frame[0] == PING]


async def accept(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (await receive())["type"] != "websocket.disconnect":
        pass


async def connected() -> tuple[StreamProtocol, Wire]:
    config = Config(accept, ws_ping_interval=PING_S, ws_ping_timeout=PING_S, log_config=None)
    config.load()
    wire = Wire()
    protocol = StreamProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    protocol.connection_made(wire)
    protocol.data_received(HANDSHAKE)
    await asyncio.sleep(0.1)
    assert protocol.handshake_complete
    return protocol, wire


def frame(kind: int, payload: bytes = b"") -> bytes:
    return bytes((kind, 0x80 | len(payload))) + MASK + payload


def test_a_peer_that_pings_by_itself_is_answered_and_never_pinged() -> None:
    async def main() -> None:
        protocol, wire = await connected()
        for _ in range(30):
            await asyncio.sleep(PING_S / 2)
            protocol.data_received(frame(PING, b"here"))
        assert wire.pings() == []
        assert sum(one[0] == PONG for one in wire.frames) == 30
        assert not wire.closed
        protocol.connection_lost(None)

    run_virtual(main())


def test_a_silent_peer_is_pinged_and_one_that_does_not_answer_is_hung_up_on() -> None:
    async def main() -> None:
        protocol, wire = await connected()
        for count in range(1, 6):
            await asyncio.sleep(PING_S + 0.5)
            assert len(wire.pings()) == count
            protocol.data_received(frame(PONG, wire.pings()[-1]))
        await asyncio.sleep(2 * PING_S + 1)
        assert wire.closed
        protocol.connection_lost(None)

    run_virtual(main())


def test_a_peer_that_falls_silent_after_it_spoke_is_found_within_three_intervals() -> None:
    async def main() -> None:
        protocol, wire = await connected()
        await asyncio.sleep(PING_S - 1)
        protocol.data_received(frame(PING))
        await asyncio.sleep(3 * PING_S)
        assert wire.closed
        protocol.connection_lost(None)

    run_virtual(main())
