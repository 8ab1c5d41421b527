"""Dry runs: what the scheduler would do with a spec, and what it says of an instance.

They work on a copy of what the scheduler knows (`live`), or where there is none on a snapshot that is made from the cache, one at a
time. In a large cell either takes a while, and then one serves all dry runs for ten times as long: together they never cost more
than a tenth of a core or so, and say how it was a moment ago.

What is quick on a copy is done at once, and all else in a thread. But who computes in a thread keeps the event loop waiting after
each of its reads and writes, and where there are thousands of nodes it has tens of thousands of them in a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from msgspec import UNSET
from msgspec.structs import replace

from atoll.api.service.access import SYSTEM, Caller, check_name
from atoll.api.service.context import Context
from atoll.api.service.heartbeats import Heartbeats
from atoll.api.service.ingress_heartbeats import IngressHeartbeats
from atoll.api.service.projects import require_project
from atoll.api.service.specs import spec_of
from atoll.api.service.workloads import check_constraints, check_host_ports, check_public_ports
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
from atoll.model.spec import AppSpec, JobSpec, NearKind, Workload, check_app, check_job
from atoll.model.states import Desired
from atoll.model.views import DefragView, Explanation, InstanceExplanation, KeptFor, PlanView
from atoll.scheduling.assembly import Records, app_owner, complete, group_of, snapshot_from
from atoll.scheduling.budget import may_go
from atoll.scheduling.defrag import propose
from atoll.scheduling.demand import Demand, Pending, demand_of
from atoll.scheduling.dry_run import explain_instance, plan_spec
from atoll.scheduling.snapshot import Snapshot
from atoll.store.cache import Held
from atoll.store.index import by_project

DRY_RUN_S = 30.0
"""The longest wait for a dry run, that for others before it included."""

KEPT_FROM_S = 0.25
"""A snapshot that took less than this to make is made anew for each dry run."""
COPY_KEPT_FROM_S = 0.005
"""The same of a copy, while which nothing else can be done."""
KEPT_TIMES = 10.0
"""One that took longer is used for so many times as long as it took."""
KEPT_S_MAX = 30.0
QUICK_MAX = 50
"""So many instances are planned without a thread, on a copy: some milliseconds on 5,000 nodes."""

Live = Callable[[Snapshot | None], Snapshot | None]
"""Returns a copy of what the scheduler plans on, which may use parts of the last one that it is given; None where there is none."""

T = TypeVar("T")
K = TypeVar("K")


class Planning:
    def __init__(self, context: Context, heartbeats: Heartbeats, ingresses: IngressHeartbeats) -> None:
        self._context = context
        self._ingresses = ingresses
        self._heartbeats = heartbeats
        self._state = context.state
        self._one = asyncio.Lock()
        self._kept: Snapshot | None = None
        self._kept_until = 0.0
        self._copied: Snapshot | None = None
        self.live: Live = lambda last: None
        """Set by whoever keeps one."""

    async def plan(self, spec: AppSpec | JobSpec, caller: Caller = SYSTEM) -> PlanView:
        """Say where the spec's instances would go; its image and secrets are not asked for.

        Raises Invalid, NotFound (project), Forbidden (a port of nodes or ingresses that the project may not have).
        """
        check_name(spec.project, "project")
        if isinstance(spec, AppSpec):
            check_app(spec)
        else:
            check_job(spec)
        check_constraints(spec)
        require_project(self._context, spec.project)
        if isinstance(spec, AppSpec):
            check_host_ports(self._context, spec)
            check_public_ports(self._context, spec)
        held = self._state.get(App, f"{spec.project}/{spec.name}")
        status = self._state.get(AppStatus, f"{spec.project}/{spec.name}")
        replicas = held.record.wanted(status.record if status is not None else None) if held is not None else 1
        releases = self._state.found(Release, by_project, spec.project).values()
        numbers = [r.record.number for r in releases if held and _same(r.record, held.record)]
        release = max(numbers, default=held.record.release if held is not None else 0) + 1
        count = replicas if isinstance(spec, AppSpec) and spec.scale is UNSET else _count(spec)
        view = await self._dry(
            lambda snapshot: plan_spec(snapshot, spec, release=release, replicas=replicas), quick=_is_quick(spec, count)
        )
        return replace(view, explanation=seen_by(caller, view.explanation))

    async def explain(self, project: str, id: str, caller: Caller = SYSTEM) -> InstanceExplanation:
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
        job = self._state.get(Job, f"{project}/{instance.owner}") if instance.owner_kind is OwnerKind.JOB else None
        owner = job.record if job is not None else None
        view = await self._dry(
            lambda snapshot: explain_instance(snapshot, key, instance, spec, waiting, owner), quick=_is_quick(spec, waiting)
        )
        return replace(view, explanation=seen_by(caller, view.explanation))

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
        return await self._dry(
            lambda snapshot: propose(snapshot, demands, movable, lambda owner: budgets.get(owner, 0), pending), anew=True
        )

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
        held = (other.record for other in self._state.found(Instance, by_project, instance.project).values())
        return sum(other.node is None and other.desired is Desired.RUN and group_of(other) == group for other in held)

    async def _dry(self, run: Callable[[Snapshot], T], *, quick: bool = False, anew: bool = False) -> T:
        """Return what `run` says. It leaves the snapshot as it was, or asks for one made `anew` and its own."""
        try:
            async with asyncio.timeout(DRY_RUN_S), self._one:
                if anew:
                    return await asyncio.to_thread(lambda make: run(make()), self._maker())
                snapshot = await self._snapshot()
                if quick and snapshot is self._copied:
                    return run(snapshot)
                return await asyncio.to_thread(run, snapshot)
        except TimeoutError:
            self._kept = self._copied = None  # the thread goes on with it
            raise DeadlineExceeded("the dry run took too long", mend="try again in a moment") from None

    async def _snapshot(self) -> Snapshot:
        """Return a snapshot of now, or where getting one takes long, of not long ago."""
        began = self._context.clock.monotonic()
        if self._kept is not None and began < self._kept_until:
            return self._kept
        self._kept = None  # never two of them in memory
        self._copied = self.live(self._copied)
        make = self._maker(self._copied)
        made = make() if self._copied is not None else await asyncio.to_thread(make)
        ended = self._context.clock.monotonic()
        if ended - began >= (KEPT_FROM_S if self._copied is None else COPY_KEPT_FROM_S):
            self._kept, self._kept_until = made, ended + min(KEPT_S_MAX, KEPT_TIMES * (ended - began))
        return made

    def _maker(self, copied: Snapshot | None = None) -> Callable[[], Snapshot]:
        """Take hold of the records of this moment, and return what makes a snapshot of them, in a thread; or what completes
        `copied`, which knows of nodes and instances already."""
        held = {kind: self._state.copy(kind) for kind in (_NEEDED if copied is None else _COMPLETING)}
        now, beats = self._context.clock.now(), dict(self._heartbeats.all())
        ingress_beats = dict(self._ingresses.all())
        projects_unread, reservations_unread = frozenset(self._state.broken(Project)), frozenset(self._state.broken(Reservation))

        def make() -> Snapshot:
            def plain(kind: type[K]) -> dict[str, K]:
                return {key: one.record for key, one in held.get(kind, {}).items()}

            records = Records(
                nodes=plain(Node),
                policies=plain(NodePolicy),
                liveness=plain(NodeLiveness),
                instances=plain(Instance),
                statuses=plain(Status),
                app_statuses=plain(AppStatus),
                projects=plain(Project),
                projects_unread=projects_unread,
                evacuations=evacuations(plain(Node), plain(NodePolicy), plain(Maintenance).values(), now),
                jobs=plain(Job),
                reservations=plain(Reservation),
                reservations_unread=reservations_unread,
                now=now,
                sites=plain(Site),
                round_trips=plain(RoundTrips),
                ingresses=plain(Ingress),
                ingress_heartbeats=ingress_beats,
                images={name: beat.images for name, beat in beats.items()},
            )
            if copied is not None:
                complete(copied, records)
                return copied
            return snapshot_from(records, lambda instance: spec_of(_Copy(held), instance))

        return make


_COMPLETING: tuple[type[Any], ...] = (
    AppStatus,
    Ingress,
    Maintenance,
    Node,
    NodePolicy,
    Project,
    Reservation,
    RoundTrips,
    Site,
)
_NEEDED: tuple[type[Any], ...] = (*_COMPLETING, App, Instance, Job, NodeLiveness, Release, Status)


class _Copy:
    """Records of one moment, to be read in a thread."""

    def __init__(self, held: Mapping[type[Any], Mapping[str, Held[Any]]]) -> None:
        self._held = held

    def get(self, kind: type[K], key: str) -> Held[K] | None:
        return self._held[kind].get(key)


def seen_by(caller: Caller, explanation: Explanation) -> Explanation:
    """Return it without the names of what waits in projects that the caller does not see."""
    kept = (
        room if room.why is KeptFor.RESERVED or caller.sees(room.project) else replace(room, project="", instances=())
        for room in explanation.kept
    )
    return replace(explanation, kept=tuple(kept))


def _count(spec: AppSpec | JobSpec) -> int:
    """Return how many instances a spec has at a time, where it says so."""
    if isinstance(spec, JobSpec):
        return min(spec.parallelism, spec.completions)
    return spec.scale.replicas if spec.scale is not UNSET else 1


def _is_quick(spec: Workload, count: int) -> bool:
    """Whether nothing is asked that may take long: a layout for users, or devices of kinds that were never asked for."""
    return count <= QUICK_MAX and spec.placement.near != NearKind.USERS and spec.resources.gpu is None


def _same(release: Release, app: App) -> bool:
    return (release.project, release.app) == (app.project, app.name)
