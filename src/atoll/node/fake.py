"""Fakes of what the agent meets, for tests and the simulator: a control plane, a machine, probes and logs in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from atoll.model.beats import BeatGrant
from atoll.model.errors import AtollError, Conflict, NotFound, Unavailable
from atoll.model.ports.control_plane import NEXT_STREAM, AssignmentBatch, Channel, Peers, RoutingBatch, StreamRequest, Unread
from atoll.model.ports.runtime import Runtime
from atoll.model.records import Assignment, Capacity, Event, Heartbeat, Ingress, IngressHeartbeat, Node, Status
from atoll.model.spec import Health
from atoll.model.states import Desired
from atoll.model.streams import LogLine, LogOptions

MESSAGES_MAX = 64
"""Messages in one direction of a fake channel before `send` waits."""
HISTORY_MAX = 10_000


class FakeChannel:
    """One end of a two-way stream in memory."""

    def __init__(self, inward: asyncio.Queue[bytes | None], outward: asyncio.Queue[bytes | None]) -> None:
        self._inward, self._outward = inward, outward
        self._closed = asyncio.Event()
        self.other: FakeChannel | None = None

    async def send(self, message: bytes) -> None:
        if self._closed.is_set() or (self.other is not None and self.other._closed.is_set()):
            raise Unavailable("the other end is gone")
        await self._outward.put(message)

    async def receive(self) -> bytes | None:
        return None if self._closed.is_set() else await self._inward.get()

    async def gone(self) -> None:
        assert self.other is not None  # noqa: S101 (`channel_pair` says so)
        await self.other._closed.wait()

    async def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            for queue in (self._outward, self._inward):
                if queue.full():
                    queue.get_nowait()  # what nobody will read any more makes room for the end
                queue.put_nowait(None)


def channel_pair() -> tuple[FakeChannel, FakeChannel]:
    """Return the two ends of one stream."""
    one: asyncio.Queue[bytes | None] = asyncio.Queue(MESSAGES_MAX)
    two: asyncio.Queue[bytes | None] = asyncio.Queue(MESSAGES_MAX)
    left, right = FakeChannel(one, two), FakeChannel(two, one)
    left.other, right.other = right, left
    return left, right


class FakeControlPlane:
    """Implements `ControlPlane` for one node: tests say what is assigned, and see what was reported."""

    def __init__(self) -> None:
        self.assigned: dict[str, Assignment] = {}
        self.secrets: dict[str, dict[str, str]] = {}
        """Instance → variable → value; an instance that is not in it has none."""
        self.nodes: dict[str, Node] = {}
        self.statuses: dict[str, Status] = {}
        self.history: deque[Status] = deque(maxlen=HISTORY_MAX)
        self.events: deque[Event] = deque(maxlen=HISTORY_MAX)
        self.heartbeats: deque[Heartbeat] = deque(maxlen=HISTORY_MAX)
        self.kept: dict[str, Desired] = {}
        self.unread: dict[str, Unread] = {}
        self.granted: BeatGrant | None = None
        self.prefetched: tuple[str, ...] = ()
        self.takes_spares = True
        """Whether it knows of streams that wait for whoever wants one."""
        self.spares: list[Channel] = []
        """Its ends of those, in their order."""
        self.spares_dialled = 0
        self._revision = 0
        self._away = False
        self._watchers: set[asyncio.Queue[AssignmentBatch | None]] = set()
        self._requests: asyncio.Queue[StreamRequest | None] = asyncio.Queue()
        self._channels: dict[str, Channel] = {}
        self._reported = asyncio.Event()

    def assign(self, assignment: Assignment) -> None:
        """Give the node an instance, or change what is wanted of it."""
        self._revision += 1
        assignment = replace(assignment, revision=self._revision)
        self.assigned[assignment.instance.id] = assignment
        self._publish(AssignmentBatch(self._revision, False, (assignment,)))

    def want(self, id: str, desired: Desired) -> None:
        assignment = self.assigned[id]
        self.assign(replace(assignment, instance=replace(assignment.instance, desired=desired)))

    def keep(self, id: str, desired: Desired) -> None:
        """Know no more of an instance than that it is there, and what is wanted of it."""
        self._revision += 1
        self.assigned.pop(id, None)
        self.kept[id] = desired
        self._publish(AssignmentBatch(self._revision, False, kept={id: desired}))

    def confuse(self, unread: Unread) -> None:
        """Assign something that the node's version does not understand."""
        self._revision += 1
        self.assigned.pop(unread.instance, None)
        self.unread[unread.instance] = unread
        self.kept[unread.instance] = Desired.RUN
        self._publish(AssignmentBatch(self._revision, False, kept={unread.instance: Desired.RUN}, unread=(unread,)))

    def remove(self, id: str) -> None:
        self._revision += 1
        self.kept.pop(id, None)
        self.unread.pop(id, None)
        self.assigned.pop(id, None)
        self.statuses.pop(id, None)
        self._publish(AssignmentBatch(self._revision, False, (), (id,)))

    def prefetch(self, *references: str) -> None:
        """Say which images the node may need soon."""
        self._revision += 1
        self.prefetched = references
        self._publish(AssignmentBatch(self._revision, False, prefetch=references))

    def cut(self) -> None:
        """Be away until `heal`: every call fails, and every stream ends."""
        self._away = True
        self._publish(None)
        self._requests.put_nowait(None)

    def heal(self) -> None:
        self._away = False

    def request(self, request: StreamRequest) -> Channel:
        """Ask the agent for a stream; return the client's end."""
        ours, theirs = channel_pair()
        self._channels[request.id] = theirs
        self._requests.put_nowait(request)
        return ours

    async def until(self, holds: Callable[[FakeControlPlane], object], timeout_s: float = 10.0) -> None:
        """Return when `holds` is true after some report; raise TimeoutError otherwise."""
        async with asyncio.timeout(timeout_s):
            while not holds(self):
                self._reported.clear()
                await self._reported.wait()

    def phases(self, id: str) -> list[str]:
        """Return the phases that were reported, each as often as it changed."""
        phases: list[str] = []
        for status in self.history:
            if status.instance == id and phases[-1:] != [status.phase.value]:
                phases.append(status.phase.value)
        return phases

    def codes(self, id: str) -> list[str]:
        return [event.code for event in self.events if event.subject == f"instance/{id}"]

    async def register_node(self, node: Node) -> None:
        self._check()
        known = self.nodes.get(node.name)
        if known is not None and 0 < node.word < known.word:
            raise Conflict(f"a newer word of node '{node.name}' is known")
        self.nodes[node.name] = node

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        self._check()
        self.heartbeats.append(heartbeat)
        self._reported.set()

    async def beat_grant(self, node: str) -> BeatGrant:
        self._check()
        if self.granted is None:
            raise NotFound("this server knows no beats")
        return self.granted

    async def assignments(self, node: str) -> AsyncIterator[AssignmentBatch]:
        self._check()
        queue: asyncio.Queue[AssignmentBatch | None] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            yield AssignmentBatch(
                self._revision,
                True,
                tuple(self.assigned.values()),
                kept=dict(self.kept),
                prefetch=self.prefetched,
                unread=tuple(self.unread.values()),
            )
            while (batch := await queue.get()) is not None:
                yield batch
        finally:
            self._watchers.discard(queue)
        raise Unavailable("the connection was cut")

    async def report(self, node: str, statuses: Sequence[Status], events: Sequence[Event] = ()) -> None:
        self._check()
        for status in statuses:
            self.history.append(status)
            if status.instance in self.assigned or status.instance in self.kept:
                self.statuses[status.instance] = status
        self.events.extend(events)
        self._reported.set()

    async def instance_secrets(self, instance: str) -> dict[str, str]:
        self._check()
        return dict(self.secrets.get(instance, {}))

    async def stream_requests(self, node: str) -> AsyncIterator[StreamRequest]:
        self._check()
        while (request := await self._requests.get()) is not None:
            yield request
        raise Unavailable("the connection was cut")

    async def open_stream(self, node: str, id: str) -> Channel:
        self._check()
        if id == NEXT_STREAM:
            self.spares_dialled += 1
            if not self.takes_spares:
                raise NotFound("this server is older than streams that wait")
            ours, theirs = channel_pair()
            self.spares.append(ours)
            return theirs
        try:
            return self._channels.pop(id)
        except KeyError:
            raise NotFound(f"no stream {id} is waited for") from None

    async def register_ingress(self, ingress: Ingress) -> None:
        self._check()

    async def routing(self, ingress: str) -> AsyncIterator[RoutingBatch]:
        self._check()
        yield RoutingBatch(self._revision, True)

    async def drained(self, ingress: str, instances: Sequence[str]) -> None:
        self._check()

    async def ingress_heartbeat(self, heartbeat: IngressHeartbeat) -> Peers:
        self._check()
        return Peers()

    def _check(self) -> None:
        if self._away:
            raise Unavailable("the control plane does not answer")

    def _publish(self, batch: AssignmentBatch | None) -> None:
        for queue in self._watchers:
            queue.put_nowait(batch)


class FakeMachine:
    """Implements `tools.Machine` with figures that a test sets."""

    def __init__(self, *, cpu_milli: int = 4_000, memory_bytes: int = 8 << 30, disk_bytes: int = 100 << 30) -> None:
        self._capacity = Capacity(cpu_milli=cpu_milli, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
        self.disk_used_fraction = 0.1
        self.processes: dict[int, str] = {}
        """Process → its control group."""

    def capacity(self) -> Capacity:
        return self._capacity

    def sample(self) -> tuple[int, int]:
        return 100, 1 << 30

    def ports_taken(self) -> tuple[str, ...]:
        return ()

    def disk_used(self) -> float:
        return self.disk_used_fraction

    def groups(self, pid: int) -> Sequence[str]:
        return (self.processes[pid],) if pid in self.processes else ()


class FakeScraper:
    """Implements `tools.Scraper`: answers with the text in `answers`, by address (else by `""`), or raises what stands there."""

    def __init__(self) -> None:
        self.answers: dict[str, str | AtollError] = {"": Unavailable("connection refused")}
        self.hanging: set[str] = set()
        """Addresses that never answer."""
        self.asked: list[tuple[str, int, str]] = []

    async def scrape(self, address: str, port: int, path: str) -> bytes:
        self.asked.append((address, port, path))
        if address in self.hanging:
            await asyncio.Event().wait()  # without a deadline: the caller's counts
        answer = self.answers.get(address, self.answers[""])
        if isinstance(answer, AtollError):
            raise answer
        return answer.encode()


class FakeProber:
    """Implements `tools.Prober`: succeeds but for the instances, or gate addresses, in `failing` (→ why)."""

    def __init__(self) -> None:
        self.failing: dict[str, str] = {}

    async def probe_port(self, address: str, port: int) -> str:
        return self.failing.get(address, "")

    async def probe(self, runtime: Runtime, id: str, address: str | None, health: Health, port: int, http2: bool) -> str:
        return self.failing.get(id, "")


class MemoryLogs:
    """Implements `tools.Logs` without files or pipes: what a test puts in `lines` is what is read."""

    def __init__(self, directory: Path = Path("/nonexistent")) -> None:
        self._directory = directory
        self.opened: set[str] = set()
        self.lines: dict[str, list[LogLine]] = {}

    def open(self, project: str, id: str) -> tuple[Path, Path]:
        self.opened.add(id)
        return self._directory / id / "stdout", self._directory / id / "stderr"

    def drain(self, id: str) -> None: ...

    def close(self, id: str) -> None:
        self.opened.discard(id)

    def remove(self, project: str, id: str) -> None:
        self.close(id)
        self.lines.pop(id, None)

    def strangers(self, known: set[str]) -> list[tuple[str, str]]:
        return []

    async def read(self, project: str, id: str, options: LogOptions) -> AsyncIterator[LogLine]:
        lines = [line for line in self.lines.get(id, []) if options.since is None or line.at >= options.since]
        for line in lines if options.tail is None else lines[len(lines) - min(options.tail, len(lines)) :]:
            yield line

    def shut(self) -> None: ...
