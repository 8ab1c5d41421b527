"""Two server processes over one etcd, and a machine that joins them over TLS: real processes, real runc, real deaths."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from atoll.entry.config import Config
from atoll.entry.joining import JOIN_VARIABLE
from atoll.entry.scratch import free_port, free_subnet
from atoll.images.minimal import docker_archive
from atoll.model import keys
from atoll.model.errors import AtollError
from atoll.model.membership import DATA_VERSION, SKEW_MAX
from atoll.model.streams import ExecOptions, Kind
from atoll.runtimes.runc import probe_runc
from atoll.sdk.client import Client
from atoll.store.etcd.private import PrivateEtcd
from atoll.store.etcd.store import EtcdStore

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes namespaces, mounts and cgroups"),
    pytest.mark.skipif(shutil.which("etcd") is None, reason="there is no etcd on this machine"),
    pytest.mark.skipif(not Path("/bin/busybox").exists(), reason="needs the package busybox-static"),
]
T = TypeVar("T")
ATOLL = str(Path(sys.executable).with_name("atoll"))
SPEC = """
name = "box"
image = "{image}"
command = ["/bin/busybox", "sleep", "100000"]
resources = {{ memory = "32MiB" }}
stop = {{ grace = "0.1s" }}
"""


class Process:
    """A process of Atoll with data of its own."""

    def __init__(self, role: str, config: Config, environment: dict[str, str]) -> None:
        config.data.mkdir(parents=True, exist_ok=True)
        self.data = config.data
        self.command = [sys.executable, "-m", f"atoll.entry.{role}", *config.arguments()]
        self._environment = environment
        self.start()

    def start(self, **more: str) -> None:
        with open(self.data / "log", "ab") as log:
            environment = self._environment | more
            self.running = subprocess.Popen(self.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end(self, number: int, wait_s: float = 30.0) -> int:
        if self.running.poll() is None:
            self.running.send_signal(number)
        return self.running.wait(wait_s)

    @property
    def log(self) -> str:
        return (self.data / "log").read_text(errors="replace")


class Cell:
    def __init__(self, directory: Path, etcd: PrivateEtcd) -> None:
        self.directory = directory
        self.etcd = etcd
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ATOLL_")}
        self.environment = {**kept, "NO_COLOR": "1", "XDG_CONFIG_HOME": str(directory / "config")}
        key = directory / "cell-key"
        self.urls: list[str] = []
        self.servers: list[Process] = []
        for number in range(2):
            listen = f"127.0.0.1:{free_port()}"
            config = Config(
                data=directory / f"server{number}", listen=listen, tls=True, store=etcd.url, key=key, certificate_life="1h"
            )
            if number == 0:
                key.touch(mode=0o600)
                key.write_bytes(os.urandom(32))
            self.servers.append(Process("server", config, self.environment))
            self.urls.append(f"https://{listen}")
        for server in self.servers:
            wait_for(lambda server=server: (server.data / "client.json").exists() or _died(server), "a server")  # type: ignore[misc]
        self.ca = str(self.servers[0].data / "server" / "ca.pem")
        self.token = (self.servers[0].data / "server" / "admin-token").read_text()
        self.agents: list[Process] = []

    def atoll(self, *arguments: str, api: str | None = None) -> str:
        environment = {**self.environment, "ATOLL_TOKEN": self.token, "ATOLL_CA": self.ca, "ATOLL_API": api or ",".join(self.urls)}
        done = subprocess.run([ATOLL, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def ask(self, call: Callable[[Client], Awaitable[T]], api: str | None = None) -> T:
        """Make a call as a program does, which takes no start of a process."""

        async def made() -> T:
            async with Client.connect(api or ",".join(self.urls), self.token, ca=self.ca) as client:
                return await call(client)

        return asyncio.run(made())

    def answers(self, api: str) -> bool:
        try:
            return bool(self.ask(Client.info, api).version)
        except AtollError:
            return False

    def inside(self, api: str | None = None) -> bool:
        """Whether a command runs in the app's instance."""

        async def run(client: Client) -> bool:
            instance = (await client.instances("default", app="box"))[0].instance.id
            try:
                running = await client.exec("default", instance, ExecOptions(argv=("/bin/busybox", "echo", "inside")))
                said = b"".join([data async for kind, data in running if kind is Kind.STDOUT])
            except AtollError:
                return False
            return said == b"inside\n"

        return self.ask(run, api)

    def agent(self, name: str, join: str) -> Process:
        data = self.directory / name
        config = Config(data=data, server=",".join(self.urls), subnet=free_subnet(os.getpid() + free_port()), node=name)
        process = Process("agent", config, self.environment | {JOIN_VARIABLE: join})
        self.agents.append(process)
        return process

    def close(self) -> None:
        for process in self.agents:
            process.end(signal.SIGINT)
        for server in self.servers:
            server.end(signal.SIGTERM)


def _died(process: Process) -> bool:
    assert process.running.poll() is None, process.log
    return False


def wait_for(holds: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    try:
        probe_runc()
    except AtollError as error:
        pytest.skip(f"{error}; {error.mend}")
    with PrivateEtcd() as etcd:
        made = Cell(tmp_path_factory.mktemp("cell"), etcd)
        try:
            yield made
        finally:
            made.close()


def test_a_server_with_another_key_says_so_and_changes_nothing(cell: Cell, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(os.urandom(32))
    config = Config(data=tmp_path / "third", listen=f"127.0.0.1:{free_port()}", tls=True, store=cell.etcd.url, key=wrong)
    third = Process("server", config, cell.environment)
    assert third.running.wait(60) == 78
    assert "this server's key is not the cell's" in third.log
    assert "mend:" in third.log
    assert len(cell.ask(Client.servers)) == 2


def test_a_server_that_is_too_old_for_the_data_says_so_and_changes_nothing(cell: Cell, tmp_path: Path) -> None:
    newer = DATA_VERSION + SKEW_MAX + 1

    async def put(value: bytes | None) -> None:
        store = await EtcdStore.open(cell.etcd.address)
        try:
            await (store.put(keys.CELL_DATA, value) if value is not None else store.delete(keys.CELL_DATA))
        finally:
            await store.close()

    asyncio.run(put(b"%d" % newer))
    try:
        config = Config(
            data=tmp_path / "old", listen=f"127.0.0.1:{free_port()}", tls=True, store=cell.etcd.url, key=cell.directory / "cell-key"
        )
        old = Process("server", config, cell.environment)
        assert old.running.wait(60) == 78
    finally:
        asyncio.run(put(None))
    assert f"the cell's data is of version {newer}" in old.log
    assert "mend: use the newer Atoll" in old.log
    assert len(cell.ask(Client.servers)) == 2, "and those that run go on"


def test_a_machine_joins_by_token_runs_an_app_and_is_reached_through_any_server_until_it_is_revoked(cell: Cell) -> None:
    wait_for(lambda: len(cell.ask(Client.servers)) == 2, "both servers to be listed")
    wait_for(lambda: sum(view.leads for view in cell.ask(Client.servers)) == 1, "one server to lead")
    words = cell.atoll("join-token", "create").split()
    assert words[-5:-1] == ["agent", "--server", ",".join(sorted(cell.urls)), "--join"]
    token = words[-1]
    agent = cell.agent("m1", token)
    wait_for(lambda: [view.node.name for view in cell.ask(Client.nodes)] == ["m1"] or _died(agent), "the node")
    assert token.encode() not in Path(f"/proc/{agent.running.pid}/cmdline").read_bytes()
    replay = cell.agent("m2", token)
    assert replay.running.wait(60) == 78, "another try cannot help"
    assert "used already, by 'm1'" in replay.log

    archive = docker_archive(cell.directory / "busybox.tar", "busybox:1", program=Path("/bin/busybox"), target="/bin/busybox")
    imported = cell.atoll("image", "import", str(archive), "--name", "busybox", "--tag", "1", "--json", api=cell.urls[0])
    image = json.loads(imported)["image"]
    (cell.directory / "atoll.toml").write_text(SPEC.format(image=image))
    cell.atoll("deploy", "-f", str(cell.directory / "atoll.toml"), api=cell.urls[0])

    # The agent has its tunnel at one of the two: through the other the stream is carried on.
    for url in cell.urls:
        assert cell.atoll("exec", "box", "--", "/bin/busybox", "echo", "inside", api=url).strip() == "inside"

    # The first serves the registry; the second may lead, or have the tunnel, or both.
    assert cell.servers[1].end(signal.SIGKILL) == -signal.SIGKILL
    began = time.monotonic()
    assert len(cell.ask(lambda client: client.instances("default", app="box"))) == 1, "who knows both goes on at the other"
    assert time.monotonic() - began < 10
    wait_for(lambda: cell.inside(), "exec through the server that is left")
    leads = (cell.urls[0],)
    wait_for(lambda: any(view.leads and view.server.urls == leads for view in cell.ask(Client.servers)), "this one to lead")

    cell.servers[1].start()
    wait_for(lambda: cell.answers(cell.urls[1]) and cell.inside(cell.urls[1]), "exec through the server that is back")

    # A kill of the agent needs no new token: its certificate is on disk.
    agent.end(signal.SIGKILL)
    agent.start()
    wait_for(lambda: cell.inside(), "exec after the agent's restart")
    cell.atoll("delete", "box", "--yes")
    wait_for(lambda: not cell.ask(lambda client: client.instances("default", app="box")), "the app to be gone")
    cell.atoll("nodes", "revoke", "m1")
    wait_for(lambda: "was revoked" in agent.log, "the agent to be told", seconds=10)
    assert agent.end(signal.SIGTERM) == 0
    text = str(agent.data).encode()
    left = [line for path in Path("/proc").glob("[0-9]*/cmdline") if text in (line := _read(path))]
    assert not left, "nothing is left running"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""
