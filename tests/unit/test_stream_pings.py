"""Whom the server pings over a WebSocket: who is silent, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from control_cell import run_virtual
from uvicorn import Config
from uvicorn.server import ServerState

from atoll.api.http.serve import CLIENTS, HERE_S, IN_VAIN, PAUSED_S, StreamProtocol

PING_S = 20.0
HANDSHAKE = (
    b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
BINARY, PING, PONG = 0x82, 0x89, 0x8A
MASK = bytes(4)
"""Under it a masked payload is the payload."""


class Wire(asyncio.Transport):
    """What the server writes, frame by frame."""

    def __init__(self, line: socket.socket | None = None) -> None:
        super().__init__({"socket": line})
        self.frames: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if bytes(data[:4]) != b"HTTP":
            self.frames.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def pings(self) -> list[bytes]:
        return [frame[2:] for frame in self.frames if frame[0] == PING]


async def accept(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    await hear(receive)


async def hear(receive: Any) -> None:
    while (await receive())["type"] != "websocket.disconnect":
        pass


async def connected(path: str = "/", line: socket.socket | None = None, application: Any = accept) -> tuple[StreamProtocol, Wire]:
    config = Config(application, ws_ping_interval=PING_S, ws_ping_timeout=PING_S, log_config=None)
    config.load()
    wire = Wire(line)
    protocol = StreamProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    protocol.connection_made(wire)
    protocol.data_received(HANDSHAKE % path.encode())
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


@contextlib.contextmanager
def answered() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as line:
        yield line


@contextlib.contextmanager
def unanswered() -> Iterator[socket.socket]:
    """A line whose peer's kernel answers nothing: that of a listener whose queue is full does not."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):
            line = stack.enter_context(socket.socket())
            line.setblocking(False)
            line.connect_ex(listener.getsockname())
        until = time.monotonic() + 20
        while line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 4)[2] < IN_VAIN:
            assert time.monotonic() < until
            time.sleep(0.1)
        yield line


@pytest.mark.parametrize(
    ("lines", "path", "cut_s"),
    [
        (answered, f"{CLIENTS}default/instances/web-1/exec", PAUSED_S),
        (unanswered, f"{CLIENTS}default/instances/web-1/exec", 2 * PING_S),
        (answered, "/v1/nodes/n1/tunnel", 2 * PING_S),
    ],
)
def test_a_client_that_stands_still_is_given_time_but_neither_one_that_is_gone_nor_an_agent(
    lines: Any, path: str, cut_s: float
) -> None:
    with lines() as line:

        async def main() -> None:
            protocol, wire = await connected(path, line)
            await asyncio.sleep(cut_s - 1)
            assert not wire.closed
            await asyncio.sleep(2 * PING_S + 2)
            assert wire.closed
            protocol.connection_lost(None)

        run_virtual(main())


def test_a_peer_of_which_nothing_is_read_is_told_that_this_end_is_there_and_is_not_judged() -> None:
    async def main() -> None:
        resume = asyncio.Event()

        async def busy(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            await resume.wait()
            await hear(receive)

        protocol, wire = await connected(application=busy)
        protocol.data_received(frame(BINARY, b"work"))
        await asyncio.sleep(100)
        assert not wire.closed
        assert sum(one[0] == PONG for one in wire.frames) == 100 // HERE_S
        resume.set()
        await asyncio.sleep(3 * PING_S)
        assert wire.closed
        assert sum(one[0] == PONG for one in wire.frames) == 100 // HERE_S
        protocol.connection_lost(None)

    run_virtual(main())


def test_the_end_of_a_stream_waits_for_a_client_that_pauses() -> None:
    async def main() -> None:
        async def end(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close"})

        protocol, wire = await connected(application=end)
        await asyncio.sleep(PAUSED_S - 1)
        assert not wire.closed
        await asyncio.sleep(2)
        assert wire.closed
        protocol.connection_lost(None)

    run_virtual(main())
