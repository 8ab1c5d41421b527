"""Traces: a real Envoy sends spans to a collector and hands the trace on to the instance; without the collector requests go on."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from msgspec.structs import replace
from test_ingress import TIMEOUT_S, eventually, get, pytestmark, routing, start_backends

from atoll.ingress.fake import FakeRouting
from atoll.ingress.service import Ingress
from atoll.ingress.tracing import Tracing, tracing_of
from atoll.model.errors import Invalid

__all__ = ["pytestmark"]


class Collector:
    """Takes what is sent to it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                self.paths.append(head.split()[1])
                self.bodies.append(await self._body(head, reader))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _body(self, head: str, reader: asyncio.StreamReader) -> bytes:
        if "content-length: " in head:
            return await reader.readexactly(int(head.partition("content-length: ")[2].split("\r\n")[0]))
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return body


async def test_a_trace_goes_on_from_client_to_instance_and_its_span_names_app_release_and_site(tmp_path: Path) -> None:
    collector = Collector()
    server = await asyncio.start_server(collector.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    control = FakeRouting()
    async with AsyncExitStack() as stack:
        (backend,) = await start_backends(stack, 1)
        made = routing("web", backend)
        control.put(replace(made, endpoints=(replace(made.endpoints[0], release=7, site="ams"),)))
        tracing = tracing_of(f"http://127.0.0.1:{port}")
        ingress = Ingress(control, tmp_path / "i", port=0, workers=1, stop_grace_s=0.1, tracing=tracing)
        task = asyncio.create_task(ingress.run())
        try:
            await asyncio.wait_for(ingress.ready.wait(), 30)
            trace = "0af7651916cd43dd8448eb211c80319c"
            given = f"traceparent: 00-{trace}-b7ad6b7169203331-01"
            head = (await get(ingress.http_port, "web.localhost", "/head", given)).body.decode().lower()
            handed = head.partition("traceparent: ")[2].split("\r\n")[0]
            assert handed.startswith(f"00-{trace}-")
            assert "b7ad6b7169203331" not in handed

            def told() -> bool:
                return any(bytes.fromhex(trace) in body for body in collector.bodies)

            await eventually(told, timeout_s=30)
            body = next(body for body in collector.bodies if bytes.fromhex(trace) in body)
            for word in (b"default/web", b"atoll.release", b"atoll.site", b"ams", b"web-b2", b"atoll-ingress-local"):
                assert word in body, word
            assert set(collector.paths) == {"/v1/traces"}
            server.close()
            for _ in range(20):
                answer = await asyncio.wait_for(get(ingress.http_port, "web.localhost", "/head"), TIMEOUT_S)
                assert answer.status == 200
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            server.close()


@pytest.mark.parametrize(
    ("url", "means"),
    [
        ("http://c.example", Tracing(host="c.example", port=4318)),
        ("https://c.example/otlp/", Tracing(host="c.example", port=443, tls=True, path="/otlp/v1/traces")),
        ("http://[::1]:9/v1/traces", Tracing(host="::1", port=9)),
        ("", None),
    ],
)
def test_a_collector_is_named_by_a_url(url: str, means: Tracing | None) -> None:
    assert tracing_of(url) == means


@pytest.mark.parametrize(
    "url", ["c.example:4318", "grpc://c.example", "http://", "http://:p@c.example", "http://c.example:x", "http://[x"]
)
def test_what_is_no_collector_is_refused(url: str) -> None:
    with pytest.raises(Invalid):
        tracing_of(url)
