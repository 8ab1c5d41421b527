"""Live streams over the agent on fakes: exec, logs, and what is refused."""

from __future__ import annotations

import asyncio
import io
import random
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atoll.images.fake import FakeImages
from atoll.model import codec
from atoll.model.copying import Copier, Sink, Source
from atoll.model.errors import Invalid, Unavailable
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.control_plane import StreamKind, StreamRequest
from atoll.model.records import Assignment, Event, Instance, OwnerKind, Severity, Status
from atoll.model.spec import AppSpec, RuntimeName
from atoll.model.states import Phase
from atoll.model.streams import ErrorBody, Kind, LogLine, pack, unpack
from atoll.network.fake import FakeNetwork
from atoll.node.agent import Agent
from atoll.node.fake import FakeControlPlane, FakeMachine, FakeProber, MemoryLogs, channel_pair
from atoll.node.record import MemoryRecord
from atoll.node.report import EVENTS_MAX, STATUSES_MAX, Reporter
from atoll.node.stdin import AHEAD_BYTES
from atoll.node.streams import FILES_PER_PROJECT, FILES_THREADS, _Bridge, _copy, _feed
from atoll.runtimes.fake import FakeRuntime
from atoll.runtimes.fake_exec import FakeExecution

LOGS = MemoryLogs()


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[FakeControlPlane]:
    control = FakeControlPlane()
    agent = Agent(
        node="n1",
        control=control,
        runtimes=[FakeRuntime()],
        images=FakeImages(),
        network=FakeNetwork(),
        clock=SystemClock(),
        random=random.Random(1),
        data=tmp_path,
        record=MemoryRecord(),
        logs=LOGS,
        prober=FakeProber(),
        machine=FakeMachine(),
    )
    task = asyncio.create_task(agent.run())
    instance = Instance(
        id="web-1", project="default", owner_kind=OwnerKind.APP, owner="web", runtime=RuntimeName.RUNC, created_at=1.0
    )
    control.assign(Assignment(instance=instance, workload=AppSpec(name="web", image="web"), revision=1))
    await control.until(lambda c: c.statuses.get("web-1") and c.statuses["web-1"].phase is Phase.RUNNING)
    yield control
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


async def ask(control: FakeControlPlane, kind: str, instance: str = "web-1", **options: Any) -> list[tuple[Kind, bytes]]:
    channel = control.request(StreamRequest(f"s{random.random()}", kind, instance, options))
    found = []
    async with asyncio.timeout(5):
        while (message := await channel.receive()) is not None:
            found.append(unpack(message))
    return found


async def test_exec_gives_output_and_status(control: FakeControlPlane) -> None:
    assert await ask(control, StreamKind.EXEC, argv=["echo", "a", "b"]) == [(Kind.STDOUT, b"a b\n"), (Kind.EXIT, b"0")]
    assert (await ask(control, StreamKind.EXEC, argv=["exit", "7"]))[-1] == (Kind.EXIT, b"7")


async def test_exec_takes_input(control: FakeControlPlane) -> None:
    channel = control.request(StreamRequest("s", StreamKind.EXEC, "web-1", {"argv": ["cat"]}))
    await channel.send(pack(Kind.STDIN, b"hello"))
    await channel.send(pack(Kind.STDIN_END))
    found = []
    while (message := await channel.receive()) is not None:
        found.append(unpack(message))
    assert b"".join(payload for kind, payload in found if kind is Kind.STDOUT) == b"hello"
    assert found[-1] == (Kind.EXIT, b"0")


class Deaf(FakeExecution):
    """A command that reads nothing until it `reads`."""

    def __init__(self) -> None:
        super().__init__(tty=False, rows=24, columns=80)
        self.reads = asyncio.Event()
        self.read_bytes = 0
        self.signals: list[str] = []
        self.closed = asyncio.Event()

    async def write(self, data: bytes) -> None:
        await self.reads.wait()
        self.read_bytes += len(data)

    async def close_stdin(self) -> None:
        self.stdin_closed = True

    async def signal(self, name: str) -> None:
        self.signals.append(name)

    async def close(self) -> None:
        self.closed.set()


PIECE = b"y" * (64 << 10)


async def test_a_command_that_does_not_read_hears_signals_and_then_all_its_input() -> None:
    client, ours = channel_pair()
    command = Deaf()
    feeding = asyncio.create_task(_feed(ours, command))  # type: ignore[arg-type]
    count = AHEAD_BYTES // len(PIECE) - 1
    for _ in range(count):
        await client.send(pack(Kind.STDIN, PIECE))
    await client.send(pack(Kind.STDIN_END))
    await client.send(pack(Kind.SIGNAL, b"SIGINT"))
    await eventually(lambda: command.signals == ["SIGINT"])
    assert not command.stdin_closed
    command.reads.set()
    await eventually(lambda: command.stdin_closed)
    assert command.read_bytes == count * len(PIECE)
    await client.close()
    await feeding
    assert command.closed.is_set()


async def test_a_client_that_leaves_ends_its_command_though_that_reads_nothing_of_what_was_sent() -> None:
    client, ours = channel_pair()
    command = Deaf()
    feeding = asyncio.create_task(_feed(ours, command))  # type: ignore[arg-type]
    for _ in range(2 * AHEAD_BYTES // len(PIECE)):
        await client.send(pack(Kind.STDIN, PIECE))
    await asyncio.sleep(0.01)
    assert not feeding.done()
    await client.close()
    async with asyncio.timeout(5):
        await feeding
    assert command.closed.is_set()
    assert command.read_bytes == 0


@pytest.mark.parametrize(
    ("kind", "instance", "options", "code"),
    [
        (StreamKind.EXEC, "web-1", {"argv": []}, "invalid"),
        (StreamKind.EXEC, "web-1", {}, "invalid"),
        (StreamKind.EXEC, "web-1", {"argv": ["missing"]}, "command-not-found"),
        (StreamKind.EXEC, "web-9", {"argv": ["echo"]}, "not-found"),
        (StreamKind.LOGS, "web-9", {}, "not-found"),
        (StreamKind.LOGS, "web-1", {"tail": "many"}, "invalid"),
        ("teleport", "web-1", {}, "invalid"),
    ],
)
async def test_what_cannot_be_served_is_refused_with_its_code(
    control: FakeControlPlane, kind: str, instance: str, options: dict[str, Any], code: str
) -> None:
    messages = await ask(control, kind, instance, **options)
    assert messages[-1][0] is Kind.ERROR
    assert codec.decode(messages[-1][1], ErrorBody).code == code


async def test_logs_end_with_an_end(control: FakeControlPlane) -> None:
    LOGS.lines["web-1"] = [LogLine(at=float(n), stream="stdout", text=str(n)) for n in range(5)]
    messages = await ask(control, StreamKind.LOGS, tail=2)
    assert [codec.decode(payload, LogLine).text for kind, payload in messages if kind is Kind.LOG] == ["3", "4"]
    assert messages[-1][0] is Kind.END


class Stuck:
    """A copier that waits until it is let go."""

    def __init__(self) -> None:
        self.running = 0
        self.goes = threading.Event()

    def pack(self, path: str, sink: Sink) -> None:
        self.running += 1
        self.goes.wait(10)

    def unpack(self, path: str, source: Source) -> None:
        raise NotImplementedError


class CopyingRuntime(FakeRuntime):
    def __init__(self, copier: Stuck) -> None:
        super().__init__()
        self._copier = copier

    async def copier(self, id: str) -> Copier:
        return self._copier


async def test_copies_of_one_project_that_do_not_move_leave_threads_for_another() -> None:
    stuck, quick = Stuck(), Stuck()
    quick.goes.set()

    def begin(project: str, copier: Stuck) -> asyncio.Task[None]:
        state = SimpleNamespace(pid=1, phase=Phase.RUNNING)
        runner: Any = SimpleNamespace(id="web-1", project=project, runtime=CopyingRuntime(copier), state=state)
        return asyncio.create_task(_copy(runner, "/f", lambda *_: None, lambda copier: copier.pack("/f", io.BytesIO()), _Bridge()))

    copies = [begin("slow", stuck) for _ in range(FILES_THREADS)]
    try:
        await eventually(lambda: stuck.running == FILES_PER_PROJECT)
        async with asyncio.timeout(5):
            await begin("other", quick)
        assert stuck.running == FILES_PER_PROJECT
    finally:
        stuck.goes.set()
    await asyncio.gather(*copies)
    assert stuck.running == FILES_THREADS


async def test_a_channel_that_is_closed_ends_both_ways() -> None:
    ours, theirs = channel_pair()
    for _ in range(64):
        await ours.send(b"x")
    await ours.close()
    with pytest.raises(Unavailable):
        await theirs.send(b"y")
    assert await ours.receive() is None


class Slow(FakeControlPlane):
    """Notes each report; fails as often as told."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, int]] = []
        self.errors: list[Exception] = []

    async def report(self, node: str, statuses: Any, events: Any = ()) -> None:
        self.batches.append((len(statuses), len(events)))
        await asyncio.sleep(0)
        if self.errors:
            raise self.errors.pop(0)
        await super().report(node, statuses, events)


async def test_reports_are_bounded_and_the_newest_word_wins() -> None:
    control = Slow()
    control.errors = [Unavailable("away"), Invalid("bad")]
    reporter = Reporter("n1", control, SystemClock(), random.Random(1))
    for number in range(EVENTS_MAX + 10):
        reporter.event("default", "instance/x", "code", str(number), Severity.INFO)
    for phase in (Phase.STARTING, Phase.RUNNING):
        for number in range(STATUSES_MAX + 1):
            reporter.status(Status(instance=f"i{number}", project="default", node="n1", phase=phase))
    task = asyncio.create_task(reporter.run())
    async with asyncio.timeout(5):
        while not reporter.idle:  # noqa: ASYNC110 - the reporter has no event for it
            await asyncio.sleep(0.01)
    task.cancel()
    assert max(statuses for statuses, _ in control.batches) == STATUSES_MAX
    # The first try failed and was repeated whole; the second was refused and dropped; the rest came.
    assert control.batches[0] == control.batches[1]
    assert {status.phase for status in control.history} == {Phase.RUNNING}
    assert isinstance(control.events[-1], Event)
    assert control.events[-1].message == str(EVENTS_MAX + 9)


async def test_that_it_runs_waits_a_moment_for_that_it_is_ready_and_that_it_is_not_any_more_waits_for_nothing() -> None:
    control = Slow()
    reporter = Reporter("n1", control, SystemClock(), random.Random(1))
    task = asyncio.create_task(reporter.run())

    async def tell(*, ready: bool) -> int:
        """Say so, and return how many reports there are as soon as what goes at once has gone."""
        reporter.status(Status(instance="i", project="default", node="n1", phase=Phase.RUNNING, ready=ready))
        for _ in range(5):
            await asyncio.sleep(0)
        return len(control.batches)

    assert await tell(ready=False) == 0
    assert await tell(ready=True) == 1
    async with asyncio.timeout(5):
        while not reporter.idle:  # noqa: ASYNC110 - the reporter has no event for it
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)
    assert await tell(ready=False) == 2
    task.cancel()
    assert [statuses for statuses, _ in control.batches] == [1, 1]


async def test_what_is_forgotten_while_under_way_is_not_said_again() -> None:
    control = Slow()
    control.errors = [Unavailable("away")]
    reporter = Reporter("n1", control, SystemClock(), random.Random(1))
    reporter.status(Status(instance="gone", project="default", node="n1", phase=Phase.STOPPED))
    task = asyncio.create_task(reporter.run())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    reporter.forget("gone")
    await asyncio.sleep(0.2)
    task.cancel()
    assert [status.instance for status in control.history] == []
