"""What the node makes of apps' metrics: of their text, of servers that refuse, hang and lie, and what is said of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from control_cell import run_virtual
from msgspec.structs import replace

from atoll.images.fake import FakeImages
from atoll.model.errors import AtollError, Invalid, Unavailable
from atoll.model.ports.clock import SystemClock
from atoll.model.records import Assignment, Instance, OwnerKind, Severity, Usage
from atoll.model.spec import AppSpec, JobSpec, Metrics, Port, RuntimeName, Scale
from atoll.model.states import Phase
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.node.agent import Agent
from atoll.node.fake import FakeControlPlane, FakeMachine, FakeProber, FakeScraper, MemoryLogs
from atoll.node.metrics import (
    BODY_BYTES_MAX,
    ROUND_S,
    SAMPLES_MAX,
    SCRAPES_MAX,
    NetworkScraper,
    Scrapes,
    Target,
    read_samples,
    target_of,
    with_metrics,
)
from atoll.node.record import MemoryRecord
from atoll.node.report import Reporter
from atoll.node.transitions import State
from atoll.runtimes.fake import FakeHost, FakeRuntime

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
TEXT = """\
# HELP queue_depth Requests that wait.
# TYPE queue_depth gauge
queue_depth 3
tokens_total{model="a",user="}\\" x"} 1e3
tokens_total{model="b",} 24.5 1700000000000
tokens_total_created 9
  spaced\t \t-1.5
bad NaN
huge +Inf
"""


def test_the_samples_of_a_name_are_summed_up_whatever_their_labels() -> None:
    names = ("queue_depth", "tokens_total", "spaced", "bad", "huge", "missing")
    assert read_samples(TEXT, names) == {"queue_depth": 3.0, "tokens_total": 1024.5, "spaced": -1.5}


def test_lines_that_nobody_asked_for_may_say_anything() -> None:
    assert read_samples("<html>\nqueue_depth_max {{{\n\r\nqueue_depth 1\r\n", ("queue_depth",)) == {"queue_depth": 1.0}


@pytest.mark.parametrize(
    "line",
    [
        "q",
        "q 0x10",
        "q 1_000",
        "q+3",
        "q nan",
        "q 1 2 3",
        'q{a="b} 1',
        "q{a=b} 1",
        "q 1 # {trace} 2",
        "q " + "1" * 65,
        'q{a="b"' + " " * BODY_BYTES_MAX + "x",
        'q{a="' + "\\" * BODY_BYTES_MAX,
        "q{" + 'a="b",' * 40_000 + "x",
        "q " + "1" * BODY_BYTES_MAX + "x",
    ],
    ids=lambda line: line[:12],
)
def test_a_line_that_is_not_in_the_format_is_refused_by_its_number(line: str) -> None:
    with pytest.raises(Invalid, match="line 2 "):
        read_samples(f"q 1\n{line}\n", ("q",))


def test_an_answer_with_too_many_samples_is_refused() -> None:
    with pytest.raises(Invalid, match="over"):
        read_samples("q 1\n" * (SAMPLES_MAX + 1), ("q",))
    assert read_samples("q 1\n" * SAMPLES_MAX, ("q",)) == {"q": float(SAMPLES_MAX)}


def assignment(**changes: Any) -> Assignment:
    spec = AppSpec(
        **{"name": "web", "image": "x", "ports": (Port(name="api", port=80), Port(name="admin", port=81))}
        | {"metrics": Metrics(port="admin", path="/m", names=("tokens", "depth"))}
        | {"scale": Scale(max=4, metric="depth", target=8)}
        | changes
    )
    return Assignment(instance=_instance(), workload=spec, revision=1)


def _instance() -> Instance:
    return Instance(
        id="web-1", project="shop", owner_kind=OwnerKind.APP, owner="web", node="n1", runtime=RuntimeName.RUNC, created_at=1.0
    )


READY = State(phase=Phase.RUNNING, ready=True, address="10.64.0.2")


def test_a_ready_instance_is_asked_for_the_metric_it_scales_by_and_those_that_are_named() -> None:
    target = target_of(assignment(), READY)
    assert target == Target(
        instance="web-1", project="shop", address="10.64.0.2", port=81, path="/m", names=("depth", "tokens"), needed="depth"
    )


@pytest.mark.parametrize(
    ("given", "state"),
    [
        (assignment(), replace(READY, ready=False)),
        (assignment(), replace(READY, phase=Phase.STOPPING)),
        (assignment(), replace(READY, address=None)),
        (assignment(metrics=None), READY),
        (assignment(metrics=Metrics(), scale=Scale()), READY),
        (Assignment(instance=_instance(), workload=JobSpec(name="sum", image="x"), revision=1), READY),
    ],
)
def test_what_is_not_ready_or_names_no_metric_is_not_asked(given: Assignment, state: State) -> None:
    assert target_of(given, state) is None


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[int]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


def answering(answer: bytes, asked: list[bytes] | None = None) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        if asked is not None:
            asked.append(request)
        writer.write(answer)
        writer.close()

    return serve


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nq 1\n",
        b"HTTP/1.0 200 OK\r\n\r\nq 1\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nq \r\n2\r\n1\n\r\n0\r\n\r\n",
    ],
)
async def test_an_answer_is_read_however_it_is_framed(answer: bytes) -> None:
    async with serving(answering(answer)) as port:
        assert await NetworkScraper().scrape("127.0.0.1", port, "/metrics") == b"q 1\n"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "it answered 404"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\n\r\n", "it answered 302"),
        (b"SSH-2.0-OpenSSH\r\n", "not HTTP"),
        (b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", "not HTTP"),
        (b"", "without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\nq 1\n", "broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nq 1\n\r\n", "broke off"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"#" * (BODY_BYTES_MAX + 1), "over 256 KiB"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (BODY_BYTES_MAX * 2), "over 256 KiB"),
    ],
)
async def test_what_is_no_good_answer_says_why(answer: bytes, why: str) -> None:
    async with serving(answering(answer)) as port:
        with pytest.raises(AtollError, match=why):
            await NetworkScraper().scrape("127.0.0.1", port, "/metrics")


async def test_a_closed_port_is_refused() -> None:
    async with serving(answering(b"")) as port:
        pass
    with pytest.raises(Unavailable, match="connection refused"):
        await NetworkScraper().scrape("127.0.0.1", port, "/metrics")


async def test_the_path_is_asked_for_and_cannot_smuggle_headers() -> None:
    asked: list[bytes] = []
    async with serving(answering(b"HTTP/1.1 200 OK\r\n\r\n", asked)) as port:
        await NetworkScraper().scrape("127.0.0.1", port, "/m x\r\nX-Evil: 1")
    assert asked[0].split(b"\r\n")[0] == b"GET /m%20xX-Evil:%201 HTTP/1.1"
    assert b"\r\nX-Evil" not in asked[0]


class Round:
    """A scraper that is told what to answer, and the events that come of it."""

    def __init__(self) -> None:
        self.control = FakeControlPlane()
        self.scraper = FakeScraper()
        self.reporter = Reporter("n1", self.control, SystemClock(), random.Random(1))
        self.scrapes = Scrapes(self.scraper, self.reporter)

    async def ask(self, *addresses: str, needed: str | None = "q") -> dict[str, dict[str, float]]:
        targets = [
            Target(instance=f"i{a}", project="p", address=a, port=80, path="/metrics", names=("q", "t"), needed=needed)
            for a in addresses
        ]
        return await self.scrapes.ask(targets)

    async def events(self) -> list[tuple[str, str]]:
        """Return (subject, message) of what was said since the last time."""
        task = asyncio.create_task(self.reporter.run())
        await asyncio.sleep(1.0)  # of virtual time: events wait for company
        task.cancel()
        told = [(event.subject, event.message) for event in self.control.events]
        assert all((event.code, event.severity) == ("metrics-failed", Severity.WARNING) for event in self.control.events)
        self.control.events.clear()
        return told


def test_a_failing_scrape_is_said_once_and_again_after_it_has_worked() -> None:
    async def main() -> None:
        one = Round()
        assert await one.ask("a") == await one.ask("a") == {}
        assert await one.events() == [("instance/ia", "GET /metrics on port 80 gives no metrics: connection refused")]
        one.scraper.answers["a"] = "q 5\n"
        assert await one.ask("a") == {"ia": {"q": 5.0}}
        assert await one.events() == []
        one.scraper.answers["a"] = "q five\n"
        assert await one.ask("a") == {}
        ((_, said),) = await one.events()
        assert said.endswith("line 1 of its answer is not in Prometheus' text format")

    run_virtual(main())


def test_a_metric_that_an_app_scales_by_and_does_not_give_is_said() -> None:
    async def main() -> None:
        one = Round()
        one.scraper.answers["a"] = "t 7\nq NaN\n"
        assert await one.ask("a") == {"ia": {"t": 7.0}}
        ((_, said),) = await one.events()
        assert said.endswith("its answer has no number for 'q'")
        assert await one.ask("a", needed=None) == {"ia": {"t": 7.0}}
        assert await one.events() == []

    run_virtual(main())


def test_an_instance_that_hangs_takes_no_reading_from_the_others() -> None:
    async def main() -> None:
        one = Round()
        one.scraper.answers[""] = "q 1\n"
        hanging = [f"h{n}" for n in range(SCRAPES_MAX)]
        one.scraper.hanging.update(hanging)
        began = asyncio.get_running_loop().time()
        assert await one.ask(*hanging, "a", "b") == {}, "all turns are taken by those who hang"
        assert asyncio.get_running_loop().time() - began == ROUND_S
        assert {subject for subject, _ in await one.events()} == {f"instance/i{name}" for name in hanging}
        assert await one.ask(*hanging, "a", "b") == {"ia": {"q": 1.0}, "ib": {"q": 1.0}}, "but only once: they come last now"
        assert await one.events() == []

    run_virtual(main())


def test_metrics_are_joined_with_what_the_instance_uses() -> None:
    found = [Usage(instance="a", pids=2), Usage(instance="b", pids=3)]
    assert with_metrics(found, {"b": {"q": 1.0}, "c": {"q": 2.0}}) == (
        Usage(instance="a", pids=2),
        Usage(instance="b", pids=3, metrics={"q": 1.0}),
        Usage(instance="c", metrics={"q": 2.0}),
    )


async def test_a_heartbeat_carries_the_metrics_of_what_is_ready(tmp_path: Path) -> None:
    control, scraper = FakeControlPlane(), FakeScraper()
    scraper.answers[""] = "depth 12\ntokens 340.5\nother 1\n"
    agent = Agent(
        node="n1",
        control=control,
        runtimes=[FakeRuntime(FakeHost())],
        images=FakeImages(),
        network=FakeNetwork(FakeNetworkState()),
        clock=SystemClock(),
        random=random.Random(1),
        data=tmp_path,
        record=MemoryRecord(),
        logs=MemoryLogs(),
        prober=FakeProber(),
        scraper=scraper,
        machine=FakeMachine(),
    )
    task = asyncio.create_task(agent.run())
    try:
        control.assign(assignment())
        await control.until(lambda c: "web-1" in c.statuses and c.statuses["web-1"].ready)
        control.heartbeats.clear()
        control.cut()  # an agent that comes back sends a heartbeat at once
        control.heal()
        await control.until(lambda c: any(usage.metrics for beat in c.heartbeats for usage in beat.usage))
        (usage,) = control.heartbeats[-1].usage
        assert usage.metrics == {"depth": 12.0, "tokens": 340.5}
        assert scraper.asked[-1] == (control.statuses["web-1"].address, 81, "/m")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
