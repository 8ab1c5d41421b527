"""What the instance state machine is made of: rules, state, events that go in, actions that come out."""

from __future__ import annotations

import enum
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from atoll.model.records import Exit, Severity, Status
from atoll.model.spec import AppSpec, Health, JobSpec, PortProtocol, Restart, Stop, Workload
from atoll.model.states import Desired, Phase


class Now(Struct, frozen=True):
    """`wall` (seconds since the epoch) goes into records, `monotonic` measures spans: the wall clock may jump."""

    wall: float
    monotonic: float


class Rules(Struct, frozen=True, kw_only=True):
    """What the spec says of an instance's life. `restart` None (a job) means: never restarted here."""

    restart: Restart | None
    stop: Stop
    health: Health | None = None
    gate_port: int | None = None
    """Without a health check: ready once this port accepts a connection; None when running is enough."""
    warmed: bool = False
    """In a template's pool: ready once a command has run in it."""
    idle_limit_s: float | None = None
    """Of a sandbox: ended when nobody has used it for so long."""
    memory_bytes: int = 0


class Rest(enum.StrEnum):
    """Whether a process that runs may do so, or is parked: off its devices, then frozen."""

    AWAKE = "awake"
    PARKING = "parking"
    PARKED = "parked"
    WAKING = "waking"


class State(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One instance as its node knows it. Fields named `*_at` are wall time, `*_due` and `running_since` monotonic."""

    phase: Phase = Phase.PENDING
    desired: Desired = Desired.RUN
    removed: bool = False
    erased: bool = False
    ready: bool = False
    run: int = 0
    """Starts so far; what a probe of an earlier run says does not count."""
    failures: int = 0
    """Ends in a row, the `n` of the back-off."""
    pid: int | None = None
    exit: Exit | None = None
    message: str = ""
    image_digest: str | None = None
    volume_digests: dict[str, str] = {}
    """Volume → the image that it shows."""
    address: str | None = None
    ipv6: str | None = None
    stop_signal: str | None = None
    """The image's own, used where the spec keeps the default."""
    ending: bool = False
    """Told to end by the node itself, to be started again."""
    standby: bool = False
    """To be parked once it is ready; never again once it was false."""
    rest: Rest = Rest.AWAKE
    kept_awake: bool = False
    """This run could not be parked, and waits awake."""
    suspended: tuple[int, ...] = ()
    """Processes that were taken off their devices, or were about to be."""
    paused: bool = False
    """Its user has it stand still."""
    idle_since: float | None = None
    """Since when nobody has used it, in wall time; None while somebody does, and where it may be idle for ever."""
    idle_due: float | None = None
    phase_at: float = 0.0
    started_at: float | None = None
    ready_at: float | None = None
    running_since: float | None = None
    retry_due: float | None = None
    held_until: float | None = None
    """It is started by a new agent no earlier than this, or once the control plane has said what it wants of this node."""
    kill_due: float | None = None
    probe_due: float | None = None
    probes: int = 0
    misses: int = 0

    @property
    def due(self) -> float | None:
        """The monotonic time at which the next `Due` must come; None when nothing is waited for."""
        times = [at for at in (self.start_due, self.kill_due, self.probe_due, self.idle_due) if at is not None]
        return min(times) if times else None

    @property
    def start_due(self) -> float | None:
        """When the next try at a start is due."""
        if self.retry_due is None or self.held_until is None:
            return self.retry_due
        return max(self.retry_due, self.held_until)

    @property
    def durable(self) -> State:
        """The part that the local record keeps: what would be lost by a restart of the agent and matters after it."""
        timers: dict[str, Any] = {"retry_due": None, "held_until": None, "kill_due": None, "probe_due": None, "idle_due": None}
        return replace(self, running_since=None, probes=0, misses=0, **timers)


def rules_of(workload: Workload) -> Rules:
    """Return the rules of an app's or a job's instances."""
    memory_bytes = int(workload.resources.memory)
    if not isinstance(workload, AppSpec):
        warmed = isinstance(workload, JobSpec) and workload.pool is not None
        limit = workload.idle_limit if isinstance(workload, JobSpec) and not warmed else None
        idle_limit_s = float(limit) if limit is not None else None
        return Rules(restart=None, stop=workload.stop, memory_bytes=memory_bytes, warmed=warmed, idle_limit_s=idle_limit_s)
    streams = [port.port for port in workload.ports if port.protocol is not PortProtocol.UDP]
    gate = streams[0] if streams and workload.health is None else None
    return Rules(restart=workload.restart, stop=workload.stop, health=workload.health, gate_port=gate, memory_bytes=memory_bytes)


def status_of(state: State, *, instance: str, project: str, node: str) -> Status:
    """Return what the control plane is told."""
    return Status(
        instance=instance,
        project=project,
        node=node,
        phase=state.phase,
        ready=state.ready,
        restarts=max(0, state.run - 1),
        pid=state.pid,
        address=state.address,
        ipv6=state.ipv6,
        exit=state.exit,
        message=state.message,
        image_digest=state.image_digest,
        phase_at=state.phase_at,
        started_at=state.started_at,
        ready_at=state.ready_at,
        parked=state.rest in (Rest.PARKED, Rest.WAKING),
        paused=state.paused,
    )


class Wanted(Struct, frozen=True):
    """The control plane's wish, as in the assignment."""

    desired: Desired
    standby: bool = False


class Removed(Struct, frozen=True):
    """The assignment is gone: stop what runs, then remove every trace."""


class Recovered(Struct, frozen=True):
    """A new agent has this state from its record; the runtime found the process (`pid`), how it ended (`exit`), an
    instance that was never started (neither), or nothing (`present` False)."""

    present: bool
    pid: int | None = None
    exit: Exit | None = None


class Reached(Struct, frozen=True):
    """The control plane has said all that it wants of this node now."""


class Progressed(Struct, frozen=True):
    """What is being prepared, in words."""

    message: str


class Prepared(Struct, frozen=True, kw_only=True):
    """Image, link and root are there."""

    image_digest: str
    address: str | None
    ipv6: str | None = None
    stop_signal: str | None = None
    volume_digests: dict[str, str] = {}


class PrepareFailed(Struct, frozen=True):
    """`passing`: the cause may go by itself (a registry that hangs), so that even a job tries again."""

    message: str
    passing: bool = False


class Launched(Struct, frozen=True):
    pid: int
    at: float


class LaunchFailed(Struct, frozen=True):
    message: str


class Ended(Struct, frozen=True):
    """The process is gone; `exit` None when nobody knows how."""

    exit: Exit | None


class Probed(Struct, frozen=True):
    """A probe's answer; `failure` is empty when it succeeded."""

    run: int
    failure: str = ""


class Paused(Struct, frozen=True):
    """Its user has it stand still, or lets it go on."""

    paused: bool


class Used(Struct, frozen=True):
    """Whether somebody works in it now: a command, a copy of files; and asked again when its rules have changed."""

    now: bool


class Due(Struct, frozen=True):
    """`State.due` has come."""


class Suspending(Struct, frozen=True):
    """These processes are about to be taken off their devices: recorded first, since they cannot be found afterwards."""

    run: int
    pids: tuple[int, ...]


class Parked(Struct, frozen=True):
    """`message` says what was done, and how long it took."""

    run: int
    message: str


class ParkFailed(Struct, frozen=True):
    """It runs on as before."""

    run: int
    message: str


class Woken(Struct, frozen=True):
    """It runs, on its devices. `message` says how long that took."""

    run: int
    message: str


class WakeFailed(Struct, frozen=True):
    """It does not run, or not on its devices, and is of no use any more."""

    run: int
    message: str


Happening = (
    Wanted
    | Removed
    | Recovered
    | Reached
    | Progressed
    | Prepared
    | PrepareFailed
    | Launched
    | LaunchFailed
    | Ended
    | Probed
    | Paused
    | Used
    | Due
    | Suspending
    | Parked
    | ParkFailed
    | Woken
    | WakeFailed
)


class Prepare(Struct, frozen=True):
    """Get image, link, secrets and root; answer Prepared or PrepareFailed."""


class CancelPrepare(Struct, frozen=True):
    """Let go of a Prepare under way; it answers nothing."""


class Launch(Struct, frozen=True):
    """Start the process; answer Launched or LaunchFailed."""


class Watch(Struct, frozen=True):
    """Wait for the process; answer Ended."""


class Probe(Struct, frozen=True):
    """Check once; answer Probed with the same `run`."""

    run: int


class Park(Struct, frozen=True):
    """Take its processes off their devices (answer Suspending first), then freeze it; answer Parked, ParkFailed, or WakeFailed
    where it could not be let go on either. `again`: an earlier agent may have come half-way. Kill and Clean end it unanswered."""

    run: int
    again: bool = False


class Wake(Struct, frozen=True):
    """Let it go on, then put it back on its devices; answer Woken or WakeFailed. Ended like Park."""

    run: int
    again: bool = False


class Signal(Struct, frozen=True):
    name: str


class Kill(Struct, frozen=True):
    pass


class Clean(Struct, frozen=True):
    """Remove root, cgroup and what still runs; with `all` the link and pipes too. Logs stay."""

    all: bool = False


class Erase(Struct, frozen=True):
    """Remove logs and the record: the instance is over."""


class Note(Struct, frozen=True):
    """Write an event for people."""

    code: str
    message: str
    severity: Severity = Severity.INFO


Action = Prepare | CancelPrepare | Launch | Watch | Probe | Park | Wake | Signal | Kill | Clean | Erase | Note
