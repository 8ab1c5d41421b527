"""A stand-in for a site's ingress: it follows routing, sends requests to endpoints, and says when one is drained."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from atoll.model.errors import AtollError
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Endpoint, Ingress, Routing
from atoll.model.traffic import Counts, ReleaseTraffic, TrafficReport
from atoll.sim.line import Line

RETRY_S = 0.5
TELL_S = 1.0
"""How often a server is told what was counted."""
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
        self.tellers: list[Line] = []
        """A line to each server, where what is counted is told: rollouts are judged by it."""
        self._counts: dict[tuple[str, int], Counts] = {}

    async def run(self) -> None:
        """Serve for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._drain())
            for line in self.tellers:
                group.create_task(self._tell(line))

    def pick(self, app: str, tried: Collection[str] = ()) -> Endpoint | None:
        """Return an endpoint that a request may go to, and that it has not tried."""
        routing = self.routings.get(app)
        open = [each for each in routing.endpoints if self.takes(each) and each.instance not in tried] if routing else []
        if routing is not None and routing.weights and open:
            open = self._of_one_release(open, routing.weights)
        return self._choose.choice(open) if open else None

    def _of_one_release(self, open: Sequence[Endpoint], weights: Mapping[int, int]) -> list[Endpoint]:
        """Return those of one release, chosen by its share; one of which nothing serves gives its share to the others."""
        releases = sorted({each.release for each in open if weights.get(each.release, 0) > 0})
        if not releases:
            return []
        (release,) = self._choose.choices(releases, [weights[each] for each in releases])
        return [each for each in open if each.release == release]

    def count(self, app: str, release: int, *, failed: bool) -> None:
        """Count a request that was answered, or broke off: a client sees a 503 then."""
        if self.tellers:
            key = (app, release)
            self._counts[key] = self._counts.get(key, Counts()) + Counts(1, int(failed))

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

    async def _tell(self, line: Line) -> None:
        """Tell one server what was counted, all of it each time: an answer may be lost."""
        said = 0
        while True:
            await asyncio.sleep(TELL_S)
            total = sum(counts.requests for counts in self._counts.values())
            if total == said:
                continue
            releases = tuple(
                ReleaseTraffic(project=app.split("/")[0], app=app.split("/")[1], release=release, counts=counts)
                for (app, release), counts in self._counts.items()
            )
            try:
                await line.traffic(TrafficReport(ingress=self.name, started=1.0, releases=releases))
                said = total
            except AtollError:
                continue

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
