"""Nodes, their devices, and taking them out of use; sites."""

from __future__ import annotations

import enum

from msgspec import Struct

from atoll.model.devices import GpuGrant
from atoll.model.evacuation import Evacuation
from atoll.model.maintenance import DRAIN_DEADLINE_S, Drain, Maintenance, Window
from atoll.model.records import Brake, Heartbeat, Ingress, Node, NodeHealth, NodePolicy, OwnerKind, Site
from atoll.model.spec.values import default
from atoll.model.units import Seconds


class GpuHolder(Struct, frozen=True, kw_only=True):
    """What one instance holds of a device."""

    instance: str
    project: str
    grant: GpuGrant


class GpuHolding(Struct, frozen=True, kw_only=True):
    """What of one device is given away; the rest is free."""

    device: str
    milli: int
    """Thousandths of its compute; of a device in MIG mode, of its memory slices."""
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


class LabelRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be said of a node beside its agent's words, and before them."""

    labels: dict[str, str | None] = {}
    """Key → value; null takes a label away, one of the agent's too."""
    reset: bool = False
    """First forget every label that was said so before: those of the agent count again."""


class TaintRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Taints to add and to take away; `KEY[=VALUE][:EFFECT]`."""

    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    """Taints, or keys: then every taint with that key. Those of the agent, too."""
    reset: bool = False
    """First forget all that was said of its taints before: those of the agent count again."""


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


class ReinstateRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """With `reset`, the GPU is reset before."""

    reset: bool = False


class IngressView(Struct, frozen=True, kw_only=True):
    """An ingress that has registered."""

    ingress: Ingress
    silent_s: float | None = None
    """Since the server that was asked heard of it; None where it has not for an hour, or never."""
    requests_per_s: float = 0.0
    """Smoothed over minutes."""
    problems: int = 0
    """Apps of whose routing it leaves out a part, whose events say why; and one where `problem` says something."""
    problem: str = ""
    """What is wrong with the ingress itself."""
