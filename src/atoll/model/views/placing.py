"""What the scheduler would do, and why; what could be moved; and what is reserved."""

from __future__ import annotations

import enum

from msgspec import Struct

from atoll.model.devices import GpuGrant
from atoll.model.records import Instance, Rejection
from atoll.model.reservation import Reservation


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


class KeptFor(enum.StrEnum):
    """Why room is kept."""

    WAITING = "waiting"
    """For the head of the queue, until what runs there has ended: what comes after it may only use it in the meantime."""
    RESERVED = "reserved"
    """For a project, by an operator."""


class KeptRoom(Struct, frozen=True, kw_only=True):
    """Room on nodes that is kept for somebody."""

    why: KeptFor
    project: str = ""
    """For which; empty where the caller may not see it."""
    name: str = ""
    """Of the app or job that waits, or of the reservation."""
    instances: tuple[str, ...] = ()
    """That wait; of many the first."""
    count: int = 1
    """Instances that wait, or nodes that are reserved."""
    nodes: tuple[str, ...] = ()
    """Where; of many the first."""
    node_count: int
    cpu_milli: int = 0
    """Of each instance that waits, or of each node that is reserved; with memory and GPUs 0, all of it."""
    memory_bytes: int = 0
    gpu_milli: int = 0
    start: float | None = None
    """When who waits has it at the latest, or when the reservation begins; None where nobody knows."""
    end: float | None = None
    """When the reservation ends; of what waits, nobody knows."""
    own: bool = False
    """It is kept for what is explained here itself, or for its project."""
    turns_away: int = 0
    """Nodes on which it keeps out what is explained here, and nothing else does."""


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
    kept: tuple[KeptRoom, ...] = ()
    """Room that is kept for it or its project, and room of others that it is kept out of."""
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


class ReservationView(Struct, frozen=True, kw_only=True):
    reservation: Reservation
    nodes: tuple[str, ...] = ()
    """Those that it concerns now."""
    revision: int
