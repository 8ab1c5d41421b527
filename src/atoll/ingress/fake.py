"""A control plane in memory, as far as an ingress sees one. Public: tests and benchmarks use it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from atoll.ingress.fake_feed import FakeFeed
from atoll.model.ports.control_plane import Peers, RoutingBatch
from atoll.model.records import Ingress, IngressHeartbeat, Routing
from atoll.model.traffic import DemandReport, TrafficReport


class FakeRouting(FakeFeed[RoutingBatch]):
    """Keeps the routing of apps. `available = False` breaks every call, too."""

    def __init__(self) -> None:
        super().__init__()
        self.ingresses: dict[str, Ingress] = {}
        self.drained_instances: list[str] = []
        self.reports: list[TrafficReport] = []
        self.heartbeats: list[IngressHeartbeat] = []
        self.demands: list[DemandReport] = []
        self.on_demand: Callable[[DemandReport], None] = lambda report: None
        """Called with each report of what is to be awake."""
        self.peers = Peers()
        """What every heartbeat is answered with."""
        self._routings: dict[str, Routing] = {}

    def put(self, *routings: Routing) -> None:
        """Set the routing of one or several apps, in one batch."""
        self._routings.update({f"{routing.project}/{routing.app}": routing for routing in routings})
        self._send(lambda revision: RoutingBatch(revision, False, routings))

    def remove(self, *keys: str) -> None:
        """Remove apps, each as `project/app`."""
        for key in keys:
            self._routings.pop(key, None)
        self._send(lambda revision: RoutingBatch(revision, False, removed=keys))

    async def register_ingress(self, ingress: Ingress) -> None:
        self._check()
        self.ingresses[ingress.name] = ingress

    def routing(self, ingress: str) -> AsyncIterator[RoutingBatch]:
        return self._watch(lambda: RoutingBatch(self._revision, True, tuple(self._routings.values())))

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
