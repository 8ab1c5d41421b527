"""Streams that wait before anybody wants one: kept by an agent with sandboxes, given away by the server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from atoll.api.service.tunnels import SPARES_MAX, Tunnels
from atoll.images.fake import FakeImages
from atoll.model import codec
from atoll.model.errors import DeadlineExceeded, Exhausted, Unavailable
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.control_plane import TAKEN, Channel, StreamKind, StreamRequest
from atoll.model.records import Assignment, Instance, OwnerKind
from atoll.model.spec import AppSpec, JobSpec, RuntimeName
from atoll.model.states import Phase
from atoll.model.streams import Kind, unpack
from atoll.network.fake import FakeNetwork
from atoll.node.agent import Agent
from atoll.node.fake import FakeControlPlane, FakeMachine, FakeProber, MemoryLogs
from atoll.node.record import MemoryRecord
from atoll.node.spares import SPARES, Spares
from atoll.runtimes.fake import FakeRuntime


@asynccontextmanager
async def agent(control: FakeControlPlane, data: Path) -> AsyncIterator[None]:
    made = Agent(
        node="n1",
        control=control,
        runtimes=[FakeRuntime()],
        images=FakeImages(),
        network=FakeNetwork(),
        clock=SystemClock(),
        random=random.Random(1),
        data=data,
        record=MemoryRecord(),
        logs=MemoryLogs(),
        prober=FakeProber(),
        machine=FakeMachine(),
    )
    task = asyncio.create_task(made.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def run(control: FakeControlPlane, id: str, workload: AppSpec | JobSpec) -> None:
    kind = OwnerKind.JOB if isinstance(workload, JobSpec) else OwnerKind.APP
    instance = Instance(id=id, project="default", owner_kind=kind, owner=workload.name, runtime=RuntimeName.RUNC, created_at=1.0)
    control.assign(Assignment(instance=instance, workload=workload, revision=1))
    await control.until(lambda c: (status := c.statuses.get(id)) and status.phase is Phase.RUNNING)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.005)


async def left(channel: Channel) -> list[tuple[Kind, bytes]]:
    found = []
    async with asyncio.timeout(10):
        while (message := await channel.receive()) is not None:
            found.append(unpack(message))
    return found


TOOLS = JobSpec(name="try", image="tools", sandbox=True, command=("serve",))
ECHO = StreamRequest("s1", StreamKind.EXEC, "try-1", {"argv": ["echo", "here"]})


async def test_a_node_with_a_sandbox_keeps_streams_that_wait_and_one_that_is_taken_is_followed_by_another(
    tmp_path: Path,
) -> None:
    control = FakeControlPlane()
    async with agent(control, tmp_path):
        await run(control, "try-1", TOOLS)
        await until(lambda: len(control.spares) == SPARES)
        await control.spares[0].send(codec.encode(ECHO))
        assert await control.spares[0].receive() == TAKEN
        assert await left(control.spares[0]) == [(Kind.STDOUT, b"here\n"), (Kind.EXIT, b"0")]
        await until(lambda: len(control.spares) == SPARES + 1)
        asked = control.request(ECHO)  # by the tunnel, as ever
        assert (await left(asked))[-1] == (Kind.EXIT, b"0")
        assert len(control.spares) == SPARES + 1


async def test_they_wait_as_long_as_there_is_a_sandbox(tmp_path: Path) -> None:
    control = FakeControlPlane()
    async with agent(control, tmp_path):
        await run(control, "web-1", AppSpec(name="web", image="web"))
        assert control.spares_dialled == 0
        await run(control, "try-1", TOOLS)
        await until(lambda: len(control.spares) == SPARES)
        control.remove("try-1")
        async with asyncio.timeout(10):
            assert [await spare.receive() for spare in control.spares] == [None] * SPARES
        assert len(control.spares) == SPARES


async def test_a_sandbox_that_comes_as_the_last_one_goes_has_its_streams() -> None:
    control, there = FakeControlPlane(), True

    async def serve(_: StreamRequest, channel: Channel) -> None:
        await channel.close()

    async with asyncio.TaskGroup() as group:
        spares = Spares("n1", control, random.Random(1), spawn=group.create_task, serve=serve, wanted=lambda: there)
        spares.look()
        await until(lambda: len(control.spares) == SPARES)
        there = False
        spares.look()
        there = True
        spares.look()  # before those of the first have ended
        await until(lambda: len(control.spares) == 2 * SPARES)
        assert [await spare.receive() for spare in control.spares[:SPARES]] == [None] * SPARES
        spares.look()
        assert control.spares_dialled == 2 * SPARES
        there = False
        spares.look()


async def test_of_an_older_server_none_is_asked_again(tmp_path: Path) -> None:
    control = FakeControlPlane()
    control.takes_spares = False
    async with agent(control, tmp_path):
        await run(control, "try-1", TOOLS)
        assert (await left(control.request(ECHO)))[-1] == (Kind.EXIT, b"0")
        assert control.spares_dialled == SPARES


async def test_one_that_was_broken_off_is_dialled_again(tmp_path: Path) -> None:
    control = FakeControlPlane()
    async with agent(control, tmp_path):
        await run(control, "try-1", TOOLS)
        await until(lambda: len(control.spares) == SPARES)
        await control.spares[0].close()
        await until(lambda: len(control.spares) == SPARES + 1)


async def test_who_wants_a_stream_is_given_one_that_waits_and_the_agent_is_not_asked_to_dial() -> None:
    tunnels = Tunnels()
    requests = tunnels.requests("n1")
    asked = asyncio.ensure_future(anext(requests))
    spare = tunnels.spare("n1")
    opening = asyncio.create_task(tunnels.open("n1", StreamKind.EXEC, "try-1", {"argv": ["true"]}))
    request = codec.decode(await spare.receive() or b"", StreamRequest)
    assert (request.kind, request.instance, request.options) == (StreamKind.EXEC, "try-1", {"argv": ["true"]})
    assert not opening.done()
    await spare.send(TAKEN)
    ours = await asyncio.wait_for(opening, 10)
    await spare.send(b"out")
    assert await ours.receive() == b"out"
    other = asyncio.create_task(tunnels.open("n1", StreamKind.EXEC, "try-1", {}))
    request = await asyncio.wait_for(asked, 10)  # no other waits: it is asked to dial
    tunnels.accept("n1", request.id)
    await asyncio.wait_for(other, 10)


async def test_one_whose_agent_has_gone_is_given_to_nobody() -> None:
    tunnels = Tunnels()
    await tunnels.spare("n1").close()
    with pytest.raises(Unavailable, match="no connection"):
        await tunnels.open("n1", StreamKind.EXEC, "try-1", {}, answer_s=0.05)


async def test_one_that_does_not_answer_is_an_error_and_nothing_is_asked_for_twice() -> None:
    tunnels = Tunnels()
    silent, other = tunnels.spare("n1"), tunnels.spare("n1")
    with pytest.raises(DeadlineExceeded, match="n1"):
        await tunnels.open("n1", StreamKind.EXEC, "try-1", {}, answer_s=0.05)
    assert other.closed  # the newest is given first
    opening = asyncio.create_task(tunnels.open("n1", StreamKind.EXEC, "try-1", {}))
    assert await silent.receive() is not None
    await silent.close()
    with pytest.raises(Unavailable, match="has just left"):
        await opening


async def test_few_may_wait() -> None:
    tunnels = Tunnels()
    waiting = [tunnels.spare("n1") for _ in range(SPARES_MAX)]
    with pytest.raises(Exhausted):
        tunnels.spare("n1")
    await waiting[0].close()
    tunnels.spare("n1")
