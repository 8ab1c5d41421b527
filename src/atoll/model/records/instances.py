"""Instances as the control plane wants them, and as their nodes see them."""

from __future__ import annotations

import enum
import secrets
from typing import Any

from atoll.model.devices import GpuGrant
from atoll.model.records.basis import Record
from atoll.model.spec import AppSpec, JobSpec, RuntimeName, Workload
from atoll.model.states import Desired, Phase


class OwnerKind(enum.StrEnum):
    APP = "app"
    JOB = "job"


class Booked(Record, frozen=True, kw_only=True):
    """Room that the scheduler keeps for what waits, until what runs there has ended (backfill)."""

    nodes: dict[str, int]
    """Node → for how many of them."""
    at: float | None = None
    """When it is free at the latest; None where nobody knows when what runs there ends."""
    since: float = 0.0
    """Where nobody knows: all has to end there that was placed by then."""


class Rejection(Record, frozen=True, kw_only=True):
    """Why an instance has no node: a stable code, the reason, and what would change the answer."""

    code: str
    message: str
    mend: str = ""
    failed: dict[str, int] = {}
    """Filter → number of nodes that it turned away."""
    booked: Booked | None = None
    """What is kept for it; of a gang, its first member says it for all."""


class Instance(Record, frozen=True, kw_only=True):
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
    """Made to be parked until it takes another's place; then false for good. Until then it serves nobody and counts as none.
    Of a template's pool: to be taken; it is not parked, so that who takes it has it at once."""
    taken_at: float | None = None
    """When it was taken out of a template's pool: its owner is a job that was made in the same write, at that time."""


class Exit(Record, frozen=True, kw_only=True):
    """How a process ended. `code` is the exit status, or 128 + the signal."""

    code: int
    at: float
    signal: str | None = None
    oom: bool = False
    """The kernel killed it for going over its memory limit."""
    why: str = ""
    """What the runtime did and why, in words, where the rest does not say it."""


class Status(Record, frozen=True, kw_only=True):
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
    ipv6: str | None = None
    """Its IPv6 address within the cell, where it has one."""
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
    paused: bool = False
    """It stands still because its user said so."""
    word: int = 0
    """Which word of its agent this is: a newer one has a higher number, so that one that arrives late is known. 0: not told."""


class Usage(Record, frozen=True, kw_only=True):
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
    connections: int = 0
    """That it began, to wherever; this and the next since it was last silent for ten minutes."""
    limited_packets: int = 0
    """Beyond its limits (`network.bandwidth`, `network.packets`), in either direction, and dropped."""
    metrics: dict[str, float] = {}
    """The app's own, as its `metrics` endpoint gave them."""
    shared_by: int = 1
    """How many workers share its process: of processor, memory and pids each is told its equal part, since nobody knows more."""


class Assignment(Record, frozen=True, kw_only=True):
    """All that an agent needs to run one instance."""

    instance: Instance
    workload: AppSpec | JobSpec
    revision: int
    caller_ca: str = ""
    """PEM, of an app with `ingress.instance_tls.mutual`: who signs what ingresses show its instances."""


def workload_of(assignment: Assignment) -> Workload:
    """Return the assignment's spec as what apps and jobs have in common."""
    return assignment.workload


_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def new_suffix(choose: Any = secrets.choice, length: int = 6) -> str:
    """Return random characters for an id; pass a seeded `choose` where runs must repeat."""
    return "".join(choose(_ALPHABET) for _ in range(length))


def suffix_of(bits: int, length: int = 6) -> str:
    """Return the id suffix that `5 * length` random bits make; one draw where many ids are made at once."""
    return "".join(_ALPHABET[bits >> shift & 31] for shift in range(0, 5 * length, 5))
