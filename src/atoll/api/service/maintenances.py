"""Windows of maintenance: put, look, remove. What they do is worked out by the leader, from the time alone."""

from __future__ import annotations

from atoll.api.service.access import SYSTEM, Caller
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.lookups import labels_by_node
from atoll.api.service.pages import page
from atoll.model import keys, stored
from atoll.model.errors import Invalid, NotFound
from atoll.model.maintenance import MAINTENANCES_MAX, Maintenance, MaintenanceSpec, check_maintenance, selects, window_at
from atoll.model.ports.store import Delete, Put, absent, unchanged
from atoll.model.views import MaintenanceView, Page
from atoll.store.cache import Held


class Maintenances:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state

    def get(self, name: str) -> MaintenanceView:
        """Raises NotFound."""
        return self._view(self._held(name))

    def all(self, *, limit: int, after: str = "") -> Page[MaintenanceView]:
        return page(self._state, Maintenance, "", self._view, limit=limit, after=after)

    async def put(self, spec: MaintenanceSpec, *, caller: Caller = SYSTEM, request: RequestKey | None = None) -> MaintenanceView:
        """Make or change a window. Safe to repeat. Raises Invalid: it contradicts itself, is over, or there are too many."""
        check_maintenance(spec)

        def build() -> Draft[MaintenanceView]:
            now = self._context.clock.now()
            if window_at(spec, now) is None:
                raise Invalid("start: the window is over already", field="start", mend="give a time in the future")
            held = self._state.get(Maintenance, spec.name)
            if held is None and len(self._state.records(Maintenance)) >= MAINTENANCES_MAX:
                mend = "remove one: atoll maintenance remove NAME"
                raise Invalid(f"there are {MAINTENANCES_MAX} windows of maintenance already", mend=mend)
            if held is not None and held.record.spec == spec:
                return Draft(answer=lambda _: self._view(held))
            made = Maintenance(spec=spec, created_at=now, by=caller.name or caller.id)
            key = keys.maintenance(spec.name)
            return Draft(
                compare=[absent(key) if held is None else unchanged(key, held.revision)],
                ops=[Put(key, stored.encode(made))],
                answer=lambda revision: self._view(Held(made, revision, revision)),
            )

        return await self._context.write(MaintenanceView, build, request)

    async def remove(self, name: str, *, request: RequestKey | None = None) -> MaintenanceView:
        """Forget a window; its nodes are used again at once. Raises NotFound."""

        def build() -> Draft[MaintenanceView]:
            held = self._held(name)
            key = keys.maintenance(name)
            view = self._view(held)
            return Draft(compare=[unchanged(key, held.revision)], ops=[Delete(key)], answer=lambda _: view)

        return await self._context.write(MaintenanceView, build, request)

    def _held(self, name: str) -> Held[Maintenance]:
        held = self._state.get(Maintenance, name)
        if held is None:
            raise NotFound(f"no maintenance '{name[:60]}'", mend="'atoll maintenance' lists them")
        return held

    def _view(self, held: Held[Maintenance]) -> MaintenanceView:
        spec = held.record.spec
        nodes = sorted(name for name, labels in labels_by_node(self._state).items() if selects(spec.nodes, labels))
        window = window_at(spec, self._context.clock.now())
        return MaintenanceView(maintenance=held.record, window=window, nodes=tuple(nodes), revision=held.revision)
