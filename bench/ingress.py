"""The ingress beside a lean Envoy written by hand, HAProxy and nginx; how soon a change counts; and no failed request meanwhile."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import structlog
from msgspec import structs

from atoll.ingress.fake import FakeRouting
from atoll.ingress.hostnames import AHEAD_MAX
from atoll.ingress.resources import Kind
from atoll.ingress.service import Ingress
from atoll.model.records import Endpoint, Routing
from atoll.model.spec import AppSpec, Port
from bench.ingress_live import LOAD_S, live
from bench.ingress_peers import Backend, Load, Peer, envoy_lean, haproxy, nginx, pin, processor_s, wrk
from bench.report import Report, Result, median, percentile

ROUTES = (1, 1_000, 10_000)
READY_S = 120.0
PROBE_S = 30.0
DARK_ROUNDS = 10
AT_ONCE = 100
"""Hostnames that are asked for side by side to have all in use."""
ADDRESSES = ("127.0.0.2", "127.0.0.3")


def run(arguments: Sequence[str]) -> Report:
    parser = argparse.ArgumentParser(prog="python -m bench ingress")
    parser.add_argument("--runs", type=int, default=7, help="short runs of wrk of each proxy, interleaved")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--changes", type=int, default=40, help="new apps, and as many changes of an endpoint")
    parser.add_argument("--routes", type=int, nargs="*", default=list(ROUTES))
    parser.add_argument("--no-live", action="store_true", help="without the part on a real `atoll up`")
    parser.add_argument("--live-seconds", type=float, default=LOAD_S, help="of load on that `atoll up`")
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    report = Report("ingress")
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch, Backend(Path(scratch)) as backend:
        for routes in options.routes:
            asyncio.run(_at(report, Path(scratch) / f"r{routes}", backend, routes, options))
    if not options.no_live:
        live(report, options.live_seconds)
    report.notes.append(
        f"one worker of each proxy on a core of its own, instance and wrk on the other; {options.connections} connections, "
        f"{options.runs} runs of {options.seconds:g} s, interleaved, medians"
    )
    return report


def routing(number: int, port: int, address: str = "127.0.0.1") -> Routing:
    name = f"app{number}"
    return Routing(
        project="default",
        app=name,
        spec=AppSpec(name=name, image="x", ports=(Port(port=port),)),
        hosts=((f"{name}.localhost", "/", port, False),),
        endpoints=(Endpoint(instance=f"{name}-1", node="n", address=address, release=1),),
    )


async def _at(report: Report, directory: Path, backend: Backend, routes: int, options: argparse.Namespace) -> None:
    control = FakeRouting()
    control.put(*(routing(number, backend.port) for number in range(routes)))
    directory.mkdir()
    ingress = Ingress(control, directory / "i", port=0, workers=1, stop_grace_s=0.1)
    began = asyncio.get_running_loop().time()
    task = asyncio.create_task(ingress.run())
    await asyncio.wait_for(ingress.ready.wait(), READY_S)
    start_s = asyncio.get_running_loop().time() - began
    try:
        pid = ingress.envoy.pid or 0
        pin(pid, 0)
        if routes == max(options.routes):
            report.add(Result(f"from nothing to serving {routes:,} apps", start_s, "s"))
            report.add(Result(f"Envoy's memory with {routes:,} apps", _rss_mib(pid), "MiB"))
            report.add(Result(f"our process's memory with {routes:,} apps", _rss_mib(os.getpid()), "MiB"))
        await _throughput(report, directory, ingress, backend, routes, options)
        await _changes(report, control, ingress, backend, routes, options.changes)
        if routes > AHEAD_MAX:
            await _in_use(report, control, ingress, backend, routes, options.changes)
        if routes == min(options.routes):
            await _dark(report, control, ingress)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _throughput(
    report: Report, directory: Path, ingress: Ingress, backend: Backend, routes: int, options: argparse.Namespace
) -> None:
    host = f"app{routes // 2}.localhost"
    await _until(ingress.http_port, host, lambda body: True)
    makers = [envoy_lean] if routes != min(options.routes) else [envoy_lean, haproxy, nginx]
    peers = [peer for make in makers if (peer := make(directory, backend.port)) is not None]
    rates: dict[str, list[float]] = {"ours": [], **{peer.name: [] for peer in peers}}
    spent: dict[str, list[float]] = {name: [] for name in rates}
    places = [("ours", ingress.envoy.pid or 0, ingress.http_port), *((peer.name, peer.process.pid, peer.port) for peer in peers)]
    try:
        for _ in range(options.runs):
            for name, pid, port in places:
                before = processor_s(pid)
                found = await _load(port, host, options)
                rates[name].append(found.per_s)
                spent[name].append((processor_s(pid) - before) / max(1, found.requests) * 1e6)
    finally:
        for peer in peers:
            peer.stop()
    ours, lean = median(rates["ours"]), median(rates[Peer.LEAN])
    report.add(Result(f"requests/s with {routes:,} routes, beside a lean Envoy with one", ours, "1/s", lean, ">= 0.97"))
    # What others do on the machine disturbs this less.
    least = {name: min(values) for name, values in spent.items()}
    what = f"processor time of a request with {routes:,} routes, the least of all runs, beside the lean Envoy"
    report.add(Result(what, least["ours"], "us", least[Peer.LEAN]))
    for peer in peers:
        if peer.name != Peer.LEAN:
            report.add(Result(f"requests/s with {routes:,} routes, beside {peer.name}", ours, "1/s", median(rates[peer.name])))


async def _load(port: int, host: str, options: argparse.Namespace) -> Load:
    found = await asyncio.to_thread(wrk, port, host, options.connections, options.seconds)
    if found.failed:
        raise RuntimeError(f"{found.failed} requests failed at port {port}")
    return found


async def _changes(report: Report, control: FakeRouting, ingress: Ingress, backend: Backend, routes: int, count: int) -> None:
    clock = asyncio.get_running_loop().time
    fresh: list[float] = []
    for number in range(routes, routes + count):
        began = clock()
        control.put(routing(number, backend.port))
        await _until(ingress.http_port, f"app{number}.localhost", lambda body: True)
        fresh.append((clock() - began) * 1000)
    moved: list[float] = []
    async with _Named(ADDRESSES) as port:
        control.put(routing(0, port, ADDRESSES[0]))
        await _until(ingress.http_port, "app0.localhost", lambda body: body == ADDRESSES[0].encode())
        for number in range(count * 2):
            address = ADDRESSES[(number + 1) % 2]
            began = clock()
            control.put(routing(0, port, address))
            await _until(ingress.http_port, "app0.localhost", lambda body, address=address: body == address.encode())  # type: ignore[misc]
            moved.append((clock() - began) * 1000)
    goal = "<= 60" if routes == 10_000 else None
    report.add(Result(f"new app → routable among {routes:,}, p50", percentile(fresh, 50), "ms", goal=goal))
    report.add(Result(f"new app → routable among {routes:,}, p99", percentile(fresh, 99), "ms"))
    report.add(Result(f"endpoint change → traffic among {routes:,}, p50", percentile(moved, 50), "ms", goal="<= 5"))
    report.add(Result(f"endpoint change → traffic among {routes:,}, p99", percentile(moved, 99), "ms"))


async def _in_use(report: Report, control: FakeRouting, ingress: Ingress, backend: Backend, routes: int, count: int) -> None:
    """Measure the first request for hostnames of which Envoy is told on demand, and a new app once all of them are in use."""
    clock = asyncio.get_running_loop().time
    first: list[float] = []
    for number in range(1, count * 2):
        began = clock()
        await _until(ingress.http_port, f"app{number}.localhost", lambda body: True)
        first.append((clock() - began) * 1000)
    rest = [f"app{number}.localhost" for number in range(routes)]
    for at in range(0, routes, AT_ONCE):
        await asyncio.gather(*(_until(ingress.http_port, host, lambda body: True) for host in rest[at : at + AT_ONCE]))
    fresh: list[float] = []
    for number in range(routes + count, routes + 2 * count):
        began = clock()
        control.put(routing(number, backend.port))
        await _until(ingress.http_port, f"app{number}.localhost", lambda body: True)
        fresh.append((clock() - began) * 1000)
    report.add(Result(f"first request for a hostname among {routes:,}, p50", percentile(first, 50), "ms"))
    report.add(Result(f"first request for a hostname among {routes:,}, p99", percentile(first, 99), "ms"))
    report.add(Result(f"new app → routable among {routes:,} that are all in use, p50", percentile(fresh, 50), "ms"))
    report.add(Result(f"Envoy's memory with {routes:,} apps that are all in use", _rss_mib(ingress.envoy.pid or 0), "MiB"))


async def _dark(report: Report, control: FakeRouting, ingress: Ingress) -> None:
    """Measure how long requests take of an app whose nearest site answers no packet any more: the first, and later ones."""
    first: list[float] = []
    later: list[float] = []
    clock = asyncio.get_running_loop().time
    for number in range(DARK_ROUNDS):
        name = f"dark{number}"
        async with _Named(ADDRESSES[1:]) as port:
            with socket.socket() as listener, contextlib.ExitStack() as stack:
                # It accepts nothing and its queue is full: the kernel answers no further connection.
                listener.bind((ADDRESSES[0], port))
                listener.listen(0)
                for _ in range(4):
                    filler = stack.enter_context(socket.socket())
                    filler.setblocking(False)
                    filler.connect_ex((ADDRESSES[0], port))
                made = routing(0, port)
                places = tuple(
                    Endpoint(instance=f"{name}-{site}", node="n", site=site, address=address, release=1)
                    for site, address in zip(("local", "next"), ADDRESSES, strict=True)
                )
                control.put(structs.replace(made, app=name, hosts=((f"{name}.localhost", "/", port, False),), endpoints=places))
                host = f"{name}.localhost"
                hosts = ingress.table.resources[Kind.HOST]
                while f"http/{host}" not in hosts:  # noqa: ASYNC110  # the table has no event
                    await asyncio.sleep(0.001)
                await ingress.ads.applied((Kind.HOST, f"http/{host}"), hosts[f"http/{host}"].version, timeout_s=PROBE_S)
                for times in (first, later, later):
                    began = clock()
                    await _until(ingress.http_port, host, lambda body: True)
                    times.append((clock() - began) * 1000)
    report.add(Result("the nearest site goes dark → first answer of the next, p50", percentile(first, 50), "ms", goal="<= 1000"))
    report.add(Result("the nearest site goes dark → first answer of the next, longest", max(first), "ms", goal="<= 1000"))
    report.add(Result("the same for requests after it, p50", percentile(later, 50), "ms"))


class _Named:
    """Two instances on one port that answer with their address."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self._addresses = addresses
        self._servers: list[asyncio.Server] = []

    async def __aenter__(self) -> int:
        port = 0
        for address in self._addresses:

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes = address.encode()) -> None:
                try:
                    while await reader.readuntil(b"\r\n\r\n"):
                        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                except (asyncio.IncompleteReadError, ConnectionError):
                    writer.close()

            server = await asyncio.start_server(serve, address, port)
            self._servers.append(server)
            port = int(server.sockets[0].getsockname()[1])
        return port

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()


async def _until(port: int, host: str, holds: object) -> None:
    """Ask over one kept connection until the answer is 200 and its body as wanted. Raises TimeoutError."""
    assert callable(holds)
    async with asyncio.timeout(PROBE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
                body = await reader.readexactly(int(length or 0))
                if head.startswith(b"HTTP/1.1 200 ") and holds(body):
                    return
                await asyncio.sleep(0.0005)
        finally:
            writer.close()


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
