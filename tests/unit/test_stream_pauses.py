"""Streams over real sockets whose reader pauses, here or there: nothing is cut, and who is gone is found all the same."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
from uvicorn import Config
from uvicorn.server import ServerState

from atoll.api.http.serve import CLIENTS, StreamProtocol
from atoll.model.errors import Unavailable
from atoll.sdk.transport import Address
from atoll.sdk.websocket import WebSocketChannel, dial

PING_S = 0.3
PAUSE_S = 5 * PING_S
PART = bytes(100_000)
PARTS = 100
"""More than the kernels of both sides hold between them."""
EXEC = f"{CLIENTS}default/instances/web-1/exec"
TUNNEL = "/v1/nodes/n1/tunnel"

Application = Callable[["Ends"], Awaitable[None]]


class Protocol(StreamProtocol):
    here_s = PING_S / 4
    agent_close_s = PING_S


class Ends:
    """The server's end of one stream, as an application has it."""

    def __init__(self, receive: Any, send: Any) -> None:
        self._receive, self._send = receive, send

    async def send(self, message: bytes) -> None:
        await self._send({"type": "websocket.send", "bytes": message})

    async def receive(self) -> bytes | None:
        message = await self._receive()
        return message["bytes"] if message["type"] == "websocket.receive" else None


@asynccontextmanager
async def serving(application: Application) -> AsyncIterator[Address]:
    async def run(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await application(Ends(receive, send))
        await send({"type": "websocket.close"})

    config = Config(run, ws_ping_interval=PING_S, ws_ping_timeout=PING_S, log_config=None)
    config.load()
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Protocol(config, ServerState(), {}, loop), "127.0.0.1", 0)
    try:
        yield Address.parse(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    finally:
        listener.close()


async def opened(address: Address, path: str = EXEC, **options: Any) -> WebSocketChannel:
    return await dial(address, None, path, ping_s=PING_S, **options)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """As in a server and an agent."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main()

    uvloop.run(bounded())


async def say_all(end: Ends) -> None:
    for _ in range(PARTS):
        await end.send(PART)
    assert await end.receive() == b"all came"


@pytest.mark.parametrize("path", [EXEC, TUNNEL])
def test_a_client_that_pauses_gets_all_of_it_later(path: str) -> None:
    async def main() -> None:
        async with serving(say_all) as address:
            channel = await opened(address, path)
            await asyncio.sleep(PAUSE_S)
            for _ in range(PARTS):
                assert await channel.receive() == PART
            await channel.send(b"all came")
            assert await channel.receive() is None

    run(main)


def test_a_server_whose_reader_pauses_gets_all_of_it_later() -> None:
    async def main() -> None:
        async def hear_all(end: Ends) -> None:
            await asyncio.sleep(PAUSE_S)
            for _ in range(PARTS):
                assert await end.receive() == PART
            await end.send(b"all came")

        async with serving(hear_all) as address:
            channel = await opened(address, TUNNEL)
            for _ in range(PARTS):
                await channel.send(PART)
            assert await channel.receive() == b"all came"
            assert await channel.receive() is None

    run(main)


def test_an_agent_that_reads_nothing_learns_soon_that_its_client_has_gone() -> None:
    async def main() -> None:
        async def leave(end: Ends) -> None:
            for _ in range(60):
                await end.send(b"input that nobody reads")

        async with serving(leave) as address:
            channel = await opened(address, "/v1/nodes/n1/streams/1")
            async with asyncio.timeout(20 * PING_S):
                await channel.gone()
            await channel.close()

    run(main)


def test_what_was_sent_before_the_end_comes_though_its_reader_pauses_and_more_comes_than_anybody_wants() -> None:
    """The end of a command whose output `less` holds up, and that did not take all of its input."""

    async def main() -> None:
        heard: list[bytes] = []
        ended = asyncio.get_running_loop().create_future()

        async def hear_late(end: Ends) -> None:
            for _ in range(40):
                await end.send(b"unwanted")
            await asyncio.sleep(PAUSE_S)
            while (message := await end.receive()) is not None:
                heard.append(message)
            ended.set_result(None)

        async with serving(hear_late) as address:
            channel = await opened(address, TUNNEL, close_s=30)
            sent = 0
            try:
                async with asyncio.timeout(PING_S):
                    for sent in range(1, PARTS + 1):  # noqa: B007 - how far it came
                        await channel.send(PART)
            except TimeoutError:
                pass  # the last one waits: now there is an end behind it
            await channel.close()
            await ended
            assert heard == [PART] * sent

    run(main)


def test_who_is_cancelled_does_not_wait_for_a_reader_that_pauses() -> None:
    async def main() -> None:
        over = asyncio.Event()

        async def hear_nothing(end: Ends) -> None:
            await over.wait()

        async def work(channel: WebSocketChannel) -> None:
            try:
                while True:
                    await channel.send(PART)
            finally:
                await channel.close()

        async with serving(hear_nothing) as address:
            working = asyncio.create_task(work(await opened(address, close_s=1_000)))
            await asyncio.sleep(PING_S)
            working.cancel()
            async with asyncio.timeout(20):
                await asyncio.gather(working, return_exceptions=True)
            over.set()

    run(main)


HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
HELLO = bytes((0x82, 0x80 | 5)) + bytes(4) + b"hello"


@pytest.mark.parametrize(("path", "heard"), [(EXEC, b"hello"), (TUNNEL, None)])
def test_a_client_that_stands_still_is_given_time_and_an_agent_that_does_is_not(path: str, heard: bytes | None) -> None:
    async def main() -> None:
        first: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

        async def hear(end: Ends) -> None:
            first.set_result(await end.receive())

        async with serving(hear) as address:
            loop = asyncio.get_running_loop()
            with socket.create_connection((address.host, address.port)) as still:
                still.setblocking(False)
                await loop.sock_sendall(still, HANDSHAKE.format(path=path).encode())
                await asyncio.sleep(PAUSE_S)
                await loop.sock_sendall(still, HELLO)
                assert await first == heard

    run(main)


def test_a_server_that_falls_silent_is_found() -> None:
    async def main() -> None:
        held: list[asyncio.StreamWriter] = []

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            held.append(writer)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            key = next(line[19:] for line in head.split("\r\n") if line.lower().startswith("sec-websocket-key: "))
            writer.write(answer_to(key))

        listener = await asyncio.start_server(accept, "127.0.0.1", 0)
        channel = await opened(Address.parse(f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"))
        with pytest.raises(Unavailable, match="the stream broke"):
            await channel.receive()
        for writer in held:
            writer.close()
        listener.close()

    run(main)


def answer_to(key: str) -> bytes:
    accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()).decode()
    return f"HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n".encode()
