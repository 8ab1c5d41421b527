"""Dry runs: what the scheduler would do with a spec, and what it says of an instance.

A snapshot is made for each call from the cache as it is now, beside the event loop, one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from atoll.api.service.access import check_name
from atoll.api.service.context import Context
from atoll.api.service.heartbeats import Heartbeats
from atoll.api.service.ingress_heartbeats import IngressHeartbeats
from atoll.api.service.projects import require_project
from atoll.api.service.specs import spec_of
from atoll.api.service.workloads import check_constraints
from atoll.model.errors import DeadlineExceeded, NotFound
from atoll.model.evacuation import evacuations
from atoll.model.maintenance import Maintenance
from atoll.model.records import (
    App,
    AppStatus,
    Ingress,
    Instance,
    Job,
    Node,
    NodeLiveness,
    NodePolicy,
    OwnerKind,
    Project,
    Release,
    RoundTrips,
    Site,
    Status,
)
from atoll.model.reservation import Reservation
from atoll.model.spec import AppSpec, JobSpec, Workload, check_app, check_job
from atoll.model.states import Desired
from atoll.model.views import DefragView, InstanceExplanation, PlanView
from atoll.scheduling.assembly import Records, app_owner, group_of, snapshot_from
from atoll.scheduling.budget import may_go
from atoll.scheduling.defrag import propose
from atoll.scheduling.demand import Demand, Pending, demand_of
from atoll.scheduling.dry_run import explain_instance, plan_spec
from atoll.scheduling.snapshot import Snapshot

DRY_RUN_S = 30.0
"""The longest wait for a dry run, that for others before it included."""

T = TypeVar("T")
K = TypeVar("K")


class Planning:
    def __init__(self, context: Context, heartbeats: Heartbeats, ingresses: IngressHeartbeats) -> None:
        self._context = context
        self._ingresses = ingresses
        self._heartbeats = heartbeats
        self._state = context.state
        self._one = asyncio.Lock()

    async def plan(self, spec: AppSpec | JobSpec) -> PlanView:
        """Say where the spec's instances would go; its image and secrets are not asked for. Raises Invalid, NotFound (project)."""
        check_name(spec.project, "project")
        if isinstance(spec, AppSpec):
            check_app(spec)
        else:
            check_job(spec)
        check_constraints(spec)
        require_project(self._context, spec.project)
        held = self._state.get(App, f"{spec.project}/{spec.name}")
        status = self._state.get(AppStatus, f"{spec.project}/{spec.name}")
        replicas = held.record.wanted(status.record if status is not None else None) if held is not None else 1
        numbers = [r.record.number for r in self._state.records(Release).values() if held and _same(r.record, held.record)]
        release = max(numbers, default=held.record.release if held is not None else 0) + 1
        return await self._dry(lambda snapshot: plan_spec(snapshot, spec, release=release, replicas=replicas))

    async def explain(self, project: str, id: str) -> InstanceExplanation:
        """Say what the scheduler would answer for an instance now. Raises NotFound."""
        key = f"{project}/{id}"
        held = self._state.get(Instance, key)
        if held is None:
            require_project(self._context, project)
            raise NotFound(f"no instance '{id[:60]}' in project '{project}'", mend="'atoll ps' lists them")
        instance = held.record
        spec = spec_of(self._state, instance)
        if spec is None:
            raise NotFound(f"what instance '{id}' was made from is not kept any more")
        waiting = self._waiting_beside(instance) if spec.placement.gang else 1
        return await self._dry(lambda snapshot: explain_instance(snapshot, key, instance, spec, waiting))

    async def defrag(self) -> DefragView:
        """Say which moves would free what, in all projects. Only apps' instances are looked at, within what a rollout may take
        away of each at a time."""
        instances = {key: held.record for key, held in self._state.records(Instance).items()}
        movable = {
            key
            for key, one in instances.items()
            if one.node is not None and one.owner_kind is OwnerKind.APP and one.desired is Desired.RUN and not one.standby
        }
        waiting = [(key, one) for key, one in instances.items() if one.node is None and one.desired is Desired.RUN]
        demands: dict[str, Demand] = {}
        for one in instances.values():
            spec = spec_of(self._state, one) if (group := group_of(one)) not in demands else None
            if spec is not None:
                demands[group] = demand_of(spec)
        budgets = {app_owner(key): self._budget(key) for key in self._state.records(App)}
        pending = [
            Pending(id=key, group=group_of(one), demand=demands[group_of(one)], created_at=one.created_at)
            for key, one in waiting
            if group_of(one) in demands and not one.standby
        ]
        return await self._dry(lambda snapshot: propose(snapshot, demands, movable, lambda owner: budgets.get(owner, 0), pending))

    def _budget(self, key: str) -> int:
        """Return how many of an app may be away at a time, less those that are."""
        app = self._state.records(App)[key].record
        held = self._state.get(AppStatus, key)
        status = held.record if held is not None else None
        wanted = app.wanted(status)
        return max(0, may_go(app.spec, wanted, min(wanted, status.ready if status is not None else 0)))

    def _waiting_beside(self, instance: Instance) -> int:
        """Return how many of the instance's group, itself among them, wait for a node."""
        group = group_of(instance)
        held = (other.record for other in self._state.records(Instance).values())
        return sum(other.node is None and other.desired is Desired.RUN and group_of(other) == group for other in held)

    async def _dry(self, run: Callable[[Snapshot], T]) -> T:
        try:
            async with asyncio.timeout(DRY_RUN_S), self._one:
                records, specs = self._records()
                return await asyncio.to_thread(lambda: run(snapshot_from(records, lambda i: specs.get(group_of(i)))))
        except TimeoutError:
            raise DeadlineExceeded("the dry run took too long", mend="try again in a moment") from None

    def _records(self) -> tuple[Records, dict[str, Workload | None]]:
        """Return copies, all of one moment, that a thread may read."""

        def plain(kind: type[K]) -> dict[str, K]:
            return {key: held.record for key, held in self._state.records(kind).items()}

        records = Records(
            nodes=plain(Node),
            policies=plain(NodePolicy),
            liveness=plain(NodeLiveness),
            instances=plain(Instance),
            statuses=plain(Status),
            app_statuses=plain(AppStatus),
            projects=plain(Project),
            evacuations=evacuations(plain(Node), plain(NodePolicy), plain(Maintenance).values(), self._context.clock.now()),
            jobs=plain(Job),
            reservations=plain(Reservation),
            now=self._context.clock.now(),
            sites=plain(Site),
            round_trips=plain(RoundTrips),
            ingresses=plain(Ingress),
            ingress_heartbeats=dict(self._ingresses.all()),
            images={name: beat.images for name, beat in self._heartbeats.all().items()},
        )
        specs: dict[str, Workload | None] = {}
        for instance in records.instances.values():
            group = group_of(instance)
            if group not in specs:
                specs[group] = spec_of(self._state, instance)
        return records, specs


def _same(release: Release, app: App) -> bool:
    return (release.project, release.app) == (app.project, app.name)
