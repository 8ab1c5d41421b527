"""What people ask of a rollout: how it stands, pause, resume, promote, abort, undo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from msgspec.structs import replace

from atoll.api.service import claims
from atoll.api.service.access import Caller
from atoll.api.service.apps import Apps
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.lookups import by_owner, owner_of
from atoll.api.service.traffic import Traffic
from atoll.model.errors import Conflict
from atoll.model.records import App, Ingress, Instance, Status
from atoll.model.rollouts import RolloutOrder, RolloutPhase, RolloutStatus
from atoll.model.states import Desired
from atoll.model.traffic import Counts
from atoll.model.views import AppView, ReleaseView, RolloutView
from atoll.store.cache import Held

Steer = Callable[[App, RolloutOrder, RolloutStatus | None], RolloutOrder]
"""From what was asked so far, and how the rollout stands, to what is asked now; raises Conflict."""


class Rollouts:
    """Every wish is written into the app's record, and is the leader's to fulfil; each is safe to repeat."""

    def __init__(self, context: Context, apps: Apps, traffic: Traffic) -> None:
        self._context = context
        self._state = context.state
        self._apps = apps
        self._traffic = traffic

    def get(self, project: str, name: str) -> RolloutView:
        """Raises NotFound."""
        view = self._apps.get(project, name)
        status = view.status.rollout if view.status is not None else None
        preview = claims.preview_of(view.app.spec, self._context.domain)
        ingress = min(self._state.records(Ingress).items(), default=None)
        url = None
        if preview is not None and ingress is not None:
            port = ingress[1].record.http_port
            url = f"http://{preview.host}{'' if port == 80 else f':{port}'}/"
        return RolloutView(
            app=view.app,
            app_status=view.status,
            status=status,
            releases=self._releases(view.app, status),
            preview=url,
            revision=view.revision,
        )

    async def pause(
        self, caller: Caller, project: str, name: str, *, if_match: int | None = None, request: RequestKey | None = None
    ) -> AppView:
        """Have nothing go on by itself. What is bad by its analysis is taken back all the same. Raises Conflict."""

        def steer(app: App, order: RolloutOrder, status: RolloutStatus | None) -> RolloutOrder:
            self._require_under_way(app, status)
            return replace(order, paused=True)

        return await self._steer(caller, project, name, "pause", steer, if_match, request)

    async def resume(
        self, caller: Caller, project: str, name: str, *, if_match: int | None = None, request: RequestKey | None = None
    ) -> AppView:
        """Go on: after a pause, past a step that waits for a person, or from the beginning after a revert. Raises Conflict."""

        def steer(app: App, order: RolloutOrder, status: RolloutStatus | None) -> RolloutOrder:
            if status is not None and status.phase is RolloutPhase.REVERTED:
                return RolloutOrder(release=app.release, attempt=status.attempt + 1)
            self._require_under_way(app, status)
            if order.paused:
                return replace(order, paused=False)
            if status is None or status.phase is not RolloutPhase.WAITING:
                raise Conflict(f"the rollout of app '{app.name}' waits for nobody", mend=f"see atoll rollout status {app.name}")
            return replace(order, step=status.step + 1)

        return await self._steer(caller, project, name, "resume", steer, if_match, request)

    async def promote(
        self, caller: Caller, project: str, name: str, *, if_match: int | None = None, request: RequestKey | None = None
    ) -> AppView:
        """Give the new release all requests, past all steps and waits, as soon as it has its instances. Raises Conflict."""

        def steer(app: App, order: RolloutOrder, status: RolloutStatus | None) -> RolloutOrder:
            if status is not None and status.phase is RolloutPhase.REVERTED:
                mend = f"begin it anew: atoll rollout resume {app.name}"
                raise Conflict(f"release {app.release} of app '{app.name}' was taken back", mend=mend)
            self._require_under_way(app, status)
            return replace(order, promoted=True, paused=False)

        return await self._steer(caller, project, name, "promote", steer, if_match, request)

    async def abort(
        self, caller: Caller, project: str, name: str, *, if_match: int | None = None, request: RequestKey | None = None
    ) -> AppView:
        """Give all requests back to the release before: at once, or as it comes back where too few of it are left.

        Raises Conflict: there is none, or nothing is under way.
        """

        def steer(app: App, order: RolloutOrder, status: RolloutStatus | None) -> RolloutOrder:
            self._require_under_way(app, status)
            return replace(order, aborted=True, paused=False)

        return await self._steer(caller, project, name, "abort", steer, if_match, request)

    async def undo(
        self, caller: Caller, project: str, name: str, *, if_match: int | None = None, request: RequestKey | None = None
    ) -> AppView:
        """Go back to the release that had all requests before this one: at once while its instances are there, else by a
        rollback. Raises Conflict, NotFound."""
        app = self._apps.get(project, name).app
        status = self._status(app)
        kept = status is not None and status.phase is RolloutPhase.KEEPING
        if not kept and not self._under_way(app, status):
            if status is not None and status.phase is RolloutPhase.REVERTED:
                raise Conflict(f"release {app.release} of app '{name}' was taken back already")
            before = status.stable if status is not None and status.stable != app.release else None
            return await self._apps.rollback(caller, project, name, before, if_match=if_match, request=request)

        def steer(app: App, order: RolloutOrder, status: RolloutStatus | None) -> RolloutOrder:
            if status is None or status.phase is not RolloutPhase.KEEPING:
                self._require_under_way(app, status)
            return replace(order, aborted=True, paused=False)

        return await self._steer(caller, project, name, "undo", steer, if_match, request)

    async def _steer(
        self, caller: Caller, project: str, name: str, what: str, steer: Steer, if_match: int | None, request: RequestKey | None
    ) -> AppView:
        def change(held: Held[App]) -> Draft[AppView]:
            app = held.record
            before = app.order if app.order is not None and app.order.release == app.release else None
            asked = steer(app, before or RolloutOrder(release=app.release), self._status(app))
            if before is not None and replace(asked, by=before.by) == before:
                return self._apps.unchanged(held)
            after = replace(app, order=replace(asked, by=caller.name or caller.id))
            return self._apps.changed(held, after, caller, f"rollout-{what}-asked", f"{what} of release {app.release}")

        return await self._apps.alter(project, name, change, if_match=if_match, request=request)

    def _status(self, app: App) -> RolloutStatus | None:
        """Return how the rollout of the wanted release stands; None where it has no status of its own yet."""
        status = self._apps.status(app)
        rollout = status.rollout if status is not None else None
        attempt = app.order.attempt if app.order is not None and app.order.release == app.release else 0
        return rollout if rollout is not None and (rollout.release, rollout.attempt) == (app.release, attempt) else None

    def _under_way(self, app: App, status: RolloutStatus | None) -> bool:
        if status is not None:
            return status.phase.under_way
        found = self._apps.status(app)
        return found is not None and found.served_release not in (0, app.release)

    def _require_under_way(self, app: App, status: RolloutStatus | None) -> None:
        if self._under_way(app, status):
            return
        found = self._apps.status(app)
        first = found is None or not found.served_release
        why = "there is no release before it" if first else "no rollout of it is under way"
        mend = f"wait, or delete it: atoll delete {app.name}" if first else f"go back with: atoll rollout undo {app.name}"
        raise Conflict(f"app '{app.name}': {why}", mend=mend)

    def _releases(self, app: App, status: RolloutStatus | None) -> tuple[ReleaseView, ...]:
        instances: Counter[int] = Counter()
        ready: Counter[int] = Counter()
        for key, held in self._state.found(Instance, by_owner, owner_of(app)).items():
            instance = held.record
            if instance.desired is Desired.RUN and not instance.standby:
                said = self._state.get(Status, key)
                instances[instance.release] += 1
                ready[instance.release] += said is not None and said.record.ready
        weights = status.weights if status is not None else {}
        recent = self._traffic.recent(f"{app.project}/{app.name}")
        heard = {number for number, (counts, _) in recent.items() if counts.requests}
        shown = {app.release, *instances, *weights, *heard}
        return tuple(
            _release(number, weights, instances[number], ready[number], *recent.get(number, (Counts(), 1.0)))
            for number in sorted(shown, reverse=True)
        )


def _release(number: int, weights: dict[int, int], instances: int, ready: int, counts: Counts, seconds: float) -> ReleaseView:
    return ReleaseView(
        release=number,
        weight=weights.get(number, 0) if weights else None,
        instances=instances,
        ready=ready,
        requests=counts.requests,
        errors=counts.errors,
        per_second=counts.requests / seconds,
        latency_p50_s=counts.quantile_s(0.5),
        latency_p99_s=counts.quantile_s(0.99),
    )
