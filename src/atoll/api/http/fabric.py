"""The fabric over HTTP: nodes join it and hear who is in it; people see it and have its keys replaced."""

from __future__ import annotations

from collections.abc import AsyncIterator

from atoll.api.http.answers import Lines
from atoll.api.http.calls import Call, Route
from atoll.api.http.machines import KEEPALIVE_S
from atoll.api.service import Need
from atoll.model import codec
from atoll.model.fabric import Fabric, FabricBatch, FabricGrant, FabricNode, FabricOffer


async def join_fabric(call: Call) -> FabricGrant:
    return await call.service.fabrics.join(call.path["node"], call.body(FabricOffer))


async def node_fabric(call: Call) -> Lines:
    return Lines(_encoded(call.service.fabrics.feed(call.path["node"], KEEPALIVE_S)))


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
