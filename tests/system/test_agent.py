"""The agent with real containers, links, pipes and files: kill -9 loses nothing that runs and leaks nothing that ended."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from atoll.images.fake import FakeImages
from atoll.model import codec
from atoll.model.errors import Unsupported
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.control_plane import Channel, StreamKind, StreamRequest
from atoll.model.records import Assignment, Instance, OwnerKind, Status
from atoll.model.spec import (
    CALLER_CA,
    CALLER_CA_DIRECTORY,
    AppSpec,
    Health,
    HealthKind,
    IngressRules,
    InstanceTls,
    JobSpec,
    Port,
    Resources,
    Restart,
    RuntimeName,
    Stop,
    Volume,
)
from atoll.model.states import Desired, Phase
from atoll.model.streams import Kind, LogLine, Resize, pack, unpack
from atoll.model.units import Bytes, Seconds
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.network.links import LinkNetwork
from atoll.network.slots import tag_of
from atoll.node.agent import Agent
from atoll.node.fake import FakeControlPlane
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.fake import FakeHost, FakeRuntime
from atoll.runtimes.runc import RuncRuntime, probe_runc

BUSYBOX = Path("/bin/busybox")
AGENT = Path(__file__).with_name("agent_process.py")

pytestmark = [pytest.mark.system, pytest.mark.timeout(90)]


@pytest.fixture(scope="module", autouse=True)
def _able() -> None:
    if not BUSYBOX.exists():
        pytest.skip("needs busybox-static")
    try:
        probe_runc()
    except Unsupported as error:
        pytest.skip(f"{error}; {error.mend}")


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layer")
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "data", "www"):
        (root / name).mkdir()
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for name in ("sh", "sleep", "cat", "echo", "id", "httpd", "ls", "stat", "true", "false", "env", "test", "stty"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\napp:x:1000:1000::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\napp:x:1000:\n")
    (root / "www/index.html").write_text("hello\n")
    return root


class Place:
    """One node's directories and names, and what must not be left of them."""

    runtimes: tuple[str, ...] = ("runc",)

    def __init__(self, data: Path, layer: Path) -> None:
        self.data, self.layer = data, layer
        self.subnet = f"10.{random.randrange(124, 127)}.{random.randrange(256)}.0/24"
        self.cgroup = f"/atoll-test-{random.randrange(1 << 32):08x}"

    def runtime(self) -> RuncRuntime:
        return RuncRuntime(self.data / "runc", cgroup=self.cgroup)

    def network(self, prepared: int = 1) -> LinkNetwork:
        return LinkNetwork(self.subnet, self.data / "network", prepared=prepared)

    async def sweep(self) -> None:
        """What the next agent of a node without instances does; spares that are kept ready are given back too."""
        runtime, network = self.runtime(), self.network(0)
        for found in await runtime.recover():
            await runtime.delete(found.id)
        await network.recover(())
        await runtime.close()
        await network.close()

    def left(self) -> list[str]:
        """Return what is left on the machine of this place: mounts, links, namespaces, cgroups, processes."""
        text = str(self.data)
        left = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if text in line]
        tag = tag_of(self.data / "network")
        left += [path.name for path in Path("/sys/class/net").iterdir() if tag in path.name]
        left += [str(path) for path in Path("/run").glob(f"*/*{tag}*")]
        detected = Cgroups.detect()
        for root in {detected.v2, *detected.v1.values()} - {None}:
            left += [str(path) for path in (Path(str(root)) / self.cgroup.strip("/")).glob("*/")]
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if text.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                    left.append(path.read_bytes().replace(b"\0", b" ").decode())
        return left


@pytest.fixture
async def place(tmp_path: Path, layer: Path) -> AsyncIterator[Place]:
    place = Place(tmp_path / "agent", layer)
    yield place
    await place.sweep()
    detected = Cgroups.detect()
    for root in {detected.v2, *detected.v1.values()} - {None}:
        with contextlib.suppress(OSError):
            (Path(str(root)) / place.cgroup.strip("/")).rmdir()


def app(id: str, *command: str, **spec: Any) -> Assignment:
    spec.setdefault("restart", Restart(delay=Seconds(0.05), delay_max=Seconds(0.1)))
    spec.setdefault("stop", Stop(grace=Seconds(0.5)))
    spec.setdefault("resources", Resources(memory=Bytes(64 << 20), disk=Bytes(16 << 20)))
    workload = AppSpec(name="web", image="box", command=command, **spec)
    return Assignment(instance=_instance(id, OwnerKind.APP), workload=workload, revision=1)


def job(id: str, *command: str) -> Assignment:
    resources = Resources(memory=Bytes(64 << 20), disk=Bytes(16 << 20))
    workload = JobSpec(name="sum", image="box", command=command, resources=resources)
    return Assignment(instance=_instance(id, OwnerKind.JOB), workload=workload, revision=1)


def _instance(id: str, kind: OwnerKind) -> Instance:
    return Instance(id=id, project="default", owner_kind=kind, owner="web", node="n1", runtime=RuntimeName.RUNC, created_at=1.0)


class Killable:
    """An agent in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.statuses: dict[str, Status] = {}
        self.seen = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, place: Place, assignments: list[Assignment]) -> Killable:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(AGENT),
            str(place.data),
            str(place.layer),
            place.subnet,
            place.cgroup,
            *place.runtimes,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        agent = cls(process)
        assert process.stdin is not None
        process.stdin.write(codec.encode(assignments) + b"\n")
        return agent

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            status = codec.decode(line, Status)
            self.statuses[status.instance] = status
            self.seen.set()

    async def until(self, holds: Callable[[dict[str, Status]], object], timeout_s: float = 30) -> None:
        async with asyncio.timeout(timeout_s):
            while not holds(self.statuses):
                self.seen.clear()
                await self.seen.wait()

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()
        await self._reading


def in_phase(id: str, phase: Phase) -> Callable[[dict[str, Status]], bool]:
    return lambda statuses: id in statuses and statuses[id].phase is phase


async def test_after_kill_9_everything_is_adopted_and_nothing_leaks(place: Place) -> None:
    kept = app("web-1", "httpd", "-f", "-p", "8000", "-h", "/www", ports=(Port(port=8000),))
    talking = app("web-2", "sh", "-c", "while true; do echo tick; sleep 0.1; done")
    crashing = app("web-3", "sleep", "1000")
    short = job("sum-1", "sh", "-c", "sleep 1.5; exit 7")
    everything = [kept, talking, crashing, short]
    first = await Killable.start(place, everything)
    await first.until(lambda s: s.get("web-1") and s["web-1"].ready)
    for id in ("web-2", "web-3", "sum-1"):
        await first.until(in_phase(id, Phase.RUNNING))
    await first.kill()
    pids = {id: status.pid for id, status in first.statuses.items()}
    assert pids["web-3"] is not None
    os.kill(pids["web-3"], 9)
    await asyncio.sleep(2.0)

    second = await Killable.start(place, everything)
    await second.until(in_phase("sum-1", Phase.FAILED))
    await second.until(lambda s: s.get("web-3") and s["web-3"].restarts == 1 and s["web-3"].phase is Phase.RUNNING)
    await second.until(lambda s: s.get("web-1") and s.get("web-2"))
    failed = second.statuses["sum-1"].exit
    assert failed is not None
    assert failed.code == 7
    for id in ("web-1", "web-2"):
        assert second.statuses[id].pid == pids[id]
        assert second.statuses[id].phase is Phase.RUNNING
    assert second.statuses["web-1"].ready
    assert await _get(second.statuses["web-1"].address, 8000) == b"hello\n"
    ticks = [path.read_bytes() for path in (place.data / "logs/default/web-2").iterdir()]
    await asyncio.sleep(0.5)
    assert sum(map(len, ticks)) < sum(path.stat().st_size for path in (place.data / "logs/default/web-2").iterdir())

    for assignment in everything:
        second.tell(do="remove", id=assignment.instance.id)
    async with asyncio.timeout(20):
        while [*(place.data / "instances").iterdir(), *(place.data / "logs").iterdir()]:  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.02)
    await second.kill()
    await place.sweep()
    assert place.left() == []
    assert list((place.data / "logs").iterdir()) == []


async def test_kill_9_at_any_moment_of_a_start_is_mended_by_the_next_agent(place: Place) -> None:
    assignments = [app(f"web-{n}", "sleep", "1000") for n in range(3)]
    for delay in (0.0, 0.01, 0.02, 0.03, 0.05, 0.08):
        agent = await Killable.start(place, assignments)
        with contextlib.suppress(TimeoutError):
            await agent.until(lambda s: len(s) > 0, timeout_s=20)
        await asyncio.sleep(delay)
        await agent.kill()
    agent = await Killable.start(place, assignments)
    for assignment in assignments:
        await agent.until(in_phase(assignment.instance.id, Phase.RUNNING))
    pids = {status.pid for status in agent.statuses.values()}
    assert len(pids) == 3
    await agent.kill()
    nothing = await Killable.start(place, [])
    async with asyncio.timeout(20):
        while list((place.data / "instances").iterdir()):  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.02)
    await nothing.kill()
    await place.sweep()
    assert place.left() == []


@pytest.fixture
async def control(place: Place) -> AsyncIterator[FakeControlPlane]:
    """An agent in this process, for what needs no killing; the fixture is its control plane."""
    control = FakeControlPlane()
    images = FakeImages()
    images.add("box", layers=(place.layer,), ready=True)
    agent = Agent(
        node="n1",
        control=control,
        runtimes=(place.runtime(),),
        images=images,
        network=place.network(),
        clock=SystemClock(),
        random=random.Random(),
        data=place.data,
    )
    running = asyncio.create_task(agent.run())
    yield control
    for id in list(control.assigned):
        control.remove(id)
    async with asyncio.timeout(20):
        while agent.runners and not running.done():  # noqa: ASYNC110 - the agent has no event for it
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await place.sweep()
    assert place.left() == []


async def _phase(control: FakeControlPlane, id: str, phase: Phase) -> Status:
    await control.until(lambda c: in_phase(id, phase)(c.statuses), timeout_s=20)
    return control.statuses[id]


async def _get(address: str | None, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(address, port)
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return answer.partition(b"\r\n\r\n")[2]


async def _messages(channel: Channel) -> list[tuple[Kind, bytes]]:
    found = []
    async with asyncio.timeout(20):
        while (message := await channel.receive()) is not None:
            found.append(unpack(message))
            if found[-1][0] in (Kind.EXIT, Kind.ERROR, Kind.END):
                break
    return found


async def _exec(control: FakeControlPlane, id: str, *argv: str, **options: Any) -> tuple[int, bytes]:
    request = StreamRequest(f"s{random.random()}", StreamKind.EXEC, id, {"argv": list(argv), **options})
    messages = await _messages(control.request(request))
    assert messages[-1][0] is Kind.EXIT, messages
    return int(messages[-1][1]), b"".join(payload for kind, payload in messages[:-1])


async def test_an_app_serves_and_its_checks_make_it_ready(control: FakeControlPlane) -> None:
    check = Health(kind=HealthKind.HTTP, path="/index.html", interval=Seconds(0.2))
    command = ("httpd", "-f", "-p", "8000", "-h", "/www")
    control.assign(app("web-1", *command, ports=(Port(port=8000),), health=check))
    await control.until(lambda c: "web-1" in c.statuses and c.statuses["web-1"].ready)
    assert await _get(control.statuses["web-1"].address, 8000) == b"hello\n"
    failing = Health(kind=HealthKind.EXEC, command=("sh", "-c", "echo no good; false"), start=Seconds(0), retries=1)
    control.assign(app("web-2", "sleep", "1000", health=failing))
    status = await _phase(control, "web-2", Phase.BACKOFF)
    assert "no good" in status.message


async def test_exec_runs_in_the_instance_with_its_environment(control: FakeControlPlane) -> None:
    control.assign(app("web-1", "sleep", "1000", env={"COLOUR": "blue"}, ports=(Port(port=8000),)))
    await _phase(control, "web-1", Phase.RUNNING)
    assert await _exec(control, "web-1", "sh", "-c", "echo $COLOUR $PORT $ATOLL_INSTANCE $X; exit 4", env={"X": "y"}) == (
        4,
        b"blue 8000 web-1 y\n",
    )
    channel = control.request(StreamRequest("cat", StreamKind.EXEC, "web-1", {"argv": ["cat"]}))
    await channel.send(pack(Kind.STDIN, b"to and fro"))
    await channel.send(pack(Kind.STDIN_END))
    assert await _messages(channel) == [(Kind.STDOUT, b"to and fro"), (Kind.EXIT, b"0")]
    channel = control.request(StreamRequest("none", StreamKind.EXEC, "web-1", {"argv": ["/no/such"]}))
    assert (await _messages(channel))[-1][0] is Kind.ERROR


async def test_a_terminal_has_the_size_that_it_is_given_and_takes_signals(control: FakeControlPlane) -> None:
    control.assign(app("web-1", "sleep", "1000"))
    await _phase(control, "web-1", Phase.RUNNING)
    options = {"argv": ["sh", "-c", "stty size; read x; stty size; sleep 100"], "tty": True, "rows": 40, "columns": 100}
    channel = control.request(StreamRequest("s", StreamKind.EXEC, "web-1", options))
    seen = b""
    async with asyncio.timeout(10):
        while b"40 100" not in seen:
            seen += unpack(await channel.receive() or b"")[1]
        await channel.send(pack(Kind.RESIZE, codec.encode(Resize(50, 120))))
        await channel.send(pack(Kind.STDIN, b"\n"))
        while b"50 120" not in seen:
            seen += unpack(await channel.receive() or b"")[1]
        await channel.send(pack(Kind.SIGNAL, b"SIGKILL"))
    assert (await _messages(channel))[-1] == (Kind.EXIT, b"137")


async def test_a_command_whose_client_leaves_is_ended(control: FakeControlPlane) -> None:
    control.assign(app("web-1", "sleep", "1000"))
    await _phase(control, "web-1", Phase.RUNNING)
    channel = control.request(StreamRequest("s", StreamKind.EXEC, "web-1", {"argv": ["sh", "-c", "echo on; sleep 77"]}))
    assert unpack(await channel.receive() or b"")[1] == b"on\n"
    await channel.close()
    async with asyncio.timeout(10):
        while b"sleep\x0077" in (await _exec(control, "web-1", "sh", "-c", "cat /proc/*/cmdline"))[1]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_logs_come_with_their_stream_and_follow_until_the_end(control: FakeControlPlane) -> None:
    control.assign(job("sum-1", "sh", "-c", "echo out; sleep 0.2; echo err >&2; echo again > /dev/stdout; exit 0"))
    await _phase(control, "sum-1", Phase.RUNNING)
    channel = control.request(StreamRequest("s", StreamKind.LOGS, "sum-1", {"follow": True}))
    *lines, end = await _messages(channel)
    assert end[0] is Kind.END
    decoded = [codec.decode(payload, LogLine) for _, payload in lines]
    assert sorted((line.stream, line.text) for line in decoded) == [("stderr", "err"), ("stdout", "again"), ("stdout", "out")]
    await _phase(control, "sum-1", Phase.SUCCEEDED)
    channel = control.request(StreamRequest("t", StreamKind.LOGS, "sum-1", {"tail": 1}))
    assert len(await _messages(channel)) == 2


async def test_another_user_can_write_to_stdout_by_name(control: FakeControlPlane) -> None:
    control.assign(job("sum-1", "sh", "-c", "echo hello > /dev/stdout"))
    await _phase(control, "sum-1", Phase.SUCCEEDED)
    assignment = app("web-1", "sh", "-c", "echo me > /dev/stdout; sleep 1000", user="app")
    control.assign(assignment)
    await _phase(control, "web-1", Phase.RUNNING)
    await asyncio.sleep(0.2)
    channel = control.request(StreamRequest("s", StreamKind.LOGS, "web-1", {}))
    assert b'"me"' in (await _messages(channel))[0][1]


async def test_files_go_in_and_out_with_owners_of_the_instance_on_volumes_too(control: FakeControlPlane, place: Place) -> None:
    control.assign(app("web-1", "sleep", "1000", volumes=(Volume(name="store", path="/data"),)))
    await _phase(control, "web-1", Phase.RUNNING)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, uid in (("root.txt", 0), ("app.txt", 1000)):
            member = tarfile.TarInfo(f"new/{name}")
            member.size, member.uid, member.gid, member.mode = 5, uid, uid, 0o640
            tar.addfile(member, io.BytesIO(b"hello"))
    for number, target in enumerate(("/data", "/tmp/below")):
        channel = control.request(StreamRequest(f"p{number}", StreamKind.FILES_PUT, "web-1", {"path": target}))
        await channel.send(pack(Kind.DATA, out.getvalue()))
        await channel.send(pack(Kind.END))
        assert await _messages(channel) == [(Kind.END, b"")]
        code, text = await _exec(control, "web-1", "sh", "-c", f"cd {target}/new && stat -c '%n %u %g %a' * && stat -c %u .")
        assert (code, text) == (0, b"app.txt 1000 1000 640\nroot.txt 0 0 640\n0\n")
    assert (place.data / "volumes/default/web/store/new/app.txt").stat().st_uid == 1000
    channel = control.request(StreamRequest("g", StreamKind.FILES_GET, "web-1", {"path": "/data/new"}))
    *parts, end = await _messages(channel)
    await channel.send(pack(Kind.END))
    assert end[0] is Kind.END
    with tarfile.open(fileobj=io.BytesIO(b"".join(payload for _, payload in parts))) as tar:
        assert {member.name: member.uid for member in tar} == {"new": 0, "new/app.txt": 1000, "new/root.txt": 0}
    channel = control.request(StreamRequest("n", StreamKind.FILES_GET, "web-1", {"path": "/no/such"}))
    assert b"not-found" in (await _messages(channel))[-1][1]


async def test_a_volume_outlives_its_instance_and_any_user_may_write_to_it(control: FakeControlPlane) -> None:
    volumes = (Volume(name="store", path="/data"),)
    control.assign(app("web-1", "sh", "-c", "echo kept > /data/file; sleep 1000", volumes=volumes, user="app"))
    await _phase(control, "web-1", Phase.RUNNING)
    await asyncio.sleep(0.1)
    control.want("web-1", Desired.STOP)
    await _phase(control, "web-1", Phase.STOPPED)
    control.remove("web-1")
    control.assign(app("web-2", "sleep", "1000", volumes=volumes))
    await _phase(control, "web-2", Phase.RUNNING)
    assert await _exec(control, "web-2", "cat", "/data/file") == (0, b"kept\n")


async def test_an_app_that_asks_who_calls_can_read_the_authority_and_cannot_change_it(control: FakeControlPlane) -> None:
    rules = IngressRules(instance_tls=InstanceTls(pins=("k2oYXKqiZrucvpgengXLeM1zKwsygOuURBK7b4+PB68=",), mutual=True))
    control.assign(replace(app("web-1", "sleep", "1000", ingress=rules, user="app"), caller_ca="authority\n"))
    await _phase(control, "web-1", Phase.RUNNING)
    assert await _exec(control, "web-1", "sh", "-c", "cat $ATOLL_INGRESS_CA") == (0, b"authority\n")
    for argv in (("sh", "-c", f"echo x > {CALLER_CA}"), ("sh", "-c", f"echo x > {CALLER_CA_DIRECTORY}/other")):
        status, _ = await _exec(control, "web-1", *argv, user="root")
        assert status != 0
    assert await _exec(control, "web-1", "cat", CALLER_CA) == (0, b"authority\n")
    # Without the authority nothing starts: it would take nobody, or everybody.
    control.assign(app("web-2", "sleep", "1000", ingress=rules))
    await control.until(lambda c: "web-2" in c.statuses and "has not been told of yet" in c.statuses["web-2"].message)


async def test_out_of_memory_is_reported_as_such(control: FakeControlPlane) -> None:
    control.assign(job("sum-1", "sh", "-c", "x=a; while true; do x=$x$x$x; done"))
    status = await _phase(control, "sum-1", Phase.FAILED)
    assert status.exit is not None
    assert status.exit.oom
    assert "out of memory" in status.message


async def test_a_command_that_does_not_exist_names_itself(control: FakeControlPlane) -> None:
    control.assign(job("sum-1", "/no/such/command"))
    assert "/no/such/command" in (await _phase(control, "sum-1", Phase.FAILED)).message


async def test_usage_is_measured(control: FakeControlPlane) -> None:
    control.assign(app("web-1", "sleep", "1000"))
    await _phase(control, "web-1", Phase.RUNNING)
    control.cut()
    control.heal()  # it registers again, and a heartbeat follows at once
    await control.until(lambda c: any(beat.usage for beat in c.heartbeats), timeout_s=20)
    usage = control.heartbeats[-1].usage[0]
    assert usage.memory_bytes > 0
    assert usage.pids >= 1
    assert control.heartbeats[-1].memory_bytes > 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


async def test_a_full_disk_stops_nothing_that_runs_and_is_got_over(small_disk: Path) -> None:
    control, host, links = FakeControlPlane(), FakeHost(), FakeNetworkState()

    def agent() -> Agent:
        return Agent(
            node="n1",
            control=control,
            runtimes=(FakeRuntime(host),),
            images=FakeImages(),
            network=FakeNetwork(links),
            clock=SystemClock(),
            random=random.Random(),
            data=small_disk / "agent",
        )

    running = asyncio.create_task(agent().run())
    control.assign(app("web-1", "run"))
    await _phase(control, "web-1", Phase.RUNNING)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    (small_disk / "agent/instances/web-1/stdout").write_bytes(b"lost\n" * 20_000)
    for restarts in range(1, 40):
        host.crash("web-1")
        await control.until(lambda c, n=restarts: c.statuses["web-1"].restarts == n)  # type: ignore[misc]
        control.assign(app("web-1", "run"))
    filler.unlink()
    control.assign(app("web-2", "run"))
    await _phase(control, "web-2", Phase.RUNNING)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    pid = control.statuses["web-2"].pid
    running = asyncio.create_task(agent().run())
    await control.until(lambda c: "adopted" in c.codes("web-2"))
    assert control.statuses["web-2"].pid == pid
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_the_tools_that_this_needs_are_there() -> None:
    assert subprocess.run(["runc", "--version"], capture_output=True, check=False).returncode == 0
