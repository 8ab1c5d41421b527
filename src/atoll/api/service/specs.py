"""Which spec an instance runs: its release's, or its job's."""

from __future__ import annotations

from typing import Protocol, TypeVar

from atoll.model import keys
from atoll.model.records import App, Instance, Job, OwnerKind, Release
from atoll.model.spec import AppSpec, JobSpec
from atoll.store.cache import Held

T = TypeVar("T")


class Records(Protocol):
    """Where records are read: a `State`, or a copy of one."""

    def get(self, kind: type[T], key: str) -> Held[T] | None: ...


def spec_of(state: Records, instance: Instance) -> AppSpec | JobSpec | None:
    """Return the spec, None when it is no longer kept."""
    if instance.owner_kind is OwnerKind.JOB:
        job = state.get(Job, f"{instance.project}/{instance.owner}")
        return job.record.spec if job is not None else None
    return release_spec(state, instance.project, instance.owner, instance.release)


def release_spec(state: Records, project: str, app: str, number: int) -> AppSpec | None:
    release = state.get(Release, keys.release(project, app, number).removeprefix(keys.RELEASES))
    if release is not None:
        return release.record.spec
    held = state.get(App, f"{project}/{app}")
    return held.record.spec if held is not None and held.record.release == number else None
