"""A node that is cut off: what must not run twice is stopped in time, across restarts of the agent; all else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from control_cell import LoopClock, run_virtual
from faked_agent import running_agent

from atoll.model.records import Assignment, Instance, OwnerKind
from atoll.model.spec import AppSpec, Lost, Restart, RuntimeName, Stop
from atoll.model.units import Seconds
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.node.agent import Agent
from atoll.node.contact import Contact
from atoll.node.fake import FakeControlPlane, MemoryLogs
from atoll.node.record import MemoryRecord
from atoll.runtimes.fake import FakeHost

LIMIT_S = 30.0


class Machine:
    def __init__(self, data: Path) -> None:
        self.data = data
        self.clock = LoopClock()
        self.control = FakeControlPlane()
        self.host = FakeHost(clock=self.clock)
        self.links = FakeNetworkState()
        self.record = MemoryRecord()

    def agent(self) -> AbstractAsyncContextManager[Agent]:
        return running_agent(
            self.control,
            self.host,
            self.data,
            self.clock,
            network=FakeNetwork(self.links),
            record=self.record,
            logs=MemoryLogs(self.data),
        )

    async def assign_both(self) -> None:
        for id, lost in (("once", Lost(stop_after_disconnect=Seconds(LIMIT_S))), ("any", Lost())):
            spec = AppSpec(name=id, image="x", command=("serve",), lost=lost, stop=Stop(grace=Seconds(1)), restart=Restart())
            instance = Instance(
                id=id,
                project="default",
                owner_kind=OwnerKind.APP,
                owner=id,
                release=1,
                node="n1",
                runtime=RuntimeName.RUNC,
                created_at=self.clock.now(),
            )
            self.control.assign(Assignment(instance=instance, workload=spec, revision=0))
        await asyncio.sleep(2)
        assert self.running() == {"once", "any"}

    def running(self) -> set[str]:
        return set(self.host.running())


def on_machine(data: Path, test: Callable[[Machine], Awaitable[None]]) -> None:
    async def main() -> None:
        await test(Machine(data))

    run_virtual(main())


def test_only_what_must_not_run_twice_is_stopped_and_that_in_time(tmp_path: Path) -> None:
    async def test(machine: Machine) -> None:
        async with machine.agent():
            await machine.assign_both()
            await asyncio.sleep(120)
            assert machine.running() == {"once", "any"}, "who is heard keeps everything"
            machine.control.cut()
            await asyncio.sleep(LIMIT_S - 7)
            assert machine.running() == {"once", "any"}
            await asyncio.sleep(9)
            assert machine.running() == {"any"}
            machine.control.heal()
            await asyncio.sleep(30)
            assert "stopped-cut-off" in machine.control.codes("once")
            assert machine.control.phases("once")[-1] == "stopped", "and it is told, so that another is made"
            assert machine.running() == {"any"}

    on_machine(tmp_path, test)


def test_an_agent_that_starts_anew_counts_from_when_the_one_before_was_heard(tmp_path: Path) -> None:
    async def test(machine: Machine) -> None:
        async with machine.agent():
            await machine.assign_both()
            machine.control.cut()
            await asyncio.sleep(LIMIT_S - 10)
        async with machine.agent():
            await asyncio.sleep(1)
            assert machine.running() == {"once", "any"}, "it adopts what may still run"
            await asyncio.sleep(12)
            assert machine.running() == {"any"}

    on_machine(tmp_path, test)


def test_an_agent_that_does_not_know_when_it_was_heard_last_ends_what_must_not_run_twice(tmp_path: Path) -> None:
    async def test(machine: Machine) -> None:
        async with machine.agent():
            await machine.assign_both()
            machine.control.cut()
            await asyncio.sleep(1)
        (tmp_path / "contact").write_text("another-boot 1.0\n")
        async with machine.agent():
            await asyncio.sleep(3)
            assert machine.running() == {"any"}

    on_machine(tmp_path, test)


@pytest.mark.parametrize("text", ["", "x", "this-boot", "this-boot nan?", "this-boot 99.0", "other 1.0"])
def test_a_contact_that_cannot_be_or_cannot_be_read_counts_as_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "contact"
    file.write_text(text)
    contact = Contact(file, boot_id="this-boot")
    contact.load(50.0)
    assert contact.at is None
    assert contact.cut_off_s(50.0) == float("inf")


def test_contact_outlives_the_agent_and_only_grows(tmp_path: Path) -> None:
    contact = Contact(tmp_path / "contact", boot_id="this-boot")
    contact.prove(40.0)
    contact.prove(30.0)
    contact.save()
    later = Contact(tmp_path / "contact", boot_id="this-boot")
    later.load(50.0)
    assert later.cut_off_s(50.0) == pytest.approx(10.0)
