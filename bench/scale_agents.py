"""Many agents in one process, as a server sees real ones: each with a stream of its assignments, a tunnel, a connection for calls,
and a socket for its beats. Only what an agent does on its machine is left out: an instance is a timer.

python -m bench.scale_agents ADDRESS[,ADDRESS…] FIRST COUNT [quiet] [together] < tokens
                                                 one token a line; then one question a line on stdin
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import heapq
import json
import os
import random
import sys
import time
from collections import deque
from typing import Any, cast

import httptools
import msgspec
import uvloop

from atoll.model import codec
from atoll.model.beats import BeatGrant
from atoll.model.membership import API_HEADER, API_VERSION
from atoll.model.ports.datagrams import Udp
from atoll.model.records import Capacity, Event, Heartbeat, Node, Status, Usage, event_id, new_suffix
from atoll.model.spec import RuntimeName
from atoll.model.states import Desired, Phase
from atoll.node.agent import REDIAL_MAX_S
from atoll.node.beating import ANEW_FIRST_S, ANEW_S, DEAF_S, HEARTBEAT_S
from atoll.node.contact import Contact
from atoll.node.pulse import Pulse
from atoll.node.report import LAZY_S, STATUSES_MAX, retry_delay
from atoll.sdk.websocket import PING_S

SITES = 50
STARTS_S = (0.2, 1.0)
"""From the assignment to a process that is ready."""
JOINING_MAX = 64
"""Agents that register at a time; a whole data centre does not switch on at one moment either."""
CPU_MILLI, MEMORY_BYTES = 64_000, 256 << 30
PING = bytes((0x89, 0x84, 1, 2, 3, 4, 0, 0, 0, 0))
"""A ping of four bytes, masked (RFC 6455, 5.5.2)."""
TICK_S = 0.01
"""How closely beats are sent when they are due: one task does it for all agents of a process."""


class _Instance(msgspec.Struct):
    id: str
    project: str
    desired: Desired = Desired.RUN


class _Assignment(msgspec.Struct):
    instance: _Instance


class _Batch(msgspec.Struct):
    complete: bool
    put: tuple[_Assignment, ...] = ()
    removed: tuple[str, ...] = ()


_batches = msgspec.json.Decoder(_Batch)
"""As much of an AssignmentBatch as a timer needs."""


class Counts:
    """What all agents of this process have seen and done."""

    def __init__(self) -> None:
        self.streams = self.tunnels = self.registered = self.running = self.failed = self.lost_streams = 0
        self.reports: list[float] = []
        self.heartbeats: list[float] = []
        self.errors: dict[str, int] = {}

    def error(self, what: str) -> None:
        self.failed += 1
        if len(self.errors) < 50 or what in self.errors:
            self.errors[what] = self.errors.get(what, 0) + 1


class Line(asyncio.Protocol):
    """One connection: calls one after another, or one stream of lines, or a tunnel whose pings are answered."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self.status = 0
        self.on_line: Any = None
        self.upgraded = False
        self._body = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("lost"))
        if not self.ended.done():
            self.ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self.upgraded:
            self._frames(data)
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.upgraded = True
            self._done(101, b"")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.on_line is not None and self.status == 200:
            self._done(200, b"")

    def on_body(self, body: bytes) -> None:
        self._body += body
        if self.on_line is not None and self.status == 200:
            *lines, self._body = self._body.split(b"\n")
            for line in lines:
                self.on_line(line)

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        self._done(self.status, body)
        if self.on_line is not None and self.transport is not None:
            self.transport.close()  # a stream that the server has ended

    def _done(self, status: int, body: bytes) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((status, body))

    def _frames(self, data: bytes) -> None:
        """A server's pings are short and come alone (RFC 6455, 5.5.2)."""
        if len(data) >= 2 and data[0] & 0x0F == 0x9 and self.transport is not None:
            payload, mask = data[2 : 2 + (data[1] & 0x7F)], os.urandom(4)
            sealed = bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))
            self.transport.write(bytes([0x8A, 0x80 | len(payload)]) + mask + sealed)

    async def ask(self, head: bytes, body: bytes = b"") -> tuple[int, bytes]:
        if self.transport is None or self.closed:
            raise ConnectionError("closed")
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(head + body)
        try:
            async with asyncio.timeout(30.0):
                return await self._answer
        finally:
            self._answer = None

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Agent:
    def __init__(self, number: int, token: str, fleet: Fleet) -> None:
        self.name = f"n{number:05d}"
        self.fleet = fleet
        self.instances: dict[str, _Instance] = {}
        self.statuses: dict[str, Status] = {}
        self._fresh: set[str] = set()
        self._events: deque[Event] = deque(maxlen=1_000)
        self._wake = asyncio.Event()
        self._reached = asyncio.Event()
        """Pulsed when assignments come again, as a real agent's."""
        self._at = 0 if fleet.together else number % len(fleet.addresses)
        """Which server it uses: real agents begin with any, by chance."""
        self._calls: dict[int, Line] = {}
        self._calling = asyncio.Lock()
        self._spread_s = 0.0
        self._chance = random.Random(number)
        self._word = int(time.time() * 1000)
        self._common = f"Authorization: Bearer {token}\r\n{API_HEADER}: {API_VERSION}\r\nUser-Agent: atoll-agent\r\n"
        self._pulse: Pulse | None = None
        self._heartbeat_s = HEARTBEAT_S
        self._usage = b""
        """The heartbeat of what runs, ready to send; empty when that has changed."""
        site = number % SITES
        capacity = Capacity(cpu_milli=CPU_MILLI, memory_bytes=MEMORY_BYTES, disk_bytes=1 << 40)
        self._node = Node(
            name=self.name, site=f"s{site}", region=f"r{site % 5}", capacity=capacity, runtimes=(RuntimeName.RUNC, RuntimeName.CRUN)
        )

    def _head(self, method: str, path: str, size: int = 0, more: str = "") -> bytes:
        length = f"Content-Type: application/json\r\nContent-Length: {size}\r\n" if method != "GET" else ""
        return f"{method} /v1/nodes/{self.name}{path} HTTP/1.1\r\nHost: bench\r\n{self._common}{length}{more}\r\n".encode()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._report())

    async def dial(self) -> Line:
        """Connect to the server in use, or to the next one. Raises OSError."""
        for _ in self.fleet.addresses:
            at = self._at
            try:
                return await self.fleet.dial(at)
            except OSError:
                if self._at == at:
                    self._at = (at + 1) % len(self.fleet.addresses)
        raise ConnectionError("no server takes connections")

    async def call(self, method: str, path: str, record: object = None) -> bytes:
        """One call at the server in use, or at the next. Raises OSError, TimeoutError."""
        async with self._calling:
            for _ in self.fleet.addresses:
                at = self._at
                try:
                    return await self._call_at(at, method, path, record)
                except ConnectionRefusedError:
                    if self._at == at:
                        self._at = (at + 1) % len(self.fleet.addresses)
        raise ConnectionError("no server takes connections")

    async def tell_all(self, path: str, record: object) -> None:
        """Tell every server, as real agents do with what only the leader judges by. Raises what the server in use raised."""
        async with self._calling:
            for at in range(len(self.fleet.addresses)):
                try:
                    await self._call_at(at, "POST", path, record)
                except (OSError, TimeoutError):
                    if at == self._at:
                        raise

    async def _call_at(self, at: int, method: str, path: str, record: object) -> bytes:
        """One call on the connection that is kept for them; again with another where that was closed."""
        body = b"" if record is None else record if isinstance(record, bytes) else codec.encode(record)
        line = self._calls.pop(at, None)
        kept = line is not None and not line.closed
        if line is None or line.closed:
            line = await self.fleet.dial(at)
        try:
            status, answer = await line.ask(self._head(method, path, len(body)), body)
        except (ConnectionError, TimeoutError):
            line.close()
            if not kept:
                raise
            line = await self.fleet.dial(at)
            status, answer = await line.ask(self._head(method, path, len(body)), body)
        self._calls[at] = line
        if status >= 400:
            raise ConnectionError(
                f"{method} {path.split('/')[1] if path else 'node'}: {status} {answer[:120].decode(errors='replace')}"
            )
        return answer

    async def _follow(self) -> None:
        """As the agent: register, then follow the assignments; again after a break, at the address that comes next."""
        failures = 0
        beats: list[asyncio.Task[None]] = []
        while True:
            line, spread_s = None, 0.0
            try:
                async with contextlib.AsyncExitStack() as stack:
                    if not beats:  # those that come back are spread as real ones are
                        await stack.enter_async_context(self.fleet.joining)
                    await self.call("PUT", "", self._node)
                    line = await self.dial()
                    line.on_line = self._take
                    status, answer = await line.ask(self._head("GET", "/assignments"))
                spread_s = 0.0
                if status != 200:
                    raise ConnectionError(f"assignments: {status} {answer[:120].decode(errors='replace')}")
                self.fleet.counts.streams += 1
                failures = 0
                if not beats:
                    beats = [asyncio.create_task(self._heartbeat()), asyncio.create_task(self._tunnel())]
                    if self.fleet.beats:
                        beats.append(asyncio.create_task(self._beat()))
                await line.ended
                self.fleet.counts.streams -= 1
                self.fleet.counts.lost_streams += 1
                spread_s = self._chance.uniform(0.0, self._spread_s)
            except (OSError, TimeoutError) as error:
                self.fleet.counts.error(str(error) or repr(error))
                if line is not None:
                    line.close()
            await self._pause(failures, spread_s)
            failures += 1

    async def _pause(self, failures: int, spread_s: float) -> None:
        """As the agent's wait before it dials again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(spread_s + retry_delay(failures, self._chance, REDIAL_MAX_S)):
                await self._reached.wait()

    async def _tunnel(self) -> None:
        failures = 0
        while True:
            spread_s = 0.0
            try:
                line = await self.dial()
                key = base64.b64encode(os.urandom(16)).decode()
                more = f"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
                status, _ = await line.ask(self._head("GET", "/tunnel", more=more))
                if status != 101:
                    line.close()
                    raise ConnectionError(f"tunnel: {status}")
                self.fleet.counts.tunnels += 1
                failures = 0
                self.fleet.pinged(line)
                await line.ended
                self.fleet.counts.tunnels -= 1
                spread_s = self._chance.uniform(0.0, self._spread_s)
            except (OSError, TimeoutError) as error:
                self.fleet.counts.error(str(error) or repr(error))
            await self._pause(failures, spread_s)
            failures += 1

    async def _heartbeat(self) -> None:
        """Say what is in use, as often as a real agent does."""
        await asyncio.sleep(self._chance.random() * HEARTBEAT_S)
        loop = asyncio.get_running_loop()
        while True:
            began = time.perf_counter()
            try:
                await self.tell_all("/heartbeat", self._usage or self._measure())
                self.fleet.counts.heartbeats.append(time.perf_counter() - began)
            except (OSError, TimeoutError) as error:
                self.fleet.counts.error(str(error) or repr(error))
            pulse, began = self._pulse, loop.time()
            while loop.time() < began + self._heartbeat_s - 0.01:
                cut_off = pulse is not None and pulse.cut_off(loop.time())
                if cut_off and loop.time() >= began + DEAF_S - 0.01:
                    break
                await asyncio.sleep(min(DEAF_S, max(0.01, began + self._heartbeat_s - loop.time())))

    def _measure(self) -> bytes:
        usage = tuple(
            Usage(instance=id, cpu_milli=self._chance.randrange(500), memory_bytes=self._chance.randrange(1 << 28), pids=3)
            for id, status in self.statuses.items()
            if status.phase is Phase.RUNNING
        )
        self._usage = codec.encode(Heartbeat(node=self.name, at=time.time(), cpu_milli=1_000, memory_bytes=8 << 30, usage=usage))
        return self._usage

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        pulse = Pulse(self.name, contact=Contact(boot_id=""), counter=int(time.time() * 1000))
        end = await Udp().open(("127.0.0.1", 0), lambda data, sender: pulse.receive(data, sender, loop.time()))
        pulse.send_to = end.send
        pulse.inside = f"127.0.0.1:{end.address[1]}"
        await self.ask_grant(pulse)
        self._pulse = pulse
        self.fleet.beat(pulse)
        await asyncio.sleep(ANEW_FIRST_S)
        while True:
            await self.ask_grant(pulse)
            await asyncio.sleep(ANEW_S * self._chance.uniform(0.9, 1.0))

    async def ask_grant(self, pulse: Pulse | None = None) -> None:
        """Ask for a key, and how often heartbeats are wanted."""
        pulse = pulse or self._pulse
        if pulse is None:
            return
        try:
            grant = codec.decode(await self.call("GET", "/beats"), BeatGrant)
        except (OSError, TimeoutError) as error:
            self.fleet.counts.error(str(error) or repr(error))
            return
        pulse.serve(grant, [_address(text) for text in grant.servers] or self.fleet.addresses)
        self._heartbeat_s, self._spread_s = grant.heartbeat_s, grant.spread_s

    def _take(self, line: bytes) -> None:
        if not line:
            return
        batch = _batches.decode(line)
        for assignment in batch.put:
            instance = assignment.instance
            known = self.instances.get(instance.id)
            self.instances[instance.id] = instance
            if known is None:
                self._begin(instance)
            elif instance.desired is Desired.STOP and known.desired is not Desired.STOP:
                self._say(instance, Phase.STOPPED)
        gone = list(batch.removed)
        if batch.complete:
            wanted = {assignment.instance.id for assignment in batch.put}
            gone += [id for id in self.instances if id not in wanted]
            # What was said while the connection was away may have been lost.
            self._fresh.update(self.statuses)
            self._wake.set()
            self._reached.set()
            self._reached.clear()
        for id in gone:
            self.instances.pop(id, None)
            self._fresh.discard(id)
            status = self.statuses.pop(id, None)
            self._usage = b""
            self.fleet.counts.running -= status is not None and status.ready

    def _begin(self, instance: _Instance) -> None:
        if instance.desired is Desired.STOP:
            self._say(instance, Phase.STOPPED)
            return
        self._say(instance, Phase.STARTING, soon=True)
        delay_s = self._chance.uniform(*STARTS_S)
        asyncio.get_running_loop().call_later(delay_s, self._started, instance.id)

    def _started(self, id: str) -> None:
        instance, status = self.instances.get(id), self.statuses.get(id)
        if instance is None or status is None or status.phase is not Phase.STARTING:
            return
        at = time.time()
        self._events.append(
            Event(
                id=event_id(at, new_suffix(self._chance.choice, 8)), at=at, project=instance.project,
                subject=f"instance/{id}", code="started", message="started as process 4711", node=self.name,
            )
        )  # fmt: skip
        self._say(instance, Phase.RUNNING)

    def change(self) -> bool:
        """One instance says something new: its readiness goes, and comes back."""
        ready = [id for id, status in self.statuses.items() if status.ready and self.instances[id].desired is Desired.RUN]
        if not ready:
            return False
        id = self._chance.choice(ready)
        self._put(msgspec.structs.replace(self.statuses[id], ready=False, word=self._next_word()))
        asyncio.get_running_loop().call_later(5.0, self._recover, id)
        return True

    def _recover(self, id: str) -> None:
        status = self.statuses.get(id)
        if status is not None and status.phase is Phase.RUNNING and not status.ready:
            self._put(msgspec.structs.replace(status, ready=True, word=self._next_word()))

    def _next_word(self) -> int:
        self._word += 1
        return self._word

    def _say(self, instance: _Instance, phase: Phase, *, soon: bool = False) -> None:
        now, running = time.time(), phase is Phase.RUNNING
        status = Status(
            instance=instance.id, project=instance.project, node=self.name, phase=phase, ready=running, phase_at=now,
            pid=4711 if running else None, address="10.1.2.3" if running else None, started_at=now if running else None,
            ready_at=now if running else None, image_digest="sha256:" + "0" * 64, word=self._next_word(),
        )  # fmt: skip
        self._put(status, soon=soon)

    def _put(self, status: Status, *, soon: bool = False) -> None:
        old = self.statuses.get(status.instance)
        self.fleet.counts.running += status.ready - (old is not None and old.ready)
        self.statuses[status.instance] = status
        self._usage = b""
        self._fresh.add(status.instance)
        if soon:
            asyncio.get_running_loop().call_later(LAZY_S, self._wake.set)
        else:
            self._wake.set()

    async def _report(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            failures = 0
            while self._fresh or self._events:
                sending = [self._fresh.pop() for _ in range(min(len(self._fresh), STATUSES_MAX))]
                events = [self._events.popleft() for _ in range(min(len(self._events), STATUSES_MAX))]
                statuses = [self.statuses[id] for id in sending if id in self.statuses]
                began = time.perf_counter()
                try:
                    await self.call("POST", "/statuses", {"statuses": statuses, "events": events})
                    self.fleet.counts.reports.append(time.perf_counter() - began)
                    failures = 0
                except (OSError, TimeoutError) as error:
                    self.fleet.counts.error(str(error) or repr(error))
                    self._fresh.update(sending)
                    self._events.extendleft(reversed(events))
                    await asyncio.sleep(retry_delay(failures, self._chance))
                    failures += 1


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


class Fleet:
    def __init__(self, addresses: list[tuple[str, int]], *, beats: bool, together: bool) -> None:
        self.addresses = addresses
        self.beats = beats
        self.together = together
        """All begin with the first server."""
        self.counts = Counts()
        self.joining = asyncio.Semaphore(JOINING_MAX)
        self.agents: list[Agent] = []
        self._due: list[tuple[float, int, Pulse]] = []

    async def dial(self, at: int) -> Line:
        """Connect to a server. Raises OSError."""
        host, port = self.addresses[at]
        async with asyncio.timeout(10.0):
            return (await asyncio.get_running_loop().create_connection(Line, host, port))[1]

    def beat(self, pulse: Pulse) -> None:
        """Have it beat from now on."""
        heapq.heappush(self._due, (asyncio.get_running_loop().time(), id(pulse), pulse))

    async def run_beats(self) -> None:
        """Send every beat that is due, for ever: one task, since one for each agent would cost more than the beats do."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            while self._due and self._due[0][0] <= now:
                _, number, pulse = self._due[0]
                heapq.heapreplace(self._due, (max(now + 0.001, pulse.tick(now)), number, pulse))
            await asyncio.sleep(TICK_S)

    def pinged(self, line: Line) -> None:
        """Have a tunnel pinged as a real agent does it."""
        asyncio.get_running_loop().call_later(PING_S, self._ping, line)

    def _ping(self, line: Line) -> None:
        if line.transport is not None and not line.closed:
            line.transport.write(PING)
            self.pinged(line)

    async def regrant(self) -> None:
        """Have all ask for their keys anew, as each does by itself every five minutes."""
        await asyncio.gather(*(agent.ask_grant() for agent in self.agents))

    async def churn(self, per_s: float) -> None:
        """Let so many instances a second lose their readiness for a while: two status changes each."""
        chance = random.Random(0)
        while True:
            await asyncio.sleep(chance.expovariate(per_s / 2))
            for _ in range(20):
                if chance.choice(self.agents).change():
                    break


async def main(addresses: str, first: int, count: int, *words: str) -> None:
    """`words`: `quiet`, no beats; `together`, all begin with the first server."""
    loop = asyncio.get_running_loop()
    fleet = Fleet([_address(text) for text in addresses.split(",")], beats="quiet" not in words, together="together" in words)
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    for number in range(first, first + count):
        token = (await lines.readline()).decode().strip()
        fleet.agents.append(Agent(number, token, fleet))
    tasks = [asyncio.create_task(agent.run()) for agent in fleet.agents]
    tasks.append(asyncio.create_task(fleet.run_beats()))
    churning: asyncio.Task[None] | None = None
    while line := await lines.readline():
        word, _, rest = line.decode().strip().partition(" ")
        if word == "churn":
            if churning is not None:
                churning.cancel()
            churning = asyncio.create_task(fleet.churn(float(rest))) if float(rest) else None
        if word == "regrant":
            await fleet.regrant()
        counts = fleet.counts
        said = {name: value for name, value in vars(counts).items() if name not in ("reports", "heartbeats")}
        said["instances"] = sum(len(agent.instances) for agent in fleet.agents)
        said["processor_s"] = time.process_time()
        if word == "take":  # what was measured since the last take
            said["reports"], counts.reports = counts.reports, []
            said["heartbeats"], counts.heartbeats = counts.heartbeats, []
        print(json.dumps(said), flush=True)
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
