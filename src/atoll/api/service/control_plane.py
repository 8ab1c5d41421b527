"""The port `ControlPlane` in this process: what the HTTP handlers of agents and ingresses stand on, and the simulator's way in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from atoll.api.service import reports
from atoll.api.service.beat_keys import grant_of
from atoll.api.service.context import Context
from atoll.api.service.demand import Demands
from atoll.api.service.events import Allowance
from atoll.api.service.feeds import Feeds
from atoll.api.service.heartbeats import Heartbeats
from atoll.api.service.ingress_heartbeats import IngressHeartbeats
from atoll.api.service.nodes import Nodes
from atoll.api.service.secrets import Secrets
from atoll.api.service.specs import spec_of
from atoll.api.service.traffic import Traffic
from atoll.api.service.tunnels import Tunnels
from atoll.model.beats import BeatGrant
from atoll.model.errors import NotFound
from atoll.model.ports.control_plane import NEXT_STREAM, AssignmentBatch, Channel, Peers, RoutingBatch, StreamRequest
from atoll.model.records import Event, Heartbeat, Ingress, IngressHeartbeat, Instance, Node, Status
from atoll.model.traffic import DemandReport, TrafficReport
from atoll.store.cache import Held


class LocalControlPlane:
    """See `ports.control_plane.ControlPlane`. `keepalive_s` asks for empty batches, which only a connection needs."""

    def __init__(
        self,
        context: Context,
        feeds: Feeds,
        nodes: Nodes,
        secrets: Secrets,
        heartbeats: Heartbeats,
        tunnels: Tunnels,
        ingresses: IngressHeartbeats,
    ) -> None:
        self._context = context
        self._feeds = feeds
        self._nodes = nodes
        self._secrets = secrets
        self._heartbeats = heartbeats
        self._tunnels = tunnels
        self.counted = Traffic(context.clock)
        """What ingresses say goes there."""
        self._ingresses = ingresses
        self._allowance = Allowance(context.clock)
        self.wanted = Demands(context)
        """What ingresses have requests for."""

    async def register_node(self, node: Node) -> None:
        await self._nodes.register(node)

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        self._heartbeats.note(heartbeat)

    async def beat_grant(self, node: str) -> BeatGrant:
        return grant_of(self._context, node)

    def assignments(self, node: str, keepalive_s: float | None = None) -> AsyncIterator[AssignmentBatch]:
        return self._feeds.assignments(node, keepalive_s)

    async def report(self, node: str, statuses: Sequence[Status], events: Sequence[Event] = ()) -> None:
        await reports.report(self._context, node, statuses, events, self._allowance, self._feeds.had)

    async def instance_secrets(self, instance: str, node: str | None = None) -> dict[str, str]:
        """See `ControlPlane`; with `node`, only for an instance of that node."""
        held = self._find(instance, node)
        spec = spec_of(self._context.state, held.record)
        return self._secrets.reveal(held.record.project, spec) if spec is not None else {}

    def stream_requests(self, node: str) -> AsyncIterator[StreamRequest]:
        return self._tunnels.requests(node)

    async def open_stream(self, node: str, id: str) -> Channel:
        return self._tunnels.spare(node) if id == NEXT_STREAM else self._tunnels.accept(node, id)

    async def register_ingress(self, ingress: Ingress) -> None:
        await reports.register_ingress(self._context, ingress)

    def routing(self, ingress: str, keepalive_s: float | None = None) -> AsyncIterator[RoutingBatch]:
        return self._feeds.routing(keepalive_s)

    async def ingress_heartbeat(self, heartbeat: IngressHeartbeat) -> Peers:
        return await self._ingresses.note(heartbeat)

    async def traffic(self, report: TrafficReport) -> None:
        self.counted.note(report)

    async def demand(self, report: DemandReport) -> None:
        self.wanted.note(report)

    async def drained(self, ingress: str, instances: Sequence[str]) -> None:
        wanted = set(instances)
        records = self._context.state.records(Instance)
        find = {held.record.id: key for key, held in records.items() if held.record.id in wanted}
        await reports.drained(self._context, ingress, instances, find)

    def _find(self, instance: str, node: str | None) -> Held[Instance]:
        of_node = self._feeds.of_node(node) if node is not None else self._context.state.records(Instance).values()
        held = next((held for held in of_node if held.record.id == instance), None)
        if held is None:
            where = f" on node '{node}'" if node is not None else ""
            raise NotFound(f"no instance '{instance[:60]}'{where}")
        return held
