"""Apps, jobs and their instances, as the API shows them, and what is asked of them."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from atoll.model.names import EnvName, Name
from atoll.model.records import App, AppStatus, Instance, Job, JobStatus, Status
from atoll.model.rollouts import RolloutStatus
from atoll.model.spec import REPLICAS_MAX, AppSpec, EnvValue
from atoll.model.streams import SnapshotView
from atoll.model.units import Seconds


class AppView(Struct, frozen=True, kw_only=True):
    app: App
    status: AppStatus | None = None
    revision: int
    """Of `app`: pass it as `If-Match` to change only what was read."""
    urls: tuple[str, ...] = ()
    refused: dict[str, str] = {}
    """Ingress → what of the app's routing it leaves out, a public port that it cannot have, say, and why."""


GROUP_MAX = 64
"""Apps in one write."""


class AppGroup(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Apps that are written together, all or none."""

    apps: Annotated[tuple[AppSpec, ...], Meta(min_length=1, max_length=GROUP_MAX)]


class GroupView(Struct, frozen=True, kw_only=True):
    apps: tuple[AppView, ...]
    revision: int


class InstanceView(Struct, frozen=True, kw_only=True):
    instance: Instance
    status: Status | None = None
    revision: int


class ReleaseView(Struct, frozen=True, kw_only=True):
    """A release of an app that has instances or requests, with what ingresses counted of it in about the last minute."""

    release: int
    weight: int | None = None
    """Percent of the requests; None where they go to every ready instance alike."""
    instances: int = 0
    ready: int = 0
    requests: int = 0
    errors: int = 0
    """Answered with 500 to 599."""
    per_second: float = 0.0
    latency_p50_s: float | None = None
    latency_p99_s: float | None = None


class RolloutView(Struct, frozen=True, kw_only=True):
    """How an app's last rollout stands; `status` is None of one that only replaces instances and that nobody steers."""

    app: App
    app_status: AppStatus | None = None
    status: RolloutStatus | None = None
    releases: tuple[ReleaseView, ...] = ()
    """The newest first."""
    preview: str | None = None
    """Where a blue-green set answers before it is promoted."""
    revision: int


class JobView(Struct, frozen=True, kw_only=True):
    job: Job
    status: JobStatus | None = None
    revision: int
    instance: str = ""
    """The answer to taking a sandbox: its instance, which runs. Empty where the pool had none and one is being made."""


class TakeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sandbox out of a template's pool: who it is. What is left out is as the template says."""

    name: Name
    env: dict[EnvName, EnvValue] = {}
    """What its commands see, beside the template's; its first process began before."""
    deadline: Seconds | None = None
    idle_limit: Seconds | None = None


class SnapshotsView(Struct, frozen=True, kw_only=True):
    """A project's snapshots, those used last first."""

    snapshots: tuple[SnapshotView, ...] = ()
    silent: tuple[str, ...] = ()
    """Nodes that did not answer: what they have is not here."""


class ScaleRequest(Struct, frozen=True, forbid_unknown_fields=True):
    replicas: Annotated[int, Meta(ge=0, le=REPLICAS_MAX)]


class RollbackRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Without `release`, the one before the current."""

    release: Annotated[int, Meta(ge=1)] | None = None
