"""An ingress that listens everywhere is there by both versions of IP, plain and over TLS and at its ports. On the real Envoy."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from test_ingress_http3 import fast
from test_ingress_http3 import routing as http3_routing
from test_ingress_ports import TCP, UDP, Datagrams, Line, app
from test_ingress_tls import BODY, TIMEOUT_S, Cell, ask, eventually, trusting
from test_ingress_tls import _has_envoy as has_envoy
from test_ingress_tls import _instance as instance

from atoll.ingress.envoy import also_at, free_port
from atoll.ingress.fake import FakeRouting
from atoll.ingress.fake_certificates import FakeCertificates
from atoll.ingress.service import Ingress
from made_certificates import Maker

EVERYWHERE = "0.0.0.0"
BOTH = ("127.0.0.1", "::1")
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not has_envoy(), reason="Envoy is not installed"),
    pytest.mark.skipif(also_at(EVERYWHERE) == "", reason="no IPv6 here"),
]


@asynccontextmanager
async def cell_at(address: str, directory: Path, **options: bool) -> AsyncIterator[Cell]:
    server = await asyncio.start_server(instance, "127.0.0.1", 0)
    routing, certificates, maker = FakeRouting(), FakeCertificates(), Maker()
    ingress = Ingress(
        routing, directory, address=address, port=0, tls_port=0, certificates=certificates, workers=1, stop_grace_s=0.2, **options
    )
    running = asyncio.create_task(ingress.run())
    try:
        ready = asyncio.create_task(ingress.ready.wait())
        await asyncio.wait({running, ready}, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        assert ready.done(), running
        yield Cell(ingress, routing, certificates, maker, server.sockets[0].getsockname()[1])
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        server.close()


async def said(address: str, port: int, host: str, cell: Cell | None = None) -> bytes:
    """Return the answer to a request, over TLS for a cell's; empty where there is no connection to be had."""
    name = host if cell is not None else None
    try:
        reader, writer = await asyncio.open_connection(
            address, port, ssl=trusting(cell.maker) if cell is not None else None, server_hostname=name
        )
    except OSError:
        return b""
    try:
        return await ask(reader, writer, host)
    except asyncio.IncompleteReadError:
        return b""
    finally:
        writer.close()


async def echoed(address: str, port: int, text: bytes) -> bytes:
    """Return what a UDP port answers; what is lost before it is open is said again."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as client:
        client.connect((address, port))
        for _ in range(100):
            try:
                client.send(text)
                async with asyncio.timeout(0.3):
                    return await loop.sock_recv(client, 1_000)
            except (ConnectionRefusedError, TimeoutError):
                await asyncio.sleep(0.01)
    return b""


async def test_everything_is_served_by_both_versions_of_ip() -> None:
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        async with cell_at(EVERYWHERE, Path(directory) / "i") as cell, Line("127.0.0.2").serving() as line:
            tcp, udp = free_port("::"), free_port("::")
            end, _ = await loop.create_datagram_endpoint(lambda: Datagrams("one"), ("127.0.0.2", 0))
            try:
                cell.routing.put(
                    http3_routing(cell, "web", "web.test"),
                    app(tcp, line.port, line.address, protocol=TCP),
                    app(udp, end.get_extra_info("sockname")[1], "127.0.0.2", protocol=UDP, name="dns"),
                )
                cell.show(cell.maker.material("web.test"))
                for address in BOTH:

                    async def plain(at: str = address) -> bool:
                        return BODY in await said(at, cell.ingress.http_port, "web.test")

                    async def secure(at: str = address) -> bool:
                        return BODY in await said(at, cell.tls_port, "web.test", cell)

                    async def quick(at: str = address) -> bool:
                        return await fast(cell, "web.test", at=at) == ("200", BODY)

                    async def lined(at: str = address) -> bool:
                        try:
                            reader, writer = await asyncio.open_connection(at, tcp)
                        except OSError:
                            return False
                        name = await reader.readline()
                        writer.close()
                        return name.decode().strip() == line.address

                    for way in (plain, secure, quick, lined):
                        await eventually(way)
                    assert await echoed(address, udp, b"hello") == b"one hello"
                assert cell.ingress._problems() == {}
            finally:
                end.close()


async def test_an_ingress_at_one_address_or_of_a_node_without_ipv6_is_there_alone() -> None:
    for address, options in (("127.0.0.1", {}), (EVERYWHERE, {"one_family": True})):
        with tempfile.TemporaryDirectory(dir="/tmp") as directory:
            async with cell_at(address, Path(directory) / "i", **options) as cell:
                assert (await said("127.0.0.1", cell.ingress.http_port, "nobody.test")).startswith(b"HTTP/1.1 404")
                assert await said("::1", cell.ingress.http_port, "nobody.test") == b""


async def test_a_port_that_another_has_by_ipv6_is_said_and_ipv4_is_served() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        other.bind(("::", 0))
        other.listen(1)
        port = other.getsockname()[1]
        ingress = Ingress(FakeRouting(), Path(directory) / "i", address=EVERYWHERE, port=port, workers=1, stop_grace_s=0.2)
        running = asyncio.create_task(ingress.run())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await ingress.ready.wait()
            assert (await said("127.0.0.1", port, "nobody.test")).startswith(b"HTTP/1.1 404")
            (problem,) = ingress._problems().values()
            assert f"[::]:{port}" in problem
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
