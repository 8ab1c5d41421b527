"""What an operator does after each failure, with the very commands, and what they show: docs/runbook.md is written from it.

Each step says how the failure was made, runs commands as from a shell, and holds what the page promises of them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from pathlib import Path

from chaos_cell import Cell, fill, until
from chaos_users import Requests
from chaos_world import Host

from atoll.entry.joining import JOIN_VARIABLE
from atoll.model.errors import AtollError
from atoll.model.membership import JoinTokenRequest
from atoll.model.spec import AppSpec, Scale
from atoll.sdk.client import Client

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def tell(*words: object) -> None:
    print(*words, flush=True)


class Operator:
    """Someone at a shell with the cell's addresses and an admin's token."""

    def __init__(self, cell: Cell, requests: dict[str, Requests]) -> None:
        self.cell = cell
        self._requests = requests

    def title(self, text: str) -> None:
        tell(f"\n=== {text}")

    async def atoll(self, *words: str, lines: int = 12) -> str:
        said = await asyncio.to_thread(lambda: self.cell.atoll(*words, check=False))
        tell(f"$ atoll {' '.join(words)}\n" + "\n".join(said.rstrip().splitlines()[-lines:]))
        return said

    async def shell(self, command: str, host: Host | None = None, lines: int = 12) -> str:
        where = list(host.run_in) if host is not None else []

        def done() -> str:
            own = {**self.cell.environment, "ETCDCTL_API": "3"}
            made = subprocess.run([*where, "sh", "-c", command], env=own, capture_output=True, text=True, timeout=60, check=False)
            return made.stdout + made.stderr + (f"(exit status {made.returncode})\n" if made.returncode else "")

        said = await asyncio.to_thread(done)
        tell(f"{host.name if host else ''}$ {command}\n" + "\n".join(line[:300] for line in said.rstrip().splitlines()[-lines:]))
        return said

    def endpoints(self, *names: str) -> str:
        hosts = [host for host in self.cell.control if not names or host.name in names]
        return "--endpoints=" + ",".join(f"http://{host.address}:2379" for host in hosts)

    def no_request_failed(self) -> None:
        bad = {site: one.bad[:2] for site, one in self._requests.items() if one.bad}
        assert not bad, f"requests failed: {bad}"
        tell(f"(requests so far: {sum(one.good for one in self._requests.values())}, failed: 0)")


async def server_lost(op: Operator, client: Client) -> None:
    op.title("a server is lost")
    leader = await op.cell.leader(client)
    assert leader is not None
    op.cell.servers[leader].kill()
    assert "leads" in await op.atoll("servers")
    await asyncio.sleep(11)
    assert (await op.atoll("servers")).count("https://") == 2
    op.cell.servers[leader].start()
    await until(lambda: _count(client, 3), "three servers", 30)
    await op.atoll("servers")
    op.no_request_failed()


async def _count(client: Client, count: int) -> bool:
    try:
        return len(await client.servers()) == count
    except AtollError:
        return False


async def member_lost(op: Operator) -> None:
    op.title("a member of etcd is lost with its disk")
    host = op.cell.control[0]
    member = op.cell.members[host.name]
    member.kill()
    shutil.rmtree(op.cell.directory_of(host.name))
    assert "unhealthy" in await op.shell(f"etcdctl {op.endpoints()} endpoint health")
    await op.atoll("apps")
    left = op.endpoints("c2", "c3")
    listed = await op.shell(f"etcdctl {left} member list")
    id = next(line.split(",")[0] for line in listed.splitlines() if f"{host.address}:2380" in line)
    await op.shell(f"etcdctl {left} member remove {id}")
    await op.shell(f"etcdctl {left} member add {host.name} --peer-urls=http://{host.address}:2380")
    op.cell.directory_of(host.name).mkdir(mode=0o700)
    member.command = [word.replace("--initial-cluster-state=new", "--initial-cluster-state=existing") for word in member.command]
    tell("(etcd is started there with an empty directory and --initial-cluster-state=existing)")
    member.start()
    await until(lambda: asyncio.to_thread(op.cell.synced, host.name), "the new member", 30)
    assert "unhealthy" not in await op.shell(f"etcdctl {op.endpoints()} endpoint health")
    op.no_request_failed()


async def quorum_lost(op: Operator, client: Client, backup: Path) -> None:
    op.title("two members of etcd are lost with their disks")
    await op.atoll("store", "backup", str(backup), "--store", op.cell.store)
    for host in op.cell.control[:2]:
        op.cell.members[host.name].kill()
        shutil.rmtree(op.cell.directory_of(host.name))
    await op.atoll("apps")
    await op.shell(f"etcdctl {op.endpoints()} endpoint health", lines=3)
    op.no_request_failed()
    tell("(every server and the last member are stopped; all three members are started anew, with empty directories)")
    for part in (*op.cell.servers.values(), *op.cell.members.values()):
        part.kill()
    for host in op.cell.control:
        shutil.rmtree(op.cell.directory_of(host.name), ignore_errors=True)
        op.cell.directory_of(host.name).mkdir(mode=0o700)
        member = op.cell.members[host.name]
        member.command = [word.replace("-state=existing", "-state=new") for word in member.command]
        member.start()
    await until(lambda: asyncio.to_thread(op.cell.store_leader), "a new cluster", 30)
    damaged = backup.with_name("damaged.atoll")
    content = bytearray(backup.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    tell("(a copy of the backup has one bit turned)")
    assert "error" in await op.atoll("store", "restore", str(damaged), "--store", op.cell.store)
    await op.atoll("store", "check", str(backup))
    await op.atoll("store", "restore", str(backup), "--store", op.cell.store)
    for server in op.cell.servers.values():
        server.start()
    await until(lambda: _count(client, 3), "three servers", 30)
    for site in op.cell.sites:
        await op.cell.serves(client, site, 2, 30)
    await op.atoll("apps")
    op.no_request_failed()


async def node_lost(op: Operator, client: Client) -> None:
    op.title("a machine is cut off for good, or dead")
    everyone = tuple(host for host in op.cell.world.hosts.values() if host.name != "b")
    op.cell.world.cut(op.cell.sites["b"], from_=everyone)
    began = time.monotonic()
    await until(lambda: _health(client, "n-b", "lost"), "the node to be lost", 60)
    tell(f"({time.monotonic() - began:.1f} s later)")
    await op.atoll("nodes")
    await op.atoll("events", "node/n-b")
    await op.atoll("status", "web-b")
    op.cell.world.heal()
    await until(lambda: _health(client, "n-b", "ready"), "the node to be back", 60)
    await op.cell.serves(client, "b", 2, 30)
    await op.atoll("ps")
    op.no_request_failed()


async def _health(client: Client, node: str, wanted: str) -> bool:
    try:
        return (await client.node(node)).health.value == wanted
    except AtollError:
        return False


async def disk_full(op: Operator, client: Client) -> None:
    op.title("the disk of a member of etcd is full, and that of a node")
    for name in ("c3", "b"):
        await asyncio.to_thread(fill, op.cell.small_disks[name])
    for n in range(300):
        await client.put_app(AppSpec(name="filler", image=op.cell.image, env={"N": str(n) * 400}, scale=Scale(replicas=0)))
        if not op.cell.members["c3"].alive:
            break
    await op.shell(f"etcdctl {op.endpoints()} endpoint health", lines=3)
    tell("c3: etcd's last words: " + op.cell.members["c3"].log.rstrip().splitlines()[-1][:300])
    await op.atoll("apps")
    await client.put_app(op.cell.web("b", replicas=3))
    await asyncio.sleep(3)
    await op.atoll("ps", "web-b")
    await op.atoll("events", "app/web-b", lines=4)
    tell("agent of n-b: " + "\n".join(line[:250] for line in op.cell.agents["b"].log.splitlines()[-4:]))
    for name in ("c3", "b"):
        (op.cell.small_disks[name] / "fill").unlink()
    op.cell.members["c3"].start()
    await op.cell.serves(client, "b", 3, 60)
    await until(lambda: asyncio.to_thread(op.cell.synced, "c3"), "the member to follow", 30)
    await client.put_app(op.cell.web("b"))
    await op.cell.serves(client, "b", 2, 60)
    await op.shell(f"etcdctl {op.endpoints()} endpoint health", lines=3)
    op.no_request_failed()


async def clock_wrong(op: Operator, client: Client) -> None:
    op.title("clocks are wrong")
    if not FAKETIME.exists():
        tell("(left out: libfaketime is not installed)")
        return
    parts = {**op.cell.servers, "b": op.cell.agents["b"]}
    clocks = {name: op.cell.data / f"clock-{name}" for name in parts}
    own = {
        name: {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        for name, clock in clocks.items()
    }
    for name, part in parts.items():
        clocks[name].write_text("+0\n")
        await asyncio.to_thread(part.end)
        part.start(**own[name])
    await until(lambda: _count(client, 3), "three servers", 30)
    await until(lambda: op.cell.leader(client), "a leader", 30)
    await op.cell.serves(client, "b", 2, 60)
    kept = {view.instance.id for view in await client.instances("default", app="web-b")}
    for step in ("+3600", "-3600", "+172800", "+0"):
        leader = await op.cell.leader(client)
        assert leader is not None
        for name in (leader, "b"):
            clocks[name].write_text(f"{step}\n")
        tell(f"({step} s at the leading server, on {leader}, and at the agent of n-b, at once)")
        await asyncio.sleep(6)
        replicas = 2 if step == "+0" else 3
        await client.put_app(op.cell.web("a", replicas=replicas))
        await op.cell.serves(client, "a", replicas, 30)
        await op.atoll("nodes")
        if step == "+172800":
            tell("(the agent of n-b is killed, and starts with that clock)")
            agent = op.cell.agents["b"]
            agent.kill()
            agent.start(**own["b"])
            await asyncio.sleep(8)
            await op.atoll("nodes")
            tell("agent of n-b: " + "\n".join(line[:260] for line in agent.log.splitlines()[-2:]))
        tell(f"server on {leader}: " + op.cell.servers[leader].log.splitlines()[-1][:260])
    await until(lambda: _health(client, "n-b", "ready"), "the node to be ready", 60)
    await op.cell.serves(client, "b", 2, 60)
    now = {view.instance.id for view in await client.instances("default", app="web-b")}
    tell(f"(instances before and after: {len(kept)} and {len(now)}, {len(kept & now)} of them the same)")
    await op.atoll("events", "node/n-b")
    for part in parts.values():
        await asyncio.to_thread(part.end)
        part.start()
    await until(lambda: _count(client, 3), "three servers", 30)
    op.no_request_failed()


async def certificate_expired(op: Operator, client: Client) -> None:
    op.title("a node's certificate has expired while it was cut off")
    for server in op.cell.servers.values():
        await asyncio.to_thread(server.end)
        server.command = [*server.command, "--certificate-life=20s"]
        server.start()
    await until(lambda: _count(client, 3), "three servers", 30)
    agent = op.cell.agents["b"]
    await asyncio.to_thread(agent.end)
    tell("(servers sign for 20 s now; the agent of n-b joins anew)")
    shutil.rmtree(op.cell.data_of("b") / "agent" / "identity")
    made = await client.create_join_token(JoinTokenRequest(subject="n-b"))
    assert made.token is not None
    before = agent.log.count("recovered")
    agent.start(**{JOIN_VARIABLE: made.token})
    await until(lambda: agent.log.count("recovered") > before, "the agent to have joined", 60)
    await asyncio.sleep(2)
    op.cell.world.cut(op.cell.sites["b"], from_=(*op.cell.control, op.cell.sites["a"]))
    await asyncio.sleep(30)
    tell("(cut off for 30 s; its certificate lasted 20)")
    tell("agent of n-b: " + "\n".join(line[:250] for line in agent.log.splitlines()[-3:]))
    await op.atoll("nodes")
    op.cell.world.heal()
    began = time.monotonic()
    await until(lambda: _health(client, "n-b", "ready"), "the node to be ready", 60)
    await op.cell.serves(client, "b", 2, 60)
    tell(f"(ready again after {time.monotonic() - began:.1f} s)")
    await op.atoll("events", "node/n-b", lines=5)
    op.no_request_failed()


STEPS = ("server", "member", "quorum", "node", "disk", "clock", "certificate")


async def walk(cell: Cell, requests: dict[str, Requests], only: str = os.environ.get("RUNBOOK", "")) -> None:
    """Go through all of it, or through what `only` names."""
    op = Operator(cell, requests)
    async with cell.client() as client:
        for step in STEPS:
            if only and step not in only.split(","):
                continue
            match step:
                case "server":
                    await server_lost(op, client)
                case "member":
                    await member_lost(op)
                case "quorum":
                    await quorum_lost(op, client, cell.data / "backup.atoll")
                case "node":
                    await node_lost(op, client)
                case "disk":
                    await disk_full(op, client)
                case "clock":
                    await clock_wrong(op, client)
                case "certificate":
                    await certificate_expired(op, client)
