"""The ingress with a real Envoy: small backends on loopback addresses, which share a port as instances of an app do."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import websockets.asyncio.client
import websockets.asyncio.server
from envoy.config.route.v3.route_components_pb2 import VirtualHost

from atoll.ingress import envoy, resources
from atoll.ingress.fake import FakeRouting
from atoll.ingress.logs import keep_bounded
from atoll.ingress.resources import Kind
from atoll.ingress.running import started_at
from atoll.ingress.service import Ingress
from atoll.model import codec
from atoll.model.errors import AtollError, Conflict
from atoll.model.records import Endpoint, Routing
from atoll.model.spec import AppSpec, Port


def _has_envoy() -> bool:
    try:
        envoy.find_binary()
    except AtollError:
        return False
    return True


pytestmark = [pytest.mark.system, pytest.mark.skipif(not _has_envoy(), reason="Envoy is not installed")]
TIMEOUT_S = 10.0


async def eventually(condition: Callable[[], Awaitable[bool]] | Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result if isinstance(result, bool) else await result:
            return
        assert time.monotonic() < deadline, "it has not come true in time"
        await asyncio.sleep(0.005)


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def error(self) -> dict[str, str]:
        return dict(json.loads(self.body)["error"])


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    body = b""
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    return Answer(int(head[0].split()[1]), headers, body)


def request(host: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode()


async def get(port: int, host: str, path: str = "/", *headers: str) -> Answer:
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request(host, path, "Connection: close", *headers))
            return await read_answer(reader)
        finally:
            writer.close()


class Backend:
    """An instance: answers with its name, or to `/head` with the request as it got it, or to `/slow` when released."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.port = 0
        self.requests = 0
        self.active = 0
        self.release = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, self.address, port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def crash(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                self.active += 1
                path = head.split()[1]
                if path.startswith(b"/slow"):
                    await self.release.wait()
                body = head if path.startswith(b"/head") else self.name.encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()
                self.active -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


class Site:
    """An ingress, its control plane, and the apps behind it."""

    def __init__(self, directory: Path, stack: AsyncExitStack, port: int, **options: Any) -> None:
        self.directory = directory
        self.control = FakeRouting()
        self.ingress = Ingress(self.control, directory, port=port, workers=2, stop_grace_s=0.2, **options)
        self._stack = stack
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        return self.ingress.http_port

    async def start(self) -> None:
        self._task = asyncio.create_task(self.ingress.run())
        ready = asyncio.create_task(self.ingress.ready.wait())
        done, _ = await asyncio.wait({self._task, ready}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._task in done:
            await self._task
        assert self.ingress.ready.is_set()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def backends(self, count: int) -> list[Backend]:
        return await start_backends(self._stack, count)


async def start_backends(stack: AsyncExitStack, count: int) -> list[Backend]:
    """Start `b2`, `b3` and so on, on one port and at addresses of their own."""
    for _ in range(10):
        made = [Backend(f"b{n}", f"127.0.0.{n}") for n in range(2, count + 2)]
        for backend in made:
            stack.push_async_callback(backend.crash)
        try:
            await made[0].start()
            for backend in made[1:]:
                await backend.start(made[0].port)
        except OSError:  # another has the port at one of the addresses
            continue
        return made
    raise AssertionError("no port is free at all addresses")


@asynccontextmanager
async def site_at(directory: Path, port: int = 0, *known: Routing, **options: Any) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        site = Site(directory, stack, port, **options)
        site.control.put(*known)
        try:
            await site.start()
            yield site
        finally:
            await site.stop()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with site_at(tmp_path / "ingress") as site:
        yield site


def routing(
    app: str,
    *backends: Backend,
    port: int = 0,
    hosts: tuple[tuple[str, str], ...] = (),
    draining: tuple[Backend, ...] = (),
    http2: bool = False,
) -> Routing:
    number = port or (backends + draining)[0].port
    places = hosts or ((f"{app}.localhost", "/"),)
    return Routing(
        project="default",
        app=app,
        spec=AppSpec(name=app, image="x", ports=(Port(port=number),)),
        hosts=tuple((host, path, number, http2) for host, path in places),
        endpoints=tuple(
            Endpoint(instance=f"{app}-{each.name}", node="n", address=each.address, draining=each in draining)
            for each in (*backends, *(each for each in draining if each not in backends))
        ),
    )


async def applied(site: Site, host: str) -> None:
    """Return when Envoy knows the hostname."""
    await eventually(lambda: f"http/{host}" in site.ingress.table.resources[Kind.HOST])
    await site.ingress.ads.applied((Kind.HOST, f"http/{host}"), "any", timeout_s=TIMEOUT_S)


async def test_a_request_on_which_nothing_moves_is_ended(tmp_path: Path) -> None:
    assert resources.STREAM_IDLE_S == 600
    async with site_at(tmp_path / "ingress", stream_idle_s=1.0) as site:
        (backend,) = await site.backends(1)
        site.control.put(routing("web", backend))
        await eventually(lambda: serves(site, "web.localhost"))
        ended = await get(site.port, "web.localhost", "/slow")  # which is never answered
        assert ended.status == 504


async def serves(site: Site, host: str, path: str = "/") -> bool:
    return (await get(site.port, host, path)).status == 200


async def test_a_new_app_is_routable_within_milliseconds(site: Site) -> None:
    (backend,) = await site.backends(1)
    took_ms = []
    for n in range(20):
        started = time.perf_counter()
        site.control.put(routing(f"app{n}", backend))
        await eventually(lambda n=n: serves(site, f"app{n}.localhost"))
        took_ms.append((time.perf_counter() - started) * 1000)
    assert sorted(took_ms)[10] < 100, took_ms


async def test_hostname_and_path_choose_the_app(site: Site) -> None:
    web, api, wild = await site.backends(3)
    site.control.put(
        routing("web", web, hosts=(("shop.example", "/"),)),
        routing("api", api, hosts=(("shop.example", "/api"), ("api.example", "/v1/"))),
        routing("wild", wild, hosts=(("*.shop.example", "/"),)),
    )
    await eventually(lambda: serves(site, "a.shop.example"))
    expected = {
        ("shop.example", "/"): b"b2",
        ("SHOP.example:8080", "/x"): b"b2",
        ("shop.example", "/api"): b"b3",
        ("shop.example", "/api/x?y"): b"b3",
        ("shop.example", "/apis"): b"b2",
        ("api.example", "/v1/x"): b"b3",
        ("eu.shop.example", "/api"): b"b4",
    }
    for (host, path), body in expected.items():
        assert (await get(site.port, host, path)).body == body, (host, path)
    assert (await get(site.port, "api.example", "/v2")).status == 404


async def test_an_unknown_host_is_told_so(site: Site) -> None:
    answer = await get(site.port, "nowhere.example")
    assert answer.status == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.error["code"] == "not-found"
    assert "nowhere.example" in answer.error["message"]


async def test_an_app_without_a_ready_instance_says_so(site: Site) -> None:
    site.control.put(routing("empty", port=80))
    await eventually(lambda: _status(site, "empty.localhost", 503))
    answer = await get(site.port, "empty.localhost")
    assert answer.error["code"] == "unavailable"
    assert "ready" in answer.error["message"]


async def _status(site: Site, host: str, status: int) -> bool:
    return (await get(site.port, host)).status == status


async def test_a_removed_app_is_gone(site: Site) -> None:
    (backend,) = await site.backends(1)
    site.control.put(routing("one", backend), routing("two", backend))
    await eventually(lambda: serves(site, "two.localhost"))
    site.control.remove("default/one")
    await eventually(lambda: _status(site, "one.localhost", 404))
    assert await serves(site, "two.localhost")
    clusters = (await site.ingress.envoy.admin.get("/clusters")).decode()
    assert "default/two/" in clusters
    await eventually(lambda: _no_cluster(site, "default/one/"))


async def _no_cluster(site: Site, name: str) -> bool:
    return name not in (await site.ingress.envoy.admin.get("/clusters")).decode()


async def test_the_app_learns_who_asked_and_how(site: Site) -> None:
    (backend,) = await site.backends(1)
    site.control.put(routing("web", backend))
    await eventually(lambda: serves(site, "web.localhost"))
    head = (await get(site.port, f"web.localhost:{site.port}", "/head", "X-Envoy-Upstream-Rq-Timeout-Ms: 1")).body.decode().lower()
    assert f"host: web.localhost:{site.port}\r\n" in head
    assert "x-forwarded-for: " in head
    assert "x-forwarded-proto: http\r\n" in head
    assert f"x-forwarded-host: web.localhost:{site.port}\r\n" in head
    assert "x-request-id: " in head
    assert "envoy" not in head


async def test_drain_waits_for_the_active_request_and_sends_no_new_one(site: Site) -> None:
    old, new = await site.backends(2)
    site.control.put(routing("web", old))
    await eventually(lambda: serves(site, "web.localhost"))
    slow = asyncio.create_task(get(site.port, "web.localhost", "/slow"))
    await eventually(lambda: old.active == 1)
    site.control.put(routing("web", new, draining=(old,)))
    await asyncio.sleep(0.5)
    assert site.control.drained_instances == []
    before = old.requests
    assert {(await get(site.port, "web.localhost")).body for _ in range(20)} == {b"b3"}
    old.release.set()
    assert (await slow).body == b"b2"
    await eventually(lambda: site.control.drained_instances == ["web-b2"])
    assert {(await get(site.port, "web.localhost")).body for _ in range(20)} == {b"b3"}
    assert old.requests == before


async def test_an_idle_endpoint_drains_at_once(site: Site) -> None:
    old, new = await site.backends(2)
    site.control.put(routing("web", old, new))
    await eventually(lambda: serves(site, "web.localhost"))
    started = time.monotonic()
    site.control.put(routing("web", new, draining=(old,)))
    await eventually(lambda: site.control.drained_instances == ["web-b2"])
    assert time.monotonic() - started < 1


async def test_requests_are_not_sent_to_the_last_endpoint_when_it_drains(site: Site) -> None:
    (only,) = await site.backends(1)
    site.control.put(routing("web", only))
    await eventually(lambda: serves(site, "web.localhost"))
    site.control.put(routing("web", draining=(only,)))
    await eventually(lambda: site.control.drained_instances == ["web-b2"])
    before = only.requests
    assert (await get(site.port, "web.localhost")).status == 503
    assert only.requests == before


class Load:
    """Clients that ask all the time, half of them over kept connections."""

    def __init__(self, port: int, host: str, clients: int = 8) -> None:
        self.port, self.host = port, host
        self.answers = 0
        self.failures: list[str] = []
        self._tasks = [asyncio.create_task(self._kept() if n % 2 else self._single()) for n in range(clients)]

    async def _single(self) -> None:
        while True:
            answer = await get(self.port, self.host)
            self._count(answer)

    async def _kept(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while True:
            writer.write(request(self.host, "/"))
            self._count(await read_answer(reader))

    def _count(self, answer: Answer) -> None:
        self.answers += 1
        if answer.status != 200:
            self.failures.append(f"{answer.status} {answer.body.decode()}")

    async def stop(self) -> None:
        for task in self._tasks:
            if task.done():
                self.failures.append(repr(task.exception()))
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_replacing_every_endpoint_under_load_costs_no_request(site: Site) -> None:
    backends = await site.backends(6)
    site.control.put(routing("web", backends[0]))
    await eventually(lambda: serves(site, "web.localhost"))
    load = Load(site.port, "web.localhost")
    for old, new in itertools.pairwise(backends):
        await asyncio.sleep(0.1)
        site.control.put(routing("web", old, new))
        await asyncio.sleep(0.05)
        site.control.put(routing("web", new, draining=(old,)))
        await eventually(lambda old=old: f"web-{old.name}" in site.control.drained_instances)
        site.control.put(routing("web", new))
        served = old.requests
        await old.crash()  # without grace: nothing may be under way
        assert old.requests == served
    await asyncio.sleep(0.1)
    await load.stop()
    assert load.failures == []
    assert load.answers > 100


async def test_a_crashed_replica_costs_no_new_request(site: Site) -> None:
    one, two = await site.backends(2)
    site.control.put(routing("web", one, two))
    await eventually(lambda: serves(site, "web.localhost"))
    await one.crash()
    answers = [await get(site.port, "web.localhost") for _ in range(60)]
    assert {answer.body for answer in answers} == {b"b3"}


WEB = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        time.sleep(0.005)
        self.answer(self.address_string().encode())
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        print("POST", flush=True)
        time.sleep(30)
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
server = Server((sys.argv[1], int(sys.argv[2])), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@asynccontextmanager
async def web_process(address: str, port: int = 0) -> AsyncIterator[tuple[asyncio.subprocess.Process, Backend]]:
    """An instance that can be killed as the kernel kills: its sockets close with requests under way."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", WEB, address, str(port), stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        backend = Backend(address, address)
        backend.port = int(await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S))
        yield process, backend
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_killed_replica_costs_no_get_that_was_under_way(site: Site) -> None:
    async with web_process("127.0.0.2") as (_, stays):
        for n in range(5):
            async with web_process(f"127.0.0.{n + 3}", stays.port) as (victim, dies):
                site.control.put(routing(f"web{n}", stays, dies))
                await eventually(lambda n=n: serves(site, f"web{n}.localhost"))
                load = Load(site.port, f"web{n}.localhost", clients=16)
                await asyncio.sleep(0.2)
                victim.kill()
                await asyncio.sleep(0.3)
                await load.stop()
                assert load.failures == []
                assert load.answers > 50


async def test_a_post_that_was_under_way_is_never_sent_twice(site: Site) -> None:
    async with web_process("127.0.0.2") as (one, first), web_process("127.0.0.3", first.port) as (two, second):
        site.control.put(routing("web", first, second))
        await eventually(lambda: serves(site, "web.localhost"))
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: 2\r\nx-envoy-retry-on: reset\r\n\r\nhi")
        assert one.stdout is not None
        assert two.stdout is not None
        arrived = {asyncio.create_task(each.stdout.readline()): each for each in (one, two) if each.stdout is not None}
        (first_word,), waiting = await asyncio.wait(arrived, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        arrived[first_word].kill()
        answer = await asyncio.wait_for(read_answer(reader), TIMEOUT_S)
        assert answer.status == 503
        assert "broke the connection" in answer.error["message"]
        _, waiting = await asyncio.wait(waiting, timeout=0.3)
        assert len(waiting) == 1
        for task in waiting:
            task.cancel()
        writer.close()


async def test_an_answer_that_has_begun_is_never_begun_again(site: Site) -> None:
    asked = 0

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"\r\n\r\n")
        asked += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 400_000)
        await writer.drain()
        writer.transport.abort()

    async with await asyncio.start_server(half, "127.0.0.2", 0) as server:
        backend = Backend("half", "127.0.0.2")
        backend.port = server.sockets[0].getsockname()[1]
        site.control.put(routing("web", backend))
        await applied(site, "web.localhost")
        with pytest.raises(asyncio.IncompleteReadError):
            await get(site.port, "web.localhost")
    assert asked == 1


async def test_websockets_pass_through(site: Site) -> None:
    async def echo(connection: websockets.asyncio.server.ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with websockets.asyncio.server.serve(echo, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        backend = Backend("ws", "127.0.0.1")
        backend.port = port
        site.control.put(routing("chat", backend))
        await eventually(lambda: _status(site, "chat.localhost", 426))
        connecting = websockets.asyncio.client.connect(f"ws://chat.localhost:{site.port}/", host="127.0.0.1", port=site.port)
        async with connecting as client:
            for message in ("hello", b"\x00" * 100_000):
                await client.send(message)
                assert await asyncio.wait_for(client.recv(), TIMEOUT_S) == message
            # It counts as an active request while it is open.
            site.control.put(routing("chat", draining=(backend,)))
            await asyncio.sleep(0.4)
            assert site.control.drained_instances == []
            await client.send("still here")
            assert await asyncio.wait_for(client.recv(), TIMEOUT_S) == "still here"
        await eventually(lambda: site.control.drained_instances == ["chat-ws"])


async def test_http2_reaches_an_instance_that_speaks_it(site: Site) -> None:
    """gRPC in both directions at once, so both sides of Envoy speak HTTP/2 without TLS."""

    async def shout(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message.upper()

    server = grpc.aio.server()
    handlers = {"Shout": grpc.stream_stream_rpc_method_handler(shout)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("t.T", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    backend = Backend("grpc", "127.0.0.1")
    backend.port = port
    site.control.put(routing("rpc", backend, http2=True))
    await applied(site, "rpc.localhost")
    options = [("grpc.default_authority", "rpc.localhost")]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{site.port}", options=options) as channel:
        call = channel.stream_stream("/t.T/Shout")()
        for word in (b"one", b"two"):
            await call.write(word)
            assert await asyncio.wait_for(call.read(), TIMEOUT_S) == word.upper()
        await call.done_writing()
    await server.stop(0)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_a_client_may_speak_http2_on_the_same_port(site: Site) -> None:
    (backend,) = await site.backends(1)
    site.control.put(routing("web", backend))
    await eventually(lambda: serves(site, "web.localhost"))
    client = await asyncio.create_subprocess_exec(
        "curl", "-sS", "--http2-prior-knowledge", "-w", " %{http_version}", "-H", "Host: web.localhost", f"http://127.0.0.1:{site.port}/",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(client.communicate(), TIMEOUT_S)
    assert output == b"b2 2"


async def test_envoy_is_started_again_when_it_is_killed(site: Site) -> None:
    (backend,) = await site.backends(1)
    site.control.put(routing("web", backend))
    await eventually(lambda: serves(site, "web.localhost"))
    pid = site.ingress.envoy.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.05)

    async def back() -> bool:
        try:
            return await serves(site, "web.localhost")
        except OSError:
            return False

    await eventually(back)
    assert site.ingress.envoy.pid != pid
    site.control.put(routing("other", backend))
    await eventually(lambda: serves(site, "other.localhost"))


EARLIER = """
import asyncio, sys
from pathlib import Path
from atoll.ingress.fake import FakeRouting
from atoll.ingress.service import Ingress
from atoll.model import codec
from atoll.model.records import Routing

async def main():
    control = FakeRouting()
    control.put(codec.decode(sys.stdin.buffer.read(), Routing))
    ingress = Ingress(control, Path(sys.argv[1]), port=0, workers=2)
    task = asyncio.create_task(ingress.run())
    await ingress.ready.wait()
    print("serving", ingress.http_port, ingress.envoy.pid, flush=True)
    await task

asyncio.run(main())
"""


async def test_envoy_serves_on_when_the_ingress_is_killed_and_the_next_one_adopts_it(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        one, two = await start_backends(stack, 2)
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-c", EARLIER, str(tmp_path))
        earlier = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        assert earlier.stdin is not None
        assert earlier.stdout is not None
        earlier.stdin.write(codec.encode(routing("web", one)))
        earlier.stdin.close()
        line = ""
        while not line.startswith("serving"):  # log lines come before it
            line = (await asyncio.wait_for(earlier.stdout.readline(), 30)).decode()
        port, pid = map(int, line.split()[1:])
        load = Load(port, "web.localhost", clients=4)
        await asyncio.sleep(0.1)
        earlier.kill()
        await earlier.wait()
        await asyncio.sleep(0.1)
        async with site_at(tmp_path, port, routing("web", one)) as site:
            assert site.ingress.envoy.pid == pid
            site.control.put(routing("web", two), routing("late", two))
            await eventually(lambda: serves(site, "late.localhost"))
            await eventually(lambda: _body(site, "web.localhost", b"b3"))
            await load.stop()
        assert load.failures == []
        assert load.answers > 20
        assert started_at(pid) is None


async def test_without_the_control_plane_it_serves_what_it_knew_and_catches_up_later(site: Site) -> None:
    (backend,) = await site.backends(1)
    site.control.put(routing("web", backend), routing("old", backend))
    await eventually(lambda: serves(site, "old.localhost"))
    site.control.available = False
    await asyncio.sleep(0.1)
    site.control.put(routing("new", backend))
    site.control.remove("default/old")
    assert await serves(site, "old.localhost")
    assert await serves(site, "web.localhost")
    site.control.available = True
    await eventually(lambda: serves(site, "new.localhost"))
    await eventually(lambda: _status(site, "old.localhost", 404))


async def test_a_bad_or_duplicate_host_stops_no_other_app(site: Site) -> None:
    one, two = await site.backends(2)
    site.control.put(routing("first", one, hosts=(("taken.example", "/"),)))
    await eventually(lambda: serves(site, "taken.example"))
    site.control.put(
        routing("second", two, hosts=(("taken.example", "/"), ("bad host", "/"), ("x.example", "/a?b"), ("second.example", "/"))),
        routing("third", two),
    )
    await eventually(lambda: serves(site, "third.localhost"))
    assert await serves(site, "second.example")
    assert (await get(site.port, "taken.example")).body == b"b2"
    assert len(site.ingress.table.problems) == 3
    site.control.remove("default/first")
    await eventually(lambda: _body(site, "taken.example", b"b3"))


async def _body(site: Site, host: str, body: bytes) -> bool:
    return (await get(site.port, host)).body == body


async def test_what_envoy_refuses_is_contained_and_the_last_good_version_serves(site: Site) -> None:
    one, two = await site.backends(2)
    site.control.put(routing("web", one), routing("other", one))
    await eventually(lambda: serves(site, "other.localhost"))
    # Past the table's own checks: one that does not parse and one whose domain is taken, sent together with a good one.
    table = site.ingress.table
    site.control.put(routing("web", two), routing("new", two))
    broken = table.resources[Kind.HOST]["http/web.localhost"]._replace(version="broken", body=b"\x0a\x03abc\xff")
    await eventually(lambda: "http/new.localhost" in table.resources[Kind.HOST])
    table.resources[Kind.HOST]["http/web.localhost"] = broken
    taken = VirtualHost.FromString(table.resources[Kind.HOST]["http/new.localhost"].body)
    taken.name = "http/extra.localhost"
    table.resources[Kind.HOST][taken.name] = resources.resource(Kind.HOST, taken.name, taken)
    site.ingress.ads.publish({(Kind.HOST, "http/web.localhost"), (Kind.HOST, taken.name)})
    site.control.put(routing("later", two))
    await eventually(lambda: serves(site, "later.localhost"))
    for host in ("web.localhost", "other.localhost", "new.localhost"):
        assert await serves(site, host), host


async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(Conflict) as caught:
            await Ingress(FakeRouting(), tmp_path, port=port).run()
    assert str(port) in str(caught.value)
    assert caught.value.mend
    assert not (tmp_path / envoy.PID_FILE).exists()


async def test_stopping_ends_envoy(tmp_path: Path) -> None:
    async with site_at(tmp_path / "ingress") as site:
        pid = site.ingress.envoy.pid
        assert pid is not None
        assert started_at(pid) is not None
    assert started_at(pid) is None


async def test_the_admin_interface_is_on_no_network(site: Site) -> None:
    listening = Path(f"/proc/{site.ingress.envoy.pid}/net/tcp").read_text()
    inodes = {str(path.readlink()) for path in Path(f"/proc/{site.ingress.envoy.pid}/fd").iterdir() if path.is_symlink()}
    mine = [line for line in listening.splitlines()[1:] if line.split()[3] == "0A" and f"socket:[{line.split()[9]}]" in inodes]
    assert {int(line.split()[1].partition(":")[2], 16) for line in mine} == {site.port}


async def test_the_access_log_says_what_happened_without_queries(site: Site) -> None:
    (backend,) = await site.backends(1)
    site.control.put(routing("web", backend))
    await eventually(lambda: serves(site, "web.localhost"))
    await get(site.port, "web.localhost", "/path?token=secret")
    path = site.directory / "access.log"
    await eventually(lambda: path.exists() and "/path" in path.read_text())
    text = path.read_text()
    assert "secret" not in text
    line = next(json.loads(line) for line in text.splitlines() if "/path" in line)
    assert (line["app"], line["status"], line["path"]) == ("default/web", 200, "/path")


async def test_the_access_log_is_kept_to_a_size(site: Site) -> None:
    path = site.directory / "access.log"
    keeper = asyncio.create_task(keep_bounded([path], site.ingress.envoy.admin, bytes_max=4_000, period_s=0.05))
    older = path.with_suffix(".log.1")

    async def rotated_twice() -> bool:
        await asyncio.gather(*(get(site.port, "nowhere.example", f"/{n}") for n in range(20)))
        return older.exists() and path.exists() and path.stat().st_ino != first

    first = path.stat().st_ino
    try:
        await eventually(rotated_twice, timeout_s=20)
        await get(site.port, "nowhere.example", "/last")
        await eventually(lambda: any("/last" in each.read_text() for each in (path, older) if each.exists()))
    finally:
        keeper.cancel()
    assert sorted(each.name for each in site.directory.glob("access.log*")) == ["access.log", "access.log.1"]


async def test_a_client_that_sends_its_headers_too_large_is_refused_alone(site: Site) -> None:
    (backend,) = await site.backends(1)
    site.control.put(routing("web", backend))
    await eventually(lambda: serves(site, "web.localhost"))
    answer = await get(site.port, "web.localhost", "/", *(f"X-{n}: {'x' * 900}" for n in range(90)))
    assert answer.status == 431
    assert backend.requests > 0
    assert await serves(site, "web.localhost")


async def test_the_python_side_stays_small(tmp_path: Path) -> None:
    code = (
        "from atoll.ingress.service import Ingress\n"
        "import re; print(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert int(output) < 60 << 10
