"""A stand-in for the ingress: it follows routing, sends requests to endpoints, and says when one is drained."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

from atoll.model.errors import AtollError
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Endpoint, Ingress, Routing
from atoll.sim.faults import Faults, Life
from atoll.sim.line import Line
from atoll.sim.server import Server
from atoll.sim.story import Story

NAME = "edge"
RETRY_S = 0.5
SILENCE_S = 30.0


class SimIngress:
    """`routed` is called with each batch before it is used."""

    def __init__(
        self, server: Server, choose: random.Random, faults: Faults, story: Story, routed: Callable[[RoutingBatch], None]
    ) -> None:
        self.line = Line(server, Life(NAME), faults, story)
        self._choose = choose
        self._routed = routed
        self.routings: dict[str, Routing] = {}
        self.active: Counter[str] = Counter()
        self._told: set[str] = set()

    async def run(self) -> None:
        """Serve for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._drain())

    def pick(self, app: str) -> Endpoint | None:
        """Return an endpoint that a new request may go to."""
        routing = self.routings.get(app)
        open = [endpoint for endpoint in routing.endpoints if not endpoint.draining] if routing else []
        return self._choose.choice(open) if open else None

    async def _follow(self) -> None:
        while True:
            try:
                await self.line.register_ingress(Ingress(name=NAME, http_port=8080))
                batches = self.line.routing(NAME)
                while True:
                    async with asyncio.timeout(SILENCE_S):
                        self._apply(await anext(batches))
            except (AtollError, TimeoutError):
                await asyncio.sleep(RETRY_S)

    def _apply(self, batch: RoutingBatch) -> None:
        self._routed(batch)
        if batch.complete:
            self.routings.clear()
        for routing in batch.put:
            self.routings[f"{routing.project}/{routing.app}"] = routing
        for name in batch.removed:
            self.routings.pop(name, None)

    async def _drain(self) -> None:
        """Say what has no request any more, until it is no endpoint any more."""
        while True:
            await asyncio.sleep(RETRY_S)
            draining = [e.instance for r in self.routings.values() for e in r.endpoints if e.draining]
            idle = sorted(id for id in draining if not self.active[id])
            if idle:
                try:
                    await self.line.drained(NAME, idle)
                except AtollError:
                    continue
