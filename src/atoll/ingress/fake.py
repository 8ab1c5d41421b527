"""A control plane in memory, as far as an ingress sees one. Public: tests and benchmarks use it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from atoll.model.errors import Unavailable
from atoll.model.ports.control_plane import Peers, RoutingBatch
from atoll.model.records import Ingress, IngressHeartbeat, Routing
from atoll.model.traffic import DemandReport, TrafficReport


class FakeRouting:
    """Keeps the routing of apps; every change goes to all who watch. `available = False` breaks every call and watch."""

    def __init__(self) -> None:
        self.ingresses: dict[str, Ingress] = {}
        self.drained_instances: list[str] = []
        self.reports: list[TrafficReport] = []
        self.heartbeats: list[IngressHeartbeat] = []
        self.demands: list[DemandReport] = []
        self.on_demand: Callable[[DemandReport], None] = lambda report: None
        """Called with each report of what is to be awake."""
        self.peers = Peers()
        """What every heartbeat is answered with."""
        self.watches = 0
        """How often a watch was begun."""
        self._available = True
        self._revision = 1
        self._routings: dict[str, Routing] = {}
        self._queues: set[asyncio.Queue[RoutingBatch | None]] = set()

    @property
    def available(self) -> bool:
        return self._available

    @available.setter
    def available(self, value: bool) -> None:
        self._available = value
        if not value:
            for queue in self._queues:
                queue.put_nowait(None)

    def put(self, *routings: Routing) -> None:
        """Set the routing of one or several apps, in one batch."""
        self._routings.update({f"{routing.project}/{routing.app}": routing for routing in routings})
        self._send(put=routings)

    def remove(self, *keys: str) -> None:
        """Remove apps, each as `project/app`."""
        for key in keys:
            self._routings.pop(key, None)
        self._send(removed=keys)

    async def register_ingress(self, ingress: Ingress) -> None:
        self._check()
        self.ingresses[ingress.name] = ingress

    async def routing(self, ingress: str) -> AsyncIterator[RoutingBatch]:
        self._check()
        self.watches += 1
        queue: asyncio.Queue[RoutingBatch | None] = asyncio.Queue()
        self._queues.add(queue)
        try:
            yield RoutingBatch(self._revision, True, tuple(self._routings.values()))
            while (batch := await queue.get()) is not None:
                yield batch
            raise Unavailable("the control plane has gone away")
        finally:
            self._queues.discard(queue)

    async def drained(self, ingress: str, instances: Sequence[str]) -> None:
        self._check()
        self.drained_instances.extend(instances)

    async def traffic(self, report: TrafficReport) -> None:
        self._check()
        self.reports.append(report)

    async def demand(self, report: DemandReport) -> None:
        self._check()
        self.demands.append(report)
        self.on_demand(report)

    async def ingress_heartbeat(self, heartbeat: IngressHeartbeat) -> Peers:
        self._check()
        self.heartbeats.append(heartbeat)
        return self.peers

    def _send(self, *, put: tuple[Routing, ...] = (), removed: tuple[str, ...] = ()) -> None:
        self._revision += 1
        for queue in self._queues:
            queue.put_nowait(RoutingBatch(self._revision, False, put, removed))

    def _check(self) -> None:
        if not self._available:
            raise Unavailable("the control plane does not answer")
