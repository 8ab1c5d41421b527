"""The calls that keep nodes, or room on them, for one project."""

from __future__ import annotations

from atoll.api.http.calls import Call, Route
from atoll.api.http.users import PAGED
from atoll.api.service import Need
from atoll.model.errors import Invalid
from atoll.model.reservation import ReservationSpec
from atoll.model.views import Page, ReservationView

_ONE = "/v1/reservations/{reservation}"


async def list_reservations(call: Call) -> Page[ReservationView]:
    return call.service.reservations.all(limit=call.limit, after=call.after)


async def get_reservation(call: Call) -> ReservationView:
    return call.service.reservations.get(call.path["reservation"])


async def put_reservation(call: Call) -> ReservationView:
    spec = call.body(ReservationSpec)
    if spec.name != call.path["reservation"]:
        raise Invalid(f"name: the body says '{spec.name}', the path '{call.path['reservation']}'", field="name")
    return await call.service.reservations.put(spec, caller=call.caller, request=call.request_key)


async def remove_reservation(call: Call) -> ReservationView:
    return await call.service.reservations.remove(call.path["reservation"], request=call.request_key)


ROUTES: tuple[Route, ...] = (
    Route(
        method="GET",
        path="/v1/reservations",
        need=Need.READ,
        run=list_reservations,
        summary="What is reserved, for whom, and until when",
        answer=Page[ReservationView],
        query=PAGED,
    ),
    Route(method="GET", path=_ONE, need=Need.READ, run=get_reservation, summary="A reservation", answer=ReservationView),
    Route(
        method="PUT",
        path=_ONE,
        need=Need.ADMIN,
        run=put_reservation,
        summary="Make or change a reservation",
        body=ReservationSpec,
        answer=ReservationView,
        repeatable=True,
    ),
    Route(
        method="DELETE",
        path=_ONE,
        need=Need.ADMIN,
        run=remove_reservation,
        summary="Forget a reservation",
        answer=ReservationView,
        repeatable=True,
    ),
)
