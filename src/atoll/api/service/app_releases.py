"""The releases of an app that are kept: one for each spec that its instances ran by, the newest `RELEASES_MAX`."""

from __future__ import annotations

from msgspec import UNSET
from msgspec.structs import replace

from atoll.api.service.access import Caller
from atoll.api.service.lookups import by_owner, owner_of
from atoll.model import keys, stored
from atoll.model.errors import Invalid
from atoll.model.ports.store import Delete, Op, Put
from atoll.model.records import App, AppStatus, Instance, Release
from atoll.model.spec import AppSpec
from atoll.store.cache import Held, State

RELEASES_MAX = 50
"""Releases that are kept of one app; older ones go, unless an instance runs them."""


def is_new(before: AppSpec, after: AppSpec) -> bool:
    """Whether a changed spec makes a release."""
    return _of_release(before) != _of_release(after) or metric_of(before) != metric_of(after)


def kept(state: State, app: App) -> list[Held[Release]]:
    """Return all kept releases of an app, oldest first. Their numbers have no gaps, because only the oldest are ever removed."""
    records = state.records(Release)
    found: list[Held[Release]] = []
    number = app.release
    while (held := records.get(_key_of(app, number))) is not None:
        found.append(held)
        number -= 1
    found.reverse()
    number = app.release + 1
    while (held := records.get(_key_of(app, number))) is not None:
        found.append(held)
        number += 1
    return found


def record(caller: Caller, app: App) -> Put:
    """Return the write of the release that `app` is at, made by `caller`."""
    release = Release(
        project=app.project,
        app=app.name,
        number=app.release,
        spec=app.spec,
        created_at=app.updated_at,
        author=caller.name or caller.id,
    )
    return Put(key(app), stored.encode(release))


def prune(state: State, status: AppStatus | None, app: App, releases: list[Held[Release]]) -> list[Op]:
    """Delete the oldest releases over the bound, up to the first that something runs or that served last."""
    if len(releases) < RELEASES_MAX:
        return []
    needed = {app.release, status.served_release if status else 0}
    if status is not None and status.rollout is not None:
        needed.add(status.rollout.stable)
    there = state.found(Instance, by_owner, owner_of(app))
    needed.update(held.record.release for held in there.values())
    ops: list[Op] = []
    for release in releases[: len(releases) - RELEASES_MAX + 1]:
        if release.record.number in needed:
            break
        ops.append(Delete(keys.release(app.project, app.name, release.record.number)))
    return ops


def _of_release(spec: AppSpec) -> AppSpec:
    """Return what instances run by: changing the rest makes no release."""
    return replace(spec, scale=UNSET, disruption=None, depends_on=(), ingress=None)


def metric_of(spec: AppSpec) -> str | None:
    """Return what instances are asked for: of all that `scale` says the one thing that they run by, as the rest of a release."""
    return None if spec.scale is UNSET else spec.scale.metric


def key(app: App) -> str:
    return keys.release(app.project, app.name, app.release)


def _key_of(app: App, number: int) -> str:
    return keys.release(app.project, app.name, number).removeprefix(keys.RELEASES)


def number(text: str) -> int:
    """Return the number that a page goes on after. Raises Invalid."""
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise Invalid(f"after: {text[:40]!r} is not a release's number", field="after")
    return int(text)
