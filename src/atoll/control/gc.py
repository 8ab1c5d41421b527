"""What nobody needs any more: old events, releases beyond a bound, records whose instance, app, job or node is gone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice

from atoll.control.actions import Action, Forget
from atoll.control.world import World
from atoll.model import keys
from atoll.model.records import (
    App,
    AppStatus,
    Drained,
    Event,
    Instance,
    Job,
    JobStatus,
    Node,
    NodeLiveness,
    OwnerKind,
    Release,
    RouteClaim,
    Status,
)
from atoll.store.cache import Held

GC_S = 30.0
"""Between two looks."""
GC_BEHIND_S = 2.0
"""The same while one look does not remove all that is to go: what comes in must not outrun what is taken away."""
EVENT_AGE_MAX_S = 3 * 86_400.0
EVENTS_PER_PROJECT_MAX = 1_000
EVENTS_MAX = 10_000
"""In the cell; the oldest go first."""
RELEASES_KEPT = 50
"""Of each app, beside the wanted one, the one that serves and those that instances run."""
REMOVED_AT_ONCE_MAX = 2_000
"""Records removed in one look; the rest goes in the next."""


def decide_gc(world: World, now: float) -> list[Action]:
    """Return what to remove. Every removal is conditional on the record, and an orphan's on its owner still being gone."""
    return list(islice(_all(world, now), REMOVED_AT_ONCE_MAX))


def _all(world: World, now: float) -> Iterator[Action]:
    yield from _orphans(world)
    yield from _releases(world)
    yield from old_events(world.state.records(Event).values(), now)


def old_events(events: Iterable[Held[Event]], now: float) -> Iterator[Forget]:
    """Yield the events that are over one of the three bounds."""
    by_project: dict[str, list[Held[Event]]] = defaultdict(list)
    kept: list[Held[Event]] = []
    for held in events:
        by_project[held.record.project].append(held)
    for held_events in by_project.values():
        held_events.sort(key=_age_order, reverse=True)
        for place, held in enumerate(held_events):
            # One that is dated as long ahead (a clock was wrong) would never be old, and would stay before all others.
            if place >= EVENTS_PER_PROJECT_MAX or abs(now - held.record.at) > EVENT_AGE_MAX_S:
                yield _forget_event(held)
            else:
                kept.append(held)
    kept.sort(key=_age_order, reverse=True)
    for held in kept[EVENTS_MAX:]:
        yield _forget_event(held)


def _age_order(held: Held[Event]) -> tuple[float, str]:
    return (held.record.at, held.record.id)


def _forget_event(held: Held[Event]) -> Forget:
    return Forget(keys.event(held.record.project, held.record.id), held.revision)


def _orphans(world: World) -> Iterator[Forget]:
    state = world.state
    for key, status in state.records(Status).items():
        if state.get(Instance, key) is None:
            yield Forget(keys.STATUSES + key, status.revision, keys.INSTANCES + key)
    for key, drained in state.records(Drained).items():
        if drained.record.instance not in world.ids:
            yield Forget(keys.DRAINED + key, drained.revision)
    for key, app_status in state.records(AppStatus).items():
        if state.get(App, key) is None:
            yield Forget(keys.APP_STATUSES + key, app_status.revision, keys.APPS + key)
    for key, job_status in state.records(JobStatus).items():
        if state.get(Job, key) is None:
            yield Forget(keys.JOB_STATUSES + key, job_status.revision, keys.JOBS + key)
    for key, liveness in state.records(NodeLiveness).items():
        if state.get(Node, key) is None:
            yield Forget(keys.NODE_LIVENESS + key, liveness.revision, keys.NODES + key)
    for key, claim in state.records(RouteClaim).items():
        app = f"{claim.record.project}/{claim.record.app}"
        if state.get(App, app) is None:
            yield Forget(keys.ROUTES + key, claim.revision, keys.APPS + app)


def _releases(world: World) -> Iterator[Forget]:
    by_app: dict[str, list[Held[Release]]] = defaultdict(list)
    for held in world.state.records(Release).values():
        by_app[f"{held.record.project}/{held.record.app}"].append(held)
    for key, releases in by_app.items():
        app = world.state.get(App, key)
        if app is None:
            for held in releases:
                yield Forget(_release_key(held.record), held.revision, keys.APPS + key)
        elif len(releases) > RELEASES_KEPT:
            status = world.state.get(AppStatus, key)
            needed = {seen.instance.release for seen in world.instances((OwnerKind.APP, key))} | {app.record.release}
            if status is not None:
                needed.add(status.record.served_release)
            releases.sort(key=lambda held: held.record.number, reverse=True)
            for held in releases[RELEASES_KEPT:]:
                if held.record.number not in needed:
                    yield Forget(_release_key(held.record), held.revision)


def _release_key(release: Release) -> str:
    return keys.release(release.project, release.app, release.number)
