"""What agents and ingress see of the control plane: nothing but this. Over HTTP in production, direct in the simulator."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from msgspec import Struct

from atoll.model.beats import BeatGrant
from atoll.model.records import Assignment, Event, Heartbeat, Ingress, IngressHeartbeat, Node, Routing, Status
from atoll.model.states import Desired
from atoll.model.traffic import DemandReport, TrafficReport


class Unread(Struct, frozen=True):
    """An assignment that the node's version does not understand."""

    project: str
    instance: str
    why: str


class AssignmentBatch(Struct, frozen=True):
    """With `complete`, `put` and `kept` are everything that is assigned to the node, and whatever else the node has must go."""

    revision: int
    complete: bool
    put: tuple[Assignment, ...] = ()
    removed: tuple[str, ...] = ()
    """Instance ids: remove every trace of them."""
    kept: dict[str, Desired] = {}
    """Instances of which no more can be told, because a record of theirs is missing or damaged, or is to be done, because they have
    ended for good: what the node knows of them holds, and of others it need not know."""
    prefetch: tuple[str, ...] | None = None
    """Images (references with digests) that the node may need soon, the likeliest first; None where nothing new is said of them.
    A wish: nothing fails where it is not followed."""
    unread: tuple[Unread, ...] = ()
    """Said by who reads the batch, of what was in `put` and is in `kept` now: never by the server."""


class RoutingBatch(Struct, frozen=True):
    """With `complete`, `put` and `kept` are every app that has a route."""

    revision: int
    complete: bool
    put: tuple[Routing, ...] = ()
    removed: tuple[str, ...] = ()
    """`project/app`."""
    kept: tuple[str, ...] = ()
    """Apps of which no more can be told, because their record is damaged: what is known of them holds."""


class Peer(Struct, frozen=True):
    """Another site's ingress, for a round trip to be measured to."""

    site: str
    address: str
    port: int


class Peers(Struct, frozen=True):
    peers: tuple[Peer, ...] = ()
    sites: dict[str, float] = {}
    """Other site → round trip in ms from the ingress's own, of those of which it is known or can be estimated."""


class StreamKind:
    EXEC = "exec"
    LOGS = "logs"
    FILES_GET = "files-get"
    FILES_PUT = "files-put"
    GPU_REINSTATE = "gpu-reinstate"
    """Of the node itself: `instance` is empty."""
    PAUSE = "pause"
    RESUME = "resume"
    SNAPSHOT = "snapshot"
    SNAPSHOTS = "snapshots"
    SNAPSHOT_REMOVE = "snapshot-remove"
    """These two of the node itself."""


class StreamRequest(Struct, frozen=True):
    """The server asks the agent to open stream `id`; `options` depend on `kind` (see `model.streams`)."""

    id: str
    kind: str
    instance: str
    options: dict[str, Any] = {}


NEXT_STREAM = "next"
"""In the place of a stream's id: one that waits for whoever wants a stream of the node next. Its first message is the request, and
the agent's first is TAKEN."""
TAKEN = b""
"""No message of any stream."""


class Channel(Protocol):
    """A two-way stream of messages (see `model.streams` for what is in them), with back-pressure."""

    async def send(self, message: bytes) -> None:
        """Raises Unavailable when the other end is gone."""
        ...

    async def receive(self) -> bytes | None:
        """Return the next message; None when the other end has closed."""
        ...

    async def gone(self) -> None:
        """Return once the other end hears nothing any more, for who does not receive; it may take some 20 s to be seen."""
        ...

    async def close(self) -> None: ...


class ControlPlane(Protocol):
    """Every call may raise Unavailable (safe to repeat) and Unauthenticated or Forbidden (not)."""

    async def register_node(self, node: Node) -> None: ...

    async def heartbeat(self, heartbeat: Heartbeat) -> None: ...

    async def beat_grant(self, node: str) -> BeatGrant:
        """Return the key by which `node` beats. Raises NotFound: this server is older than beats."""
        ...

    def assignments(self, node: str) -> AsyncIterator[AssignmentBatch]:
        """Yield first a complete batch, then changes as they come. Ends with Unavailable when the connection breaks: call
        again, and get a complete batch again."""
        ...

    async def report(self, node: str, statuses: Sequence[Status], events: Sequence[Event] = ()) -> None:
        """Write what the node sees; the newest word on each instance wins. Safe to repeat."""
        ...

    async def instance_secrets(self, instance: str) -> dict[str, str]:
        """Return environment variable → value for an instance of this node. Raises NotFound naming a missing secret."""
        ...

    def stream_requests(self, node: str) -> AsyncIterator[StreamRequest]: ...

    async def open_stream(self, node: str, id: str) -> Channel:
        """Dial stream `id` that was asked for, or NEXT_STREAM. Raises NotFound: nobody waits for it, or the server is older."""
        ...

    async def register_ingress(self, ingress: Ingress) -> None: ...

    def routing(self, ingress: str) -> AsyncIterator[RoutingBatch]:
        """As `assignments`, for all apps that have routes."""
        ...

    async def drained(self, ingress: str, instances: Sequence[str]) -> None: ...

    async def ingress_heartbeat(self, heartbeat: IngressHeartbeat) -> Peers:
        """Tell who asks here and how far other sites are, and return whom to measure. It may be lost: the next says as much."""
        ...

    async def demand(self, report: DemandReport) -> None:
        """Have apps that sleep woken, or kept awake. Safe to repeat: while requests wait, it is said again and again."""
        ...

    async def traffic(self, report: TrafficReport) -> None:
        """Take what an ingress counted. It may be lost: the next report says the same and more."""
        ...
