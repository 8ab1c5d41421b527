"""Three hosts in two regions, as namespaces on one wire, each with a real agent: real containers call each other by name."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import dns.message
import dns.rcode
import pytest
from msgspec import Struct

from atoll.api.http.app import create_app
from atoll.api.http.serve import listen, serving
from atoll.api.service import KINDS, SYSTEM, Service
from atoll.control import world
from atoll.control.controllers import run_control
from atoll.model.errors import Unsupported
from atoll.model.fabric import FabricNode
from atoll.model.flows import Reason
from atoll.model.ports.clock import SystemClock
from atoll.model.records import Instance, Node, Role, Status
from atoll.model.spec import AppSpec, Constraint, Health, HealthKind, Placement, Port, Resources, Scale, Stop
from atoll.model.units import Bytes, Seconds
from atoll.model.views import TokenRequest
from atoll.network import namespaces
from atoll.network.slots import tag_of
from atoll.network.sysctls import no_ipv6
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.runc import probe_runc
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

BUSYBOX = Path("/bin/busybox")
AGENT = Path(__file__).with_name("fabric_agent.py")
READY_S = 60.0

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root"),
    pytest.mark.skipif(shutil.which("wg") is None or shutil.which("wireguard-go") is None, reason="needs wireguard-go and wg"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="needs busybox-static"),
]


class Host(Struct, frozen=True, kw_only=True):
    name: str
    site: str
    region: str
    address: str
    netns: str
    data: Path


def run(*command: str, check: bool = True) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=20).stdout


class World:
    """The hosts, their wire, and a server that all of them reach."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.tag = f"{random.randrange(1 << 24):06x}"
        self.net = f"198.19.{random.randrange(256)}"
        self.wire = f"fbw{self.tag}"
        self.cgroup = f"/atoll-test-{self.tag}"
        self.hosts = {
            name: Host(
                name=name,
                site=site,
                region=region,
                address=f"{self.net}.{number}",
                netns=f"fbh{self.tag}{number}",
                data=tmp_path / name,
            )
            for number, (name, site, region) in enumerate((("e1", "ams", "east"), ("e2", "ams", "east"), ("w1", "iad", "west")), 1)
        }
        self.agents: dict[str, asyncio.subprocess.Process] = {}
        self.service: Service

    def lay(self) -> None:
        """Make the namespaces and the wire: a bridge in one of its own, and the server's end here."""
        run("ip", "netns", "add", self.wire)
        run("ip", "-n", self.wire, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self.wire, "link", "set", "br0", "up")
        ends = [(f"{host.address}/24", host.netns, "up0") for host in self.hosts.values()]
        for host in self.hosts.values():
            run("ip", "netns", "add", host.netns)
        for number, (address, netns, name) in enumerate([*ends, (f"{self.net}.254/24", "", f"fbs{self.tag}")]):
            inside = ["ip", "-n", netns] if netns else ["ip"]
            place = ["netns", netns] if netns else ["netns", str(os.getpid())]
            run("ip", "-n", self.wire, "link", "add", f"p{number}", "type", "veth", "peer", "name", name, *place)
            run("ip", "-n", self.wire, "link", "set", f"p{number}", "master", "br0", "up")
            run(*inside, "addr", "add", address, "dev", name)
            run(*inside, "link", "set", name, "up")
            if netns:
                run(*inside, "link", "set", "lo", "up")
                run(*inside, "route", "add", "default", "via", f"{self.net}.254")

    def remove(self) -> None:
        for host in self.hosts.values():
            tag = tag_of(host.data / "network")
            for path in namespaces.DIRECTORY.glob(f"atoll-{tag}-*"):
                namespaces.remove(path)
        for netns in (*(host.netns for host in self.hosts.values()), self.wire):
            run("ip", "netns", "delete", netns, check=False)
        detected = Cgroups.detect()
        for root in {detected.v2, *detected.v1.values()} - {None}:
            shutil.rmtree(Path(str(root)) / self.cgroup.strip("/"), ignore_errors=True)

    async def start(self, host: Host, layer: Path, server: str) -> None:
        view = await self.service.tokens.create(SYSTEM, TokenRequest(name=host.name, role=Role.AGENT, subject=host.name))
        given = {
            "data": str(host.data), "layer": str(layer), "node": host.name, "site": host.site, "region": host.region,
            "address": host.address, "server": server, "token": view.token, "cgroup": self.cgroup,
        }  # fmt: skip
        host.data.mkdir()
        with open(host.data / "log", "wb") as log:
            self.agents[host.name] = await asyncio.create_subprocess_exec(
                "nsenter", f"--net=/run/netns/{host.netns}", sys.executable, str(AGENT), json.dumps(given),
                stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip

    async def stop(self) -> None:
        for agent in self.agents.values():
            assert agent.stdin is not None
            agent.stdin.close()
        await asyncio.gather(*(asyncio.wait_for(agent.wait(), 30) for agent in self.agents.values()))

    def cut(self, one: str, other: str) -> None:
        """Let nothing through between two hosts any more; each still reaches the third."""
        for here, there in ((one, other), (other, one)):
            address = self.hosts[there].address
            rules = (
                f"add table ip cut; add chain ip cut in {{ type filter hook prerouting priority -400; }};"
                f"add rule ip cut in ip saddr {address} drop"
            )
            run("ip", "netns", "exec", self.hosts[here].netns, "nft", rules)

    def mend(self, one: str, other: str) -> None:
        for host in (one, other):
            run("ip", "netns", "exec", self.hosts[host].netns, "nft", "delete table ip cut")

    def silence(self, silent: bool) -> None:
        """Keep the server's answers from every host, or let them through again."""
        rules = (
            f"add table ip silent; add chain ip silent in {{ type filter hook prerouting priority -400; }};"
            f"add rule ip silent in ip saddr {self.net}.254 drop"
        )
        for host in self.hosts.values():
            run("ip", "netns", "exec", host.netns, "nft", rules if silent else "delete table ip silent")

    async def deploy(self, project: str, name: str, node: str, command: tuple[str, ...]) -> None:
        await self.service.projects.put(project)
        spec = AppSpec(
            name=name,
            project=project,
            image="box",
            command=command,
            ports=(Port(port=8000),),
            health=Health(kind=HealthKind.TCP, interval=Seconds(1), start=Seconds(60)),
            scale=Scale(replicas=1),
            resources=Resources(memory=Bytes(32 << 20), disk=Bytes(16 << 20)),
            placement=Placement(constraints=(Constraint(label="node", value=node),)),
            stop=Stop(grace=Seconds(0.2)),
        )
        await self.service.apps.put(SYSTEM, spec)

    def ready(self, project: str, app: str) -> Status | None:
        state = self.service.context.state
        for key, held in state.records(Instance).items():
            if held.record.project == project and held.record.owner == app:
                status = state.get(Status, key)
                if status is not None and status.record.ready:
                    return status.record
        return None

    def inside(self, project: str, app: str) -> Inside:
        status = self.ready(project, app)
        assert status is not None
        assert status.address is not None
        host = self.hosts[status.node]
        tag = tag_of(host.data / "network")
        for path in namespaces.DIRECTORY.glob(f"atoll-{tag}-*"):
            if status.address in namespaces.run_inside(path, _own_addresses):
                return Inside(path, host)
        raise AssertionError(f"no namespace of {status.instance}")

    def sent(self, instance: str) -> int:
        return sum(usage.sent_bytes for usage in self.service.nodes.usage(SYSTEM, None) if usage.instance == instance)

    def flow(self, source: str, target: str) -> int:
        flows = self.service.nodes.flows("shop").flows
        return sum(each.bytes for each in flows if (each.source, each.target) == (source, target))

    def logs(self) -> str:
        return "\n".join(f"--- {host.name}\n{(host.data / 'log').read_text()[-3000:]}" for host in self.hosts.values())


def _own_addresses() -> list[str]:
    return [line.split()[3].split("/")[0] for line in run("ip", "-4", "-o", "addr").splitlines()]


class Inside:
    """An instance's namespace, from which things are tried."""

    def __init__(self, netns: Path, host: Host) -> None:
        self.netns, self.host = netns, host
        text = (host.data / "network" / "resolv.conf").read_text()
        self.server = text.split("nameserver ", 1)[1].split()[0]

    def resolve(self, name: str, kind: str = "A") -> tuple[str, list[str]]:
        query = dns.message.make_query(name, kind)

        def ask() -> bytes:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
                asking.settimeout(5)
                asking.sendto(query.to_wire(), (self.server, 53))
                return asking.recv(4096)

        answer = dns.message.from_wire(namespaces.run_inside(self.netns, ask))
        return dns.rcode.to_text(answer.rcode()), [str(one) for rrset in answer.answer for one in rrset]

    def get(self, address: str, timeout_s: float = 5.0) -> str:
        """Return what the address answers, "" where it is not reached."""

        def ask() -> str:
            try:
                with socket.create_connection((address, 8000), timeout_s) as connection:
                    connection.settimeout(timeout_s)
                    connection.sendall(b"GET /big HTTP/1.0\r\n\r\n")
                    found = b""
                    while part := connection.recv(1 << 16):
                        found += part
                    return found.decode(errors="replace")
            except OSError:
                return ""

        return namespaces.run_inside(self.netns, ask)


async def until(holds: Callable[[], object], world: World, what: str) -> None:
    try:
        async with asyncio.timeout(READY_S):
            while not holds():  # noqa: ASYNC110 (what is waited for happens in other processes)
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"{what}\n{world.logs()}") from None


async def reached(caller: Inside, address: str, timeout_s: float) -> None:
    """Return once all of the answer comes through, tunnels' MTU and all."""
    async with asyncio.timeout(timeout_s):
        while len(await asyncio.to_thread(caller.get, address, 2.0)) < 200_000:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    root = tmp_path / "layer"
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "www"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for name in ("sh", "sleep", "httpd", "wget"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (root / "www/big").write_text("web says hello\n" + "x" * 200_000)
    return root


@pytest.fixture
async def made(tmp_path: Path, layer: Path) -> AsyncIterator[World]:
    try:
        probe_runc()
    except Unsupported as error:
        pytest.skip(f"{error}; {error.mend}")
    world_ = World(tmp_path)
    clock, chance = SystemClock(), random.Random(1)
    async with AsyncExitStack() as stack:
        stack.callback(world_.remove)
        world_.lay()
        store = MemoryStore(clock)
        stack.push_async_callback(store.close)
        state = await stack.enter_async_context(State(store, {**KINDS, **world.KINDS}))
        service = world_.service = Service(store, state, clock, chance, bytes(32))
        await stack.enter_async_context(service)
        listener = listen(f"{world_.net}.254", 0)
        server = f"http://{world_.net}.254:{listener.getsockname()[1]}"
        await stack.enter_async_context(serving(create_app(service), service, listener))
        control = asyncio.create_task(
            run_control(store, state, clock, chance, service.heartbeats.last_seen(), heartbeats=service.heartbeats.all())
        )
        stack.callback(control.cancel)
        stack.push_async_callback(world_.stop)
        for host in world_.hosts.values():
            await world_.start(host, layer, server)
        await until(lambda: len(state.records(FabricNode)) == 3 and len(state.records(Node)) == 3, world_, "the nodes join")
        yield world_


SERVE = ("httpd", "-f", "-p", "8000", "-h", "/www")
CALL_THEN_SERVE = "until wget -q -O /dev/null http://web.shop.internal:8000/big; do sleep 0.2; done; exec httpd -f -p 8000 -h /www"


async def test_an_app_calls_another_region_by_name_no_other_project_can_and_a_cut_link_is_gone_around(made: World) -> None:
    await made.deploy("shop", "web", "w1", SERVE)
    await made.deploy("shop", "caller", "e1", ("sh", "-c", CALL_THEN_SERVE))
    await made.deploy("shop", "near", "e2", ("sh", "-c", CALL_THEN_SERVE))
    await made.deploy("spy", "spy", "e1", SERVE)
    prefixes = {held.record.prefix for held in made.service.context.state.records(FabricNode).values()}
    assert len(prefixes) == 3
    for project, app in (("shop", "web"), ("shop", "caller"), ("shop", "near"), ("spy", "spy")):
        # The callers are ready only once their own programs have called `web` by its name, from the other region.
        await until(lambda p=project, a=app: made.ready(p, a), made, f"{project}/{app} is ready")  # type: ignore[misc]
    caller, spy = made.inside("shop", "caller"), made.inside("spy", "spy")
    web = made.ready("shop", "web")
    assert web is not None
    assert web.address is not None

    assert await asyncio.to_thread(caller.resolve, "web.shop.internal") == ("NOERROR", [web.address])
    assert await asyncio.to_thread(caller.resolve, f"{web.instance}.web.shop.internal") == ("NOERROR", [web.address])
    assert await asyncio.to_thread(caller.resolve, "iad.site.web.shop.internal") == ("NOERROR", [web.address])
    assert await asyncio.to_thread(caller.resolve, "ams.site.web.shop.internal") == ("NXDOMAIN", [])
    assert len(await asyncio.to_thread(caller.get, web.address)) > 200_000

    if not no_ipv6():
        assert web.ipv6 is not None
        assert await asyncio.to_thread(caller.resolve, "web.shop.internal", "AAAA") == ("NOERROR", [web.ipv6])
        assert await asyncio.to_thread(spy.resolve, "web.shop.internal", "AAAA") == ("NXDOMAIN", [])
        for app in ("web", "near"):  # of the other region, and of the same site
            there = made.ready("shop", app)
            assert there is not None
            assert there.ipv6 is not None
            assert len(await asyncio.to_thread(caller.get, there.ipv6)) > 200_000
            assert await asyncio.to_thread(spy.get, there.ipv6, 1.0) == ""

    assert await asyncio.to_thread(spy.resolve, "web.shop.internal") == ("NXDOMAIN", [])
    assert await asyncio.to_thread(spy.get, web.address, 1.0) == ""
    near = made.ready("shop", "near")
    assert near is not None
    assert near.address is not None
    assert await asyncio.to_thread(spy.get, near.address, 1.0) == ""
    assert len(await asyncio.to_thread(caller.get, near.address)) > 200_000

    def link(source: str = "caller", target: str = "web") -> str:
        return made.service.fabrics.reach("shop", source, target, 8000, "tcp", "shop").steps[-1].detail

    assert made.service.fabrics.reach("shop", "caller", "web", 8000, "tcp", "shop").ok
    assert not made.service.fabrics.reach("spy", "spy", "web", 8000, "tcp", "shop").ok
    assert "directly" in link()
    await until(lambda: made.sent(web.instance) > 600_000, made, "what went over a link is told")
    await until(lambda: made.flow("web", "caller") > 400_000, made, "what apps sent each other on different nodes is told")

    def refused() -> set[tuple[str, str, str, Reason]]:
        return {(each.source, each.target, each.address, each.reason) for each in made.service.nodes.flows("spy").refusals}

    await until(lambda: len(refused()) == 2, made, "what another project was refused is told")  # each node tells in its time
    assert refused() == {("spy", "", near.address, Reason.PROJECT), ("spy", "", web.address, Reason.PROJECT)}

    # Without the control plane: names are answered, and a cut link is gone around all the same.
    made.silence(True)
    made.cut("e1", "w1")
    await reached(caller, web.address, 60)
    if web.ipv6 is not None:
        await reached(caller, web.ipv6, 20)
    assert await asyncio.to_thread(caller.resolve, "web.shop.internal") == ("NOERROR", [web.address])
    assert await asyncio.to_thread(spy.get, web.address, 1.0) == ""
    made.silence(False)
    await until(lambda: "through e2" in link(), made, "the way around is told")

    made.mend("e1", "w1")
    await until(lambda: "directly" in link(), made, "the direct way is taken again")
    await reached(caller, web.address, 20)

    nodes = made.service.context.state.records(FabricNode)
    old = {held.record.public_key for held in nodes.values()}
    await made.service.fabrics.rotate()
    await until(lambda: not old & {held.record.public_key for held in nodes.values()}, made, "every node has a new key")
    await reached(caller, web.address, 60)
