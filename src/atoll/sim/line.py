"""The line between an agent or an ingress and the server: slow, lossy, and sometimes cut. Implements `ControlPlane`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from atoll.api.service.service import Service
from atoll.model.beats import BeatGrant
from atoll.model.errors import AtollError, Unavailable
from atoll.model.ports.control_plane import AssignmentBatch, Channel, Peers, RoutingBatch, StreamRequest
from atoll.model.records import Event, Heartbeat, Ingress, IngressHeartbeat, Node, Status
from atoll.model.traffic import TrafficReport
from atoll.sim.faults import Faults, Life
from atoll.sim.server import Server
from atoll.sim.story import Story

T = TypeVar("T")
KEEPALIVE_S = 10.0
BATCH_LATE_S = 4.0


class Line:
    """One end's line; it belongs to `life`, the process at that end. `cut` breaks it until `mend`."""

    def __init__(self, server: Server, life: Life, faults: Faults, story: Story) -> None:
        self._server = server
        self._life = life
        self._faults = faults
        self._story = story
        self._broken = asyncio.Event()

    @property
    def is_cut(self) -> bool:
        return self._broken.is_set()

    def cut(self) -> None:
        self._broken.set()

    def mend(self) -> None:
        self._broken.clear()

    async def call(self, call: Callable[[Service], Awaitable[T]]) -> T:
        """Make one call. Raises Unavailable when it or its answer is lost."""
        self._life.check()
        await self._faults.pause()
        service = self._service()
        if self._faults.hit(self._faults.profile.lost):
            self._story.mark("line: request lost")
            raise Unavailable("the request was lost")
        result = await self._before_the_end(call(service))
        await self._faults.pause()
        self._life.check()
        if self._broken.is_set() or self._faults.hit(self._faults.profile.lost_reply):
            self._story.mark("line: reply lost")
            raise Unavailable("the reply was lost")
        return result

    def _service(self) -> Service:
        self._life.check()
        if self._broken.is_set() or self._server.service is None:
            raise Unavailable("the server cannot be reached")
        return self._server.service

    async def _before_the_end(self, awaitable: Awaitable[T]) -> T:
        """Await it; Unavailable when the line breaks or the server dies first."""
        work = asyncio.ensure_future(awaitable)
        ends = [asyncio.ensure_future(event.wait()) for event in (self._server.life.ended, self._broken)]
        try:
            await asyncio.wait({work, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Unavailable("the connection broke")
            return work.result()
        finally:
            for task in (work, *ends):
                task.cancel()
            await asyncio.gather(work, *ends, return_exceptions=True)

    async def _stream(self, open: Callable[[Service], AsyncIterator[T]]) -> AsyncIterator[T]:
        await self._faults.pause()
        batches = open(self._service())
        try:
            while True:
                batch = await self._before_the_end(anext(batches))
                await self._faults.pause()
                if self._faults.hit(self._faults.profile.slow_watch):
                    self._story.mark("line: batch late")
                    await self._faults.dawdle(BATCH_LATE_S)
                if self._faults.hit(self._faults.profile.lost):
                    self._story.mark("line: stream cut")
                    raise Unavailable("the connection broke")
                self._service()
                yield batch
        finally:
            await batches.aclose()  # type: ignore[attr-defined]

    async def register_node(self, node: Node) -> None:
        await self.call(lambda service: service.control_plane.register_node(node))

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        await self.call(lambda service: service.control_plane.heartbeat(heartbeat))

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
        return self._stream(lambda service: service.control_plane.routing(ingress, KEEPALIVE_S))

    async def traffic(self, report: TrafficReport) -> None:
        await self.call(lambda service: service.control_plane.traffic(report))

    async def ingress_heartbeat(self, heartbeat: IngressHeartbeat) -> Peers:
        return await self.call(lambda service: service.control_plane.ingress_heartbeat(heartbeat))

    async def drained(self, ingress: str, instances: Sequence[str]) -> None:
        await self.call(lambda service: service.control_plane.drained(ingress, instances))
