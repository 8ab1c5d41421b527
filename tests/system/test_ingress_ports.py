"""TCP and UDP ports of the ingress, on the real Envoy."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

from msgspec.structs import replace
from test_ingress import TIMEOUT_S, Site, eventually, routing, serves, site_at, start_backends
from test_ingress import pytestmark as pytestmark

from atoll.ingress.envoy import free_port
from atoll.model.records import Endpoint, Listening, Routing
from atoll.model.spec import AppSpec, Port, PortProtocol
from atoll.model.traffic import DemandReport

TCP, UDP = PortProtocol.TCP, PortProtocol.UDP


class Line:
    """An instance that speaks first, as databases do: its name; then it sends back what it gets."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.port = 0
        self.open = 0

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[Line]:
        server = await asyncio.start_server(self._serve, self.address, port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            writer.write(self.address.encode() + b"\n")
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            self.open -= 1
            writer.close()


class Datagrams(asyncio.DatagramProtocol):
    """An instance that answers each datagram with its name and what it got."""

    def __init__(self, name: str) -> None:
        self._name = name

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(self._name.encode() + b" " + data, addr)


def app(public: int, port: int, *addresses: str, draining: str = "", protocol: PortProtocol = TCP, name: str = "db") -> Routing:
    return Routing(
        project="default",
        app=name,
        spec=AppSpec(name=name, image="x", ports=(Port(name="db", port=port, protocol=protocol),)),
        hosts=(),
        listens=(Listening(public=public, protocol=protocol, port=port),),
        endpoints=tuple(
            Endpoint(instance=f"{name}-{address}", node="n", address=address, draining=address == draining) for address in addresses
        ),
    )


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, str]:
    """Return a connection and the instance that it reached; empty where none was."""
    async with asyncio.timeout(TIMEOUT_S):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            return reader, writer, (await reader.readline()).decode().strip()
        except OSError:
            return asyncio.StreamReader(), None, ""  # type: ignore[return-value]


async def reached(port: int) -> str:
    _, writer, name = await connect(port)
    if writer is not None:
        writer.close()
    return name


async def says_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes) -> bool:
    writer.write(text)
    async with asyncio.timeout(TIMEOUT_S):
        return await reader.readexactly(len(text)) == text


async def test_a_tcp_port_leads_to_instances_and_a_drain_cuts_no_connection() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        async with (
            site_at(Path(directory) / "i") as site,
            Line("127.0.0.2").serving() as one,
            Line("127.0.0.3").serving(one.port) as two,
        ):
            public = free_port("127.0.0.1")
            site.control.put(app(public, one.port, one.address))
            await eventually(lambda: _leads(public, one.address))
            reader, writer, _ = await connect(public)
            assert await says_back(reader, writer, b"x" * 3_000_000)
            site.control.put(app(public, one.port, one.address, two.address, draining=one.address))
            await eventually(lambda: _leads(public, two.address))
            for _ in range(10):
                assert await reached(public) == two.address
            assert await says_back(reader, writer, b"still there")
            assert site.control.drained_instances == []
            writer.close()
            await eventually(lambda: site.control.drained_instances == [f"db-{one.address}"])
            # An instance that nobody listens at is passed over, after one connection that meets it at every try at most.
            site.control.put(app(public, one.port, two.address, "127.0.0.9"))
            await eventually(lambda: _leads(public, two.address))
            answers = [await reached(public) for _ in range(20)]
            assert set(answers) - {""} == {two.address}
            assert answers.count("") <= 1
            log = (Path(directory) / "i" / "access.log").read_text
            await eventually(lambda: f'"place":"tcp:{public}"' in log() and '"app":"default/db"' in log())
            site.control.remove("default/db")
            await eventually(lambda: _leads(public, ""))


async def _leads(port: int, to: str) -> bool:
    return await reached(port) == to


async def test_a_udp_port_leads_to_one_instance_for_each_client() -> None:
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        async with site_at(Path(directory) / "i") as site:
            addresses = ("127.0.0.2", "127.0.0.3")
            port = free_port(addresses[0])
            ends = [(await loop.create_datagram_endpoint(lambda a=a: Datagrams(a), (a, port)))[0] for a in addresses]  # type: ignore[misc]
            public = free_port("127.0.0.1")
            site.control.put(app(public, port, *addresses, protocol=UDP))
            found = set()
            try:
                for _ in range(20):
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as client:
                        client.connect(("127.0.0.1", public))
                        answers = {await _asked(client, b"%d" % n) for n in range(3)}
                        assert len(answers) == 1, "one client is answered by one instance"
                        found |= answers
                assert found == set(addresses)
            finally:
                for end in ends:
                    end.close()


async def _asked(client: socket.socket, text: bytes) -> str:
    """Return who answers; what is lost before the port is open is said again."""
    loop = asyncio.get_running_loop()
    for _ in range(200):
        try:
            client.send(text)
            async with asyncio.timeout(TIMEOUT_S / 100):
                while True:
                    name, _, got = (await loop.sock_recv(client, 1_000)).partition(b" ")
                    if got == text:
                        return name.decode()
        except (ConnectionRefusedError, TimeoutError):
            await asyncio.sleep(0.01)
    raise AssertionError("nobody answers")


async def test_a_connection_wakes_an_app_that_sleeps_and_waits_for_it() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        async with site_at(Path(directory) / "i") as site, Line("127.0.0.2").serving() as line:
            public = free_port("127.0.0.1")
            asleep = _waking(app(public, line.port))
            awake = _waking(app(public, line.port, line.address))
            site.control.on_demand = lambda report: site.control.put(awake) if "default/db" in report.apps else None
            site.control.put(asleep)
            await eventually(lambda: _leads(public, line.address))
            assert site.ingress.activator.held >= 1
            # Whoever waited is let in before Envoy has heard of the instance; soon nobody passes here any more.
            await eventually(lambda: _passes_by(site, public, line.address))
            for _ in range(5):
                assert await _passes_by(site, public, line.address)


async def _passes_by(site: Site, port: int, to: str) -> bool:
    """Say whether a connection reaches `to` without the activator."""
    held = site.ingress.activator.held
    assert await reached(port) == to
    return site.ingress.activator.held == held


async def test_a_datagram_wakes_an_app_that_sleeps_and_is_handed_to_it() -> None:
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        async with site_at(Path(directory) / "i") as site:
            heard = Heard("127.0.0.2")
            end, _ = await loop.create_datagram_endpoint(lambda: heard, ("127.0.0.2", 0))
            port = end.get_extra_info("sockname")[1]
            public = free_port("127.0.0.1")
            asleep = _waking(app(public, port, protocol=UDP))
            awake = _waking(app(public, port, heard.address, protocol=UDP))
            reports: list[frozenset[str]] = []

            def asked(report: DemandReport) -> None:
                reports.append(frozenset(report.apps))
                if "default/db" in report.apps:
                    site.control.put(awake)

            try:
                site.control.put(asleep)
                await asyncio.sleep(0)
                assert site.ingress.activator.waiting == set()
                site.control.on_demand = asked
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as client:
                    client.connect(("127.0.0.1", public))
                    assert await _asked(client, b"first") == heard.address
                    assert b"first" in heard.got
                    assert site.ingress.activator.waiting == set()
                    # It is at work as long as datagrams come, and no longer.
                    told = len(reports)
                    assert await _asked(client, b"later") == heard.address
                    await eventually(lambda: any("default/db" in apps for apps in reports[told:]))
                    told = len(reports)
                    await eventually(lambda: len(reports) > told + 1 and "default/db" not in reports[-1])
                    # Asleep again, it is woken again, with what the same client says.
                    site.control.on_demand = lambda report: None
                    site.control.put(asleep)
                    held = site.ingress.activator.datagrams
                    await eventually(lambda: _sent(client, b"again") and held.waiting == {"default/db"})
                    count = held.kept
                    await eventually(lambda: _sent(client, b"kept") and held.kept > count)
                    assert b"kept" not in heard.got
                    site.control.put(awake)
                    await eventually(lambda: b"kept" in heard.got)
            finally:
                end.close()


def _sent(client: socket.socket, text: bytes) -> bool:
    try:
        client.send(text)
    except ConnectionRefusedError:
        return False
    return True


class Heard(Datagrams):
    """It remembers what it got."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address
        self.got: list[bytes] = []

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.got.append(data)
        super().datagram_received(data, addr)


def _waking(made: Routing) -> Routing:
    return replace(made, wakes=True)


async def test_a_port_that_something_else_has_is_said_of_its_app_and_stops_no_other() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        async with site_at(Path(directory) / "i") as site, Line("127.0.0.2").serving() as line:
            (backend,) = await start_backends(site._stack, 1)
            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))
                taken.listen(1)
                number = taken.getsockname()[1]
                public = free_port("127.0.0.1")
                site.control.put(
                    app(number, line.port, line.address, name="late"), app(public, line.port, line.address), routing("web", backend)
                )
                await eventually(lambda: _leads(public, line.address))
                await eventually(lambda: serves(site, "web.localhost"))
                await eventually(lambda: "default/late" in site.ingress._problems())
                assert str(number) in site.ingress._problems()["default/late"]
