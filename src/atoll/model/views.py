"""What the API answers with and takes beside specs and records; shared by the server and its clients."""

from __future__ import annotations

import enum
from typing import Annotated, Any, Generic, TypeVar

from msgspec import Meta, Struct

from atoll.model.devices import GpuGrant
from atoll.model.evacuation import Evacuation
from atoll.model.maintenance import DRAIN_DEADLINE_S, Drain, Maintenance, Window
from atoll.model.records import (
    App,
    AppStatus,
    Brake,
    Heartbeat,
    Ingress,
    Instance,
    Job,
    JobStatus,
    Node,
    NodeHealth,
    NodePolicy,
    OwnerKind,
    Rejection,
    Role,
    Site,
    Status,
)
from atoll.model.reservation import Reservation
from atoll.model.rollouts import RolloutStatus
from atoll.model.spec import REPLICAS_MAX, AppSpec, Name
from atoll.model.spec.values import default
from atoll.model.streams import ErrorBody
from atoll.model.units import Seconds

PAGE_LIMIT_MAX = 1_000
"""Items in one page; `next` is what to pass as `after` for the following page."""

T = TypeVar("T")


class ErrorAnswer(Struct, frozen=True):
    error: ErrorBody


class Page(Struct, Generic[T], frozen=True, kw_only=True):
    items: tuple[T, ...]
    revision: int
    next: str | None = None


class AppView(Struct, frozen=True, kw_only=True):
    app: App
    status: AppStatus | None = None
    revision: int
    """Of `app`: pass it as `If-Match` to change only what was read."""
    urls: tuple[str, ...] = ()


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


class GpuHolder(Struct, frozen=True, kw_only=True):
    """What one instance holds of a device."""

    instance: str
    project: str
    grant: GpuGrant


class GpuHolding(Struct, frozen=True, kw_only=True):
    """What of one device is given away; the rest is free."""

    device: str
    milli: int
    """Thousandths of its compute; of a device in MIG mode, memory slices by `MEMORY_SLICES`."""
    memory_bytes: int
    holders: tuple[GpuHolder, ...]


class NodeView(Struct, frozen=True, kw_only=True):
    node: Node
    health: NodeHealth = NodeHealth.READY
    since: float = 0.0
    policy: NodePolicy | None = None
    heartbeat: Heartbeat | None = None
    allocated_cpu_milli: int = 0
    allocated_memory_bytes: int = 0
    instances: int = 0
    gpus: tuple[GpuHolding, ...] = ()
    """Of the devices that something holds, those that the node does not list any more among them."""
    prefetch: tuple[str, ...] = ()
    """Images that it may need soon, the likeliest first; for those who see every project."""
    evacuation: Evacuation | None = None
    """Why instances are to leave it, and until when."""
    revision: int

    def since_window(self, now: float) -> bool:
        """Whether a window of maintenance has begun for it."""
        return self.evacuation is not None and self.evacuation.start is not None and now >= self.evacuation.start


class BrakeView(Struct, frozen=True, kw_only=True):
    """Whether nodes that do not answer are kept from being given up, since too many do not at once."""

    brake: Brake | None = None
    released: bool = False
    """An operator has let go of it; the leader follows within a second."""


class DrainState(enum.StrEnum):
    """How an instance of a node that is being emptied stands."""

    STAYS = "stays"
    """Nothing wants it away."""
    WAITS = "waits"
    """For its app's budget, or for the place of what is to serve instead."""
    REPLACING = "replacing"
    """What is to serve instead is starting."""
    RUNS = "runs"
    """A job's: its end is waited for."""
    DRAINING = "draining"
    STOPPING = "stopping"
    KEPT = "kept"
    """It writes to volumes of the node, and nobody has agreed to leave them behind."""


class DrainItem(Struct, frozen=True, kw_only=True):
    instance: str
    project: str
    kind: OwnerKind
    owner: str
    state: DrainState
    why: str = ""


class DrainView(Struct, frozen=True, kw_only=True):
    """How far the emptying of a node has come."""

    node: str
    evacuation: Evacuation | None = None
    """None: nothing is to leave it."""
    drain: Drain | None = None
    items: tuple[DrainItem, ...] = ()
    """What is there still, of the projects that the caller sees."""
    left: int
    """Instances that are to leave still."""
    kept: int
    """Instances that stay for their volumes' sake."""
    total: int
    """How many there were when it began."""
    done: bool
    """All have left that are to leave."""


class DrainRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`deadline` is from now on; with 0 nothing is waited for."""

    deadline: Seconds = default(Seconds(DRAIN_DEADLINE_S))
    leave_volumes: bool = False


class MaintenanceView(Struct, frozen=True, kw_only=True):
    maintenance: Maintenance
    window: Window | None = None
    """The one in force, or the next; None when all are over."""
    nodes: tuple[str, ...] = ()
    """Those that it concerns now."""
    revision: int


class ReservationView(Struct, frozen=True, kw_only=True):
    reservation: Reservation
    nodes: tuple[str, ...] = ()
    """Those that it concerns now."""
    revision: int


class SiteView(Struct, frozen=True, kw_only=True):
    """A site, with what is known of it beside what operators say."""

    site: Site
    described: bool = True
    """Whether operators have said anything; else it is known by its nodes or ingresses only."""
    nodes: int = 0
    ingresses: tuple[str, ...] = ()
    requests_per_s: float = 0.0
    """That come in here, of all apps."""
    measured_ms: dict[str, float] = {}
    """Other site → round trip, as its ingresses measure it."""
    round_trips_ms: dict[str, float] = {}
    """Other site → what counts: measured, else known to operators, else estimated. Only when one site is asked for."""
    revision: int


class Candidate(Struct, frozen=True, kw_only=True):
    """A node that would take the instance, with what each score says of it (already times its weight)."""

    node: str
    total: float
    scores: dict[str, float]
    room: int
    """How many of such instances it has room for."""
    gpus: tuple[GpuGrant, ...] = ()
    """The devices that it would get there."""
    site: str = ""
    latency_ms: float | None = None
    """The round trip to what `placement.near` names (to users: the mean); None where it names nothing, or nobody knows."""


class Explanation(Struct, frozen=True, kw_only=True):
    """What the scheduler would answer now: the best candidates in order, and how many nodes each filter turns away."""

    candidates: tuple[Candidate, ...]
    feasible: int
    nodes: int
    failed: dict[str, int] = {}
    rejection: Rejection | None = None
    """Why no node is left, and what would change that."""
    wall: str = ""
    """Of GPUs: how they are given, and how hard the wall to others is."""
    layout: dict[str, int] = {}
    """With `near = "users"`: site → how many instances it should have."""
    layout_ms: float | None = None
    """The mean round trip of requests, were it so."""
    unserved: float = 0.0
    """The share of requests from places that no site may serve."""
    share: str = ""
    """What its project holds of what it holds most of, in words: among equal priorities, projects that hold less go first."""


class InstanceExplanation(Struct, frozen=True, kw_only=True):
    """Why an instance is where it is, or nowhere: what the scheduler would answer for it now, were it not there."""

    instance: Instance
    explanation: Explanation


class PlanView(Struct, frozen=True, kw_only=True):
    """Where the instances of a spec would go if it were deployed now, beside all that runs. Nothing is written."""

    project: str
    name: str
    instances: int
    placed: dict[str, int]
    """Node → how many."""
    unplaced: int
    rejection: Rejection | None = None
    """Of those that found no node."""
    explanation: Explanation
    """For the first instance."""


class DefragMove(Struct, frozen=True, kw_only=True):
    """One instance that could be elsewhere."""

    instance: str
    project: str
    node: str
    to: str
    gpus: tuple[GpuGrant, ...] = ()
    """The devices that it would get there."""


class DefragStep(Struct, frozen=True, kw_only=True):
    """Moves that together free something."""

    frees: str
    moves: tuple[DefragMove, ...]


class DefragView(Struct, frozen=True, kw_only=True):
    """What could be moved and what that would free. Nothing is moved."""

    steps: tuple[DefragStep, ...]
    nodes: int
    waiting: int
    """Instances without a place that were looked at."""
    fit_now: int
    """Of them, those that have room as things are."""
    fit_then: int
    """Of them, those that would have room after all moves."""


class SecretView(Struct, frozen=True, kw_only=True):
    """A secret without its value, which never leaves the server but for the node that runs it."""

    project: str
    name: str
    version: int
    updated_at: float


class TokenView(Struct, frozen=True, kw_only=True):
    """`token` is there once, in the answer that made it."""

    id: str
    name: str
    role: Role
    project: str = "*"
    created_at: float
    expires_at: float | None = None
    token: str | None = None


class Info(Struct, frozen=True, kw_only=True):
    version: str
    cell: str
    revision: int
    store: str
    ingresses: tuple[Ingress, ...] = ()
    token: TokenView | None = None
    """The caller's own."""


class ScaleRequest(Struct, frozen=True, forbid_unknown_fields=True):
    replicas: Annotated[int, Meta(ge=0, le=REPLICAS_MAX)]


class ReinstateRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """With `reset`, the GPU is reset before."""

    reset: bool = False


class RollbackRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Without `release`, the one before the current."""

    release: Annotated[int, Meta(ge=1)] | None = None


class SecretRequest(Struct, frozen=True, forbid_unknown_fields=True):
    value: Annotated[str, Meta(max_length=65_536)]


class TokenRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Name
    role: Role
    project: str = "*"
    expires_in_s: Annotated[float, Meta(gt=0)] | None = None
    subject: str = ""


class WatchLine(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of `GET /v1/watch`. A line without `kind` is a bookmark: all up to `revision` has been sent.

    `record` None is a deletion. Resume with `from = revision + 1` of the last line, after which nothing is lost or twice.
    """

    revision: int
    kind: str | None = None
    key: str | None = None
    """Behind the kind's prefix: `PROJECT/NAME` or `NAME`."""
    record: Any = None
