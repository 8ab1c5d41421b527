"""Apps: put, scale, restart, roll back, delete, and their releases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec import UNSET
from msgspec.structs import replace

from atoll.api.service import app_releases, claims
from atoll.api.service.access import SYSTEM, Caller, check_name
from atoll.api.service.app_views import AppViews
from atoll.api.service.callers import ensure_for
from atoll.api.service.context import Context, Draft, RequestKey, check_match
from atoll.api.service.dependencies import check_dependencies, dependents_of
from atoll.api.service.events import told_by
from atoll.api.service.pages import page
from atoll.api.service.projects import require_project
from atoll.api.service.workloads import check_constraints, check_host_ports, check_public_ports, check_secrets, pin
from atoll.model import keys, stored
from atoll.model.certificates import provable
from atoll.model.errors import Conflict, Invalid, NotFound
from atoll.model.ports.store import Compare, Op, Put, absent, unchanged
from atoll.model.records import App, AppStatus, Release
from atoll.model.rollouts import RolloutOrder, RolloutPhase
from atoll.model.spec import AppSpec, Issuer, Strategy, check_app, check_gang_of
from atoll.model.spec.sources import sources_of
from atoll.model.views import AppView, Page
from atoll.store.cache import Held


class Apps:
    """What users do with apps. The caller's role has been checked; `caller` tells what may be named to them."""

    def __init__(self, context: Context, views: AppViews) -> None:
        self._context = context
        self._state = context.state
        self._views = views

    def get(self, project: str, name: str) -> AppView:
        """Raises NotFound."""
        return self._views.of(self._held(project, name))

    def all(self, project: str, *, limit: int, after: str = "") -> Page[AppView]:
        require_project(self._context, project)
        return page(self._state, App, project + "/", self._views.of, limit=limit, after=after)

    def releases(self, project: str, name: str, *, limit: int, after: str = "") -> Page[Release]:
        """Newest first; `after` is the number of the last one that was read."""
        found = app_releases.kept(self._state, self._held(project, name).record)[::-1]
        if after:
            number = app_releases.number(after)
            found = [held for held in found if held.record.number < number]
        items = tuple(held.record for held in found[:limit])
        following = str(items[-1].number) if len(found) > limit else None
        return Page(items=items, revision=self._state.revision, next=following)

    async def put(
        self, caller: Caller, spec: AppSpec, *, if_match: int | None = None, request: RequestKey | None = None
    ) -> AppView:
        """Make or change an app; the same spec again makes no new release. Safe to repeat.

        Raises Invalid, NotFound (project, secret), ImageError (not in the cell's registry), Conflict (a route is taken, the app
        is being deleted), StaleRevision.
        """
        self.check(spec)
        await ensure_for(self._context, (spec,))
        return await self._context.write(AppView, lambda: self.draft(caller, spec, if_match), request)

    def check(self, spec: AppSpec) -> None:
        """Raise Invalid for what can be told from the spec alone."""
        check_name(spec.project, "project")
        check_app(spec)
        check_constraints(spec)
        if spec.image is None:
            raise Invalid(
                "image: missing; the server does not build", field="image", mend="'atoll deploy' builds, pushes and sets it"
            )

    def draft(
        self, caller: Caller, spec: AppSpec, if_match: int | None, beside: Mapping[str, AppSpec] | None = None
    ) -> Draft[AppView]:
        """Return the write that makes or changes an app, decided from the cache as it is; `beside` are specs of the same write."""
        require_project(self._context, spec.project)
        held = self._state.get(App, f"{spec.project}/{spec.name}")
        check_match(held, if_match, f"app '{spec.name}'")
        claims.check_hosts(self._context, spec)
        self._check_certificate(spec)
        check_host_ports(self._context, spec)
        check_public_ports(self._context, spec)
        check_secrets(self._context, spec)
        check_dependencies(self._context, spec, beside or {})
        pinned = pin(self._context, caller, spec)
        drafted = self._create(caller, pinned) if held is None else self._change(caller, held, pinned)
        # None of them may be deleted in between, which is refused while something depends on it.
        needed = [f"{spec.project}/{name}" for name in spec.depends_on if name not in (beside or {})]
        there = [unchanged(keys.APPS + key, found.revision) for key in needed if (found := self._state.get(App, key)) is not None]
        return replace(drafted, compare=[*drafted.compare, *there]) if drafted.ops else drafted

    async def scale(
        self,
        project: str,
        name: str,
        replicas: int,
        *,
        caller: Caller = SYSTEM,
        if_match: int | None = None,
        request: RequestKey | None = None,
    ) -> AppView:
        """Set how many instances there are; of an app that scales by a metric the least, and 0 stops either. Safe to repeat.

        Raises Invalid (more than `scale.max`).
        """

        def change(held: Held[App]) -> Draft[AppView]:
            old = held.record
            if old.replicas == replicas:
                return Draft(answer=lambda _: self._views.of(held))
            _check_most(old.spec, replicas)
            _check_single(old.spec, replicas)
            check_gang_of(old.spec, replicas)
            app = replace(old, replicas=replicas)
            what = f"the least was {old.replicas} and is {replicas}" if app.most else f"scaled from {old.replicas} to {replicas}"
            return self.changed(held, app, caller, "app-scaled", what)

        return await self.alter(project, name, change, if_match=if_match, request=request)

    async def restart(
        self,
        project: str,
        name: str,
        *,
        caller: Caller = SYSTEM,
        if_match: int | None = None,
        request: RequestKey | None = None,
    ) -> AppView:
        """Have every instance replaced, as a rollout does. Without a request key, a repeat restarts once more.

        Raises Conflict while a release is being rolled out by shares of the requests: both sets would be replaced at once.
        """

        def change(held: Held[App]) -> Draft[AppView]:
            self._check_no_shares(held.record)
            app = replace(held.record, generation=held.record.generation + 1)
            return self.changed(held, app, caller, "app-restarted", "every instance is replaced")

        return await self.alter(project, name, change, if_match=if_match, request=request)

    async def rollback(
        self,
        caller: Caller,
        project: str,
        name: str,
        number: int | None = None,
        *,
        if_match: int | None = None,
        request: RequestKey | None = None,
    ) -> AppView:
        """Run release `number` again, or the one before the current. Raises NotFound when it is not kept, Conflict for a route.

        To an older release one goes without the steps and waits of its rollout: it has been through them.
        """

        def change(held: Held[App]) -> Draft[AppView]:
            specs = {release.record.number: release.record.spec for release in app_releases.kept(self._state, held.record)}
            numbers = sorted(specs)
            target = number or max((n for n in numbers if n < held.record.release), default=0)
            if target not in numbers:
                kept = ", ".join(map(str, numbers[-10:]))
                wanted = f"release {target}" if target else f"release before {held.record.release}"
                raise NotFound(f"app '{name}' has no {wanted}; it has {kept}", field="release")
            spec = specs[target]
            if app_releases.metric_of(spec) == app_releases.metric_of(held.record.spec):
                # How many there are is the app's and no release's, unless the release gives another metric away.
                spec = replace(spec, scale=held.record.spec.scale)
            now = held.record.spec
            spec = replace(spec, disruption=now.disruption, depends_on=now.depends_on, ingress=now.ingress)
            _check_single(spec, held.record.replicas)
            check_gang_of(spec, held.record.replicas)
            compare, ops = claims.claim(self._context, caller, held.record.spec, spec)
            app = replace(held.record, spec=spec, release=target, order=_order_back(held.record, spec, target))
            words = f"rolled back from release {held.record.release} to {target}"
            return self.changed(held, app, caller, "app-rolled-back", words, compare, ops)

        return await self.alter(project, name, change, if_match=if_match, request=request)

    async def delete(
        self,
        project: str,
        name: str,
        *,
        caller: Caller = SYSTEM,
        if_match: int | None = None,
        request: RequestKey | None = None,
    ) -> AppView:
        """Mark the app for deletion; it is gone when its last instance is. Safe to repeat until then."""

        def change(held: Held[App]) -> Draft[AppView]:
            if held.record.deleting:
                return Draft(answer=lambda _: self._views.of(held))
            dependents = dependents_of(self._context, held.record)
            if dependents:
                mend = f"delete {dependents[0]} first, or deploy it without depends_on"
                raise Conflict(f"app '{name}' is what {', '.join(dependents[:5])} depends on", mend=mend)
            app = replace(held.record, deleting=True)
            return self.changed(held, app, caller, "app-delete-asked", "is being deleted")

        return await self.alter(project, name, change, if_match=if_match, request=request, deleting=True)

    async def alter(
        self,
        project: str,
        name: str,
        change: Callable[[Held[App]], Draft[AppView]],
        *,
        if_match: int | None,
        request: RequestKey | None,
        deleting: bool = False,
    ) -> AppView:
        """Write what `change` makes of the app that is there; one that is being deleted only where `deleting` says so.

        Raises NotFound, StaleRevision, Conflict, and what `change` does.
        """

        def build() -> Draft[AppView]:
            held = self._held(project, name)
            check_match(held, if_match, f"app '{name}'")
            if held.record.deleting and not deleting:
                raise Conflict(f"app '{name}' is being deleted", mend="wait until it is gone, then deploy it again")
            return change(held)

        return await self._context.write(AppView, build, request)

    def changed(
        self,
        held: Held[App],
        app: App,
        caller: Caller,
        code: str,
        words: str,
        compare: Sequence[Compare] = (),
        ops: Sequence[Op] = (),
    ) -> Draft[AppView]:
        """Return the write that makes `app` of what is held, with the event that says who did it."""
        app = replace(app, updated_at=self._context.clock.now())
        return self._draft(app, held, list(compare), [*ops, told_by(self._context, caller, app, code, words)])

    def unchanged(self, held: Held[App]) -> Draft[AppView]:
        """Return the answer to a wish that is fulfilled already."""
        return Draft(answer=lambda _: self._views.of(held))

    def status(self, app: App) -> AppStatus | None:
        return self._views.status(app)

    def _check_no_shares(self, app: App) -> None:
        status = self.status(app)
        rollout = status.rollout if status is not None else None
        on = rollout is not None and (rollout.phase.under_way or rollout.phase is RolloutPhase.KEEPING)
        if on and rollout is not None and rollout.weight is not None and rollout.release == app.release:
            raise Conflict(
                f"app '{app.name}' is in a {app.spec.rollout.strategy} rollout",
                mend=f"end it first: atoll rollout promote {app.name}, or abort",
            )

    def _held(self, project: str, name: str) -> Held[App]:
        held = self._state.get(App, f"{project}/{name}")
        if held is None:
            require_project(self._context, project)
            raise NotFound(f"no app '{name[:60]}' in project '{project}'", mend="'atoll apps' lists them")
        return held

    def _create(self, caller: Caller, spec: AppSpec) -> Draft[AppView]:
        now = self._context.clock.now()
        app = App(
            project=spec.project,
            name=spec.name,
            spec=spec,
            release=1,
            replicas=_replicas(spec, 1),
            created_at=now,
            updated_at=now,
        )
        compare, ops = claims.claim(self._context, caller, None, spec)
        return self._draft(app, None, [*compare, absent(app_releases.key(app))], [*ops, app_releases.record(caller, app)])

    def _change(self, caller: Caller, held: Held[App], spec: AppSpec) -> Draft[AppView]:
        old = held.record
        if old.deleting:
            raise Conflict(f"app '{old.name}' is being deleted", mend="wait until it is gone, then deploy it again")
        running = max(1, old.wanted(self.status(old))) if old.sleeps else old.wanted(self.status(old))
        app = replace(old, spec=spec, replicas=_replicas(spec, running), updated_at=self._context.clock.now())
        _check_single(spec, app.replicas)
        check_gang_of(spec, app.replicas)
        compare: list[Compare] = []
        ops: list[Op] = []
        if app_releases.is_new(old.spec, spec):
            releases = app_releases.kept(self._state, old)
            self._check_ports(old, spec)
            app = replace(app, order=None, release=1 + max((release.record.number for release in releases), default=old.release))
            compare, ops = claims.claim(self._context, caller, old.spec, spec)
            compare.append(absent(app_releases.key(app)))
            ops.append(app_releases.record(caller, app))
            ops.extend(app_releases.prune(self._state, self.status(old), old, releases))
        elif app.replicas == old.replicas and spec == old.spec:
            return Draft(answer=lambda _: self._views.of(held))
        return self._draft(app, held, compare, ops)

    def _check_certificate(self, spec: AppSpec) -> None:
        """Raise Invalid where ACME is asked for and could sign none of the app's hostnames."""
        if spec.ingress is None or spec.ingress.certificate is not Issuer.ACME:
            return
        hosts = [host.host for host in claims.hosts_of(spec, self._context.domain)]
        if not any(provable(host) for host in hosts):
            raise Invalid(
                f"ingress.certificate: no public authority can sign {', '.join(hosts[:3])} over HTTP",
                field="ingress.certificate",
                mend="take certificate = 'own', or add a route with a public hostname",
            )

    def _check_ports(self, old: App, spec: AppSpec) -> None:
        """Raise Invalid where a canary would answer at another port than what serves: a share of the requests goes to one port."""
        status = self.status(old)
        served = status.served_release if status is not None else 0
        held = self._state.get(Release, keys.release(old.project, old.name, served).removeprefix(keys.RELEASES))
        if spec.rollout.strategy is not Strategy.CANARY or held is None:
            return
        before = held.record.spec
        for host in claims.hosts_of(spec, self._context.domain):
            port = before.port_named(host.port.name)
            if port is not None and (port.port, port.http2) != (host.port.port, host.port.http2):
                raise Invalid(
                    f"ports: '{host.port.name}' changes from {port.port}, and a canary shares it with the release before",
                    field="ports",
                    mend="keep its number and http2, or deploy this release with rollout.strategy = 'rolling' or 'blue-green'",
                )

    def _draft(self, app: App, held: Held[App] | None, compare: list[Compare], ops: list[Op]) -> Draft[AppView]:
        key = keys.app(app.project, app.name)
        first = absent(key) if held is None else unchanged(key, held.revision)
        return Draft(
            compare=[first, *compare],
            ops=[Put(key, stored.encode(app)), *ops],
            answer=lambda revision: self._views.of(Held(app, revision, revision)),
        )


def _order_back(old: App, spec: AppSpec, target: int) -> RolloutOrder | None:
    """An older release goes past its steps and waits; a newer one, or the same again, begins anew."""
    same = old.order is not None and old.order.release == target
    rules = spec.rollout
    if not same and rules.strategy is Strategy.ROLLING and rules.analysis is None and not rules.reverts:
        return None
    attempt = old.order.attempt + 1 if same and old.order is not None else 1
    return RolloutOrder(release=target, attempt=attempt, promoted=target < old.release)


def _replicas(spec: AppSpec, otherwise: int) -> int:
    """A spec without `scale` leaves the number as it is."""
    return otherwise if spec.scale is UNSET else spec.scale.replicas


def _check_most(spec: AppSpec, replicas: int) -> None:
    if spec.scale is UNSET:
        return
    most = spec.scale.max
    if most is not None and replicas > most:
        sources = " and ".join(sources_of(spec.scale))
        raise Invalid(
            f"replicas: {replicas} is above the app's scale.max, {most}",
            field="replicas",
            mend=f"it scales by {sources}, and this is the least; deploy it with a larger scale.max",
        )


def _check_single(spec: AppSpec, replicas: int) -> None:
    if replicas > 1 and spec.worker is not None and spec.worker.stateful:
        raise Invalid(
            f"replicas: {replicas} of a worker with durable objects or KV; it runs once, since its state is on one disk",
            field="replicas",
            mend="put what needs no state into a worker of its own, bound to this one",
        )
