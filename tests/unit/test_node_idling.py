"""A sandbox's idle limit and its standing still, over the agent on fakes and time that passes by itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from control_cell import LoopClock, run_virtual
from faked_agent import running_agent
from msgspec.structs import replace

from atoll.model.ports.control_plane import Channel, StreamKind, StreamRequest
from atoll.model.records import Assignment, Instance, OwnerKind, Status
from atoll.model.spec import JobSpec, RuntimeName
from atoll.model.states import Phase
from atoll.model.streams import Kind, pack, unpack
from atoll.model.units import Seconds
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.node.agent import Agent
from atoll.node.attend import WARM_S
from atoll.node.fake import FakeControlPlane
from atoll.node.holding import SNAPSHOT_BYTES_PER_S_MIN, SNAPSHOT_S
from atoll.node.record import MemoryRecord
from atoll.runtimes.fake import FakeHost
from atoll.sim import loop

ID = "try-1"
LIMIT_S = 600.0
CLOCK = LoopClock()


class World:
    def __init__(self, data: Path) -> None:
        self.data = data
        self.control = FakeControlPlane()
        self.host = FakeHost(clock=CLOCK)
        self.links = FakeNetworkState()
        self.memory = MemoryRecord()

    def agent(self) -> AbstractAsyncContextManager[Agent]:
        return running_agent(self.control, self.host, self.data, CLOCK, network=FakeNetwork(self.links), record=self.memory)

    async def sandbox(self, *, standby: bool = False, pool: int | None = None, limit_s: float | None = LIMIT_S) -> Assignment:
        """Have one run."""
        instance = Instance(
            id=ID,
            project="default",
            owner_kind=OwnerKind.JOB,
            owner="tools" if pool else "try",
            node="n1",
            runtime=RuntimeName.RUNC,
            created_at=1.0,
            standby=standby,
        )
        limit = Seconds(limit_s) if limit_s is not None else None
        spec = JobSpec(name=instance.owner, image="registry/tools", sandbox=True, command=("serve",), idle_limit=limit, pool=pool)
        assignment = Assignment(instance=instance, workload=spec, revision=0)
        self.control.assign(assignment)
        await self.until(lambda status: status.phase is Phase.RUNNING and status.ready)
        return assignment

    async def until(self, holds: Callable[[Status], bool]) -> Status:
        await self.control.until(lambda c: ID in c.statuses and holds(c.statuses[ID]), timeout_s=10_000)
        return self.control.statuses[ID]

    async def ended_after_s(self) -> float:
        """Wait for its end, and return how long that took."""
        began = CLOCK.monotonic()
        status = await self.until(lambda status: status.phase is Phase.FAILED)
        assert status.message == "nobody used it for 10m00s, its idle limit"
        assert "idle" in self.control.codes(ID)
        return CLOCK.monotonic() - began

    def open(self, kind: str, **options: object) -> Channel:
        return self.control.request(StreamRequest(f"s{random.random()}", kind, ID, dict(options)))

    @property
    def phase(self) -> Phase:
        return self.control.statuses[ID].phase


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    def run(story: Callable[[World], Awaitable[None]]) -> None:
        async def main() -> None:
            await story(World(tmp_path / "agent"))

        run_virtual(main())

    return run


Play = Callable[[Callable[[World], Awaitable[None]]], None]


def test_a_sandbox_that_nobody_uses_is_ended_at_its_limit_with_that_reason(play: Play) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            await world.sandbox()
            assert LIMIT_S - 5 <= await world.ended_after_s() <= LIMIT_S + 60

    play(story)


def test_without_a_limit_it_may_be_idle_for_ever(play: Play) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            await world.sandbox(limit_s=None)
            await asyncio.sleep(10 * LIMIT_S)
            assert world.phase is Phase.RUNNING

    play(story)


def test_a_command_holds_it_for_as_long_as_it_runs_and_the_limit_counts_from_its_end(play: Play) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            await world.sandbox()
            command = world.open(StreamKind.EXEC, argv=["cat"])
            await asyncio.sleep(5 * LIMIT_S)
            other = world.open(StreamKind.EXEC, argv=["echo", "beside"])
            while await other.receive() is not None:
                pass
            await asyncio.sleep(2 * LIMIT_S)
            assert world.phase is Phase.RUNNING
            await command.send(pack(Kind.STDIN_END))
            while await command.receive() is not None:
                pass
            assert LIMIT_S - 5 <= await world.ended_after_s() <= LIMIT_S + 60

    play(story)


def test_reading_its_log_is_no_use_of_it(play: Play) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            await world.sandbox()
            log = world.open(StreamKind.LOGS, follow=True)
            assert LIMIT_S - 5 <= await world.ended_after_s() <= LIMIT_S + 60
            await log.close()

    play(story)


def test_the_next_agent_goes_on_counting(play: Play) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            await world.sandbox()
            await asyncio.sleep(LIMIT_S / 2)
        await asyncio.sleep(LIMIT_S / 4)
        async with world.agent():
            assert await world.ended_after_s() <= LIMIT_S / 4 + 60

    play(story)


def test_what_was_in_use_when_an_agent_died_is_idle_from_the_next_one_on(play: Play) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            await world.sandbox()
            world.open(StreamKind.EXEC, argv=["cat"])
            await asyncio.sleep(3 * LIMIT_S)
            assert world.phase is Phase.RUNNING
        async with world.agent():
            assert LIMIT_S - 5 <= await world.ended_after_s() <= LIMIT_S + 60

    play(story)


def test_one_that_stands_still_is_shown_so_by_the_next_agent_too_and_is_ended_at_the_limit(play: Play) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            await world.sandbox()
            await world.open(StreamKind.PAUSE).receive()
            await world.until(lambda status: status.paused)
        async with world.agent() as agent:
            await asyncio.sleep(5)
            assert agent.runners[ID].paused
            assert world.control.statuses[ID].paused
            assert await world.ended_after_s() <= LIMIT_S + 60
            assert not world.control.statuses[ID].paused

    play(story)


def test_uses_are_not_reported_to_the_control_plane(play: Play) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            await world.sandbox()
            said = len(world.control.history)
            for _ in range(5):
                command = world.open(StreamKind.EXEC, argv=["echo"])
                while await command.receive() is not None:
                    pass
                await asyncio.sleep(3)
            assert len(world.control.history) == said

    play(story)


def test_one_of_a_pool_waits_awake_and_without_a_limit_until_it_is_taken(play: Play) -> None:
    async def story(world: World) -> None:
        async with world.agent() as agent:
            waiting = await world.sandbox(standby=True, pool=1)
            await asyncio.sleep(5 * LIMIT_S)
            status = world.control.statuses[ID]
            assert (status.phase, status.ready, status.parked) == (Phase.RUNNING, True, False)
            spec = waiting.workload
            assert isinstance(spec, JobSpec)
            instance = replace(waiting.instance, owner="mine", standby=False, taken_at=5.0)
            world.control.assign(Assignment(instance=instance, workload=replace(spec, name="mine", pool=None), revision=0))
            assert LIMIT_S - 5 <= await world.ended_after_s() <= LIMIT_S + 60
            assert agent.runners[ID].assignment.instance.owner == "mine"

    play(story)


def test_one_that_was_taken_keeps_its_limit_when_the_agent_is_another(play: Play) -> None:
    async def story(world: World) -> None:
        async with world.agent():
            waiting = await world.sandbox(standby=True, pool=1)
            spec = waiting.workload
            assert isinstance(spec, JobSpec)
            instance = replace(waiting.instance, owner="mine", standby=False, taken_at=5.0)
            world.control.assign(Assignment(instance=instance, workload=replace(spec, name="mine", pool=None), revision=0))
            await asyncio.sleep(5)
        assert world.memory.load()[0].assignment.instance.owner == "mine"
        async with world.agent():
            assert await world.ended_after_s() <= LIMIT_S + 60

    play(story)


def test_one_of_a_pool_is_ready_once_its_first_command_has_ended_also_by_the_next_agent(play: Play) -> None:
    async def story(world: World) -> None:
        slow_s, commands = 10.0, 0

        async def before(call: str, id: str) -> None:
            nonlocal commands
            if call == "exec":
                commands += 1
                await asyncio.sleep(slow_s)

        world.host.before = before
        async with world.agent():
            making = asyncio.create_task(world.sandbox(standby=True, pool=1))
            await world.until(lambda status: status.phase is Phase.RUNNING)
            await asyncio.sleep(8)
            assert commands == 1
            assert not world.control.statuses[ID].ready
        async with world.agent():  # which finds it running, and not ready
            await asyncio.sleep(8)
            assert commands == 2
            assert not world.control.statuses[ID].ready
            await making
        async with world.agent():
            await asyncio.sleep(30)
            assert commands == 2
            assert world.control.statuses[ID].ready

    play(story)


def test_one_of_a_pool_in_which_no_command_ends_is_ready_all_the_same_after_a_bound(play: Play) -> None:
    async def story(world: World) -> None:
        async def before(call: str, id: str) -> None:
            if call == "exec":
                await asyncio.Event().wait()

        world.host.before = before
        async with world.agent():
            making = asyncio.create_task(world.sandbox(standby=True, pool=1))
            await asyncio.sleep(WARM_S - 1)
            assert not world.control.statuses[ID].ready
            await making
            assert world.phase is Phase.RUNNING

    play(story)


def test_one_of_a_pool_has_run_a_command_before_it_is_taken_and_no_other_has(play: Play) -> None:
    async def story(world: World) -> None:
        calls: list[str] = []

        async def before(call: str, id: str) -> None:
            calls.append(call)

        world.host.before = before
        async with world.agent():
            await world.sandbox(standby=True, pool=1)
            await asyncio.sleep(1)
            assert calls.count("exec") == 1
            assert world.phase is Phase.RUNNING
            world.control.remove(ID)
            await asyncio.sleep(30)
            await world.sandbox()
            await asyncio.sleep(1)
            assert calls.count("exec") == 1

    play(story)


def test_a_snapshot_may_take_longer_the_more_there_is_to_write_and_not_for_ever(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path / "agent")
        async with world.agent():
            resources = (await world.sandbox(limit_s=None)).workload.resources
            whole_s = (int(resources.memory) + int(resources.disk)) / SNAPSHOT_BYTES_PER_S_MIN
            assert whole_s > 1
            kinds = []
            for took_s in (SNAPSHOT_S + whole_s - 1, SNAPSHOT_S + whole_s + 1):
                world.host.before = slow_snapshot(took_s)
                message = await world.open(StreamKind.SNAPSHOT).receive()
                assert message is not None
                kinds.append(unpack(message)[0])
            assert kinds == [Kind.DATA, Kind.ERROR]

    loop.run_virtual(story, random.Random(1))  # it has threads, whose work is done at once there


def slow_snapshot(took_s: float) -> Callable[[str, str], Awaitable[None]]:
    async def before(call: str, id: str) -> None:
        if call == "snapshot":
            await asyncio.sleep(took_s)

    return before
