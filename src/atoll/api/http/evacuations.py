"""The calls that take nodes out of use: drains, and windows of maintenance."""

from __future__ import annotations

from atoll.api.http.calls import Call, Route
from atoll.api.http.users import PAGED
from atoll.api.service import Need
from atoll.model.errors import Invalid
from atoll.model.maintenance import MaintenanceSpec
from atoll.model.views import DrainRequest, DrainView, MaintenanceView, NodeView, Page

_DRAIN = "/v1/nodes/{node}/drain"
_ONE = "/v1/maintenances/{maintenance}"


async def get_drain(call: Call) -> DrainView:
    return call.service.drains.get(call.path["node"], call.caller)


async def drain_node(call: Call) -> NodeView:
    wish = call.body(DrainRequest) if call.has_body else DrainRequest()
    return await call.service.drains.start(call.path["node"], wish, caller=call.caller, request=call.request_key)


async def undrain_node(call: Call) -> NodeView:
    return await call.service.drains.undo(call.path["node"], request=call.request_key)


async def list_maintenances(call: Call) -> Page[MaintenanceView]:
    return call.service.maintenances.all(limit=call.limit, after=call.after)


async def get_maintenance(call: Call) -> MaintenanceView:
    return call.service.maintenances.get(call.path["maintenance"])


async def put_maintenance(call: Call) -> MaintenanceView:
    spec = call.body(MaintenanceSpec)
    if spec.name != call.path["maintenance"]:
        raise Invalid(f"name: the body says '{spec.name}', the path '{call.path['maintenance']}'", field="name")
    return await call.service.maintenances.put(spec, caller=call.caller, request=call.request_key)


async def remove_maintenance(call: Call) -> MaintenanceView:
    return await call.service.maintenances.remove(call.path["maintenance"], request=call.request_key)


ROUTES: tuple[Route, ...] = (
    Route(
        method="GET",
        path=_DRAIN,
        need=Need.READ,
        run=get_drain,
        summary="How far a node's drain, or the emptying before its maintenance, has come",
        answer=DrainView,
    ),
    Route(
        method="POST",
        path=_DRAIN,
        need=Need.ADMIN,
        run=drain_node,
        summary="Have everything leave a node, within budgets until a deadline",
        body=DrainRequest,
        answer=NodeView,
        repeatable=True,
    ),
    Route(
        method="POST",
        path="/v1/nodes/{node}/undrain",
        need=Need.ADMIN,
        run=undrain_node,
        summary="Undo a drain",
        answer=NodeView,
        repeatable=True,
    ),
    Route(
        method="GET",
        path="/v1/maintenances",
        need=Need.READ,
        run=list_maintenances,
        summary="Windows of maintenance",
        answer=Page[MaintenanceView],
        query=PAGED,
    ),
    Route(method="GET", path=_ONE, need=Need.READ, run=get_maintenance, summary="A window of maintenance", answer=MaintenanceView),
    Route(
        method="PUT",
        path=_ONE,
        need=Need.ADMIN,
        run=put_maintenance,
        summary="Make or change a window of maintenance",
        body=MaintenanceSpec,
        answer=MaintenanceView,
        repeatable=True,
    ),
    Route(
        method="DELETE",
        path=_ONE,
        need=Need.ADMIN,
        run=remove_maintenance,
        summary="Forget a window of maintenance",
        answer=MaintenanceView,
        repeatable=True,
    ),
)
