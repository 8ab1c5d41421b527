"""The agent on fakes: what it does with assignments, crashes, a control plane that is away, and its own death."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from atoll.images.fake import FakeImages
from atoll.model.errors import Exhausted, ImageError, RuntimeFailed, Unavailable
from atoll.model.fabric import ipv6_of
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.control_plane import Unread
from atoll.model.ports.images import ImageConfig
from atoll.model.records import Assignment, Capacity, Instance, Node, OwnerKind, Status
from atoll.model.spec import AppSpec, Health, JobSpec, Port, Restart, RestartPolicy, RuntimeName, Stop, Volume
from atoll.model.states import Desired, Phase
from atoll.model.units import Seconds
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.node.agent import Agent
from atoll.node.fake import FakeControlPlane, FakeMachine, FakeProber, MemoryLogs
from atoll.node.record import LocalRecord, MemoryRecord, SqliteRecord
from atoll.node.transitions import State
from atoll.runtimes.fake import Behaviour, FakeHost, FakeRuntime, failing


class World:
    """One machine, its control plane, and at most one agent at a time."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.control = FakeControlPlane()
        self.host = FakeHost()
        self.images = FakeImages()
        self.links = FakeNetworkState()
        self.prober = FakeProber()
        self.logs = MemoryLogs()
        self.memory = MemoryRecord()
        self.record: Callable[[], LocalRecord] = lambda: self.memory

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[Agent]:
        agent = Agent(
            node="n1",
            control=self.control,
            runtimes=[FakeRuntime(self.host)],
            images=self.images,
            network=FakeNetwork(self.links),
            clock=SystemClock(),
            random=random.Random(1),
            data=self.data,
            record=self.record(),
            logs=self.logs,
            prober=self.prober,
            machine=FakeMachine(),
        )
        task = asyncio.create_task(agent.run())
        try:
            yield agent
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def app(self, id: str, *command: str, release: int = 1, **spec: Any) -> str:
        spec.setdefault("restart", Restart(delay=Seconds(0.01)))
        self.control.assign(
            Assignment(
                instance=replace(_instance(id, OwnerKind.APP), release=release),
                workload=AppSpec(name="web", image="registry/web", command=command, **spec),
                revision=0,
            )
        )
        return id

    def job(self, id: str, *command: str, **spec: Any) -> str:
        workload = JobSpec(name="sum", image="registry/sum", command=command, **spec)
        self.control.assign(Assignment(instance=_instance(id, OwnerKind.JOB), workload=workload, revision=0))
        return id

    async def phase(self, id: str, *phases: Phase) -> Status:
        await self.control.until(lambda c: id in c.statuses and c.statuses[id].phase in phases)
        return self.control.statuses[id]

    async def gone(self, agent: Agent, id: str) -> None:
        await until(lambda: id not in agent.runners)


async def until(holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


def _instance(id: str, kind: OwnerKind) -> Instance:
    owner = "web" if kind is OwnerKind.APP else "sum"
    return Instance(
        id=id, project="default", owner_kind=kind, owner=owner, node="n1", runtime=RuntimeName.RUNC, created_at=1.0, index=3
    )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "agent")


async def test_an_agent_whose_date_was_set_back_is_heard_all_the_same(world: World) -> None:
    later = int(SystemClock().now() * 1000) + 3_600_000
    world.control.nodes["n1"] = Node(name="n1", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1), word=later)
    async with world.agent():
        await until(lambda: world.control.nodes["n1"].word > later)
        assert world.control.nodes["n1"].capacity == FakeMachine().capacity()
        first = world.control.nodes["n1"].word
        await world.phase(world.app("web-1"), Phase.RUNNING)
        world.control.cut()
        world.control.heal()
        await world.phase(world.app("web-2"), Phase.RUNNING)
        assert world.control.nodes["n1"].word == first, "said again it is the same word, and nothing is written"
    async with world.agent():
        await until(lambda: world.control.nodes["n1"].word > first)


async def test_an_assignment_that_is_not_understood_is_told_once_and_what_runs_of_it_goes_on(world: World) -> None:
    async with world.agent() as agent:
        await world.phase(world.app("web-1"), Phase.RUNNING)
        for id in ("web-1", "web-2"):
            world.control.confuse(Unread("default", id, "network.egress[0].cidr: too long"))
        world.control.cut()
        world.control.heal()
        for id in ("web-1", "web-2"):
            world.control.confuse(Unread("default", id, "network.egress[0].cidr: too long"))
        await world.phase(world.app("web-3"), Phase.RUNNING)
        await world.control.until(lambda c: sum(event.code == "assignment-unread" for event in c.events) >= 2)
        assert set(agent.runners) == {"web-1", "web-3"}
        assert agent.runners["web-1"].state.phase is Phase.RUNNING
        assert world.control.statuses["web-1"].phase is Phase.RUNNING
    told = [event for event in world.control.events if event.code == "assignment-unread"]
    assert sorted(event.subject for event in told) == ["instance/web-1", "instance/web-2"]
    assert "cidr: too long" in told[0].message


async def test_an_assignment_that_is_not_understood_fails_and_says_why_until_it_is_removed(world: World) -> None:
    async with world.agent() as agent:
        world.control.confuse(Unread("default", "web-2", "network.egress[0].cidr: too long"))
        status = await world.phase("web-2", Phase.FAILED)
        assert (
            status.message == "this node's agent does not understand what it is to run: network.egress[0].cidr: too long; update it"
        )
        assert (status.project, status.node, status.ready, status.phase_at > 0) == ("default", "n1", False, True)
        world.control.cut()
        world.control.heal()
        await world.phase(world.app("web-3"), Phase.RUNNING)
        assert world.control.statuses["web-2"] == status, "said again it is the same word"
        world.control.remove("web-2")
        world.control.confuse(Unread("default", "web-2", "another of that name"))
        assert "another" in (await world.phase("web-2", Phase.FAILED)).message
        assert "web-2" not in agent.runners


async def test_an_assigned_instance_runs_and_is_reported_with_its_address(world: World) -> None:
    async with world.agent():
        id = world.app("web-1", ports=(Port(port=8080),))
        await world.control.until(lambda c: id in c.statuses and c.statuses[id].ready)
        status = world.control.statuses[id]
    assert status.phase is Phase.RUNNING
    assert status.address == world.links.links[id].address
    assert status.image_digest is not None
    assert status.image_digest.startswith("sha256:")
    assert world.control.phases(id)[-1] == "running"
    assert world.control.nodes["n1"].runtimes == (RuntimeName.RUNC,)


async def test_what_a_timer_would_begin_while_the_agent_ends_is_not_begun(world: World) -> None:
    async with world.agent() as agent:
        await world.phase(world.app("web-1"), Phase.RUNNING)
    begun: list[str] = []

    async def work() -> None:
        begun.append("it is too late for this")

    await agent._spawn(work())
    assert begun == []


async def test_the_process_gets_the_image_s_the_cell_s_and_the_spec_s_environment(world: World) -> None:
    config = ImageConfig(entrypoint=("/bin/web",), command=("--serve",), env=("A=image", "B=image"), user="app", workdir="/srv")
    world.images.add("registry/web", config=config)
    world.control.secrets["web-1"] = {"TOKEN": "hush"}
    async with world.agent():
        world.app("web-1", ports=(Port(port=9000),), env={"B": "spec"}, secrets={"TOKEN": "token"})
        await world.phase("web-1", Phase.RUNNING)
        box = world.host.processes["web-1"].box
    env = dict(box.env)
    assert env == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "A": "image",
        "B": "spec",
        "ATOLL_PROJECT": "default",
        "ATOLL_INSTANCE": "web-1",
        "ATOLL_NODE": "n1",
        "ATOLL_APP": "web",
        "PORT": "9000",
        "TOKEN": "hush",
    }
    assert box.argv == ("/bin/web", "--serve")
    assert (box.user, box.workdir, box.hostname) == ("app", "/srv", "web-1")


async def test_an_instance_of_which_no_more_can_be_told_goes_on_until_it_is_told_to_stop(world: World) -> None:
    async with world.agent() as agent:
        id = world.app("web-1")
        await world.phase(id, Phase.RUNNING)
        world.control.keep(id, Desired.RUN)
        world.control.cut()
        world.control.heal()
        world.app("web-2")
        await world.phase("web-2", Phase.RUNNING)
        assert agent.runners[id].state.phase is Phase.RUNNING
        world.control.keep(id, Desired.STOP)
        await until(lambda: agent.runners[id].state.phase is Phase.STOPPED)
        assert id in agent.runners


async def test_a_tag_is_looked_up_for_a_new_release_and_never_for_a_restart(world: World) -> None:
    async with world.agent() as agent:
        first = world.app("web-1")
        old = (await world.phase(first, Phase.RUNNING)).image_digest
        assert world.images.lookups == []
        world.images.add("registry/web", content="new")
        world.app("web-2")
        await world.phase("web-2", Phase.RUNNING)
        assert world.control.statuses["web-2"].image_digest == old, "of the same release"
        world.app("web-3", release=2)
        await world.phase("web-3", Phase.RUNNING)
        assert world.images.lookups == ["registry/web"]
        assert world.control.statuses["web-3"].image_digest != old
        world.host.crash(first)
        await until(lambda: agent.runners[first].state.run == 2 and agent.runners[first].state.phase is Phase.RUNNING)
        assert agent.runners[first].state.image_digest == old
        assert world.images.lookups == ["registry/web"]


async def test_without_its_registry_a_tag_means_what_is_here_and_an_event_says_so(world: World) -> None:
    here = world.images.add("registry/web", ready=True)
    world.images.fail("registry/web", Unavailable("registry registry does not answer"))
    async with world.agent():
        id = world.app("web-1")
        await world.control.until(lambda c: "image-not-looked-up" in c.codes(id) and c.statuses[id].phase is Phase.RUNNING)
        assert world.control.statuses[id].image_digest == here.digest


async def test_an_app_and_a_job_of_one_name_have_volumes_of_their_own(world: World) -> None:
    volumes = (Volume(name="data", path="/data"),)
    async with world.agent():
        world.app("web-1", volumes=volumes)
        world.control.assign(
            Assignment(
                instance=replace(_instance("job-1", OwnerKind.JOB), owner="web"),
                workload=JobSpec(name="web", image="registry/web", volumes=volumes),
                revision=0,
            )
        )
        for id in ("web-1", "job-1"):
            await world.phase(id, Phase.RUNNING)
        sources = {id: world.host.processes[id].box.mounts[0].source for id in ("web-1", "job-1")}
    assert sources == {
        "web-1": world.data / "volumes/default/web/data",
        "job-1": world.data / "volumes/default/@jobs/web/data",
    }
    assert all(source.is_dir() for source in sources.values())


async def test_stop_ends_it_within_the_grace_and_removal_leaves_nothing(world: World) -> None:
    async with world.agent() as agent:
        id = world.app("web-1", "stubborn", stop=Stop(grace=Seconds(0.05)), volumes=(Volume(name="data", path="/data"),))
        await world.phase(id, Phase.RUNNING)
        world.control.want(id, Desired.STOP)
        status = await world.phase(id, Phase.STOPPED)
        assert status.exit is not None
        assert status.exit.signal == "SIGKILL"
        world.control.remove(id)
        await world.gone(agent, id)
    assert world.host.processes == {}
    assert world.links.links == {}
    assert world.memory.entries == {}
    assert list((world.data / "instances").iterdir()) == []
    assert (world.data / "volumes/default/web/data").is_dir()


async def test_a_crash_is_restarted_with_its_count_and_cause(world: World) -> None:
    async with world.agent():
        id = world.app("web-1")
        await world.phase(id, Phase.RUNNING)
        world.host.crash(id, oom=True)
        await world.control.until(lambda c: c.statuses[id].restarts == 1 and c.statuses[id].phase is Phase.RUNNING)
        status = world.control.statuses[id]
    assert status.exit is not None
    assert status.exit.oom
    assert world.control.phases(id)[-2:] in (["starting", "running"], ["preparing", "running"], ["backoff", "running"])
    assert "out-of-memory" in world.control.codes(id)


async def test_a_job_ends_once_with_its_exit(world: World) -> None:
    async with world.agent():
        good, bad = world.job("sum-1", "exit", "0"), world.job("sum-2", "exit", "3")
        assert (await world.phase(good, Phase.SUCCEEDED)).restarts == 0
        status = await world.phase(bad, Phase.FAILED)
    assert status.exit is not None
    assert status.exit.code == 3
    assert status.message == "exited with status 3"
    assert world.host.processes == {}
    assert world.links.links == {}


async def test_a_missing_command_backs_an_app_off_and_fails_a_job(world: World) -> None:
    async with world.agent():
        app, job = world.app("web-1", "missing"), world.job("sum-1", "missing")
        assert "not found" in (await world.phase(app, Phase.BACKOFF)).message
        assert "not found" in (await world.phase(job, Phase.FAILED)).message


async def test_an_absent_image_says_so_and_its_coming_ends_the_back_off(world: World) -> None:
    world.images.fail("registry/web", ImageError("no such image", mend="push it"), times=2)
    async with world.agent():
        id = world.app("web-1")
        assert "no such image (push it)" in (await world.phase(id, Phase.BACKOFF)).message
        await world.phase(id, Phase.RUNNING)


async def test_nothing_to_run_is_a_clear_failure(world: World) -> None:
    world.images.add("registry/web", config=ImageConfig())
    async with world.agent():
        id = world.app("web-1", restart=Restart(policy=RestartPolicy.NEVER))
        status = await world.phase(id, Phase.FAILED)
    assert "neither an entry point nor a command" in status.message


async def test_a_pull_under_way_is_let_go_when_the_instance_is_stopped(world: World) -> None:
    world.images.delay("registry/web", 60)
    async with world.agent() as agent:
        id = world.app("web-1")
        await world.phase(id, Phase.PREPARING)
        world.control.want(id, Desired.STOP)
        await world.phase(id, Phase.STOPPED)
        world.control.remove(id)
        await world.gone(agent, id)
    assert world.links.links == {}


async def test_a_new_agent_adopts_what_runs_and_replays_a_missed_exit(world: World) -> None:
    async with world.agent():
        kept, ended, job = world.app("web-1"), world.app("web-2"), world.job("sum-1")
        for id in (kept, ended, job):
            await world.phase(id, Phase.RUNNING)
        pid = world.control.statuses[kept].pid
    world.host.crash(ended, signal="SIGABRT")
    world.host.crash(job)
    starts = world.host.calls.count(("start", kept))
    async with world.agent():
        failed = await world.phase(job, Phase.FAILED)
        await world.control.until(lambda c: c.statuses[ended].restarts == 1)
        status = world.control.statuses[kept]
    assert status.phase is Phase.RUNNING
    assert status.pid == pid
    assert status.ready
    assert world.host.calls.count(("start", kept)) == starts
    assert failed.exit is not None
    assert failed.exit.signal == "SIGSEGV"
    assert world.control.statuses[ended].exit is not None
    assert world.control.statuses[ended].exit.signal == "SIGABRT"


async def test_an_instance_is_reported_with_its_ipv6_address_for_as_long_as_it_has_it(world: World) -> None:
    world.links.ula = "fd00:a70:1::/48"
    async with world.agent():
        id = world.app("web-1")
        status = await world.phase(id, Phase.RUNNING)
        assert status.address is not None
        assert status.ipv6 == ipv6_of(world.links.ula, status.address)
    async with world.agent():
        await world.control.until(lambda c: len(c.heartbeats) > 1)
        assert world.control.statuses[id].ipv6 == status.ipv6
    world.links.links[id] = replace(world.links.links[id], ipv6=None)  # as by an agent that is told to do without
    async with world.agent():
        await world.control.until(lambda c: c.statuses[id].ipv6 is None)
        assert world.control.statuses[id].address == status.address


async def test_a_new_agent_removes_what_is_not_recorded(world: World) -> None:
    async with world.agent():
        id = world.app("web-1")
        await world.phase(id, Phase.RUNNING)
    world.memory.entries.clear()
    world.control.assigned.clear()
    async with world.agent():
        await world.control.until(lambda c: len(c.heartbeats) > 1)
        assert world.host.processes == {}
        assert world.links.links == {}
        assert list((world.data / "instances").iterdir()) == []


async def test_a_machine_that_was_restarted_starts_its_apps_again(world: World) -> None:
    async with world.agent():
        app, job = world.app("web-1"), world.job("sum-1")
        await world.phase(app, Phase.RUNNING)
        await world.phase(job, Phase.RUNNING)
    world.host.processes.clear()
    world.links.links.clear()
    async with world.agent():
        await world.control.until(lambda c: c.statuses[app].restarts == 1 and c.statuses[app].phase is Phase.RUNNING)
        status = await world.phase(job, Phase.FAILED)
    assert "how is not known" in status.message


async def test_without_the_control_plane_crashes_are_restarted_and_told_later(world: World) -> None:
    world.control.secrets["web-1"] = {"KEY": "value"}
    async with world.agent():
        id = world.app("web-1", secrets={"KEY": "key"})
        await world.phase(id, Phase.RUNNING)
        world.control.cut()
        first = world.host.processes[id]
        world.host.crash(id)
        await until(lambda: id in world.host.running() and world.host.processes[id] is not first)
        assert dict(world.host.processes[id].box.env)["KEY"] == "value"
        assert world.control.statuses[id].restarts == 0
        world.control.heal()
        await world.control.until(lambda c: c.statuses[id].restarts == 1)
        assert "exited" in world.control.codes(id)


async def test_without_the_control_plane_even_a_new_agent_keeps_things_running(world: World, tmp_path: Path) -> None:
    world.record = lambda: SqliteRecord(tmp_path / "record.db")
    world.control.secrets["web-1"] = {"KEY": "value"}
    async with world.agent():
        id = world.app("web-1", secrets={"KEY": "key"})
        await world.phase(id, Phase.RUNNING)
    world.control.cut()
    world.host.crash(id)
    async with world.agent() as agent:
        await until(lambda: id in world.host.running())
        assert agent.runners[id].state.run == 2
        assert dict(world.host.processes[id].box.env)["KEY"] == "value"


async def test_what_was_unassigned_while_away_is_removed_on_return(world: World) -> None:
    async with world.agent() as agent:
        id = world.app("web-1")
        await world.phase(id, Phase.RUNNING)
        world.control.cut()
        world.control.remove(id)
        world.control.heal()
        await world.gone(agent, id)
    assert world.host.processes == {}


async def test_after_a_cut_every_status_is_told_again(world: World) -> None:
    async with world.agent():
        id = world.app("web-1")
        await world.phase(id, Phase.RUNNING)
        world.control.cut()
        world.control.statuses[id] = replace(world.control.statuses[id], phase=Phase.LOST)
        world.control.heal()
        await world.phase(id, Phase.RUNNING)


async def test_a_failing_runtime_leaves_a_reason_and_is_tried_again(world: World) -> None:
    world.host.before = failing({"create": RuntimeFailed("no cgroup"), "delete": RuntimeFailed("busy")})
    world.links.failures = 1
    async with world.agent():
        id = world.app("web-1")
        await world.phase(id, Phase.RUNNING)
        assert "prepare-failed" in world.control.codes(id)


async def test_a_network_without_addresses_is_a_passing_failure_for_a_job(world: World) -> None:
    world.links.exhausted = True
    async with world.agent():
        id = world.job("sum-1", "exit", "0")
        assert "all addresses" in (await world.phase(id, Phase.BACKOFF)).message
        world.links.exhausted = False
        await world.phase(id, Phase.SUCCEEDED)
    assert Exhausted.retry == Unavailable.retry


async def test_a_failing_check_makes_it_not_ready_and_restarts_it(world: World) -> None:
    check = Health(kind="exec", command=("true",), interval=Seconds(0.01), retries=2, start=Seconds(5))  # type: ignore[arg-type]
    async with world.agent():
        id = world.app("web-1", health=check)
        await world.control.until(lambda c: id in c.statuses and c.statuses[id].ready)
        world.prober.failing[id] = "broken"
        await world.control.until(lambda c: not c.statuses[id].ready)
        await world.phase(id, Phase.BACKOFF, Phase.PREPARING, Phase.STARTING)
        del world.prober.failing[id]
        await world.control.until(lambda c: c.statuses[id].ready and c.statuses[id].restarts >= 1)
    assert "unhealthy" in world.control.codes(id)


async def test_drain_keeps_it_running_until_stop(world: World) -> None:
    async with world.agent():
        id = world.app("web-1")
        await world.phase(id, Phase.RUNNING)
        world.control.want(id, Desired.DRAIN)
        await asyncio.sleep(0.02)
        assert world.host.running() == [id]
        world.control.want(id, Desired.STOP)
        await world.phase(id, Phase.STOPPED)


async def test_a_start_is_reported_within_milliseconds(world: World) -> None:
    async with world.agent():
        world.app("warm-1")
        await world.phase("warm-1", Phase.RUNNING)
        times = []
        for number in range(20):
            id = f"web-{number}"
            began = asyncio.get_running_loop().time()
            world.app(id)
            await world.phase(id, Phase.RUNNING)
            times.append(asyncio.get_running_loop().time() - began)
    assert sorted(times)[10] < 0.05


async def test_heartbeats_carry_usage(world: World) -> None:
    async with world.agent():
        id = world.app("web-1")
        await world.phase(id, Phase.RUNNING)
    async with world.agent():
        await world.control.until(lambda c: any(beat.usage for beat in c.heartbeats))
        assert world.control.heartbeats[-1].usage[0].instance == id


async def test_a_slow_start_that_is_stopped_meanwhile_ends_stopped(world: World) -> None:
    world.host.script = lambda box: Behaviour(stop_code=0)

    async def slow(call: str, id: str) -> None:
        if call == "start":
            await asyncio.sleep(0.05)

    world.host.before = slow
    async with world.agent():
        id = world.app("web-1")
        await world.phase(id, Phase.STARTING)
        world.control.want(id, Desired.STOP)
        status = await world.phase(id, Phase.STOPPED)
    assert status.exit is not None
    assert status.exit.code == 0
    assert world.host.processes == {}


async def test_after_its_end_an_agent_sets_nothing_going(world: World) -> None:
    """A timer that was left behind tried to begin work in a group that was over. (Found by the simulator.)"""
    surprises: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: surprises.append(context))
    async with world.agent():
        id = world.app("web-1", "exit", "1", restart=Restart(delay=Seconds(0.05)))
        await world.phase(id, Phase.BACKOFF)
    starts = world.host.calls.count(("start", id))
    await asyncio.sleep(0.1)
    assert world.host.calls.count(("start", id)) == starts
    assert surprises == []


class Faulty(MemoryRecord):
    """A record on a disk that is full while `full`."""

    full = True

    def put_assignment(self, assignment: Assignment) -> None:
        self._check()
        super().put_assignment(assignment)

    def put_state(self, id: str, state: State) -> None:
        self._check()
        super().put_state(id, state)

    def _check(self) -> None:
        if self.full:
            raise Unavailable("cannot write the agent's record: the disk is full", mend="free some disk space")


async def test_a_record_that_cannot_be_written_stops_nothing_and_is_written_when_it_can(world: World) -> None:
    record = Faulty()
    world.record = lambda: record
    async with world.agent() as agent:
        id = world.app("web-1")
        await world.phase(id, Phase.RUNNING)
        assert record.entries == {}
        record.full = False
        world.control.want(id, Desired.DRAIN)
        await until(lambda: id in record.entries and record.entries[id].state.desired is Desired.DRAIN)
        assert record.entries[id].state.phase is Phase.RUNNING
        assert agent.runners[id].state.phase is Phase.RUNNING
