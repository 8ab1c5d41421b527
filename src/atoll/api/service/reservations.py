"""Reservations: put, look, remove. What they keep out is the scheduler's matter, from the time alone."""

from __future__ import annotations

from msgspec.structs import replace

from atoll.api.service.access import SYSTEM, Caller
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.lookups import labels_by_node
from atoll.api.service.pages import page
from atoll.api.service.projects import require_project
from atoll.model import keys, stored
from atoll.model.errors import Invalid, NotFound
from atoll.model.maintenance import selects
from atoll.model.ports.store import Delete, Put, absent, unchanged
from atoll.model.reservation import RESERVATIONS_MAX, Reservation, ReservationSpec, check_reservation
from atoll.model.views import Page, ReservationView
from atoll.store.cache import Held


class Reservations:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state

    def get(self, name: str) -> ReservationView:
        """Raises NotFound."""
        return self._view(self._held(name))

    def all(self, *, limit: int, after: str = "") -> Page[ReservationView]:
        return page(self._state, Reservation, "", self._view, limit=limit, after=after)

    async def put(self, spec: ReservationSpec, *, caller: Caller = SYSTEM, request: RequestKey | None = None) -> ReservationView:
        """Make or change a reservation; without a start it begins now, or when it did. What runs there already stays.

        Safe to repeat. Raises Invalid (it contradicts itself, is over, or there are too many), NotFound (the project).
        """
        check_reservation(spec)

        def build() -> Draft[ReservationView]:
            now = self._context.clock.now()
            require_project(self._context, spec.project)
            held = self._state.get(Reservation, spec.name)
            begins = held.record.start if held is not None else now
            wanted = spec if spec.start is not None else replace(spec, start=begins)
            check_reservation(wanted)
            if wanted.end <= now:
                raise Invalid("end: the reservation is over already", field="end", mend="give a time in the future")
            if held is None and len(self._state.records(Reservation)) >= RESERVATIONS_MAX:
                mend = "remove one: atoll reserve remove NAME"
                raise Invalid(f"there are {RESERVATIONS_MAX} reservations already", mend=mend)
            if held is not None and held.record.spec == wanted:
                return Draft(answer=lambda _: self._view(held))
            made = Reservation(spec=wanted, created_at=now, by=caller.name or caller.id)
            key = keys.reservation(spec.name)
            return Draft(
                compare=[absent(key) if held is None else unchanged(key, held.revision)],
                ops=[Put(key, stored.encode(made))],
                answer=lambda revision: self._view(Held(made, revision, revision)),
            )

        return await self._context.write(ReservationView, build, request)

    async def remove(self, name: str, *, request: RequestKey | None = None) -> ReservationView:
        """Forget a reservation; others may use its nodes at once. Raises NotFound."""

        def build() -> Draft[ReservationView]:
            held = self._held(name)
            view = self._view(held)
            key = keys.reservation(name)
            return Draft(compare=[unchanged(key, held.revision)], ops=[Delete(key)], answer=lambda _: view)

        return await self._context.write(ReservationView, build, request)

    def _held(self, name: str) -> Held[Reservation]:
        held = self._state.get(Reservation, name)
        if held is None:
            raise NotFound(f"no reservation '{name[:60]}'", mend="'atoll reserve' lists them")
        return held

    def _view(self, held: Held[Reservation]) -> ReservationView:
        spec = held.record.spec
        nodes = sorted(name for name, labels in labels_by_node(self._state).items() if selects(spec.nodes, labels))
        return ReservationView(reservation=held.record, nodes=tuple(nodes[: spec.count]), revision=held.revision)
