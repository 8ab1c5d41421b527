"""A stand-in for a site's ingress: it follows routing, sends requests to endpoints, and says when one is drained."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection

from atoll.model.errors import AtollError
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Endpoint, Ingress, Routing
from atoll.sim.line import Line

RETRY_S = 0.5
SILENCE_S = 30.0


class SimIngress:
    """`routed` is called with each batch before it is used. A subclass that breaks a rule is a planted bug."""

    def __init__(self, name: str, site: str, line: Line, choose: random.Random, routed: Callable[[RoutingBatch], None]) -> None:
        self.name = name
        self.site = site
        self.line = line
        self._choose = choose
        self._routed = routed
        self.routings: dict[str, Routing] = {}
        self.active: Counter[str] = Counter()

    async def run(self) -> None:
        """Serve for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._drain())

    def pick(self, app: str, tried: Collection[str] = ()) -> Endpoint | None:
        """Return an endpoint that a request may go to, and that it has not tried."""
        routing = self.routings.get(app)
        open = [each for each in routing.endpoints if self.takes(each) and each.instance not in tried] if routing else []
        return self._choose.choice(open) if open else None

    def takes(self, endpoint: Endpoint) -> bool:
        """Whether new requests may go there."""
        return not endpoint.draining

    async def _follow(self) -> None:
        while True:
            try:
                await self.line.register_ingress(Ingress(name=self.name, site=self.site, http_port=8080))
                batches = self.line.routing(self.name)
                while True:
                    async with asyncio.timeout(SILENCE_S):
                        self._apply(await anext(batches))
            except (AtollError, TimeoutError):
                await asyncio.sleep(RETRY_S)

    def _apply(self, batch: RoutingBatch) -> None:
        self._routed(batch)
        if batch.complete:
            kept = {name: self.routings[name] for name in batch.kept if name in self.routings}
            self.routings.clear()
            self.routings.update(kept)
        for routing in batch.put:
            self.routings[f"{routing.project}/{routing.app}"] = routing
        for name in batch.removed:
            self.routings.pop(name, None)

    async def _drain(self) -> None:
        """Say what has no request any more, until it is no endpoint any more."""
        while True:
            await asyncio.sleep(RETRY_S)
            idle = sorted(id for id in self.draining() if not self.active[id])
            if idle:
                try:
                    await self.line.drained(self.name, idle)
                except AtollError:
                    continue

    def draining(self) -> list[str]:
        return [e.instance for r in self.routings.values() for e in r.endpoints if e.draining]
