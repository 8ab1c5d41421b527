"""The fabric over HTTP: nodes join it and hear who is in it; people see it and have its keys replaced."""

from __future__ import annotations

from collections.abc import AsyncIterator

from atoll.api.http.answers import Lines
from atoll.api.http.calls import Call, Query, Route
from atoll.api.http.machines import KEEPALIVE_S
from atoll.api.service import Need, authorize
from atoll.model import codec
from atoll.model.errors import Invalid
from atoll.model.fabric import Fabric, FabricBatch, FabricGrant, FabricNode, FabricOffer, FabricPaths, ReachView
from atoll.model.flows import Flows


async def join_fabric(call: Call) -> FabricGrant:
    return await call.service.fabrics.join(call.path["node"], call.body(FabricOffer))


async def node_fabric(call: Call) -> Lines:
    return Lines(_encoded(call.service.fabrics.feed(call.path["node"], KEEPALIVE_S)))


async def fabric_paths(call: Call) -> None:
    paths = call.body(FabricPaths)
    if paths.node != call.path["node"]:
        raise Invalid(f"node: the body says '{paths.node[:60]}', the path '{call.path['node']}'", field="node")
    await call.service.fabrics.tell_paths(paths.node, paths)


async def check_reach(call: Call) -> ReachView:
    project = call.path["project"]
    other = call.query("to_project") or project
    authorize(call.caller, Need.READ, project=other)
    source, target, port = call.query("from") or "", call.query("to") or "", call.query("port") or ""
    if not source or not target:
        raise Invalid("from, to: name an app, a job or an instance", field="from" if not source else "to")
    if not port.isascii() or not port.isdecimal() or not 0 < int(port[:6]) < 65_536:
        raise Invalid(f"port: {port[:40]!r} is no port", field="port")
    protocol = call.query("protocol") or "tcp"
    if protocol not in ("tcp", "udp"):
        raise Invalid(f"protocol: {protocol[:40]!r} is not tcp or udp", field="protocol")
    return call.service.fabrics.reach(project, source, target, int(port), protocol, other)


async def project_flows(call: Call) -> Flows:
    return call.service.nodes.flows(call.path["project"])


async def fabric_nodes(call: Call) -> tuple[FabricNode, ...]:
    return call.service.fabrics.nodes()


async def rotate_fabric_keys(call: Call) -> Fabric:
    return await call.service.fabrics.rotate()


async def _encoded(batches: AsyncIterator[FabricBatch]) -> AsyncIterator[bytes]:
    async for batch in batches:
        yield codec.encode(batch) + b"\n"


_OF_NODE = "/v1/nodes/{node}/fabric"
ROUTES: tuple[Route, ...] = (
    Route(
        method="PUT",
        path=_OF_NODE,
        need=Need.AGENT,
        run=join_fabric,
        summary="A node joins the fabric, or tells news of itself",
        answer=FabricGrant,
        body=FabricOffer,
    ),
    Route(
        method="GET",
        path=_OF_NODE,
        need=Need.AGENT,
        run=node_fabric,
        summary="Other nodes and the members of the node's projects, as they change",
        answer=FabricBatch,
        lines=True,
    ),
    Route(
        method="PUT",
        path=f"{_OF_NODE}/paths",
        need=Need.AGENT,
        run=fabric_paths,
        summary="What a node found of its ways to others",
        body=FabricPaths,
    ),
    Route(
        method="GET",
        path="/v1/projects/{project}/reach",
        need=Need.READ,
        run=check_reach,
        summary="Whether one app reaches a port of another, and what stops it",
        answer=ReachView,
        query=(
            Query("from", "an app, a job or an instance"),
            Query("to", "likewise"),
            Query("port", "of the target", {"type": "integer", "minimum": 1, "maximum": 65_535}),
            Query("protocol", "tcp or udp; tcp where it is left out"),
            Query("to_project", "the target's project, if another"),
        ),
    ),
    Route(
        method="GET",
        path="/v1/projects/{project}/flows",
        need=Need.READ,
        run=project_flows,
        summary="What apps sent each other, and what was refused and why, as nodes counted it",
        answer=Flows,
    ),
    Route(
        method="GET",
        path="/v1/fabric",
        need=Need.ADMIN,
        run=fabric_nodes,
        summary="The fabric's nodes",
        answer=tuple[FabricNode, ...],
    ),
    Route(
        method="POST",
        path="/v1/fabric/rotate-keys",
        need=Need.ADMIN,
        run=rotate_fabric_keys,
        summary="Have every node make a new key",
        answer=Fabric,
    ),
)
