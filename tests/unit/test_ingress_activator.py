"""The activator's bounds: what one app holds leaves room for the others."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from atoll.ingress.activator import APP_SHARE, Activator
from atoll.ingress.doors import KNOCK_S
from atoll.ingress.resources import Target
from atoll.ingress.sleepers import socket_of
from atoll.ingress.table import RoutingTable
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Endpoint, Listening, Routing
from atoll.model.spec import AppSpec, Health, IngressRules, InstanceTls, Port, PortProtocol
from atoll.model.units import Seconds

SHARE = 2
LIMIT_S = 30.0


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(100):
        writer.write(data)
        await writer.drain()
    writer.close()


async def test_an_app_holds_its_share_of_connections_and_others_wake_beside_it() -> None:
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    awake = (Endpoint(instance="i", node="n", address="127.0.0.1"),)

    def database(*endpoints: Endpoint) -> Routing:
        spec = AppSpec(name="db", project="p", image="x", ports=(Port(name="db", port=port, protocol=PortProtocol.TCP),))
        listens = (Listening(public=15_432, protocol=PortProtocol.TCP, port=port),)
        return Routing(project="p", app="db", spec=spec, hosts=(), listens=listens, endpoints=endpoints, wakes=True)

    web = Routing(
        project="p",
        app="web",
        spec=AppSpec(name="web", project="p", image="x", ports=(Port(port=port),)),
        hosts=(("web.test", "/", port, False),),
        wakes=True,
    )
    table, woken = RoutingTable(), asyncio.Queue[str]()
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        activator = Activator(table, Path(directory), wake=woken.put_nowait, connections_max=SHARE * APP_SHARE)
        activator.start()
        table.apply(RoutingBatch(1, True, (database(), web)))
        activator.changed()

        async def connect(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            path = Path(directory) / socket_of(target)
            return await asyncio.open_unix_connection(path)

        raw, http = Target("p", "db", port, raw="tcp"), Target("p", "web", port)
        async with asyncio.timeout(LIMIT_S):
            held = [await connect(raw) for _ in range(SHARE)]
            assert [await woken.get() for _ in held] == ["p/db"] * SHARE
            assert await (await connect(raw))[0].read() == b""
            for _ in range(SHARE):
                await connect(http)
                assert await woken.get() == "p/web"
            reader, writer = await connect(http)
            writer.write(b"GET / HTTP/1.1\r\nHost: web.test\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
            # What woke an app keeps its place for as long as it is spliced, and gives it back.
            table.apply(RoutingBatch(2, False, (database(*awake),)))
            activator.changed()
            for reader, writer in held:
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
            assert await (await connect(raw))[0].read() == b""
            for _, writer in held:
                writer.close()
            answer = b""
            while not answer:
                reader, writer = await connect(raw)
                writer.write(b"again")
                try:
                    answer = await reader.read(5)
                except ConnectionError:
                    continue
            assert answer == b"again"
            writer.close()
        activator.stop()
        server.close()


class Sleepy:
    """An app of which an instance is on its way to `port` of 127.0.0.1, and an activator that waits for it."""

    def __init__(self, directory: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.place = Endpoint(instance="i", node="n", address="127.0.0.1")
        self.table = RoutingTable()
        self.directory = Path(directory)
        self.woken: list[str] = []
        self.activator = Activator(self.table, self.directory, wake=self.woken.append)
        self.activator.start()
        self.connections = 0
        self.rules: IngressRules | None = None
        self.health: Health | None = None
        self._revision = 0

    def tell(self, *, starting: tuple[Endpoint, ...] = (), endpoints: tuple[Endpoint, ...] = ()) -> None:
        self._revision += 1
        ports = (Port(port=self.port),)
        spec = AppSpec(name="web", project="p", image="x", ports=ports, ingress=self.rules, health=self.health)
        hosts = (("web.test", "/", self.port, False),)
        made = Routing(project="p", app="web", spec=spec, hosts=hosts, wakes=True, starting=starting, endpoints=endpoints)
        self.table.apply(RoutingBatch(self._revision, False, (made,)))
        self.activator.changed()

    async def ask(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(self.directory / socket_of(Target("p", "web", self.port)))
        writer.write(b"hello")
        return reader, writer

    async def listen(self) -> asyncio.Server:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            await _echo(reader, writer)

        return await asyncio.start_server(serve, "127.0.0.1", self.port)


@pytest.fixture
async def sleepy() -> AsyncIterator[Sleepy]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        made = Sleepy(directory)
        yield made
        made.activator.stop()


async def test_who_waits_goes_to_an_instance_that_takes_connections_before_anybody_says_that_it_is_ready(sleepy: Sleepy) -> None:
    sleepy.tell()
    held = [await sleepy.ask() for _ in range(20)]
    await until(lambda: len(sleepy.woken) >= 20)
    sleepy.tell(starting=(sleepy.place,))
    await asyncio.sleep(0.05)
    server = await sleepy.listen()
    async with asyncio.timeout(LIMIT_S):
        for reader, _ in held:
            assert await reader.readexactly(5) == b"hello"
    assert sleepy.connections <= 22, "one knocks for all who wait"
    late = await sleepy.ask()
    async with asyncio.timeout(LIMIT_S):
        assert await late[0].readexactly(5) == b"hello"
    sleepy.tell(endpoints=(sleepy.place,))
    for _, writer in (*held, late):
        writer.close()
    server.close()


async def test_nobody_knocks_where_nobody_waits_and_who_comes_later_still_does(sleepy: Sleepy) -> None:
    server = await sleepy.listen()
    sleepy.tell(starting=(sleepy.place,))
    await asyncio.sleep(0.05)
    assert sleepy.connections == 0
    reader, writer = await sleepy.ask()
    async with asyncio.timeout(LIMIT_S):
        assert await reader.readexactly(5) == b"hello"
    writer.close()
    server.close()


async def test_an_instance_that_took_a_connection_and_went_is_waited_for_anew(sleepy: Sleepy) -> None:
    server = await sleepy.listen()
    sleepy.tell(starting=(sleepy.place,))
    reader, writer = await sleepy.ask()
    async with asyncio.timeout(LIMIT_S):
        assert await reader.readexactly(5) == b"hello"
    writer.close()
    server.close()
    await server.wait_closed()
    reader, writer = await sleepy.ask()
    await asyncio.sleep(0.05)
    server = await sleepy.listen()
    async with asyncio.timeout(LIMIT_S):
        assert await reader.readexactly(5) == b"hello"
    writer.close()
    server.close()


async def test_an_instance_that_is_not_reached_keeps_nobody_from_another_that_opens_later(sleepy: Sleepy) -> None:
    lost = Endpoint(instance="h", node="m", address="127.0.0.9")
    took_s: list[float] = []
    with contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.bind((lost.address, sleepy.port))
        hole.listen(0)
        for _ in range(4):  # its queue is full, so that nothing answers any more
            full = stack.enter_context(socket.socket())
            full.setblocking(False)
            full.connect_ex((lost.address, sleepy.port))
        for _ in range(3):
            sleepy.tell()
            reader, writer = await sleepy.ask()
            await until(lambda: sleepy.activator.waiting == {"p/web"})
            sleepy.tell(starting=(lost, sleepy.place))
            await asyncio.sleep(0.05)
            began = asyncio.get_running_loop().time()
            server = await sleepy.listen()
            async with asyncio.timeout(LIMIT_S):
                assert await reader.readexactly(5) == b"hello"
            took_s.append(asyncio.get_running_loop().time() - began)
            writer.close()
            server.close()
            await until(lambda: not sleepy.activator.busy)
    assert min(took_s) < KNOCK_S / 2


async def test_who_hangs_up_is_waited_for_no_longer_and_leaves_its_place_whatever_it_has_sent(sleepy: Sleepy) -> None:
    sleepy.tell()
    for body in (b"", b"x" * (4 << 20)):
        _, writer = await sleepy.ask()
        writer.write(body)
        await until(lambda: sleepy.activator.waiting == {"p/web"})
        writer.transport.abort()
        await until(lambda: not sleepy.activator.busy)


async def test_who_has_said_all_and_waits_for_the_answer_has_not_hung_up(sleepy: Sleepy) -> None:
    sleepy.tell()
    reader, writer = await sleepy.ask()
    writer.write_eof()
    await until(lambda: len(sleepy.woken) == 1)
    server = await sleepy.listen()
    sleepy.tell(endpoints=(sleepy.place,))
    async with asyncio.timeout(LIMIT_S):
        assert await reader.readexactly(5) == b"hello"
    writer.close()
    server.close()


async def test_who_speaks_tls_waits_once_for_what_does_not_wake_and_not_with_each_of_envoys_tries(sleepy: Sleepy) -> None:
    sleepy.rules, sleepy.health = IngressRules(instance_tls=InstanceTls()), Health(start=Seconds(0.2))
    sleepy.tell()
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(LIMIT_S):
        assert await (await sleepy.ask())[0].read() == b"", "no words, which would be no TLS"
        assert loop.time() - began >= 0.2
        assert len(sleepy.woken) == 1
        assert await (await sleepy.ask())[0].read() == b""
    assert len(sleepy.woken) == 1, "this one was not waited with"
    server = await sleepy.listen()
    sleepy.tell(endpoints=(sleepy.place,))
    reader, writer = await sleepy.ask()
    async with asyncio.timeout(LIMIT_S):
        assert await reader.readexactly(5) == b"hello"
    writer.close()
    server.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.002)
