"""Apps that sleep, with a real Envoy: whatever comes in wakes them, waits for them, and then goes past the activator."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import websockets.asyncio.client
import websockets.asyncio.server
from msgspec.structs import replace
from test_ingress import TIMEOUT_S, Answer, Backend, Site, applied, eventually, get, pytestmark, read_answer, routing, site_at

from atoll.ingress.activator import CHUNK_BYTES
from atoll.ingress.bootstrap import ACCESS_LOG
from atoll.ingress.resources import BUFFER_BYTES
from atoll.ingress.sleepers import WAKE
from atoll.model.records import Endpoint, Routing
from atoll.model.spec import AppSpec, Health, Port
from atoll.model.traffic import DemandReport
from atoll.model.units import Seconds

__all__ = ["pytestmark"]
START_S = 0.05
CYCLES = int(os.environ.get("ATOLL_WAKE_CYCLES", "10"))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with site_at(tmp_path / "ingress") as site:
        yield site


def asleep(app: str, *backends: Backend, port: int = 0, draining: tuple[Backend, ...] = (), http2: bool = False) -> Routing:
    """Return the routing of an app that sleeps, and has no endpoint but `backends`."""
    return replace(routing(app, *backends, port=port, draining=draining, http2=http2), wakes=True)


class Starter:
    """Stands for the control plane: an app that is asked for has its instance `START_S` later, once."""

    def __init__(self, site: Site, awake: Routing) -> None:
        self.site, self.awake = site, awake
        self.starts = 0
        self._task: asyncio.Task[None] | None = None
        site.control.on_demand = self._asked

    def _asked(self, report: DemandReport) -> None:
        if f"{self.awake.project}/{self.awake.app}" in report.apps and not report.complete and self._task is None:
            self._task = asyncio.ensure_future(self._start())

    async def _start(self) -> None:
        self.starts += 1
        await asyncio.sleep(START_S)
        self.site.control.put(self.awake)

    def sleep(self, routing: Routing) -> None:
        """Have the app as `routing` says, and started again when it is asked for."""
        self._task = None
        self.site.control.put(routing)


def through_activator(site: Site) -> int:
    """Return how many requests went through it, as Envoy's log has it."""
    lines = (site.directory / ACCESS_LOG).read_text().splitlines()
    return sum(WAKE + "/" in str(json.loads(line)["upstream"]) for line in lines)


async def passes_by(site: Site) -> bool:
    """Say whether a request is answered without the activator."""
    held = site.ingress.activator.held
    assert (await get(site.port, "a.localhost")).status == 200
    return site.ingress.activator.held == held


async def post(port: int, host: str, body: bytes) -> Answer:
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = f"POST / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            return await read_answer(reader)
        finally:
            writer.close()


async def test_a_stampede_wakes_one_instance_loses_nothing_and_then_goes_past_the_activator(site: Site) -> None:
    (one,) = await site.backends(1)
    starter = Starter(site, asleep("a", one))
    starter.sleep(asleep("a", port=one.port))
    await applied(site, "a.localhost")
    answers = await asyncio.gather(*(get(site.port, "a.localhost") for _ in range(100)))
    assert {answer.status for answer in answers} == {200}
    assert starter.starts == 1
    # Who waited was let in before Envoy has heard of the instance; soon nobody passes there any more.
    await eventually(lambda: passes_by(site))
    held = site.ingress.activator.held
    for _ in range(50):
        assert (await get(site.port, "a.localhost")).status == 200
    assert site.ingress.activator.held == held


async def test_a_body_of_20_mb_wakes_an_app_and_arrives_whole(site: Site) -> None:
    got: list[int] = []

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")))
        left = length
        while left:
            left -= len(await reader.read(min(left, 1 << 16)))
        got.append(length)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(count, "127.0.0.2", 0)
    port = server.sockets[0].getsockname()[1]
    awake = replace(asleep("a", port=port), endpoints=(Endpoint(instance="a-1", node="n", address="127.0.0.2"),))
    Starter(site, awake).sleep(asleep("a", port=port))
    await applied(site, "a.localhost")
    answer = await post(site.port, "a.localhost", os.urandom(20 << 20))
    assert (answer.status, got) == (200, [20 << 20])
    server.close()


async def test_a_websocket_wakes_an_app(site: Site) -> None:
    async def echo(connection: websockets.asyncio.server.ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with websockets.asyncio.server.serve(echo, "127.0.0.2", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        awake = replace(asleep("a", port=port), endpoints=(Endpoint(instance="a-1", node="n", address="127.0.0.2"),))
        starter = Starter(site, awake)
        starter.sleep(asleep("a", port=port))
        await applied(site, "a.localhost")
        uri = f"ws://a.localhost:{site.port}/"
        async with websockets.asyncio.client.connect(uri, host="127.0.0.1", proxy=None) as client:
            await client.send("hello")
            assert await client.recv() == "hello"
            # What sleeps must not be stopped under it: it counts as work, though Envoy does not see the instance's end of it.
            await eventually(lambda: any("default/a" in each.apps and each.complete for each in site.control.demands))
            site.control.put(replace(awake, endpoints=(replace(awake.endpoints[0], draining=True),)))
            await asyncio.sleep(0.5)
            assert site.control.drained_instances == []
            await client.send("still here")
            assert await client.recv() == "still here"
        await eventually(lambda: site.control.drained_instances == ["a-1"])


async def test_grpc_wakes_an_app_and_hears_that_one_does_not_wake(site: Site) -> None:
    async def echo(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return request

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler("test.Echo", {"Say": grpc.unary_unary_rpc_method_handler(echo)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.2:0")
    await server.start()
    awake = replace(asleep("a", port=port, http2=True), endpoints=(Endpoint(instance="a-1", node="n", address="127.0.0.2"),))
    starter = Starter(site, awake)
    starter.sleep(asleep("a", port=port, http2=True))
    never = asleep("b", port=port, http2=True)
    site.control.put(replace(never, spec=replace(never.spec, health=Health(start=Seconds(0.5)))))
    for host in ("a.localhost", "b.localhost"):
        await applied(site, host)
    for host, code in (("a.localhost", None), ("b.localhost", grpc.StatusCode.UNAVAILABLE)):
        options = [("grpc.default_authority", host), ("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{site.port}", options=options) as channel:
            calls = [channel.unary_unary("/test.Echo/Say")(b"%d" % n, timeout=TIMEOUT_S) for n in range(20)]
            said = await asyncio.gather(*calls, return_exceptions=True)
        if code is None:
            assert said == [b"%d" % n for n in range(20)]
        else:
            assert {each.code() for each in said if isinstance(each, grpc.aio.AioRpcError)} == {code}
            assert all(isinstance(each, grpc.aio.AioRpcError) for each in said)
    assert starter.starts == 1
    await server.stop(0)


async def test_a_request_that_an_instance_is_at_work_on_counts_all_the_time_and_no_longer(site: Site) -> None:
    (one,) = await site.backends(1)
    site.control.put(asleep("a", one), asleep("b", one))
    for host in ("a.localhost", "b.localhost"):
        await applied(site, host)
    slow = asyncio.ensure_future(get(site.port, "a.localhost", "/slow"))
    await eventually(lambda: one.active == 1)

    def told() -> list[tuple[str, ...]]:
        return [report.apps for report in site.control.demands if report.complete]

    await eventually(lambda: told()[-2:] == [("default/a",)] * 2)
    one.release.set()
    assert (await slow).status == 200
    await eventually(lambda: told()[-1:] == [()])


async def test_an_app_that_does_not_wake_is_answered_at_its_deadline_with_a_reason(site: Site) -> None:
    spec = AppSpec(name="a", image="x", ports=(Port(port=80),), health=Health(start=Seconds(0.5)))
    site.control.put(replace(asleep("a", port=80), spec=spec))
    await applied(site, "a.localhost")
    for send in (get(site.port, "a.localhost"), post(site.port, "a.localhost", b"x" * (3 << 20))):
        began = time.monotonic()
        answer = await send
        assert time.monotonic() - began >= 0.5
        assert (answer.status, answer.error["code"]) == (504, "deadline-exceeded")
        assert "no instance of it was ready within 0.5 s" in answer.error["message"]
    attempts = {json.loads(line)["attempts"] for line in (site.directory / ACCESS_LOG).read_text().splitlines()}
    assert attempts <= {1, "1"}


async def test_a_client_that_goes_is_waited_for_no_longer_though_it_said_more_than_is_read(site: Site) -> None:
    """Not more than Envoy reads: behind that its end would be hidden from Envoy, too."""
    assert 2 * CHUNK_BYTES < 200 << 10 < BUFFER_BYTES
    site.control.put(asleep("a", port=80))
    await applied(site, "a.localhost")
    for body in (b"", b"x" * (200 << 10)):
        _, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(f"POST / HTTP/1.1\r\nHost: a.localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await eventually(lambda: site.ingress.activator.waiting == {"default/a"})
        writer.transport.abort()
        await eventually(lambda: not site.ingress.activator.busy)


async def test_a_control_plane_that_is_away_is_asked_again_until_it_is_back(site: Site) -> None:
    (one,) = await site.backends(1)
    starter = Starter(site, asleep("a", one))
    starter.sleep(asleep("a", port=one.port))
    await applied(site, "a.localhost")
    site.control.available = False
    waiting = asyncio.ensure_future(get(site.port, "a.localhost"))
    await eventually(lambda: site.ingress.activator.waiting == {"default/a"})
    site.control.available = True
    assert (await waiting).status == 200
    assert starter.starts == 1


class Lives:
    """Stands for the control plane over many lives of an app: what drains is told until it has drained, and is then killed."""

    def __init__(self, site: Site, backends: list[Backend]) -> None:
        self.site = site
        self.backends = itertools.cycle(backends)
        self.port = backends[0].port
        self.serving: tuple[str, Backend] | None = None
        self.draining: dict[str, Backend] = {}
        self.starts = 0
        self._task: asyncio.Task[None] | None = None
        site.control.on_demand = self._asked
        self.publish()

    def publish(self) -> None:
        there = {**dict([self.serving] if self.serving else []), **self.draining}
        endpoints = [
            Endpoint(instance=id, node="n", address=backend.address, draining=id in self.draining) for id, backend in there.items()
        ]
        self.site.control.put(replace(asleep("a", port=self.port), endpoints=tuple(endpoints)))

    def _asked(self, report: DemandReport) -> None:
        if "default/a" in report.apps and self.serving is None and (self._task is None or self._task.done()):
            self._task = asyncio.ensure_future(self._start())

    async def _start(self) -> None:
        await asyncio.sleep(START_S)
        self.serving = (f"a-{self.starts}", next(self.backends))
        self.starts += 1
        self.publish()

    async def sleep(self) -> None:
        """Put what serves to sleep, as the control plane does, and kill it the moment that it has drained."""
        await eventually(lambda: self.serving is not None)
        assert self.serving is not None
        id, backend = self.serving
        self.serving, self.draining[id] = None, backend
        self.publish()
        await eventually(lambda: id in self.site.control.drained_instances)
        assert backend.active == 0
        await backend.crash()
        del self.draining[id]
        self.publish()
        await backend.start(self.port)


async def test_no_request_is_lost_in_cycles_of_sleeping_and_waking_under_load(site: Site) -> None:
    lives = Lives(site, await site.backends(2))
    await applied(site, "a.localhost")
    statuses: list[int] = []
    done = asyncio.Event()

    async def load(number: int) -> None:
        while not done.is_set():
            send = get(site.port, "a.localhost") if number else post(site.port, "a.localhost", b"")
            statuses.append((await send).status)
            await asyncio.sleep(0.002)

    clients = [asyncio.ensure_future(load(number)) for number in range(4)]
    for _ in range(CYCLES):
        await lives.sleep()
    await eventually(lambda: lives.serving is not None)
    done.set()
    await asyncio.gather(*clients)
    assert set(statuses) == {200}
    assert lives.starts == CYCLES + 1
    assert CYCLES <= through_activator(site) < len(statuses)
