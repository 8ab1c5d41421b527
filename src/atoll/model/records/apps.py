"""Apps as users want them, and how they stand."""

from __future__ import annotations

import enum

from msgspec import UNSET

from atoll.model.records.basis import Record
from atoll.model.rollouts import RolloutOrder, RolloutStatus
from atoll.model.spec import AppSpec


class App(Record, frozen=True, kw_only=True):
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
        return self.spec.wakes and self.replicas == 0

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


class Release(Record, frozen=True, kw_only=True):
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


class AppStatus(Record, frozen=True, kw_only=True):
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
