"""What a real Envoy counts becomes the rate of a site's requests, and a connection to another site's Envoy a round trip."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from atoll.ingress import envoy
from atoll.ingress.fake import FakeRouting
from atoll.ingress.heartbeat import Heart
from atoll.ingress.probe import Prober
from atoll.ingress.service import Ingress
from atoll.model.errors import AtollError
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.control_plane import Peer, Peers
from atoll.model.records import Endpoint, Routing
from atoll.model.spec import AppSpec, Port


def _has_envoy() -> bool:
    try:
        envoy.find_binary()
    except AtollError:
        return False
    return True


pytestmark = [pytest.mark.system, pytest.mark.skipif(not _has_envoy(), reason="Envoy is not installed")]
READY_S = 30.0


@asynccontextmanager
async def site(name: str, directory: Path, routing: FakeRouting) -> AsyncIterator[Ingress]:
    ingress = Ingress(routing, directory, name=name, site=name, port=0, workers=1, stop_grace_s=0.1, reachable="127.0.0.1")
    task = asyncio.create_task(ingress.run())
    try:
        async with asyncio.timeout(READY_S):
            await ingress.ready.wait()
        yield ingress
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def upstream() -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()


async def get(port: int, host: str) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return int((await reader.readuntil(b"\r\n\r\n")).split()[1])
    finally:
        writer.close()


def routing_of(app: str, port: int, *, there: bool = True) -> Routing:
    endpoints = (Endpoint(instance=f"{app}-1", node="n", address=str(ipaddress.ip_address("127.0.0.1"))),) if there else ()
    spec = AppSpec(name=app, image="x", ports=(Port(port=port),))
    return Routing(project="default", app=app, spec=spec, hosts=((f"{app}.localhost", "/", port, False),), endpoints=endpoints)


async def test_requests_are_counted_where_they_come_in_and_the_way_to_the_other_site_is_measured(tmp_path: Path) -> None:
    clock, routing = SystemClock(), FakeRouting()
    async with upstream() as port:
        routing.put(routing_of("web", port), routing_of("empty", port, there=False))
        async with site("ams", tmp_path / "ams", routing) as here, site("iad", tmp_path / "iad", routing) as there:
            assert {one.site: one.address for one in routing.ingresses.values()} == {"ams": "127.0.0.1", "iad": "127.0.0.1"}
            routing.peers = Peers(
                (Peer("ams", "127.0.0.1", here.http_port), Peer("iad", "127.0.0.1", there.http_port), Peer("gone", "127.0.0.1", 9))
            )
            hearts = {
                ingress: Heart(ingress.envoy.admin, routing, Prober(name, clock), ingress=name, site=name, clock=clock)
                for name, ingress in (("ams", here), ("iad", there))
            }
            # What was counted before the first look is not told.
            assert await get(here.http_port, "web.localhost") == 200
            for heart in hearts.values():
                await heart.beat()
            began = clock.monotonic()
            for _ in range(40):
                assert await get(here.http_port, "web.localhost") == 200
            for _ in range(10):
                assert await get(there.http_port, "web.localhost") == 200
            for _ in range(5):
                assert await get(there.http_port, "empty.localhost") == 503
            routing.heartbeats.clear()
            for heart in hearts.values():
                await heart.beat()
            ams, iad = routing.heartbeats
            span_s = clock.monotonic() - began
            assert (ams.site, iad.site) == ("ams", "iad")
            assert 40 / span_s <= ams.requests["default/web"] < 40 / span_s * 5
            assert ams.requests["default/web"] > iad.requests["default/web"] > 0
            assert "default/empty" not in ams.requests
            assert iad.requests["default/empty"] == pytest.approx(iad.requests["default/web"] / 2, rel=0.01)
            assert set(ams.round_trips_ms) == {"iad"}
            assert 0 < ams.round_trips_ms["iad"] < 1_000
