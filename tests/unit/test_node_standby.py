"""The agent and instances that stand by: off their devices and frozen, woken by promotion, adopted after a kill."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from control_cell import LoopClock, run_virtual
from faked_agent import running_agent
from msgspec.structs import replace

from atoll.devices.fake import FakeHardware
from atoll.devices.node import NodeDevices
from atoll.model.devices import GpuGrant
from atoll.model.errors import RuntimeFailed
from atoll.model.ports.runtime import Box
from atoll.model.records import Assignment, Instance, OwnerKind, Status
from atoll.model.spec import AppSpec, Gpu, Port, Resources, Restart, RuntimeName
from atoll.model.states import Desired, Phase
from atoll.model.units import Bytes, Seconds, format_bytes
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.node.agent import Agent
from atoll.node.fake import FakeControlPlane, FakeMachine
from atoll.node.record import MemoryRecord
from atoll.runtimes.fake import Behaviour, FakeHost

CLOCK = LoopClock()
GIB = 1 << 30
ID = "web-1"
PID = 4711
"""The process in it that uses the device; its first process has another."""


class World:
    """One machine with a device, its control plane, and an instance that loads 8 GiB of it before it listens."""

    def __init__(self, data: Path, *, gpu: bool = True, model: str = "H100-80GB") -> None:
        self.data = data
        self.gpu = gpu
        self.control = FakeControlPlane()
        self.host = FakeHost(clock=CLOCK, script=self.load)
        self.links = FakeNetworkState()
        self.memory = MemoryRecord()
        self.machine = FakeMachine()
        self.hardware = FakeHardware(model, clock=CLOCK)
        (self.device,) = self.hardware.ids
        self.assignment: Assignment | None = None
        self.pids = {PID: 8 * GIB}
        """Its processes that use the device → how much of it."""

    def agent(self) -> AbstractAsyncContextManager[Agent]:
        return running_agent(
            self.control,
            self.host,
            self.data,
            CLOCK,
            network=FakeNetwork(self.links),
            record=self.memory,
            machine=self.machine,
            devices=NodeDevices([self.hardware], directory=self.data, clock=CLOCK, boot="1") if self.gpu else None,
        )

    def load(self, box: Box) -> Behaviour:
        """It has started, and takes its memory."""
        for pid, used in self.pids.items():
            self.hardware.leave(pid)
            self.hardware.use(self.device, pid, used)
            self.machine.processes[pid] = box.id
        return Behaviour()

    def stand_by(self, memory: int = 16 * GIB) -> None:
        spec = AppSpec(
            name="web",
            image="registry/web",
            command=("serve",),
            ports=(Port(port=80),),
            resources=Resources(gpu=Gpu() if self.gpu else None, memory=Bytes(memory)),
            restart=Restart(delay=Seconds(1)),
        )
        instance = Instance(
            id=ID,
            project="default",
            owner_kind=OwnerKind.APP,
            owner="web",
            node="n1",
            runtime=RuntimeName.RUNC,
            created_at=1.0,
            gpus=(GpuGrant(device=self.device),) if self.gpu else (),
            standby=True,
        )
        self._assign(Assignment(instance=instance, workload=spec, revision=0))

    def promote(self) -> None:
        assert self.assignment is not None
        self._assign(replace(self.assignment, instance=replace(self.assignment.instance, standby=False)))

    def stop(self) -> None:
        assert self.assignment is not None
        self._assign(replace(self.assignment, instance=replace(self.assignment.instance, desired=Desired.STOP)))

    def _assign(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.control.assign(assignment)

    async def until(self, holds: Callable[[Status], bool]) -> Status:
        await self.control.until(lambda c: ID in c.statuses and holds(c.statuses[ID]), timeout_s=600)
        return self.control.statuses[ID]

    async def parked(self) -> Status:
        return await self.until(lambda status: status.parked)

    async def used_bytes(self) -> int:
        (sample,) = await self.hardware.samples()
        return sample.memory_bytes

    @property
    def frozen(self) -> bool:
        return self.host.processes[ID].paused

    def said(self, code: str) -> list[str]:
        return [event.message for event in self.control.events if event.code == code]


Story = Callable[[World], Coroutine[Any, Any, None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., None]:
    """Run a story on time that passes by itself."""

    def run(story: Story, **world: Any) -> None:
        run_virtual(story(World(tmp_path / "agent", **world)))

    return run


def test_it_is_parked_off_its_device_and_serves_with_its_memory_when_promoted(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            world.stand_by()
            status = await world.parked()
            assert (status.phase, status.ready, world.frozen) == (Phase.RUNNING, False, True)
            assert await world.used_bytes() == 0
            assert not any(status.ready for status in world.control.history), "it was never said to serve"
            (words,) = world.said("parked")
            assert words.startswith("parked in ")
            assert words.endswith(f"frozen, {format_bytes(8 * GIB)} of its memory off the device")
            world.promote()
            status = await world.until(lambda status: status.ready)
            assert (status.parked, status.restarts, world.frozen) == (False, 0, False)
            assert await world.used_bytes() == 8 * GIB
            assert world.said("woken")[0].startswith("woken in ")

    play(story)


def test_without_a_device_it_is_frozen_alone(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            world.stand_by()
            await world.parked()
            assert world.frozen
            world.promote()
            await world.until(lambda status: status.ready)
            assert not world.frozen

    play(story, gpu=False)


def test_where_the_driver_cannot_do_it_its_memory_stays_on_the_device_and_that_is_said(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        world.hardware.suspends = False
        async with world.agent():
            world.stand_by()
            await world.parked()
            assert await world.used_bytes() == 8 * GIB
            assert "its memory stays on the device" in world.said("parked")[0]
            world.promote()
            status = await world.until(lambda status: status.ready)
            assert status.restarts == 0

    play(story)


def test_where_its_own_limit_has_no_room_for_its_memory_it_stays_on_the_device(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            world.stand_by(memory=8 * GIB)
            await world.parked()
            assert (world.frozen, await world.used_bytes()) == (True, 8 * GIB)
            assert "do not fit below resources.memory" in world.said("parked")[0]
            world.promote()
            await world.until(lambda status: status.ready)

    play(story)


def test_what_does_not_let_itself_be_taken_off_waits_awake_and_serves_at_once(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        world.hardware.stubborn.add(PID)
        async with world.agent():
            world.stand_by()
            await world.until(lambda status: status.ready)
            assert not world.frozen
            assert await world.used_bytes() == 8 * GIB
            assert len(world.said("park-failed")) == 1
            world.promote()
            await asyncio.sleep(1)
            assert world.control.statuses[ID].ready
            assert ("pause", ID) not in world.host.calls

    play(story)


def test_what_was_stopped_and_did_not_leave_its_device_goes_on_there(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        world.hardware.half_off.add(PID)
        async with world.agent():
            world.stand_by()
            status = await world.until(lambda status: status.ready)
            assert (status.restarts, await world.used_bytes()) == (0, 8 * GIB)

    play(story)


def test_what_can_neither_leave_its_device_nor_go_on_there_is_started_anew(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        world.hardware.failed.add(PID)
        async with world.agent():
            world.stand_by()
            await world.control.until(lambda _: bool(world.said("wake-failed")), timeout_s=60)
            world.hardware.failed.clear()
            assert (await world.parked()).restarts == 1
            assert "nor could it be put back" in world.said("wake-failed")[0]
            assert not any(status.ready for status in world.control.history), "it was never said to serve"

    play(story)


def test_while_the_driver_does_not_say_who_uses_it_nothing_is_frozen_on_its_device(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        async def before(call: str, id: str) -> None:
            if call == "start":
                world.hardware.hang()
                await asyncio.sleep(50)  # until it counts as silent

        world.host.before = before
        async with world.agent():
            world.stand_by()
            await world.until(lambda status: status.ready)
            assert not world.frozen
            assert "does not say who uses its devices" in world.said("park-failed")[0]

    play(story)


def test_of_several_processes_none_stays_off_when_one_refuses(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        world.pids[PID + 1] = GIB
        world.hardware.stubborn.add(PID + 1)
        async with world.agent():
            world.stand_by()
            await world.until(lambda status: status.ready)
            assert await world.used_bytes() == 9 * GIB

    play(story)


def test_what_cannot_be_frozen_comes_back_to_its_device(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        async def before(call: str, id: str) -> None:
            if call == "pause":
                raise RuntimeFailed("it did not pause")

        world.host.before = before
        async with world.agent():
            world.stand_by()
            await world.until(lambda status: status.ready)
            assert await world.used_bytes() == 8 * GIB
            assert "it could not be frozen: it did not pause" in world.said("park-failed")[0]

    play(story)


def test_without_free_memory_on_the_device_it_is_started_anew_and_says_why(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            world.stand_by()
            await world.parked()
            world.hardware.use(world.device, 1, 79 * GIB)  # a stranger's
            world.promote()
            status = await world.until(lambda status: status.ready)
            assert status.restarts == 1
            assert world.said("wake-failed") == [f"could not be woken: cannot put process {PID} back: out of memory"]

    play(story)


def test_a_parked_one_that_is_told_to_stop_is_gone_at_once(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            world.stand_by()
            await world.parked()
            began = CLOCK.monotonic()
            world.stop()
            await world.until(lambda status: status.phase is Phase.STOPPED)
            assert CLOCK.monotonic() - began < 1

    play(story)


@pytest.mark.parametrize("state", ["parked", "promoted meanwhile"])
def test_a_new_agent_leaves_what_is_parked_and_wakes_what_is_wanted(play: Callable[..., None], state: str) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            world.stand_by()
            await world.parked()
        if state != "parked":
            world.promote()
        async with world.agent() as agent:
            if state == "parked":
                await asyncio.sleep(10)
                assert agent.runners[ID].state.phase is Phase.RUNNING
                assert world.frozen
                assert await world.used_bytes() == 0
                world.promote()
            status = await world.until(lambda status: status.ready)
            assert (status.restarts, world.frozen) == (0, False)
            assert await world.used_bytes() == 8 * GIB

    play(story)


@pytest.mark.parametrize("call", ["suspend", "pause", "resume"])
def test_an_agent_that_dies_while_it_parks_or_wakes_is_followed_by_one_that_finishes_it(
    play: Callable[..., None], call: str
) -> None:
    async def story(world: World) -> None:
        reached, hangs = asyncio.Event(), True

        async def before(name: str, id: str) -> None:
            if hangs and name == call:
                reached.set()
                await asyncio.Event().wait()

        world.host.before = before
        async with world.agent():
            if call == "suspend":
                world.hardware.hang_suspends(reached)
            world.stand_by()
            if call == "resume":
                await world.parked()
                world.promote()
            await reached.wait()
        hangs = False
        world.hardware.hang_suspends(None)
        async with world.agent():
            if call != "resume":
                await world.parked()
                assert await world.used_bytes() == 0
                world.promote()
            status = await world.until(lambda status: status.ready)
            assert (status.restarts, world.frozen) == (0, False)
            assert await world.used_bytes() == 8 * GIB

    play(story)


def test_one_that_crashes_while_parked_is_started_and_parked_again(play: Callable[..., None]) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            world.stand_by()
            await world.parked()
            world.hardware.leave(PID)
            world.host.crash(ID, signal="SIGKILL")
            await world.until(lambda status: status.phase is Phase.BACKOFF)
            status = await world.parked()
            assert status.restarts == 1
            assert await world.used_bytes() == 0

    play(story)
