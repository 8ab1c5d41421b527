"""Hostnames on demand, on the real Envoy: the first request for one waits until Envoy has heard of it, and loses nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import websockets.asyncio.client
import websockets.asyncio.server
from msgspec.structs import replace
from test_ingress import TIMEOUT_S, Answer, eventually, get, read_answer, routing, serves, site_at, start_backends
from test_ingress import pytestmark as pytestmark
from test_ingress_rules import answering, with_rules

from atoll.ingress.bootstrap import PLACE_BYTES_MAX
from atoll.model.spec import HeaderEdit, IngressRules
from atoll.model.units import Bytes

APPS = 60
AHEAD = 8
EARLIER = """
import asyncio, sys
from pathlib import Path
from atoll.ingress.fake import FakeRouting
from atoll.ingress.service import Ingress
from atoll.model.records import Endpoint, Routing
from atoll.model.spec import AppSpec, Port

def app(n, port, address):
    return Routing(project="default", app=f"app{n}", spec=AppSpec(name=f"app{n}", image="x", ports=(Port(port=port),)),
        hosts=((f"app{n}.localhost", "/", port, False),), endpoints=(Endpoint(instance="i", node="n", address=address),))

async def main(directory, port, address):
    control = FakeRouting()
    control.put(*(app(n, int(port), address) for n in range(4)))
    ingress = Ingress(control, Path(directory), port=0, workers=1, hostnames_ahead=1)
    task = asyncio.create_task(ingress.run())
    await asyncio.wait_for(ingress.ready.wait(), 30)
    print("serving", ingress.http_port, flush=True)
    await task

asyncio.run(main(*sys.argv[1:]))
"""


async def count_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with how many bytes the body had, and the header that the app's rules set."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
            await reader.readexactly(length)
            body = b"%d %s" % (length, head.partition(b"x-env: ")[2].partition(b"\r\n")[0])
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def post(port: int, host: str, body: bytes, *, chunked: bool = False) -> Answer:
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
            writer.write(f"POST / HTTP/1.1\r\nHost: {host}\r\n{size}\r\n\r\n".encode())
            writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body)
            return await read_answer(reader)
        finally:
            writer.close()


async def test_the_first_request_for_a_hostname_waits_for_it_and_loses_nothing() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        async with site_at(Path(directory) / "i", hostnames_ahead=AHEAD) as site, answering(count_body) as backend:
            rules = IngressRules(body_max=Bytes(100_000), request_headers=HeaderEdit(set={"x-env": "prod"}))
            apps = [routing(f"app{n}", backend) for n in range(APPS)]
            site.control.put(*apps[:40], *(with_rules(app, rules) for app in apps[40:]))
            site.control.put(replace(apps[0], app="wild", hosts=(("*.shop.example", "/", backend.port, False),)))
            site.control.put(replace(apps[0], app="shop", hosts=(("a.shop.example", "/", backend.port, False),)))
            await eventually(lambda: serves(site, "a.shop.example"))
            # Bodies of any size, and names as clients write them.
            assert (await post(site.port, "app1.localhost", b"x" * 3_000_000)).body == b"3000000 "
            assert (await get(site.port, f"APP2.localhost:{site.port}")).status == 200
            # What the app's rules ask for holds from the first request.
            assert (await post(site.port, "app40.localhost", b"x" * 90_000)).body == b"90000 prod"
            assert (await post(site.port, "app41.localhost", b"x" * 200_000)).status == 413
            assert (await post(site.port, "app42.localhost", b"x" * 200_000, chunked=True)).status == 413
            # Many at once, and names that nobody has among them.
            hosts = [f"app{n}.localhost" for n in range(3, APPS)] + [f"made-up-{n}.localhost" for n in range(100)]
            found = await asyncio.gather(*(get(site.port, host) for host in hosts))
            assert [answer.status for answer in found] == [200] * (APPS - 3) + [404] * 100
            assert "made-up-99.localhost" in found[-1].error["message"]
            # A name that nobody had is served as soon as an app has it.
            site.control.put(routing("made-up-7", backend))
            await eventually(lambda: serves(site, "made-up-7.localhost"))
            site.control.remove("default/made-up-7")
            await eventually(lambda: _gone(site.port, "made-up-7.localhost"))
            # A new Envoy begins with what the last one was asked for.
            os.kill(site.ingress.envoy.pid or 0, signal.SIGKILL)
            await eventually(lambda: _up(site.port, "app3.localhost"))
            assert (await get(site.port, "made-up-1.localhost")).status == 404
            assert await serves(site, "b.shop.example")


async def test_names_that_an_envoy_asked_an_earlier_ingress_for_are_known_to_the_next(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        (backend,) = await start_backends(stack, 1)
        command = (sys.executable, "-c", EARLIER, str(tmp_path), str(backend.port), backend.address)
        earlier = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert earlier.stdout is not None
        line = ""
        while not line.startswith("serving"):  # log lines come before it
            line = (await asyncio.wait_for(earlier.stdout.readline(), 30)).decode()
        port = int(line.split()[1])
        assert (await get(port, "app1.localhost")).status == 200
        assert (await get(port, "late.localhost")).status == 404
        earlier.kill()
        await earlier.wait()
        assert (await get(port, "app1.localhost")).status == 200
        # What is too long for a hostname is answered without asking anybody.
        for length in (PLACE_BYTES_MAX + 1, 50_000):
            assert (await get(port, "x" * (length - len(".localhost")) + ".localhost")).status == 404
        apps = [routing(f"app{n}", backend) for n in range(4)]
        async with site_at(tmp_path, port, *apps, hostnames_ahead=1) as site:
            site.control.put(routing("late", backend))
            await eventually(lambda: serves(site, "late.localhost"))
            for n in range(4):
                assert (await get(port, f"app{n}.localhost")).status == 200


async def _gone(port: int, host: str) -> bool:
    return (await get(port, host)).status == 404


async def _up(port: int, host: str) -> bool:
    try:
        return (await get(port, host)).status == 200
    except (OSError, asyncio.IncompleteReadError):
        return False


async def test_a_websocket_may_be_the_first_request_for_a_hostname() -> None:
    async def echo(connection: websockets.asyncio.server.ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        async with (
            site_at(Path(directory) / "i", hostnames_ahead=1) as site,
            websockets.asyncio.server.serve(echo, "127.0.0.1", 0) as server,
            answering(count_body) as backend,
        ):
            site.control.put(routing("web", backend), routing("chat", backend, port=server.sockets[0].getsockname()[1]))
            await eventually(lambda: serves(site, "web.localhost"))
            url = f"ws://chat.localhost:{site.port}/"
            async with websockets.asyncio.client.connect(url, host="127.0.0.1", port=site.port, proxy=None) as socket:
                await socket.send("hello")
                assert await socket.recv() == "hello"
