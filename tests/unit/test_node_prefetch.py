"""Images fetched for later, on fakes and a virtual clock: what is fetched when, what is kept, and what never gets in the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from control_cell import LoopClock, run_virtual

from atoll.images.fake import FakeImages
from atoll.model import codec
from atoll.model.errors import ImageError
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.control_plane import AssignmentBatch
from atoll.model.records import Assignment, Instance, OwnerKind
from atoll.model.spec import AppSpec, RuntimeName
from atoll.model.states import Phase
from atoll.network.fake import FakeNetwork
from atoll.node.agent import Agent
from atoll.node.fake import FakeControlPlane, FakeMachine, FakeProber, MemoryLogs
from atoll.node.prefetch import AGAIN_S, FAILED_MAX_S, KEPT_S, PREFETCH_BELOW, Prefetch
from atoll.node.record import SqliteRecord
from atoll.node.report import Reporter
from atoll.runtimes.fake import FakeHost, FakeRuntime


def reference(name: str) -> str:
    return f"cell.internal/default/{name}@sha256:" + name[0] * 64


A, B, C = (reference(name) for name in ("aa", "bb", "cc"))


class Place:
    """One node's prefetching, by itself."""

    def __init__(self) -> None:
        self.clock = LoopClock()
        self.images = FakeImages(delay_s=10.0)
        self.machine = FakeMachine()
        self.control = FakeControlPlane()
        self.busy = False
        self.reporter = Reporter("n1", self.control, self.clock, random.Random(1))
        self.prefetch = Prefetch("n1", self.images, self.machine, self.clock, self.reporter, lambda: self.busy)

    @property
    def codes(self) -> list[str]:
        return [event.code for event in self.control.events]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Prefetch]:
        tasks = [asyncio.create_task(self.prefetch.run()), asyncio.create_task(self.reporter.run())]
        try:
            yield self.prefetch
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def has(self, name: str) -> bool:
        return await self.images.find(name) is not None


def test_images_are_fetched_one_at_a_time_the_likeliest_first_and_none_that_is_here() -> None:
    async def main() -> None:
        place = Place()
        place.images.add(C, ready=True)
        async with place.running() as prefetch:
            prefetch.want((A, C, B))
            await asyncio.sleep(5)
            assert place.images.pulls == [A]
            assert prefetch.fetching.startswith(A)
            await asyncio.sleep(10)
            assert place.images.pulls == [A, B]
            await asyncio.sleep(10)
            assert await place.has(A)
            assert await place.has(B)
            assert place.images.pulls == [A, B]
            assert prefetch.fetching == ""

    run_virtual(main())


def test_what_is_prepared_comes_first_and_the_fetch_goes_on_afterwards() -> None:
    async def main() -> None:
        place = Place()
        async with place.running() as prefetch:
            prefetch.want((A, B))
            await asyncio.sleep(2)
            assert prefetch.fetching
            place.busy = True
            await asyncio.sleep(0.5)
            assert prefetch.fetching == ""
            await asyncio.sleep(100)
            assert not await place.has(B)
            place.busy = False
            await asyncio.sleep(25)
            assert await place.has(A)
            assert await place.has(B)
            assert place.codes == []

    run_virtual(main())


def test_what_is_not_wanted_any_more_is_given_up_at_once() -> None:
    async def main() -> None:
        place = Place()
        async with place.running() as prefetch:
            prefetch.want((A,))
            await asyncio.sleep(2)
            prefetch.want((B,))
            await asyncio.sleep(0.5)
            assert prefetch.fetching.startswith(B)
            assert place.images.pulls == [A, B]

    run_virtual(main())


def test_nothing_is_fetched_onto_a_disk_that_is_too_full_or_would_become_so() -> None:
    async def main() -> None:
        place = Place()
        async with place.running() as prefetch:
            place.machine.disk_used_fraction = PREFETCH_BELOW
            prefetch.want((A,))
            await asyncio.sleep(2)
            assert place.images.pulls == []
            place.machine.disk_used_fraction = PREFETCH_BELOW - 0.0001  # less left than a fake image has
            await asyncio.sleep(AGAIN_S)
            assert place.images.pulls == [A]
            assert prefetch.fetching == ""
            assert place.codes == ["prefetch-failed"]
            place.machine.disk_used_fraction = 0.1
            await asyncio.sleep(AGAIN_S)
            assert await place.has(A)

    run_virtual(main())


def test_a_failure_is_said_once_and_tried_again_with_growing_waits_while_others_are_fetched() -> None:
    async def main() -> None:
        place = Place()
        place.images.fail(A, ImageError("refused"), times=1_000)
        async with place.running() as prefetch:
            prefetch.want((A, B))
            await asyncio.sleep(25)
            assert await place.has(B)
            await asyncio.sleep(6 * FAILED_MAX_S)
            assert place.codes == ["prefetch-failed"]
            assert "refused" in place.control.events[0].message
            assert place.control.events[0].subject == "node/n1"
            # Seven waits double from 30 s to over an hour; then there is one try an hour.
            assert 8 <= place.images.pulls.count(A) <= 14

    run_virtual(main())


def test_what_is_here_for_later_is_kept_for_a_bounded_time_and_no_longer_than_it_is_wanted() -> None:
    async def main() -> None:
        place = Place()
        async with place.running() as prefetch:
            prefetch.want((A, B))
            await asyncio.sleep(25)
            assert prefetch.kept == {A.partition("@")[2], B.partition("@")[2]}
            prefetch.want((A,))
            assert prefetch.kept == {A.partition("@")[2]}
            await asyncio.sleep(KEPT_S)
            assert prefetch.kept == set()

    run_virtual(main())


def test_what_was_collected_all_the_same_is_fetched_again() -> None:
    async def main() -> None:
        place = Place()
        async with place.running() as prefetch:
            prefetch.want((A,))
            await asyncio.sleep(15)
            await place.images.collect([])
            await asyncio.sleep(AGAIN_S + 15)
            assert await place.has(A)
            assert place.images.pulls == [A, A]

    run_virtual(main())


# --- as a part of the agent


class Node:
    def __init__(self, data: Path) -> None:
        self.data = data
        self.control = FakeControlPlane()
        self.images = FakeImages()

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[Agent]:
        agent = Agent(
            node="n1",
            control=self.control,
            runtimes=[FakeRuntime(FakeHost())],
            images=self.images,
            network=FakeNetwork(),
            clock=SystemClock(),
            random=random.Random(1),
            data=self.data,
            record=SqliteRecord(self.data / "record.db"),
            logs=MemoryLogs(),
            prober=FakeProber(),
            machine=FakeMachine(),
        )
        task = asyncio.create_task(agent.run())
        try:
            yield agent
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "agent")


async def until_here(node: Node, name: str) -> None:
    async with asyncio.timeout(10):
        while await node.images.find(name) is None:  # noqa: ASYNC110 - nothing tells of a pull's end
            await asyncio.sleep(0.01)


async def test_what_is_told_when_the_agent_comes_and_what_is_told_later_is_there_before_a_start_needs_it(node: Node) -> None:
    node.control.prefetch(A)
    async with node.agent():
        await until_here(node, A)
        node.control.prefetch(A, B)
        await until_here(node, B)
        instance = Instance(
            id="web-1",
            project="default",
            owner_kind=OwnerKind.APP,
            owner="web",
            node="n1",
            runtime=RuntimeName.RUNC,
            created_at=1.0,
            release=1,
        )
        node.control.assign(Assignment(instance=instance, workload=AppSpec(name="web", image=B), revision=0))
        await node.control.until(lambda c: "web-1" in c.statuses and c.statuses["web-1"].phase is Phase.RUNNING)
    assert node.images.pulls == [A, B]


async def test_heartbeats_say_which_images_are_here(node: Node) -> None:
    node.images.add(A, ready=True)
    async with node.agent():
        await node.control.until(lambda c: c.heartbeats)
    assert node.control.heartbeats[-1].images == (A.partition("@")[2],)


def test_a_server_or_an_agent_of_an_older_version_is_understood() -> None:
    assert codec.decode(b'{"revision":1,"complete":true}', AssignmentBatch).prefetch is None
    assert codec.decode(b'{"revision":1,"complete":true,"prefetch":["x"],"of-later":1}', AssignmentBatch).prefetch == ("x",)
