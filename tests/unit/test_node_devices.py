"""The agent and the node's GPUs: claimed, given back, adopted, told of; and a driver that hangs stops nothing."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ParamSpec

import pytest
from control_cell import LoopClock, run_virtual

from atoll.devices.fake import FakeHardware
from atoll.devices.ledger import LedgerFile
from atoll.devices.node import NodeDevices
from atoll.images.fake import FakeImages
from atoll.model.devices import GpuGrant, GpuHealth, GpuSample, GpuSharing
from atoll.model.errors import Unavailable
from atoll.model.records import Assignment, Instance, OwnerKind, Usage
from atoll.model.spec import AppSpec, Gpu, JobSpec, Resources, Restart, RuntimeName
from atoll.model.states import Desired, Phase
from atoll.model.units import Seconds
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.node import gpus
from atoll.node.agent import Agent
from atoll.node.fake import FakeControlPlane, FakeMachine, FakeProber, MemoryLogs
from atoll.node.gpu_usage import owners_of, usage_of
from atoll.node.record import MemoryRecord
from atoll.node.usage import LinuxMachine
from atoll.runtimes.fake import FakeHost, FakeRuntime

BOOT = "1"
CLOCK = LoopClock()
P = ParamSpec("P")


def virtual(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Let a test run on time that passes by itself."""

    @functools.wraps(test)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        run_virtual(test(*arguments, **named))

    return run


class World:
    """One machine with GPUs, its control plane, and at most one agent at a time."""

    def __init__(self, data: Path, **hardware: Any) -> None:
        self.data = data
        self.control = FakeControlPlane()
        self.host = FakeHost(clock=CLOCK)
        self.images = FakeImages()
        self.links = FakeNetworkState()
        self.memory = MemoryRecord()
        self.machine = FakeMachine()
        self.hardware: FakeHardware | None = FakeHardware(**hardware, clock=CLOCK)
        self.ids = self.hardware.ids
        self.kind_of_devices = NodeDevices
        self.runtimes: tuple[RuntimeName, ...] = (RuntimeName.RUNC,)
        self.gvisor_drivers: set[str] = set()

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[Agent]:
        devices = None
        if self.hardware is not None:
            devices = self.kind_of_devices(
                [self.hardware],
                directory=self.data,
                clock=CLOCK,
                boot=BOOT,
                gvisor_drivers=lambda: frozenset(self.gvisor_drivers),
            )
        agent = Agent(
            node="n1",
            control=self.control,
            runtimes=[FakeRuntime(self.host, name=name) for name in self.runtimes],
            images=self.images,
            network=FakeNetwork(self.links),
            clock=CLOCK,
            random=random.Random(1),
            data=self.data,
            record=self.memory,
            logs=MemoryLogs(),
            prober=FakeProber(),
            machine=self.machine,
            devices=devices,
        )
        task = asyncio.create_task(agent.run())
        try:
            yield agent
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def held(self) -> set[str]:
        """Instances for which something is held, as the next agent would read it."""
        return set(LedgerFile(self.data, BOOT).now.holdings)

    def app(self, id: str, *grants: GpuGrant, gpu: Gpu | None = Gpu(), command: tuple[str, ...] = ("serve",)) -> str:
        spec = AppSpec(
            name="web", image="registry/web", command=command, resources=Resources(gpu=gpu), restart=Restart(delay=Seconds(0.01))
        )
        self.control.assign(Assignment(instance=_instance(id, OwnerKind.APP, grants), workload=spec, revision=0))
        return id

    def job(self, id: str, *grants: GpuGrant) -> str:
        spec = JobSpec(name="sum", image="registry/sum", command=("serve",), resources=Resources(gpu=Gpu()))
        self.control.assign(Assignment(instance=_instance(id, OwnerKind.JOB, grants), workload=spec, revision=0))
        return id

    async def phase(self, id: str, phase: Phase) -> str:
        """Return the status's message once it is in `phase`."""
        await self.control.until(lambda c: id in c.statuses and c.statuses[id].phase is phase, timeout_s=120)
        return self.control.statuses[id].message

    def codes(self, subject: str) -> list[str]:
        return [event.code for event in self.control.events if event.subject == subject]


def _instance(id: str, kind: OwnerKind, grants: tuple[GpuGrant, ...]) -> Instance:
    return Instance(
        id=id, project="default", owner_kind=kind, owner="web", node="n1", runtime=RuntimeName.RUNC, created_at=1.0, gpus=grants
    )


async def until(holds: Callable[[], object], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.002)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "agent", count=2)


@virtual
async def test_a_node_registers_its_devices(world: World) -> None:
    async with world.agent():
        await until(lambda: "n1" in world.control.nodes)
    assert tuple(device.id for device in world.control.nodes["n1"].capacity.gpus) == world.ids


@virtual
async def test_a_node_whose_devices_are_of_one_nvlink_domain_says_so_as_a_label(world: World) -> None:
    assert world.hardware is not None
    for id in world.ids:
        world.hardware.change(id, fabric="ab12.7")
    async with world.agent():
        await until(lambda: "n1" in world.control.nodes)
        assert world.control.nodes["n1"].labels == {"nvlink-domain": "ab12.7"}
        world.hardware.change(world.ids[1], fabric="ab12.8")
        await until(lambda: world.control.nodes["n1"].labels == {}, timeout_s=120)


@virtual
async def test_an_instance_sees_the_device_that_it_was_granted_and_no_other(world: World) -> None:
    async with world.agent():
        world.app("web-1", GpuGrant(device=world.ids[1]))
        await world.phase("web-1", Phase.RUNNING)
        edits = world.host.processes["web-1"].box.devices
        assert dict(edits.env)["NVIDIA_VISIBLE_DEVICES"] == world.ids[1]
        world.app("web-2", gpu=None)
        await world.phase("web-2", Phase.RUNNING)
        assert not world.host.processes["web-2"].box.devices


@virtual
async def test_what_was_claimed_is_given_back_when_the_instance_is_over(world: World) -> None:
    async with world.agent() as agent:
        world.app("web-1", GpuGrant(device=world.ids[0]))
        await world.phase("web-1", Phase.RUNNING)
        assert world.held == {"web-1"}
        world.control.remove("web-1")
        await until(lambda: "web-1" not in agent.runners)
        assert world.held == set()


@virtual
async def test_a_crash_keeps_the_device_for_the_next_start(world: World) -> None:
    async with world.agent():
        world.app("web-1", GpuGrant(device=world.ids[0]))
        await world.phase("web-1", Phase.RUNNING)
        first = world.host.processes["web-1"].pid
        world.host.crash("web-1")
        await until(lambda: "web-1" in world.host.running() and world.host.processes["web-1"].pid != first)
        assert world.held == {"web-1"}


@virtual
async def test_a_partition_is_made_for_the_instance_and_removed_after_it(tmp_path: Path) -> None:
    world = World(tmp_path / "agent", mig=True)
    assert world.hardware is not None
    (id,) = world.ids
    async with world.agent() as agent:
        await until(lambda: "n1" in world.control.nodes)
        profile = world.control.nodes["n1"].capacity.gpus[0].profiles[0]
        grant = GpuGrant(
            device=id, sharing=GpuSharing.MIG, profile=profile.name, start=profile.starts[0], size=profile.memory_slices
        )
        world.app("web-1", grant, gpu=Gpu(profile=profile.name))
        await world.phase("web-1", Phase.RUNNING)
        (made,) = await world.hardware.partitions(id)
        assert dict(world.host.processes["web-1"].box.devices.env)["NVIDIA_VISIBLE_DEVICES"] == made.id
        assert world.control.nodes["n1"].capacity.gpus[0].foreign == (), "its own are nobody else's"
        world.control.remove("web-1")
        await until(lambda: "web-1" not in agent.runners)
        assert await world.hardware.partitions(id) == ()


@virtual
async def test_what_a_killed_agent_had_claimed_is_adopted_and_what_nobody_holds_is_removed(tmp_path: Path) -> None:
    world = World(tmp_path / "agent", mig=True)
    assert world.hardware is not None
    (id,) = world.ids
    async with world.agent():
        await until(lambda: "n1" in world.control.nodes)
        kind = next(kind for kind in world.control.nodes["n1"].capacity.gpus[0].profiles if len(kind.starts) > 1)
        for n, start in enumerate(kind.starts[:2]):
            grant = GpuGrant(device=id, sharing=GpuSharing.MIG, profile=kind.name, start=start, size=kind.memory_slices)
            await world.phase(world.app(f"web-{n}", grant, gpu=Gpu(profile=kind.name)), Phase.RUNNING)
    before = await world.hardware.partitions(id)
    assert len(before) == 2
    world.memory.remove("web-1")  # as if its record had been lost
    world.control.assigned.pop("web-1")
    async with world.agent():
        await until(lambda: "adopted" in world.codes("instance/web-0"))
        assert [each.id for each in await world.hardware.partitions(id)] == [before[0].id]
        assert world.held == {"web-0"}


@virtual
async def test_the_partition_that_took_the_place_of_an_ended_instance_s_outlives_the_next_agent(tmp_path: Path) -> None:
    adopted: list[set[str]] = []

    class Noting(NodeDevices):
        async def recover(self, held: Callable[[], Mapping[str, Sequence[GpuGrant]]]) -> None:
            adopted.append(set(held()))
            await super().recover(held)

    world = World(tmp_path / "agent", mig=True)
    world.kind_of_devices = Noting
    assert world.hardware is not None
    (id,) = world.ids
    async with world.agent():
        await until(lambda: "n1" in world.control.nodes)
        kind = world.control.nodes["n1"].capacity.gpus[0].profiles[0]
        grant = GpuGrant(device=id, sharing=GpuSharing.MIG, profile=kind.name, start=kind.starts[0], size=kind.memory_slices)
        gpu = Gpu(profile=kind.name)
        await world.phase(world.app("web-0", grant, gpu=gpu), Phase.RUNNING)
        await world.phase(world.app("web-9", grant, gpu=gpu), Phase.PREPARING)  # recorded after it, and waits for its place
        world.control.want("web-9", Desired.STOP)
        await world.phase("web-9", Phase.STOPPED)
    before = await world.hardware.partitions(id)
    async with world.agent():
        await until(lambda: "adopted" in world.codes("instance/web-0"))
        await asyncio.sleep(2 * gpus.LOOK_S)
        assert await world.hardware.partitions(id) == before
        assert world.held == {"web-0"}
    assert adopted == [set(), {"web-0"}]


@virtual
async def test_what_ended_before_its_devices_could_be_adopted_is_not_held_afterwards(world: World) -> None:
    blocked = True

    class Late(NodeDevices):
        async def recover(self, held: Callable[[], Mapping[str, Sequence[GpuGrant]]]) -> None:
            if blocked:
                raise Unavailable("not yet")
            await super().recover(held)

    async with world.agent():
        await world.phase(world.app("web-0", GpuGrant(device=world.ids[0])), Phase.RUNNING)
        await world.phase(world.app("web-1", GpuGrant(device=world.ids[1])), Phase.RUNNING)
    world.kind_of_devices = Late
    async with world.agent():
        world.control.want("web-0", Desired.STOP)
        await world.phase("web-0", Phase.STOPPED)
        await until(lambda: world.held == {"web-1"})
        blocked = False
        await asyncio.sleep(2 * gpus.RECOVER_PAUSE_S)
        assert world.held == {"web-1"}


@virtual
async def test_what_asks_for_a_device_and_was_given_none_is_refused_before_its_image_is_fetched(world: World) -> None:
    async with world.agent():
        world.app("web-1")
        message = await world.phase("web-1", Phase.BACKOFF)
    assert message.startswith("resources.gpu: the instance came to this node without a device")
    assert world.links.links == {}


@virtual
async def test_a_node_whose_gpus_are_gone_for_good_says_so_to_what_was_given_one(world: World) -> None:
    world.hardware = None
    async with world.agent():
        world.job("sum-1", GpuGrant(device="GPU-7"))
        message = await world.phase("sum-1", Phase.FAILED)
    assert message.startswith("this node has no GPU any more; the instance was given GPU-7")


@virtual
async def test_a_refused_claim_says_why_and_is_tried_again(world: World) -> None:
    assert world.hardware is not None
    world.hardware.change(world.ids[0], health=GpuHealth.QUARANTINED, reason="rows could not be remapped")
    async with world.agent():
        world.app("web-1", GpuGrant(device=world.ids[0]))
        message = await world.phase("web-1", Phase.BACKOFF)
        assert "rows could not be remapped" in message
        world.hardware.change(world.ids[0], health=GpuHealth.OK, reason="")
        await world.phase("web-1", Phase.RUNNING)


@virtual
async def test_a_device_that_vanishes_is_told_on_the_node_and_on_its_holder_alone_and_registered(world: World) -> None:
    assert world.hardware is not None
    async with world.agent():
        for n in (0, 1):
            await world.phase(world.app(f"web-{n}", GpuGrant(device=world.ids[n])), Phase.RUNNING)
        world.hardware.vanish(world.ids[0])
        await until(lambda: not world.control.nodes["n1"].capacity.gpus[0].present)
        await until(lambda: "gpu-vanished" in world.codes("instance/web-0"))
        (gone, well) = world.control.nodes["n1"].capacity.gpus
    assert (gone.id, gone.health) == (world.ids[0], GpuHealth.QUARANTINED)
    assert well.health is GpuHealth.OK
    assert "gpu-vanished" in world.codes("node/n1")
    assert not [code for code in world.codes("instance/web-1") if code.startswith("gpu-")]
    event = next(event for event in world.control.events if event.code == "gpu-vanished")
    assert world.ids[0] in event.message


@virtual
async def test_an_application_s_own_fault_is_told_and_leaves_the_device_on_offer(world: World) -> None:
    assert world.hardware is not None
    async with world.agent():
        await world.phase(world.app("web-0", GpuGrant(device=world.ids[0])), Phase.RUNNING)
        world.hardware.storm(world.ids[0], 5_000)
        await until(lambda: "gpu-fault" in world.codes("instance/web-0"))
        assert world.codes("instance/web-0").count("gpu-fault") == 1, "a storm is told once"
        world.hardware.xid(world.ids[1], 79)
        await until(lambda: world.control.nodes["n1"].capacity.gpus[1].health is GpuHealth.QUARANTINED)
        assert world.control.nodes["n1"].capacity.gpus[0].health is GpuHealth.OK


@virtual
async def test_a_fault_in_a_partition_is_told_to_its_holder_alone_where_the_driver_says_which(tmp_path: Path) -> None:
    world = World(tmp_path / "agent", mig=True)
    assert world.hardware is not None
    (id,) = world.ids
    async with world.agent():
        for start in (0, 4):
            grant = GpuGrant(device=id, sharing=GpuSharing.MIG, profile="3g.40gb", start=start, size=4)
            await world.phase(world.app(f"web-{start}", grant, gpu=Gpu(profile="3g.40gb")), Phase.RUNNING)
        world.hardware.xid(id, 31, start=0)
        world.hardware.xid(id, 31, start=4)
        await until(lambda: "gpu-fault" in world.codes("instance/web-4"))
        assert [world.codes(f"instance/web-{start}").count("gpu-fault") for start in (0, 4)] == [1, 1]
        assert not any("share the GPU" in event.message for event in world.control.events)
        world.hardware.xid(id, 13)
        await until(lambda: world.codes("instance/web-4").count("gpu-fault") == 2)
        told = [event for event in world.control.events if event.code == "gpu-fault" and "XID 13" in event.message]
        assert {event.subject for event in told} == {"node/n1", "instance/web-0", "instance/web-4"}
        doubt = [event.subject for event in told if "does not say which of those that share the GPU it was" in event.message]
        assert doubt == ["instance/web-0", "instance/web-4"]


@virtual
async def test_a_driver_that_is_changed_under_running_work_is_told_to_it_and_registered(world: World) -> None:
    assert world.hardware is not None
    async with world.agent():
        await world.phase(world.app("web-0", GpuGrant(device=world.ids[0])), Phase.RUNNING)
        world.hardware.driver_change("590.10")
        await until(lambda: "driver-changed" in world.codes("instance/web-0"), timeout_s=100)
        await until(lambda: {device.driver for device in world.control.nodes["n1"].capacity.gpus} == {"590.10"}, timeout_s=100)
        held, free = world.control.nodes["n1"].capacity.gpus
    assert (held.health, free.health) == (GpuHealth.QUARANTINED, GpuHealth.OK)
    assert "from 580.159.04 to 590.10" in held.reason


@virtual
async def test_the_devices_are_looked_at_before_the_end_of_what_held_one_is_told(world: World) -> None:
    assert world.hardware is not None
    async with world.agent():
        await world.phase(world.job("sum-1", GpuGrant(device=world.ids[0])), Phase.RUNNING)
        world.hardware.vanish(world.ids[0], told=False)
        world.host.crash("sum-1")
        await world.phase("sum-1", Phase.FAILED)
        assert not world.control.nodes["n1"].capacity.gpus[0].present


@virtual
async def test_a_driver_that_hangs_stops_nothing_else_and_its_devices_stay_known(world: World) -> None:
    assert world.hardware is not None
    async with world.agent():
        await world.phase(world.app("web-0", GpuGrant(device=world.ids[0])), Phase.RUNNING)
    world.hardware.hang()
    async with world.agent() as agent:
        await until(lambda: "adopted" in world.codes("instance/web-0"), timeout_s=gpus.RECOVER_S + 15)
        listed = {device.id: device for device in world.control.nodes["n1"].capacity.gpus}
        assert listed[world.ids[0]].present, "what runs on it would be replaced if it were not there"
        await until(lambda: not world.control.nodes["n1"].capacity.gpus[0].answers)
        assert "gpu-silent" in world.codes("instance/web-0")
        await world.phase(world.app("web-2", gpu=None), Phase.RUNNING)
        assert agent.runners["web-0"].state.phase is Phase.RUNNING
        world.app("web-3", GpuGrant(device=world.ids[1]))
        await world.phase("web-3", Phase.BACKOFF)
        world.hardware.answer()
        await world.phase("web-3", Phase.RUNNING)


def test_memory_is_an_instance_s_by_its_control_group_and_compute_only_of_a_device_of_its_own() -> None:
    samples = (
        GpuSample(device="GPU-0", busy_milli=900, memory_bytes=9, processes={10: 5, 11: 3, 12: 1}),
        GpuSample(device="GPU-1", busy_milli=500, memory_bytes=7, processes={20: 7}),
        GpuSample(device="GPU-2", busy_milli=100, memory_bytes=4, processes={10: 4}),
    )
    groups = {10: ("atoll", "a"), 11: ("atoll", "b"), 12: ("system.slice",), 20: ("atoll", "a", "inner")}
    owners = owners_of(samples, {"a", "b"}, lambda pid: groups.get(pid, ()))
    assert owners == {10: "a", 11: "b", 20: "a"}
    share = GpuGrant(device="GPU-0", sharing=GpuSharing.TIME_SLICE, milli=500)
    assert usage_of("a", (share, GpuGrant(device="GPU-1")), samples, owners) == (500, 12)
    assert usage_of("b", (share,), samples, owners) == (0, 3)
    assert usage_of("c", (), samples, owners) == (0, 0)
    assert usage_of("a", (share, GpuGrant(device="GPU-3")), samples, owners) is None, (
        "of a device that says nothing, nothing is known"
    )


def test_a_process_s_control_groups_are_read_in_both_versions(tmp_path: Path) -> None:
    for pid, text in ((1, "0::/atoll/web-1\n"), (2, "4:memory:/atoll/web-2\n1:name=systemd:/x/y\n0::/\n")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(text)
    machine = LinuxMachine(tmp_path, proc=tmp_path)
    assert machine.groups(1) == ("atoll", "web-1")
    assert machine.groups(2) == ("atoll", "web-2", "x", "y")
    assert machine.groups(3) == ()


@virtual
async def test_heartbeats_tell_what_devices_do_and_what_instances_use_of_them(world: World) -> None:
    assert world.hardware is not None
    async with world.agent():
        await world.phase(world.app("web-0", GpuGrant(device=world.ids[0])), Phase.RUNNING)
        world.hardware.use(world.ids[0], 4_242, 3 << 30, busy_milli=640)
        world.machine.processes[4_242] = "web-0"
        await world.control.until(lambda c: any(_usage(c, "web-0").gpu_memory_bytes for _ in (0,)))
        used = _usage(world.control, "web-0")
    assert (used.gpu_milli, used.gpu_memory_bytes) == (640, 3 << 30)
    sample = next(sample for sample in world.control.heartbeats[-1].gpus if sample.device == world.ids[0])
    assert (sample.busy_milli, sample.memory_bytes) == (640, 3 << 30)


@virtual
async def test_of_a_silent_driver_a_heartbeat_says_nothing_instead_of_nought(world: World) -> None:
    assert world.hardware is not None
    async with world.agent():
        await world.phase(world.app("web-0", GpuGrant(device=world.ids[0])), Phase.RUNNING)
        await world.control.until(lambda c: c.heartbeats and c.heartbeats[-1].gpus and c.heartbeats[-1].usage)
        assert not _usage(world.control, "web-0").gpu_silent
        world.hardware.hang()
        await world.control.until(lambda c: not c.heartbeats[-1].gpus, timeout_s=60)
        assert _usage(world.control, "web-0").gpu_silent
        world.hardware.answer()
        await world.control.until(lambda c: c.heartbeats[-1].gpus, timeout_s=60)
        assert not _usage(world.control, "web-0").gpu_silent


def _usage(control: FakeControlPlane, id: str) -> Usage:
    newest = control.heartbeats[-1].usage if control.heartbeats else ()
    return next((usage for usage in newest if usage.instance == id), Usage(instance=id))
