"""The calls about the brake on giving up nodes."""

from __future__ import annotations

from atoll.api.http.calls import Call, Route
from atoll.api.service import Need
from atoll.model.views import BrakeView


async def get_brake(call: Call) -> BrakeView:
    return call.service.brakes.get()


async def release_brake(call: Call) -> BrakeView:
    return await call.service.brakes.release(caller=call.caller, request=call.request_key)


ROUTES: tuple[Route, ...] = (
    Route(
        method="GET",
        path="/v1/brake",
        need=Need.READ,
        run=get_brake,
        summary="Whether nodes that do not answer are kept from being given up, since too many do not",
        answer=BrakeView,
    ),
    Route(
        method="POST",
        path="/v1/brake/release",
        need=Need.ADMIN,
        run=release_brake,
        summary="Have them given up, and what they ran replaced",
        answer=BrakeView,
        repeatable=True,
    ),
)
