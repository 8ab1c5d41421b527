"""A leading server killed, or standing still, until the next plan is committed; a store's leading member killed under writes."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog

from atoll.entry.config import Config
from atoll.entry.scratch import free_port
from atoll.model.errors import AtollError
from atoll.model.records import Capacity, Heartbeat, Node, Role
from atoll.model.spec import AppSpec, Resources, RuntimeName, Scale
from atoll.model.units import Bytes, Cores
from atoll.model.views import TokenRequest
from atoll.sdk.client import Client
from atoll.sdk.control_plane import HttpControlPlane
from atoll.sdk.failover import transport_to
from atoll.store.etcd.errors import FLAGS
from atoll.store.etcd.private import PrivateEtcd
from atoll.store.etcd.store import EtcdStore
from bench.report import Report, Result, median, percentile

ROUNDS = 20
PAUSES = 5
SERVERS = 3
TIMERS = " --heartbeat-interval=30 --election-timeout=300"
"""For members in one LAN."""
NODE = "n1"
HEARTBEAT_S = 2.0
CALL_PAUSE_S = 0.01
LOOK_S = 0.003
WITHIN_S = 30.0
WRITERS = 8
VALUE = bytes(800)
SETTLE_S = 0.3
"""After an outage: so long must writes have been answered again."""


def run(arguments: list[str]) -> Report:
    """Measure and return the report."""
    parser = argparse.ArgumentParser(prog="python -m bench failover")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--pauses", type=int, default=PAUSES)
    given = parser.parse_args(arguments)
    notes = [
        f"{SERVERS} server processes with TLS over three members of etcd with LAN timers (30 and 300 ms), all on this machine",
        f"{given.rounds} deaths of the leading server, {given.pauses} pauses of it, {given.rounds} deaths of the leading member",
        "p99 of so few rounds is the longest",
    ]
    report = Report("failover", notes=notes)
    if shutil.which("etcd") is None:
        report.add(Result("failover", None, "s", why="there is no etcd on this machine"))
        return report
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    work = Path(tempfile.mkdtemp(prefix="atoll-bench-"))
    try:
        asyncio.run(_servers(report, work, given.rounds, given.pauses))
        asyncio.run(_members(report, work, given.rounds))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


class Server:
    """One server process on a port of its own."""

    def __init__(self, number: int, work: Path, store: str, key: Path) -> None:
        self.listen = f"127.0.0.1:{free_port()}"
        self.url = f"https://{self.listen}"
        self.data = work / f"server{number}"
        self.data.mkdir()
        config = Config(data=self.data, listen=self.listen, tls=True, store=store, key=key)
        self._command = ["setpriv", "--pdeathsig=KILL", sys.executable, "-m", "atoll.entry.server", *config.arguments()]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.data / "log", "ab") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Cell:
    """The servers, and a node that says that it is there and does nothing else."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self.ca = str(servers[0].data / "server" / "ca.pem")
        self.token = (servers[0].data / "server" / "admin-token").read_text()

    def client(self, servers: list[Server]) -> Client:
        return Client.connect(",".join(server.url for server in servers), self.token, ca=self.ca)

    async def node(self) -> list[HttpControlPlane]:
        """Make a node and return its ways to every server."""
        async with self.client(self.servers) as client:
            token = (await client.create_token(TokenRequest(name=NODE, role=Role.AGENT, subject=NODE))).token
        authority = Path(self.ca).read_text()
        capacity = Capacity(cpu_milli=64_000, memory_bytes=1 << 38, disk_bytes=1 << 42)
        node = Node(name=NODE, site="here", region="here", capacity=capacity, runtimes=(RuntimeName.RUNC,))
        ways = [HttpControlPlane(s.url, token, node=NODE, transport=transport_to(s.url, token, ca=authority)) for s in self.servers]
        await ways[0].register_node(node)
        return ways

    async def back(self, server: Server) -> None:
        """Return when that server answers: for a while after its death it is listed still."""
        async with self.client([server]) as client, asyncio.timeout(WITHIN_S):
            while True:
                with suppress(AtollError):
                    await client.projects()
                    return
                await asyncio.sleep(0.05)

    async def leader(self, client: Client) -> Server:
        """Return the server that leads, when all are listed."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                with suppress(AtollError):
                    views = await client.servers()
                    leading = [view.server.urls[0] for view in views if view.leads]
                    if leading and len(views) == len(self.servers):
                        return next(server for server in self.servers if server.url == leading[0])
                await asyncio.sleep(0.05)


async def _beat(way: HttpControlPlane) -> None:
    """Heartbeats go to every server, as beats of an agent do."""
    while True:
        with suppress(AtollError):
            await way.heartbeat(Heartbeat(node=NODE, at=time.time()))
        await asyncio.sleep(HEARTBEAT_S)


@asynccontextmanager
async def _cell(work: Path) -> AsyncIterator[Cell]:
    key = work / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(32))
    data = work / "etcd"
    data.mkdir()
    with PrivateEtcd(3, data=data, flags=FLAGS + TIMERS) as etcd:
        servers = [Server(number, work, etcd.url, key) for number in range(SERVERS)]
        beating: list[asyncio.Task[None]] = []
        try:
            for server in servers:
                server.start()
                await _until(lambda server=server: (server.data / "client.json").exists())  # type: ignore[misc]
            cell = Cell(servers)
            beating += [asyncio.create_task(_beat(way)) for way in await cell.node()]
            yield cell
        finally:
            for task in beating:
                task.cancel()
            await asyncio.gather(*beating, return_exceptions=True)
            for server in servers:
                server.kill()


class Calls:
    """Reads at one server, one after the other, and those that failed."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.count = 0
        self.failed: list[str] = []
        self.slowest_s = 0.0

    async def run(self) -> None:
        while True:
            began = time.perf_counter()
            try:
                await self._client.projects()
            except AtollError as error:
                self.failed.append(str(error))
            self.slowest_s = max(self.slowest_s, time.perf_counter() - began)
            self.count += 1
            await asyncio.sleep(CALL_PAUSE_S)


async def _servers(report: Report, work: Path, rounds: int, pauses: int) -> None:
    killed: list[float] = []
    paused: list[float] = []
    calls, failed, slowest = 0, 0, 0.0
    async with _cell(work) as cell, cell.client(cell.servers) as everywhere:
        await cell.leader(everywhere)
        await _planned(everywhere, "first")
        for number in range(rounds + pauses):
            leader = await cell.leader(everywhere)
            others = [server for server in cell.servers if server is not leader]
            async with cell.client([others[0]]) as one, cell.client([others[1]]) as two:
                users = [Calls(one), Calls(two)]
                using = [asyncio.create_task(user.run()) for user in users]
                await asyncio.sleep(SETTLE_S)
                kills = number < rounds
                began = time.perf_counter()
                leader.signal(signal.SIGKILL if kills else signal.SIGSTOP)
                await _planned(one, f"app-{number}")
                (killed if kills else paused).append(time.perf_counter() - began)
                for task in using:
                    task.cancel()
                await asyncio.gather(*using, return_exceptions=True)
                calls += sum(user.count for user in users)
                failed += sum(len(user.failed) for user in users)
                slowest = max(slowest, *(user.slowest_s for user in users))
            if kills:
                leader.kill()
                leader.start()
            else:
                leader.signal(signal.SIGCONT)
            await cell.back(leader)
            await cell.leader(everywhere)
    what = "leading server killed → next plan committed"
    report.add(Result(f"{what}, median", median(killed), "s"))
    report.add(Result("the same, p99", percentile(killed, 99), "s", goal="<= 1.5"))
    if paused:
        why = "nothing tells a process that stands still from one that works, but its lease of 5 s"
        report.add(Result("leading server stands still (SIGSTOP) → next plan committed, median", median(paused), "s", why=why))
        report.add(Result("the same, longest", max(paused), "s"))
    report.add(Result(f"calls at the other servers meanwhile that failed, of {calls}", float(failed), "calls", goal="<= 0"))
    report.add(Result("the slowest of them", slowest, "s"))


async def _planned(client: Client, name: str) -> None:
    """Ask for an app, and return when its instance has a node."""
    resources = Resources(cpu=Cores(0.01), memory=Bytes(16 << 20), disk=Bytes(16 << 20))
    await client.put_app(AppSpec(name=name, image="registry.test/app:1", resources=resources, scale=Scale(replicas=1)))
    deadline = time.perf_counter() + WITHIN_S
    found = await client.instances("default", app=name)
    while not any(view.instance.node for view in found):
        if time.perf_counter() > deadline:
            raise RuntimeError(f"{name} got no node: {[view.instance.rejection for view in found]}")
        await asyncio.sleep(LOOK_S)
        found = await client.instances("default", app=name)


async def _members(report: Report, work: Path, rounds: int) -> None:
    """Kill the leading member under writes, again and again; each comes back before the next one's turn."""
    data = work / "members"
    data.mkdir()
    acknowledged: set[str] = set()
    at: list[float] = []
    gaps: list[float] = []
    with PrivateEtcd(3, data=data, flags=FLAGS + TIMERS) as etcd:
        store = await EtcdStore.open(etcd.address)

        async def write(who: int) -> None:
            for n in itertools.count():
                key = f"f/{who}/{n:07}"
                with suppress(AtollError):
                    await store.put(key, VALUE)
                    acknowledged.add(key)
                    at.append(time.perf_counter())
                await asyncio.sleep(CALL_PAUSE_S)

        writers = [asyncio.create_task(write(who)) for who in range(WRITERS)]
        for _ in range(rounds):
            await asyncio.to_thread(etcd.wait)
            leader = await asyncio.to_thread(etcd.leader)
            await asyncio.sleep(SETTLE_S)
            killed = time.perf_counter()
            await asyncio.to_thread(etcd.kill, leader)
            await _until(lambda killed=killed: at[-1] > killed + SETTLE_S and time.perf_counter() > killed + 2.0)  # type: ignore[misc]
            around = [moment for moment in at if moment > killed - SETTLE_S]
            gaps.append(max(after - before for before, after in itertools.pairwise(around)))
            await asyncio.to_thread(etcd.start, leader)
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        there: set[str] = set()
        after, more = "", True
        while more:
            page = await store.range("f/", after=after)
            there.update(item.key for item in page.items)
            more = page.more
            after = page.items[-1].key if page.items else ""
        await store.close()
    lost = len(acknowledged - there)
    report.add(Result("leading member of etcd killed under writes: time without an answer, median", median(gaps), "s"))
    report.add(Result("the same, p99", percentile(gaps, 99), "s", goal="<= 1.0"))
    report.add(Result(f"acknowledged writes lost, of {len(acknowledged)}", float(lost), "writes", goal="<= 0"))


async def _until(holds: object) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not holds():  # type: ignore[operator]  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)
