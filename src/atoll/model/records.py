"""What the store holds. Each record has one writer, named in its docstring. Times are seconds since the epoch (UTC)."""

from __future__ import annotations

import enum
import secrets
from typing import Any

from msgspec import UNSET, Struct

from atoll.model.devices import GpuDevice, GpuGrant, GpuSample, OfferedDevice
from atoll.model.maintenance import Drain
from atoll.model.rollouts import RolloutOrder, RolloutStatus
from atoll.model.spec import AppSpec, JobSpec, Quota, RuntimeName, Workload
from atoll.model.states import Desired, Phase

CELL = "main"
"""The cell's name in ids; a fleet has many cells."""
CELL_PROJECT = "default"
"""Where events about nodes are kept."""


class _Record(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Frozen and made from text, a record is never part of a circle: Python's collector need not walk through all of a cell."""


class Project(_Record, frozen=True, kw_only=True):
    """Tenant boundary. Writer: API."""

    name: str
    created_at: float
    quota: Quota | None = None
    """Set by an admin."""


class App(_Record, frozen=True, kw_only=True):
    """An app as the user wants it. Writer: API; `deleting` is ended by the app controller, which removes the record."""

    project: str
    name: str
    spec: AppSpec
    release: int
    """The number of the release that should run."""
    replicas: int
    """As the user says; where the app scales by a metric, the least. 0 stops it, or lets it sleep where it `sleeps`."""
    generation: int = 1
    """Raised by `restart`: instances of an older generation are replaced."""
    created_at: float
    updated_at: float
    deleting: bool = False
    order: RolloutOrder | None = None
    """What was asked of the rollout that is under way."""

    @property
    def most(self) -> int | None:
        """The most instances that its metric may ask for; None where their number is the user's alone."""
        scale = self.spec.scale
        stopped = self.replicas == 0 and not self.sleeps
        return None if scale is UNSET or scale.max is None or stopped else max(self.replicas, scale.max)

    @property
    def sleeps(self) -> bool:
        """Whether it has no instance while nobody asks for it, and is woken by the next request."""
        scale = self.spec.scale
        return scale is not UNSET and scale.sleeps and self.replicas == 0

    def wanted(self, status: AppStatus | None) -> int:
        """Return how many instances there should be: `replicas`, or up to `most` what the metric asks for."""
        scaled = status.scaled if status is not None else None
        if self.sleeps and scaled is None:
            return 1  # a deploy wakes it
        if self.most is None or scaled is None:
            return self.replicas
        return min(self.most, max(self.replicas, scaled))

    @property
    def standby(self) -> int:
        """How many more instances are kept parked beside those that are wanted."""
        return 0 if self.spec.scale is UNSET or self.replicas == 0 or self.deleting else self.spec.scale.standby


class Release(_Record, frozen=True, kw_only=True):
    """An immutable version of an app's spec. Writer: API."""

    project: str
    app: str
    number: int
    spec: AppSpec
    created_at: float
    author: str = ""
    note: str = ""


class AppPhase(enum.StrEnum):
    DEPLOYING = "deploying"
    RUNNING = "running"
    DEGRADED = "degraded"
    """Fewer ready instances than wanted, with no rollout under way."""
    FAILED = "failed"
    """The rollout made no progress before its deadline; what served before still serves."""
    STOPPED = "stopped"
    ASLEEP = "asleep"
    """It has no instance because nobody asks for it; the next request wakes it."""
    DELETING = "deleting"


class AppStatus(_Record, frozen=True, kw_only=True):
    """How an app stands. Writer: app controller."""

    project: str
    name: str
    phase: AppPhase
    release: int
    ready: int = 0
    """Ready instances of any release."""
    updated: int = 0
    """Ready instances of the wanted release and generation."""
    total: int = 0
    message: str = ""
    progressed_at: float = 0.0
    served_release: int = 0
    """The last release that was fully rolled out."""
    homes: tuple[str, ...] = ()
    """Nodes that hold the app's host-local volumes, those in use first; as many as replicas are wanted."""
    scaled: int | None = None
    """How many instances the app's metric asks for; None where it does not scale by one."""
    parked: int = 0
    """Instances that stand by, parked. They are in none of the other numbers."""
    sites: dict[str, int] = {}
    """Site → how many instances it should have, of an app that is near its users."""
    rollout: RolloutStatus | None = None
    """Of the last rollout that can be steered or goes by shares of the requests; None of one that only replaces instances."""
    waits_for: tuple[str, ...] = ()
    """Apps that it depends on and that are not ready yet at their wanted release; or, when it is to stop, those that depend
    on it and are still there."""


class Job(_Record, frozen=True, kw_only=True):
    """A job as the user wants it. Writer: API, and the job controller for the runs of one with a schedule and for its end after
    `keep`."""

    project: str
    name: str
    spec: JobSpec
    created_at: float
    cancelled: bool = False
    parent: str = ""
    """The job with a schedule of which this is a run."""
    tick: float | None = None
    """The time of its schedule that it runs for; None for a run that was asked for by hand."""
    suspended: bool = False
    """Its schedule makes no runs."""
    scheduled_from: float | None = None
    """Only later times of its schedule count: since it was made, changed or resumed."""


class JobPhase(enum.StrEnum):
    SCHEDULED = "scheduled"
    """It has a schedule, and makes runs."""
    SUSPENDED = "suspended"
    """It has a schedule, and makes none for now."""
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobPhase.SUCCEEDED, JobPhase.FAILED, JobPhase.CANCELLED)


class JobStatus(_Record, frozen=True, kw_only=True):
    """How a job stands. Writer: job controller."""

    project: str
    name: str
    phase: JobPhase
    succeeded: tuple[int, ...] = ()
    """Indices that have completed."""
    failures: dict[int, int] = {}
    """Index → failed tries."""
    retry_at: dict[int, float] = {}
    active: int = 0
    message: str = ""
    started_at: float | None = None
    finished_at: float | None = None
    ticked_at: float | None = None
    """Of a job with a schedule: the last time that was run, skipped or missed. None later than this was."""
    next_at: float | None = None
    """Of a job with a schedule: its next time."""
    missed: int = 0
    """Of a job with a schedule: times that came while nobody led, or too late for `starting_deadline`."""
    skipped: int = 0
    """Of a job with a schedule: times that came while the run before still ran."""


class OwnerKind(enum.StrEnum):
    APP = "app"
    JOB = "job"


class Rejection(_Record, frozen=True, kw_only=True):
    """Why an instance has no node: a stable code, the reason, and what would change the answer."""

    code: str
    message: str
    mend: str = ""
    failed: dict[str, int] = {}
    """Filter → number of nodes that it turned away."""


class Instance(_Record, frozen=True, kw_only=True):
    """One running copy, as the control plane wants it. Writer: the leader (controllers make, drain, stop and remove; the
    scheduler sets `node` once)."""

    id: str
    project: str
    owner_kind: OwnerKind
    owner: str
    release: int = 0
    generation: int = 0
    index: int = 0
    """A job's array index."""
    attempt: int = 0
    """A job's try of this index."""
    node: str | None = None
    runtime: RuntimeName | None = None
    """Chosen with the node."""
    gpus: tuple[GpuGrant, ...] = ()
    """Chosen with the node: which of its devices, and how much of each."""
    desired: Desired = Desired.RUN
    created_at: float
    placed_at: float | None = None
    drain_until: float | None = None
    reason: str = ""
    """Why it is drained or stopped."""
    excused: bool = False
    """What it holds of a device made it go: a job's try that ends so does not count as failed."""
    rejection: Rejection | None = None
    standby: bool = False
    """Made to be parked until it takes another's place; then false for good. Until then it serves nobody and counts as none."""


class Exit(_Record, frozen=True, kw_only=True):
    """How a process ended. `code` is the exit status, or 128 + the signal."""

    code: int
    at: float
    signal: str | None = None
    oom: bool = False
    """The kernel killed it for going over its memory limit."""


class Status(_Record, frozen=True, kw_only=True):
    """What the node sees of an instance. Writer: the agent of its node."""

    instance: str
    project: str
    node: str
    phase: Phase
    ready: bool = False
    restarts: int = 0
    pid: int | None = None
    address: str | None = None
    """Where its ports answer, reachable from the node's ingress."""
    exit: Exit | None = None
    """How it last ended."""
    message: str = ""
    """Why it is in this phase, in words, where that is not plain."""
    image_digest: str | None = None
    phase_at: float = 0.0
    started_at: float | None = None
    ready_at: float | None = None
    parked: bool = False
    """It is frozen, and off its devices where they can do that, or is on its way back. Never while ready."""
    word: int = 0
    """Which word of its agent this is: a newer one has a higher number, so that one that arrives late is known. 0: not told."""


class Capacity(_Record, frozen=True, kw_only=True):
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    gpus: tuple[GpuDevice, ...] = ()
    devices: tuple[OfferedDevice, ...] = ()
    """Of CDI specs, as far as the node's operator allowed them."""


class Node(_Record, frozen=True, kw_only=True):
    """A machine, as its agent describes it. Writer: the agent."""

    name: str
    site: str = "local"
    region: str = "local"
    capacity: Capacity
    labels: dict[str, str] = {}
    taints: tuple[str, ...] = ()
    runtimes: tuple[RuntimeName, ...] = ()
    arch: str = "amd64"
    version: str = ""
    address: str = ""
    ports_taken: tuple[str, ...] = ()
    """Ports of the machine that programs of its own listen on (`tcp/22`), and that no instance can be published on."""
    registered_at: float = 0.0


class Site(_Record, frozen=True, kw_only=True):
    """A place where nodes stand, as operators describe it. Writer: API.

    Without the record a site's nodes run as before, but nobody knows where they are.
    """

    name: str
    region: str = ""
    """That of all its nodes, whatever they say; empty for what each says itself."""
    country: str = ""
    """Two letters of ISO 3166-1."""
    latitude: float | None = None
    longitude: float | None = None
    """In degrees, both or neither."""
    round_trips_ms: dict[str, float] = {}
    """To other sites, where operators know them. What ingresses measure comes first."""
    note: str = ""


class RoundTrips(_Record, frozen=True, kw_only=True):
    """What an ingress measures to the other sites' ingresses. Writer: that ingress, through the API, which writes it rarely."""

    ingress: str
    site: str
    ms: dict[str, float]
    """Site → smoothed round trip."""
    at: float


class NodePolicy(_Record, frozen=True, kw_only=True):
    """What operators say of a node. Writer: API."""

    name: str
    cordoned: bool = False
    note: str = ""
    drain: Drain | None = None


class NodeHealth(enum.StrEnum):
    READY = "ready"
    UNREACHABLE = "unreachable"
    LOST = "lost"


class NodeLiveness(_Record, frozen=True, kw_only=True):
    """Whether a node answers, written only when that changes. Writer: node controller."""

    name: str
    health: NodeHealth
    since: float


class Brake(_Record, frozen=True, kw_only=True):
    """Many nodes fell silent at once, and none is given up any more. Written when it comes on, removed when it lets go. Writer:
    node controller."""

    since: float
    silent: int
    nodes: int
    """How many there were."""


class BrakeRelease(_Record, frozen=True, kw_only=True):
    """An operator has let go of the brake; a brake that came on later is another. Writer: API."""

    at: float
    by: str = ""


class Prefetch(_Record, frozen=True, kw_only=True):
    """Images that a node may need soon. Writer: the leader, which predicts them; without the record there are none."""

    node: str
    images: tuple[str, ...]
    """References with digests, the likeliest first."""


class Usage(_Record, frozen=True, kw_only=True):
    """What an instance uses now. Never stored: it travels with heartbeats."""

    instance: str
    cpu_milli: int = 0
    memory_bytes: int = 0
    pids: int = 0
    disk_bytes: int = 0
    gpu_milli: int = 0
    """Thousandths of a device in use, of all that it holds; 0 where the device does not tell its tenants apart."""
    gpu_memory_bytes: int = 0
    gpu_silent: bool = False
    """The driver of what it holds does not say: the two above mean nothing."""
    sent_bytes: int = 0
    """This and the next four: of its link, since it has it."""
    sent_packets: int = 0
    received_bytes: int = 0
    received_packets: int = 0
    network_drops: int = 0
    """Packets that its link had no room for; what rules and limits refuse is not among them."""
    metrics: dict[str, float] = {}
    """The app's own, as its `metrics` endpoint gave them."""


class Heartbeat(_Record, frozen=True, kw_only=True):
    """A node's sign of life. Never stored."""

    node: str
    at: float
    cpu_milli: int = 0
    memory_bytes: int = 0
    usage: tuple[Usage, ...] = ()
    gpus: tuple[GpuSample, ...] = ()
    images: tuple[str, ...] = ()
    """Digests by which images are found on the node, those used last first; not all where they are many."""
    fetching: str = ""
    """The image that is being fetched for later, and how far it is, in words."""


class IngressHeartbeat(_Record, frozen=True, kw_only=True):
    """An ingress's sign of life: who asks here, and how far the other sites are. Never stored."""

    ingress: str
    site: str = "local"
    at: float
    requests: dict[str, float] = {}
    """`PROJECT/APP` → requests per second that come in here, smoothed over minutes; not all where they are many."""
    round_trips_ms: dict[str, float] = {}
    """Other site → smoothed round trip, of those that answer."""


class Role(enum.StrEnum):
    ADMIN = "admin"
    DEPLOY = "deploy"
    READ = "read"
    AGENT = "agent"
    """A node's agent; `subject` is the node."""
    INGRESS = "ingress"
    """An ingress; `subject` is its name."""


class Token(_Record, frozen=True, kw_only=True):
    """A bearer token, of which only the SHA-256 is kept. Writer: API."""

    id: str
    name: str
    role: Role
    project: str = "*"
    """`*` for all."""
    subject: str = ""
    digest: str
    created_at: float
    expires_at: float | None = None


class Secret(_Record, frozen=True, kw_only=True):
    """A project's secret, sealed with the cell's key. Writer: API."""

    project: str
    name: str
    sealed: bytes
    version: int
    updated_at: float


class Severity(enum.StrEnum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Event(_Record, frozen=True, kw_only=True):
    """Something that happened to a subject, for people to read. Kept for a bounded time and count.

    `subject` is `app/NAME`, `job/NAME`, `instance/ID`, `node/NAME` or `ingress/NAME`; `code` is stable, kebab-case.
    """

    id: str
    at: float
    project: str
    subject: str
    code: str
    message: str
    severity: Severity = Severity.INFO
    node: str | None = None
    data: dict[str, Any] = {}


class Drained(_Record, frozen=True, kw_only=True):
    """An ingress has no active request to a draining instance and sends it no more. Writer: that ingress."""

    instance: str
    ingress: str
    at: float


class Ingress(_Record, frozen=True, kw_only=True):
    """An ingress that serves. Writer: the ingress, on registration."""

    name: str
    site: str = "local"
    http_port: int
    domain: str = "localhost"
    address: str = ""
    """Where other sites reach it at `http_port`; empty where nobody knows."""
    registered_at: float = 0.0


class RouteClaim(_Record, frozen=True, kw_only=True):
    """Which app owns a hostname and path, so that no two do. Writer: API."""

    project: str
    app: str


class RequestRecord(_Record, frozen=True, kw_only=True):
    """The answer to a write that carried a request key, so that a repeat gets the same. Writer: API."""

    status: int
    body: bytes
    fingerprint: str
    at: float


class Assignment(_Record, frozen=True, kw_only=True):
    """All that an agent needs to run one instance."""

    instance: Instance
    workload: AppSpec | JobSpec
    revision: int


class Endpoint(_Record, frozen=True, kw_only=True):
    """A place where requests for an app may go."""

    instance: str
    node: str
    site: str = "local"
    address: str
    draining: bool = False
    release: int = 0
    """What it runs; 0 where that was not told."""


class Preview(_Record, frozen=True, kw_only=True):
    """A release at a hostname of its own, on the app's first `http` port."""

    host: str
    release: int
    port: int
    http2: bool = False
    endpoints: tuple[Endpoint, ...] = ()


class Routing(_Record, frozen=True, kw_only=True):
    """All that an ingress needs for one app. `routes` are complete: the default hostname is among them."""

    project: str
    app: str
    spec: AppSpec
    hosts: tuple[tuple[str, str, int, bool], ...]
    """(hostname, path prefix, port number, HTTP/2 to the instance)."""
    endpoints: tuple[Endpoint, ...] = ()
    weights: dict[int, int] = {}
    """Release → percent of the requests, 100 in all, however many endpoints it has; empty: to every endpoint alike."""
    preview: Preview | None = None
    """Where a release answers before it gets the app's requests."""
    wakes: bool = False
    """A request that finds no endpoint waits while the ingress has the app woken (`ControlPlane.demand`)."""


_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def new_suffix(choose: Any = secrets.choice, length: int = 6) -> str:
    """Return random characters for an id; pass a seeded `choose` where runs must repeat."""
    return "".join(choose(_ALPHABET) for _ in range(length))


def suffix_of(bits: int, length: int = 6) -> str:
    """Return the id suffix that `5 * length` random bits make; one draw where many ids are made at once."""
    return "".join(_ALPHABET[bits >> shift & 31] for shift in range(0, 5 * length, 5))


def workload_of(assignment: Assignment) -> Workload:
    """Return the assignment's spec as what apps and jobs have in common."""
    return assignment.workload
