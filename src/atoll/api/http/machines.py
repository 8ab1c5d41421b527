"""The calls of agents and ingresses: the port `ControlPlane` over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from msgspec import Struct

from atoll.api.http.answers import Lines
from atoll.api.http.calls import Call, Route
from atoll.api.service import Need
from atoll.model import codec
from atoll.model.beats import BeatGrant
from atoll.model.errors import Invalid
from atoll.model.ports.control_plane import AssignmentBatch, Peers, RoutingBatch
from atoll.model.records import Event, Heartbeat, Ingress, IngressHeartbeat, Node, Status
from atoll.model.traffic import DemandReport, TrafficReport

KEEPALIVE_S = 9.0
"""After so long without news a stream carries an empty batch: at least every 10 s, and three times within an agent's patience."""
REPORT_BYTES_MAX = 8 << 20


class Report(Struct, frozen=True):
    """What a node sees."""

    statuses: tuple[Status, ...] = ()
    events: tuple[Event, ...] = ()


class DrainedReport(Struct, frozen=True):
    """Instances to which an ingress has no request left."""

    instances: tuple[str, ...]


async def put_node(call: Call) -> None:
    node = call.body(Node)
    _same("name", node.name, call.path["node"])
    await call.service.control_plane.register_node(node)


async def heartbeat(call: Call) -> None:
    beat = call.body(Heartbeat)
    _same("node", beat.node, call.path["node"])
    await call.service.control_plane.heartbeat(beat)


async def beats(call: Call) -> BeatGrant:
    return await call.service.control_plane.beat_grant(call.path["node"])


async def assignments(call: Call) -> Lines:
    return Lines(_encoded(call.service.control_plane.assignments(call.path["node"], KEEPALIVE_S)))


async def statuses(call: Call) -> None:
    report = call.body(Report)
    await call.service.control_plane.report(call.path["node"], report.statuses, report.events)


async def instance_secrets(call: Call) -> dict[str, str]:
    return await call.service.control_plane.instance_secrets(call.path["instance"], call.path["node"])


async def put_ingress(call: Call) -> None:
    ingress = call.body(Ingress)
    _same("name", ingress.name, call.path["ingress"])
    await call.service.control_plane.register_ingress(ingress)


async def routing(call: Call) -> Lines:
    return Lines(_encoded(call.service.control_plane.routing(call.path["ingress"], KEEPALIVE_S)))


async def drained(call: Call) -> None:
    await call.service.control_plane.drained(call.path["ingress"], call.body(DrainedReport).instances)


async def ingress_heartbeat(call: Call) -> Peers:
    beat = call.body(IngressHeartbeat)
    _same("ingress", beat.ingress, call.path["ingress"])
    return await call.service.control_plane.ingress_heartbeat(beat)


async def traffic(call: Call) -> None:
    report = call.body(TrafficReport)
    _same("ingress", report.ingress, call.path["ingress"])
    await call.service.control_plane.traffic(report)


async def demand(call: Call) -> None:
    report = call.body(DemandReport)
    _same("ingress", report.ingress, call.path["ingress"])
    await call.service.control_plane.demand(report)


async def _encoded(batches: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    async for batch in batches:
        yield codec.encode(batch) + b"\n"


def _same(field: str, said: str, path: str) -> None:
    if said != path:
        raise Invalid(f"{field}: the body says '{said[:60]}', the path '{path}'", field=field)


def _agent(method: str, path: str, run: Any, summary: str, answer: Any = None, **more: Any) -> Route:
    return Route(method=method, path=f"/v1/nodes/{{node}}{path}", need=Need.AGENT, run=run, summary=summary, answer=answer, **more)


def _ingress(method: str, path: str, run: Any, summary: str, answer: Any = None, **more: Any) -> Route:
    path = f"/v1/ingresses/{{ingress}}{path}"
    return Route(method=method, path=path, need=Need.INGRESS, run=run, summary=summary, answer=answer, **more)


ROUTES: tuple[Route, ...] = (
    _agent("PUT", "", put_node, "An agent describes its machine", body=Node),
    _agent("POST", "/heartbeat", heartbeat, "A sign of life", body=Heartbeat, body_bytes_max=REPORT_BYTES_MAX),
    _agent("GET", "/beats", beats, "The key for signs of life by datagram", BeatGrant),
    _agent("GET", "/assignments", assignments, "What the node runs, as it changes", AssignmentBatch, lines=True),
    _agent("POST", "/statuses", statuses, "What the node sees", body=Report, body_bytes_max=REPORT_BYTES_MAX),
    _agent("GET", "/instances/{instance}/secrets", instance_secrets, "Variable → value for one instance", dict[str, str]),
    _ingress("PUT", "", put_ingress, "An ingress describes itself", body=Ingress),
    _ingress("GET", "/routing", routing, "All routes and endpoints, as they change", RoutingBatch, lines=True),
    _ingress(
        "POST",
        "/heartbeat",
        ingress_heartbeat,
        "Who asks here, how far other sites are",
        Peers,
        body=IngressHeartbeat,
        body_bytes_max=REPORT_BYTES_MAX,
    ),
    _ingress("POST", "/drained", drained, "Which instances have no request left", body=DrainedReport),
    _ingress(
        "POST",
        "/demand",
        demand,
        "Which apps have requests and are to be awake, and how many those have that scale by them",
        body=DemandReport,
        body_bytes_max=REPORT_BYTES_MAX,
    ),
    _ingress("POST", "/traffic", traffic, "Requests to each release, counted", body=TrafficReport, body_bytes_max=REPORT_BYTES_MAX),
)
