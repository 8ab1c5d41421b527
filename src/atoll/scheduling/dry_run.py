"""What the scheduler would do, without doing it: for a spec that is not deployed, and for an instance that is there."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

from msgspec import UNSET
from msgspec.structs import replace

from atoll.model.records import Instance, Job, OwnerKind
from atoll.model.spec import AppSpec, JobSpec, Workload
from atoll.model.views import Explanation, InstanceExplanation, PlanView
from atoll.scheduling import quotas
from atoll.scheduling.assembly import ends_at, group_of
from atoll.scheduling.bookings import Booking
from atoll.scheduling.demand import Demand, Pending, demand_of
from atoll.scheduling.explain import explain
from atoll.scheduling.fair import Shares
from atoll.scheduling.groups import owner_of_group, project_of_group
from atoll.scheduling.interface import View
from atoll.scheduling.layout import lay_out, sites_of
from atoll.scheduling.ledger import SOME_DAY
from atoll.scheduling.near import wants_users
from atoll.scheduling.plan import plan
from atoll.scheduling.rules import Backfill
from atoll.scheduling.snapshot import Snapshot


def plan_spec(snapshot: Snapshot, spec: AppSpec | JobSpec, *, release: int = 0, replicas: int = 1) -> PlanView:
    """Return where the spec's instances would go beside all that runs. The snapshot is afterwards as it was.

    `release` is the number that an app's next release would have, `replicas` how many it has where the spec does not say.
    """
    if isinstance(spec, JobSpec):
        kind, release, generation, count = OwnerKind.JOB, 0, 0, min(spec.parallelism, spec.completions)
        until = SOME_DAY if spec.deadline is None else snapshot.now + spec.deadline + spec.stop.grace
    else:
        kind, generation = OwnerKind.APP, 1
        count = replicas if spec.scale is UNSET else spec.scale.replicas
        until = None
    group = f"{kind}/{spec.project}/{spec.name}/{release}/{generation}"
    demand = demand_of(spec)
    with _laid_out(snapshot, group, demand, count):
        # It comes after all that waits already.
        item = Pending(id="", group=group, demand=demand, created_at=snapshot.now, ends_at=until)
        answer = plan(snapshot, _copies(item, count), bookings=snapshot.bookings)
        return PlanView(
            project=spec.project,
            name=spec.name,
            instances=count,
            placed=dict(sorted(Counter(placed.node for placed in answer.placed).items())),
            unplaced=len(answer.rejected),
            rejection=next(iter(answer.rejected.values()), None),
            explanation=_explained(snapshot, item, snapshot.bookings),
        )


def explain_instance(
    snapshot: Snapshot, key: str, instance: Instance, spec: Workload, waiting: int = 1, job: Job | None = None
) -> InstanceExplanation:
    """Return what the scheduler would answer for the instance now, were it not there. The snapshot is afterwards as it was.

    `waiting` is how many of its group, itself among them, have no node: a gang is answered for as a whole. `job` is its owner,
    where that is one.
    """
    group, demand = group_of(instance), demand_of(spec)
    until = ends_at(instance, job)
    item = Pending(id=key, group=group, demand=demand, created_at=instance.created_at, ends_at=until)
    own = [booking for booking in snapshot.bookings if key in booking.ids]
    held_back = instance.rejection is not None and Backfill.name in instance.rejection.failed
    before = [
        booking
        for booking in snapshot.bookings
        # Between projects of one priority shares decide who goes first: the leader's own word counts.
        if key not in booking.ids and (booking.order < item.order or held_back)
    ]
    with snapshot.without(key), _laid_out(snapshot, group, demand, 1):
        explanation = _explained(snapshot, item, before, own)
        if demand.placement.gang and instance.node is None:
            answer = plan(snapshot, _copies(item, waiting), bookings=before)
            explanation = replace(explanation, rejection=next(iter(answer.rejected.values()), None))
        elif instance.node is None and not quotas.room(View(snapshot), group, demand, 1):
            explanation = replace(explanation, rejection=quotas.over(View(snapshot), group, demand))
    return InstanceExplanation(instance=instance, explanation=explanation)


@contextlib.contextmanager
def _laid_out(snapshot: Snapshot, group: str, demand: Demand, least: int) -> Iterator[None]:
    """See `_lay_out`; afterwards the layouts are as they were."""
    before = dict(snapshot.whereabouts.layouts)
    try:
        _lay_out(snapshot, group, demand, least)
        yield
    finally:
        snapshot.whereabouts.layouts = before


def _lay_out(snapshot: Snapshot, group: str, demand: Demand, least: int) -> None:
    """See that there is a layout for at least so many, as the leader would before it places any, and what it comes to is known.

    The leader's own is in the app's status; only what it is worth is worked out here.
    """
    if not wants_users(demand):
        return
    view, owner = View(snapshot), owner_of_group(group)
    known = snapshot.whereabouts.layouts.get(owner)
    current = known.wanted if known is not None else sites_of(view, group)
    layout = lay_out(view, group, demand, max(least, sum(current.values())), current)
    if layout is not None and known is not None and known.count >= least:
        layout = replace(layout, wanted=known.wanted)
    if layout is not None:
        snapshot.whereabouts.layouts[owner] = layout


def _copies(item: Pending, count: int) -> Iterator[Pending]:
    return (replace(item, id=f"{number:06d}") for number in range(count))


def _explained(snapshot: Snapshot, item: Pending, before: Iterable[Booking], own: Iterable[Booking] = ()) -> Explanation:
    share = Shares(View(snapshot)).words(project_of_group(item.group))
    found = explain(snapshot, item.group, item.demand, before=before, own=own, ends_at=item.ends_at)
    return replace(found, share=share)
