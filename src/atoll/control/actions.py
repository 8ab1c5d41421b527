"""What a decision can ask for, and what it sees of an instance. The writer turns actions into fenced transactions."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from msgspec import Struct, structs

from atoll.model.evacuation import Evacuation
from atoll.model.records import (
    AppStatus,
    Brake,
    Event,
    Instance,
    Job,
    JobStatus,
    NodeLiveness,
    Prefetch,
    Severity,
    Status,
    event_id,
)
from atoll.model.states import Desired, Phase

AGAIN_S = 0.1
"""After which it is decided again where that should have been by now, and nothing came of it."""
EVENTS_PER_DECISION_MAX = 100
"""Events about single instances in one decision; beyond it the owner's own event says how many there were."""


class Create(Struct, frozen=True):
    instance: Instance


class Update(Struct, frozen=True):
    """Write the instance if it is still at `revision`."""

    instance: Instance
    revision: int


class Remove(Struct, frozen=True):
    """Remove the instance if it is still at `revision`, and with it its status and its drained records."""

    instance: Instance
    revision: int


class WriteAppStatus(Struct, frozen=True):
    status: AppStatus


class WriteJobStatus(Struct, frozen=True):
    """Write the status if the job is still at `revision`: it may have been deleted, and another made under its name."""

    status: JobStatus
    revision: int


class CreateJob(Struct, frozen=True):
    """Make a run of a job with a schedule, if no job has its name."""

    job: Job


class UpdateJob(Struct, frozen=True):
    """Write the run of a job with a schedule if it is still at `revision`."""

    job: Job
    revision: int


class WriteLiveness(Struct, frozen=True):
    liveness: NodeLiveness


class WriteBrake(Struct, frozen=True):
    """Write that the brake is on; with None, that it is not any more."""

    brake: Brake | None


class WritePrefetch(Struct, frozen=True):
    """Write what a node should fetch; with no images, remove the record."""

    prefetch: Prefetch


class RemoveApp(Struct, frozen=True):
    """Remove the app if it is still at `revision`, with its releases, its status and its claims on routes, all at once."""

    project: str
    name: str
    revision: int


class RemoveJob(Struct, frozen=True):
    project: str
    name: str
    revision: int


class Forget(Struct, frozen=True):
    """Delete a key if it is still at `revision`, and if `unless` is absent."""

    key: str
    revision: int
    unless: str | None = None


class Tell(Struct, frozen=True):
    event: Event


Action = (
    Create
    | Update
    | Remove
    | WriteAppStatus
    | WriteJobStatus
    | CreateJob
    | UpdateJob
    | WriteLiveness
    | WriteBrake
    | WritePrefetch
    | RemoveApp
    | RemoveJob
    | Forget
    | Tell
)


class Ailment(Struct, frozen=True, kw_only=True):
    """What is wrong with a device that an instance holds; the worst of all that it holds."""

    device: str
    why: str
    gone: bool = False
    silent: bool = False


class Seen(Struct, frozen=True, kw_only=True):
    """An instance as the control plane wants it and as its node sees it."""

    instance: Instance
    revision: int
    created: int = 0
    """The revision that made the instance."""
    status: Status | None = None
    lost_at: float | None = None
    """Since when its node is lost (or was never known), once the app's patience is over."""
    lost_in_s: float | None = None
    """Its node is lost, and in so long it will be, too; infinite where it waits for its node."""
    returned: bool = False
    """Its node was lost, and has just been heard again."""
    drained: frozenset[str] = frozenset()
    """Ingresses that have no request to it any more."""
    ailment: Ailment | None = None
    """What is wrong with the devices that it holds."""
    evacuation: Evacuation | None = None
    """Why it is to leave its node; None too where it stays for its volumes' sake."""

    @property
    def lost(self) -> bool:
        return self.lost_at is not None

    @property
    def away(self) -> bool:
        """Its node is lost, but what it runs is not given up yet."""
        return self.lost_in_s is not None

    @property
    def phase(self) -> Phase:
        if self.lost and not (self.status and self.status.phase.final):
            return Phase.LOST
        return self.status.phase if self.status else Phase.PENDING

    @property
    def ended(self) -> bool:
        """It does not run and will not by itself, as far as anyone can know."""
        return self.phase.final

    @property
    def ready(self) -> bool:
        """It serves, and is meant to. What has lost a device does not, whatever its checks say; nor does what stands by."""
        if (
            self.away
            or self.instance.desired is not Desired.RUN
            or self.instance.standby
            or (self.ailment is not None and self.ailment.gone)
        ):
            return False
        return self.phase is Phase.RUNNING and self.status is not None and self.status.ready

    @property
    def idle(self) -> bool:
        """It stands by, or is not awake again: no request can be on its way to it."""
        return self.instance.standby or (self.status is not None and self.status.parked)


class Decision:
    """Actions in the order in which they were decided, and when to decide again if nothing happens before.

    `now` is in seconds since the epoch; `new_suffix` gives random characters for ids, of which `taken` are in use and
    `given` (which grows) have been given out by decisions that are not written yet. `forward_since` is since when the clock's dates
    have gone forward only, as far as is known.
    """

    def __init__(
        self,
        now: float,
        new_suffix: Callable[[], str],
        taken: Container[str] = (),
        given: set[str] | None = None,
        *,
        forward_since: float | None = None,
    ) -> None:
        self.now = now
        self.new_suffix = new_suffix
        self.actions: list[Action] = []
        self.wake_at: float | None = None
        self._told = 0
        self._taken = taken
        self._given = set() if given is None else given
        self._forward_since = now if forward_since is None else min(now, forward_since)

    def past(self, at: float) -> float:
        """Return when something was that has been stamped with `at`.

        A stamp that is still to come is from before the date was set back, or of a clock that is ahead. How long ago that was
        nobody can tell; it counts as the time since which this clock goes forward, so that no wait for it is longer than it was
        meant to be.
        """
        return at if at <= self.now else self._forward_since

    def do(self, action: Action) -> None:
        self.actions.append(action)

    def new_id(self, owner: str) -> str:
        """Return an id for an instance that no other in the cell has, whatever its project."""
        while (id := f"{owner}-{self.new_suffix()}") in self._taken or id in self._given:
            pass
        self._given.add(id)
        return id

    def wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)

    @property
    def again_at(self) -> float | None:
        """When to decide again: at once only where something was done, or the same would be decided for ever."""
        if self.wake_at is None or self.wake_at > self.now or self.actions:
            return self.wake_at
        return self.now + AGAIN_S

    def tell(
        self,
        project: str,
        subject: str,
        code: str,
        message: str,
        severity: Severity = Severity.INFO,
        node: str | None = None,
        **data: Any,
    ) -> None:
        """Record an event for people. Of those about single instances only the first are kept (see the bound above)."""
        if subject.startswith("instance/"):
            self._told += 1
            if self._told > EVENTS_PER_DECISION_MAX:
                return
        # Behind the time comes the place among those of one decision.
        event = Event(
            id=event_id(self.now, f"{len(self.actions):04d}{self.new_suffix()}"),
            at=self.now,
            project=project,
            subject=subject,
            code=code,
            message=message,
            severity=severity,
            node=node,
            data=data,
        )
        self.do(Tell(event))

    def update(self, seen: Seen, **changes: Any) -> None:
        self.do(Update(structs.replace(seen.instance, **changes), seen.revision))
