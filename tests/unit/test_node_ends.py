"""What has ended and was told so is never started again by a later agent, and what crashed is, control plane or not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from control_cell import LoopClock, run_virtual
from faked_agent import running_agent

from atoll.model.errors import Unavailable
from atoll.model.records import Assignment, Instance, OwnerKind
from atoll.model.spec import AppSpec, JobSpec, Restart, RuntimeName, Stop, Workload
from atoll.model.states import Desired, Phase
from atoll.model.units import Seconds
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.node.agent import Agent
from atoll.node.decide import HOLD_S
from atoll.node.fake import FakeControlPlane, MemoryLogs
from atoll.node.record import Entry, MemoryRecord
from atoll.node.runner import RECORD_RETRY_S
from atoll.node.transitions import State
from atoll.runtimes.fake import FakeHost


class FullableRecord(MemoryRecord):
    """A record on a disk that is full while `full`."""

    full = False

    def put_assignment(self, assignment: Assignment) -> None:
        self._check()
        super().put_assignment(assignment)

    def put_state(self, id: str, state: State) -> None:
        self._check()
        super().put_state(id, state)

    def remove(self, id: str) -> None:
        self._check()
        super().remove(id)

    def _check(self) -> None:
        if self.full:
            raise Unavailable("cannot write the agent's record: the disk is full", mend="free some disk space")


class Machine:
    def __init__(self, data: Path) -> None:
        self.data = data
        self.clock = LoopClock()
        self.control = FakeControlPlane()
        self.host = FakeHost(clock=self.clock)
        self.links = FakeNetworkState()
        self.record = FullableRecord()

    def agent(self) -> AbstractAsyncContextManager[Agent]:
        network, logs = FakeNetwork(self.links), MemoryLogs(self.data)
        return running_agent(self.control, self.host, self.data, self.clock, network=network, record=self.record, logs=logs)

    async def assign(self, workload: Workload) -> None:
        kind = OwnerKind.APP if isinstance(workload, AppSpec) else OwnerKind.JOB
        instance = Instance(
            id=workload.name,
            project="default",
            owner_kind=kind,
            owner=workload.name,
            node="n1",
            runtime=RuntimeName.RUNC,
            created_at=self.clock.now(),
        )
        self.control.assign(Assignment(instance=instance, workload=workload, revision=0))
        await asyncio.sleep(1)
        assert self.host.running() == [workload.name]

    def starts(self, id: str) -> int:
        return self.host.calls.count(("start", id))

    def lose_power(self, entries: dict[str, Entry]) -> None:
        """Lose every process, and of the record all that came after `entries`."""
        self.host.crash_all()
        self.host.processes.clear()
        self.links.links.clear()
        self.record.entries = entries


def app(*command: str) -> AppSpec:
    return AppSpec(name="web", image="x", command=command or ("serve",), stop=Stop(grace=Seconds(1)), restart=Restart())


def on_machine(data: Path, test: Callable[[Machine], Awaitable[None]]) -> None:
    async def main() -> None:
        await test(Machine(data))

    run_virtual(main())


def test_an_end_is_told_only_once_it_is_on_the_disk(tmp_path: Path) -> None:
    async def test(machine: Machine) -> None:
        async with machine.agent() as agent:
            await machine.assign(app())
            machine.record.full = True
            machine.control.want("web", Desired.STOP)
            await asyncio.sleep(10 * RECORD_RETRY_S)
            assert agent.runners["web"].state.phase is Phase.STOPPED, "a full disk does not keep it from ending"
            assert machine.host.processes == {}
            assert machine.control.statuses["web"].phase is Phase.STOPPING
            machine.control.cut()
            machine.control.heal()
            await asyncio.sleep(10)
            assert machine.control.statuses["web"].phase is Phase.STOPPING, "who asks anew is told no more than who asked before"
            machine.record.full = False
            await asyncio.sleep(2 * RECORD_RETRY_S)
            assert machine.control.statuses["web"].phase is Phase.STOPPED
            assert machine.record.entries["web"].state.phase is Phase.STOPPED

    on_machine(tmp_path, test)


def test_what_ended_while_the_disk_was_full_is_not_started_by_the_next_agent(tmp_path: Path) -> None:
    """The smallest case of the simulator's seeds 827 and 919."""

    async def test(machine: Machine) -> None:
        async with machine.agent():
            await machine.assign(app())
            machine.record.full = True
            machine.control.want("web", Desired.STOP)
            await asyncio.sleep(5)
        assert machine.record.entries["web"].state.phase is Phase.RUNNING, "the next agent cannot know"
        assert machine.control.statuses["web"].phase is Phase.STOPPING, "and nobody else has been told"
        machine.control.cut()
        async with machine.agent():
            await asyncio.sleep(HOLD_S - 2)
            machine.control.heal()
            await asyncio.sleep(2 * HOLD_S)
            machine.record.full = False
            await asyncio.sleep(2 * RECORD_RETRY_S)
            assert machine.control.statuses["web"].phase is Phase.STOPPED
            assert machine.starts("web") == 1

    on_machine(tmp_path, test)


def test_what_was_told_and_then_forgotten_with_the_power_is_not_done_again_once_the_control_plane_is_heard(tmp_path: Path) -> None:
    async def test(machine: Machine) -> None:
        async with machine.agent():
            spec = JobSpec(name="sum", image="x", command=("exit", "0", "2"))
            machine.record.entries = {}
            await machine.assign(spec)
            preparing = {"sum": Entry(machine.record.entries["sum"].assignment, State(phase=Phase.PREPARING))}
            await asyncio.sleep(5)
            assert machine.control.statuses["sum"].phase is Phase.SUCCEEDED
        machine.lose_power(preparing)
        del machine.control.assigned["sum"]  # what has ended for good is not handed out again
        machine.control.cut()
        async with machine.agent():
            await asyncio.sleep(HOLD_S - 1)
            assert machine.starts("sum") == 1
            machine.control.heal()
            await asyncio.sleep(2 * HOLD_S)
            assert machine.starts("sum") == 1
            assert machine.record.entries == {}

    on_machine(tmp_path, test)


def test_after_a_loss_of_power_a_node_that_is_cut_off_starts_its_work_again_after_a_bounded_wait(tmp_path: Path) -> None:
    async def test(machine: Machine) -> None:
        async with machine.agent():
            await machine.assign(app())
        machine.lose_power(machine.record.entries)
        machine.control.cut()
        async with machine.agent():
            await asyncio.sleep(HOLD_S - 1)
            assert machine.host.running() == []
            await asyncio.sleep(2)
            assert machine.host.running() == ["web"]
            machine.host.crash("web")
            await asyncio.sleep(2)
            assert machine.host.running() == ["web"], "from then on nothing waits for anybody"

    on_machine(tmp_path, test)


def test_after_a_loss_of_power_a_node_that_is_heard_starts_its_work_at_once(tmp_path: Path) -> None:
    async def test(machine: Machine) -> None:
        async with machine.agent():
            await machine.assign(app())
        machine.lose_power(machine.record.entries)
        async with machine.agent():
            await asyncio.sleep(2)
            assert machine.host.running() == ["web"]

    on_machine(tmp_path, test)


def test_a_crash_that_no_agent_has_seen_is_mended_at_once_control_plane_or_not(tmp_path: Path) -> None:
    async def test(machine: Machine) -> None:
        async with machine.agent():
            await machine.assign(app())
        machine.control.cut()
        machine.host.crash("web")
        async with machine.agent():
            await asyncio.sleep(2)
            assert machine.host.running() == ["web"]

    on_machine(tmp_path, test)
