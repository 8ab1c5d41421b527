"""The line between a process and one server after another: slow, lossy, sometimes cut. Implements `ControlPlane`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from atoll.api.service.service import Service
from atoll.model.beats import BeatGrant
from atoll.model.errors import AtollError, Unavailable
from atoll.model.ports.control_plane import AssignmentBatch, Channel, Peers, RoutingBatch, StreamRequest
from atoll.model.records import Event, Heartbeat, Ingress, IngressHeartbeat, Node, Status
from atoll.model.traffic import DemandReport, TrafficReport
from atoll.sdk.onward import Onward
from atoll.sim.faults import Faults, Life
from atoll.sim.net import Net
from atoll.sim.server import Server, check_serving
from atoll.sim.story import Story

T = TypeVar("T")
KEEPALIVE_S = 10.0
BATCH_LATE_S = 4.0
PATIENCE_S = 6.0
"""The longest that a caller waits for an answer that does not come."""
AGAIN_LATE_S = 5.0
"""A request that arrives twice does so within so long."""


class Line:
    """One end's line, at `place`; it belongs to `life`, the process at that end."""

    def __init__(
        self,
        place: str,
        servers: Sequence[Server],
        net: Net,
        life: Life,
        faults: Faults,
        story: Story,
        choose: random.Random,
    ) -> None:
        self.place = place
        self._servers = servers
        self._net = net
        self._life = life
        self._faults = faults
        self._story = story
        self._choose = choose
        self._at = choose.randrange(len(servers))
        self._routed = Onward()

    @property
    def server(self) -> Server:
        """The server that is asked now."""
        return self._servers[self._at]

    def _move(self) -> None:
        """Ask another server from now on."""
        if len(self._servers) > 1:
            self._at = (self._at + 1) % len(self._servers)
            self._story.mark("line: another server is asked")

    def reaches_any(self) -> bool:
        """Whether some server that serves is reached, and answers."""
        return any(
            server.service is not None and not server.paused and self._net.talk(self.place, server.name) for server in self._servers
        )

    async def call(self, call: Callable[[Service], Awaitable[T]]) -> T:
        """Make one call. Raises Unavailable when it or its answer is lost."""
        try:
            return await self._call(call)
        except Unavailable:
            self._move()
            raise

    async def _call(self, call: Callable[[Service], Awaitable[T]]) -> T:
        self._life.check()
        server = self.server
        await self._faults.pause()
        self._life.check()
        if not self._net.reaches(self.place, server.name):
            await self._lose_patience()
            raise Unavailable("the server cannot be reached")
        service = check_serving(server)
        if self._faults.hit(self._faults.profile.lost):
            self._story.mark("line: request lost")
            raise Unavailable("the request was lost")
        if self._faults.hit(self._faults.profile.repeated):
            server.spawn(self._again(server, call))
        result = await self._before_the_end(server, _awaited(call, service))
        await self._faults.pause()
        self._life.check()
        if not self._net.reaches(server.name, self.place) or self._faults.hit(self._faults.profile.lost_reply):
            self._story.mark("line: reply lost")
            raise Unavailable("the reply was lost")
        return result

    async def _again(self, server: Server, call: Callable[[Service], Awaitable[T]]) -> None:
        """Let the same request arrive once more, later: behind others that were made after it."""
        await self._faults.dawdle(AGAIN_LATE_S)
        self._story.mark("line: request repeated")
        try:
            await call(check_serving(server))
        except AtollError:
            return  # nobody hears the answer

    async def _lose_patience(self) -> None:
        self._story.mark("line: no answer")
        await asyncio.sleep(self._choose.random() * PATIENCE_S)

    async def _before_the_end(self, server: Server, work: Coroutine[Any, Any, T]) -> T:
        """Let the server do it. Raises Unavailable when the connection breaks or falls silent; it may go on there."""
        task = server.spawn(work)
        with self._net.connection(self.place, server.name) as broken, server.life.ending() as ended:
            ends: set[asyncio.Future[Any]] = {task, broken, ended}
            try:
                while not any(end.done() for end in ends):
                    await asyncio.wait(ends, timeout=2 * PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
                    if server.paused or not self._net.talk(self.place, server.name):
                        break
            except asyncio.CancelledError:
                if self._choose.random() < 0.5:
                    task.cancel()
                raise
        if task.done() and not task.cancelled():
            return task.result()
        raise Unavailable("the connection broke")

    async def _stream(
        self, open: Callable[[Service], AsyncIterator[T]], check: Callable[[T], None] | None = None
    ) -> AsyncIterator[T]:
        try:
            async for batch in self._batches(open):
                if check is not None:
                    check(batch)
                yield batch
        except Unavailable:
            self._move()
            raise

    async def _batches(self, open: Callable[[Service], AsyncIterator[T]]) -> AsyncIterator[T]:
        self._life.check()
        server = self.server
        await self._faults.pause()
        if not self._net.talk(self.place, server.name):
            await self._lose_patience()
            raise Unavailable("the server cannot be reached")
        batches = open(check_serving(server))
        life = server.life
        step: asyncio.Task[T] | None = None
        try:
            with self._net.connection(self.place, server.name) as broken, life.ending() as ended:
                while True:
                    step = server.spawn(_next(batches))
                    # Without a deadline: who listens has one, since a connection can always fall silent.
                    ends: set[asyncio.Future[Any]] = {step, broken, ended}
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                    if broken.done() or not life.alive or not step.done():
                        raise Unavailable("the connection broke")
                    batch = step.result()
                    await self._faults.pause()
                    if self._faults.hit(self._faults.profile.slow_watch):
                        self._story.mark("line: batch late")
                        await self._faults.dawdle(BATCH_LATE_S)
                    if self._faults.hit(self._faults.profile.lost):
                        self._story.mark("line: stream cut")
                        raise Unavailable("the connection broke")
                    await self._net.arrives(server.name, self.place)
                    self._life.check()
                    if broken.done() or not life.alive:
                        raise Unavailable("the connection broke")
                    yield batch
        finally:
            if step is not None and not step.done():
                step.cancel()
                if not server.paused:
                    await asyncio.gather(step, return_exceptions=True)
            if step is None or step.done():
                await batches.aclose()  # type: ignore[attr-defined]

    async def register_node(self, node: Node) -> None:
        await self.call(lambda service: service.control_plane.register_node(node))

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        await self.call(lambda service: service.control_plane.heartbeat(heartbeat))

    async def beat_grant(self, node: str) -> BeatGrant:
        return await self.call(lambda service: service.control_plane.beat_grant(node))

    def assignments(self, node: str) -> AsyncIterator[AssignmentBatch]:
        return self._stream(lambda service: service.control_plane.assignments(node, KEEPALIVE_S))

    async def report(self, node: str, statuses: Sequence[Status], events: Sequence[Event] = ()) -> None:
        await self.call(lambda service: service.control_plane.report(node, statuses, events))

    async def instance_secrets(self, instance: str) -> dict[str, str]:
        return await self.call(lambda service: service.control_plane.instance_secrets(instance))

    def stream_requests(self, node: str) -> AsyncIterator[StreamRequest]:
        return self._stream(lambda service: service.control_plane.stream_requests(node))

    async def open_stream(self, node: str, id: str) -> Channel:
        return await self.call(lambda service: service.control_plane.open_stream(node, id))

    async def register_ingress(self, ingress: Ingress) -> None:
        await self.call(lambda service: service.control_plane.register_ingress(ingress))

    def routing(self, ingress: str) -> AsyncIterator[RoutingBatch]:
        return self._stream(lambda service: service.control_plane.routing(ingress, KEEPALIVE_S), self._routed.take)

    async def demand(self, report: DemandReport) -> None:
        await self.call(lambda service: service.control_plane.demand(report))

    async def traffic(self, report: TrafficReport) -> None:
        await self.call(lambda service: service.control_plane.traffic(report))

    async def ingress_heartbeat(self, heartbeat: IngressHeartbeat) -> Peers:
        return await self.call(lambda service: service.control_plane.ingress_heartbeat(heartbeat))

    async def drained(self, ingress: str, instances: Sequence[str]) -> None:
        await self.call(lambda service: service.control_plane.drained(ingress, instances))


async def _awaited(call: Callable[[Service], Awaitable[T]], service: Service) -> T:
    """Begin the call only as its server."""
    return await call(service)


async def _next(batches: AsyncIterator[T]) -> T:
    return await anext(batches)
