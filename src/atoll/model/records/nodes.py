"""Machines: as their agents describe them, and what is said and known of them."""

from __future__ import annotations

import enum
from typing import ClassVar

from atoll.model.devices import GpuDevice, GpuSample, OfferedDevice
from atoll.model.flows import Flows
from atoll.model.maintenance import Drain
from atoll.model.records.basis import Record
from atoll.model.records.instances import Usage
from atoll.model.spec import RuntimeName


class Capacity(Record, frozen=True, kw_only=True):
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    gpus: tuple[GpuDevice, ...] = ()
    devices: tuple[OfferedDevice, ...] = ()
    """Of CDI specs, as far as the node's operator allowed them."""
    gpu_refusals: dict[RuntimeName, str] = {}
    """Of the node's runtimes those that cannot hand on its GPUs, and why."""


class Node(Record, frozen=True, kw_only=True):
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
    word: int = 0
    """The number of this word of the agent's: one that was on its way for long is not to count for the newest. 0 for an agent from
    before there were numbers."""


class NodePolicy(Record, frozen=True, kw_only=True):
    """What operators say of a node. Writer: API."""

    PIECEMEAL: ClassVar[bool] = True

    name: str
    cordoned: bool = False
    note: str = ""
    drain: Drain | None = None
    labels: dict[str, str | None] = {}
    """What is said of the node beside, and before, what its agent says (`model.labels`); None hides a label of the agent's."""
    taints: tuple[str, ...] = ()
    untaints: tuple[str, ...] = ()
    """Taints of the agent's that do not count."""


class NodeHealth(enum.StrEnum):
    READY = "ready"
    UNREACHABLE = "unreachable"
    LOST = "lost"


class NodeLiveness(Record, frozen=True, kw_only=True):
    """Whether a node answers, written only when that changes. Writer: node controller."""

    name: str
    health: NodeHealth
    since: float


class Brake(Record, frozen=True, kw_only=True):
    """Many nodes fell silent at once, and none is given up any more. Written when it comes on, removed when it lets go. Writer:
    node controller."""

    since: float
    silent: int
    nodes: int
    """How many there were."""


class BrakeRelease(Record, frozen=True, kw_only=True):
    """An operator has let go of the brake; a brake that came on later is another. Writer: API."""

    at: float
    by: str = ""


class Prefetch(Record, frozen=True, kw_only=True):
    """Images that a node may need soon. Writer: the leader, which predicts them; without the record there are none."""

    node: str
    images: tuple[str, ...]
    """References with digests, the likeliest first."""


class Heartbeat(Record, frozen=True, kw_only=True):
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
    flows: Flows | None = None
    """What its instances sent each other and those of other nodes."""
