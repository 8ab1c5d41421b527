"""A cell in a world: three machines with a member of etcd and a server each, and two sites with an agent and an ingress."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from chaos_world import Host, World, processes, wait_for

from atoll.entry.config import Config
from atoll.entry.joining import JOIN_VARIABLE
from atoll.images.minimal import docker_archive
from atoll.model.errors import AtollError
from atoll.model.membership import JoinTokenRequest, MemberKind
from atoll.model.spec import AppSpec, Constraint, Placement, Port, Resources, Rollout, Scale
from atoll.model.spec.lifecycle import Stop
from atoll.model.units import Bytes, Cores, Seconds
from atoll.sdk.client import Client
from atoll.store.etcd.errors import FLAGS

HEARTBEAT_MS = 50
ELECTION_MS = 500
SMALL_DISK_MIB = 768
"""etcd writes its log in pieces of 64 MB, made ahead."""
OTHER_RUNTIMES = ("qemu", "runsc", "crun", "lxc", "firecracker", "cloud-hypervisor")
"""Agents are not to find them: it takes half a minute to try them out, for nothing here."""
API_PORT = 7600
INGRESS_PORT = 8080
DOMAIN = "localhost"
START_S = 90.0
STOP_S = 20.0
ATOLL = str(Path(sys.executable).with_name("atoll"))
WEB = "mkdir -p /www; echo {name} > /www/index.html; exec httpd -f -p $PORT -h /www"


class Part:
    """One process on a host, that is killed, paused and started again."""

    def __init__(self, host: Host, log: Path, command: list[str], environment: dict[str, str]) -> None:
        self.host = host
        self.command = [*host.run_in, *command]
        self._log = log
        self._environment = environment
        self.running: subprocess.Popen[bytes] | None = None

    def start(self, **more: str) -> None:
        with open(self._log, "ab") as log:
            environment = self._environment | more
            self.running = subprocess.Popen(self.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        if self.alive:
            assert self.running is not None
            self.running.send_signal(number)

    def kill(self) -> None:
        """Safe to repeat."""
        if self.running is not None:
            self.running.kill()
            self.running.wait()

    def end(self) -> int:
        """End it in order; return its exit status."""
        assert self.running is not None
        self.signal(signal.SIGTERM)
        return wait_for(self.running, STOP_S)

    @property
    def alive(self) -> bool:
        return self.running is not None and self.running.poll() is None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""


class Cell:
    """`data` is where everything lies; `world` is empty so far."""

    def __init__(self, world: World, data: Path) -> None:
        self.world = world
        self.data = data
        (data / "bin").mkdir()
        for folder in ("/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/bin"):
            for tool in Path(folder).glob("*"):
                if not tool.name.startswith(OTHER_RUNTIMES) and not (data / "bin" / tool.name).is_symlink():
                    (data / "bin" / tool.name).symlink_to(tool)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ATOLL_")}
        self.environment = {**kept, "NO_COLOR": "1", "XDG_CONFIG_HOME": str(data / "config"), "PATH": str(data / "bin")}
        self.control = tuple(world.host(f"c{n}") for n in (1, 2, 3))
        self.sites = {name: world.host(name) for name in ("a", "b")}
        self.small_disks = {name: self._small_disk(name) for name in ("c3", "b")}
        self.members = {host.name: self._member(host) for host in self.control}
        key = data / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(32))
        self.urls = {host.name: f"https://{host.address}:{API_PORT}" for host in self.control}
        self.store = "etcd://" + ",".join(f"{host.address}:2379" for host in self.control)
        self.servers: dict[str, Part] = {}
        for host in self.control:
            config = Config(data=data / host.name, listen=f"{host.address}:{API_PORT}", store=self.store, key=key, domain=DOMAIN)
            self.servers[host.name] = self._part(host, "server", config)
        self.agents: dict[str, Part] = {}
        self.ingresses: dict[str, Part] = {}
        for number, (site, host) in enumerate(self.sites.items()):
            config = Config(
                data=self._disk(site) / "atoll",
                server=",".join(self.urls.values()),
                subnet=f"10.{101 + number}.0.0/16",
                ingress=f"0.0.0.0:{INGRESS_PORT}",
                domain=DOMAIN,
                site=site,
                node=f"n-{site}",
            )
            self.agents[site] = self._part(host, "agent", config)
            self.ingresses[site] = self._part(host, "ingress", config)

    def _small_disk(self, name: str) -> Path:
        """Make a disk that is soon full: of etcd's member at that machine, or of all that a site's machine has."""
        where = self.data / "disks" / name
        where.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MIB}m", "small", str(where)], check=True)
        return where

    def _disk(self, name: str) -> Path:
        """Return where a machine keeps what it may not lose."""
        where = self.small_disks.get(name) or self.data / "disks" / name
        where.mkdir(parents=True, exist_ok=True)
        return where

    def directory_of(self, name: str) -> Path:
        """Return where a member of etcd has its data."""
        return self._disk(name) / "etcd"

    def data_of(self, site: str) -> Path:
        """Return the data directory of a site's machine."""
        return self._disk(site) / "atoll"

    def _member(self, host: Host) -> Part:
        client, peer = f"http://{host.address}:2379", f"http://{host.address}:2380"
        command = ["etcd", f"--name={host.name}", f"--data-dir={self._disk(host.name) / 'etcd'}", "--initial-cluster-state=new"]
        command += [f"--listen-client-urls={client}", f"--advertise-client-urls={client}"]
        command += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", "--logger=zap", "--log-level=error"]
        command += ["--initial-cluster=" + ",".join(f"{each.name}=http://{each.address}:2380" for each in self.control)]
        command += [f"--heartbeat-interval={HEARTBEAT_MS}", f"--election-timeout={ELECTION_MS}", *FLAGS.split()]
        (self._disk(host.name) / "etcd").mkdir(mode=0o700)
        return Part(host, self.data / f"etcd-{host.name}.log", command, self.environment)

    def _part(self, host: Host, role: str, config: Config) -> Part:
        config.data.mkdir(exist_ok=True)
        command = [sys.executable, "-m", f"atoll.entry.{role}", *config.arguments()]
        # Not on its own disk, which may be full.
        return Part(host, self.data / f"{role}-{host.name}.log", command, self.environment)

    @property
    def parts(self) -> list[Part]:
        return [*self.members.values(), *self.servers.values(), *self.agents.values(), *self.ingresses.values()]

    async def start(self) -> None:
        """Start all of it, let both sites join, and put an app at each; return when they serve."""
        for member in self.members.values():
            member.start()
        await until(lambda: self.store_leader() is not None, "a leading member of etcd")
        for server in self.servers.values():
            server.start()
        first = self.data / self.control[0].name
        await until(lambda: (first / "client.json").exists(), "the first server")
        self.ca = str(first / "server" / "ca.pem")
        self.token = (first / "server" / "admin-token").read_text()
        async with self.client() as client:
            await until(lambda: all_listed(client), "three servers")
            for site in self.sites:
                wanted = {MemberKind.NODE: self.agents[site], MemberKind.INGRESS: self.ingresses[site]}
                for kind, part in wanted.items():
                    made = await client.create_join_token(JoinTokenRequest(kind=kind, subject=f"n-{site}"))
                    assert made.token is not None
                    part.start(**{JOIN_VARIABLE: made.token})
            archive = docker_archive(self.data / "busybox.tar", "busybox:1", program=Path("/bin/busybox"), target="/bin/busybox")
            said = await asyncio.to_thread(self.atoll, "image", "import", str(archive), "--name", "busybox", "--tag", "1", "--json")
            self.image = json.loads(said)["image"]
            for site in self.sites:
                await client.put_app(self.web(site))
            for site in self.sites:
                await self.serves(client, site, 2, START_S)
        self.check_alive()

    def check_alive(self) -> None:
        for part in self.parts:
            assert part.alive, f"{' '.join(part.command)} has ended:\n{part.log[-3000:]}"

    def client(self, *, first: int = 0, only: str | None = None) -> Client:
        """Return a client of all servers, which begins at one of them, or of one alone."""
        names = list(self.urls)
        order = [only] if only else [*names[first:], *names[:first]]
        return Client.connect(",".join(self.urls[name] for name in order), self.token, ca=self.ca)

    def atoll(self, *words: str, check: bool = True) -> str:
        """Run a command as an operator does."""
        own = {"ATOLL_TOKEN": self.token, "ATOLL_CA": self.ca, "ATOLL_API": ",".join(self.urls.values())}
        done = subprocess.run([ATOLL, *words], env=self.environment | own, capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout if check else done.stdout + done.stderr

    def web(self, site: str, *, replicas: int = 2, name: str = "") -> AppSpec:
        """Return an app that may run at one site only, and says its name."""
        name = name or f"web-{site}"
        return AppSpec(
            name=name,
            image=self.image,
            command=("/bin/busybox", "sh", "-c", WEB.format(name=name)),
            ports=(Port(port=8000),),
            resources=Resources(cpu=Cores(0.05), memory=Bytes(32 << 20), disk=Bytes(16 << 20)),
            scale=Scale(replicas=replicas),
            placement=Placement(constraints=(Constraint(label="site", value=site),)),
            stop=Stop(grace=Seconds(1)),
            rollout=Rollout(drain=Seconds(5)),
        )

    async def serves(self, client: Client, site: str, count: int, seconds: float) -> float:
        """Return how long it took until the app of a site has just `count` instances, and all of them are ready."""

        async def settled() -> bool:
            try:
                found = await client.instances("default", app=f"web-{site}")
            except AtollError:
                return False
            ready = [one for one in found if one.status is not None and one.status.ready]
            return len(found) == len(ready) == count

        began = time.monotonic()
        await until(settled, f"{count} instances at {site}", seconds)
        return time.monotonic() - began

    def crash(self, site: str) -> int:
        """Kill the process of one instance of the site's app, and return it."""
        victim = processes("httpd", "-f")
        inside = [pid for pid in victim if self._runs_at(pid, site)]
        assert inside, f"no instance runs at {site}"
        os.kill(inside[0], signal.SIGKILL)
        return inside[0]

    def running(self, site: str) -> set[int]:
        return {pid for pid in processes("httpd", "-f") if self._runs_at(pid, site)}

    def _runs_at(self, pid: int, site: str) -> bool:
        try:
            return f"ATOLL_APP=web-{site}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    async def leader(self, client: Client) -> str | None:
        """Return the host whose server leads, as far as that server, or the store, says."""
        try:
            for view in await client.servers():
                if view.leads:
                    return next(name for name, url in self.urls.items() if (url,) == view.server.urls)
        except AtollError:
            pass
        return None

    def store_leader(self) -> str | None:
        """Return the host of the leading member, as most of those that answer say."""
        for host in self.control:
            if not self.members[host.name].alive:
                continue
            endpoint = f"--endpoints=http://{host.address}:2379"
            command = ["etcdctl", endpoint, "--dial-timeout=1s", "--command-timeout=1s", "endpoint", "status", "--write-out=json"]
            said = subprocess.run(command, env={**os.environ, "ETCDCTL_API": "3"}, capture_output=True, text=True, check=False)
            if said.returncode == 0 and said.stdout:
                status = json.loads(said.stdout)[0]["Status"]
                if status["leader"] == status["header"]["member_id"]:
                    return host.name
        return None

    def synced(self, name: str) -> bool:
        """Whether a member has what was just written through the others."""
        revisions = []
        for host in self.control:
            endpoint = f"--endpoints=http://{host.address}:2379"
            command = ["etcdctl", endpoint, "--dial-timeout=1s", "--command-timeout=1s", "endpoint", "status", "--write-out=json"]
            said = subprocess.run(command, env={**os.environ, "ETCDCTL_API": "3"}, capture_output=True, text=True, check=False)
            if said.returncode != 0 or not said.stdout:
                return False
            revisions.append(json.loads(said.stdout)[0]["Status"]["header"]["revision"])
        return revisions[[host.name for host in self.control].index(name)] >= min(revisions) > 0

    def revive(self) -> None:
        """Start what has ended."""
        for part in self.parts:
            if not part.alive:
                part.start()

    def close(self) -> None:
        for part in reversed(self.parts):
            part.kill()


async def all_listed(client: Client) -> bool:
    """Whether a server answers `client`, and knows of all three."""
    try:
        return len(await client.servers()) == 3
    except AtollError:
        return False


async def until(holds: Callable[[], object] | Callable[[], Awaitable[object]], what: str, seconds: float = START_S) -> None:
    """Return when `holds()` is true. Raises AssertionError."""
    deadline = time.monotonic() + seconds
    while True:
        found = holds()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        await asyncio.sleep(0.05)


def fill(where: Path) -> None:
    """Leave no byte free."""
    with open(where / "fill", "ab", buffering=0) as file:
        piece = bytes(1 << 20)
        while piece:
            try:
                file.write(piece)
            except OSError:
                piece = piece[: len(piece) // 2]
