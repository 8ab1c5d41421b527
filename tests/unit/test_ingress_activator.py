"""The activator's bounds: what one app holds leaves room for the others."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from atoll.ingress.activator import APP_SHARE, Activator
from atoll.ingress.resources import Target
from atoll.ingress.sleepers import socket_of
from atoll.ingress.table import RoutingTable
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Endpoint, Listening, Routing
from atoll.model.spec import AppSpec, Port, PortProtocol

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
