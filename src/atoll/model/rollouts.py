"""How a rollout stands, and what people ask of it: parts of an app's record and its status. Times are seconds since the epoch."""

from __future__ import annotations

import enum

from msgspec import Struct

from atoll.model.spec.rollout import Strategy


class RolloutPhase(enum.StrEnum):
    PROGRESSING = "progressing"
    """Instances are being made for what comes next, or a step lasts its time."""
    WAITING = "waiting"
    """For a person: a step without a time, a blue-green set that is ready, a rollout that was paused."""
    PROMOTING = "promoting"
    """The new release is on its way to have all requests."""
    KEEPING = "keeping"
    """The new release has all requests; the old set is kept for a while, to switch back at once."""
    COMPLETE = "complete"
    REVERTED = "reverted"
    """The old release has all requests again, once it has the instances. The new one is not tried again until asked for."""

    @property
    def under_way(self) -> bool:
        return self in (RolloutPhase.PROGRESSING, RolloutPhase.WAITING, RolloutPhase.PROMOTING)


class RolloutOrder(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What people ask of the rollout of `release`; it means nothing for any other. Writer: API."""

    release: int
    attempt: int = 0
    """Raised to have a rollout that was reverted begin anew."""
    paused: bool = False
    step: int = 0
    """Steps before this one are over, whatever their pauses say."""
    promoted: bool = False
    """Go on to the end, past all steps and waits."""
    aborted: bool = False
    """Go back to the release before."""
    by: str = ""


class Leaving(Struct, frozen=True, kw_only=True):
    """A release that was taken back, that people went back from, or that another overtook."""

    release: int
    weight: int
    """Percent of the requests."""
    until: float
    """Then it has none, however few there are of `stable`."""


class RolloutStatus(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the rollout of `release` in place of `stable` stands. Writer: app controller."""

    release: int
    stable: int
    """What had all requests when it began, what it is compared with, and what it goes back to."""
    attempt: int = 0
    strategy: Strategy = Strategy.ROLLING
    phase: RolloutPhase = RolloutPhase.PROGRESSING
    step: int = 0
    """Index of the step that is in force, or on its way."""
    weight: int | None = None
    """Percent of the requests that go to `release`; None: to every ready instance alike, and after a revert none."""
    since: float = 0.0
    """When this step's weight, or this phase, came into force; 0 while instances are being made for it."""
    short_since: float = 0.0
    """Since when fewer instances are ready than what is in force needs; 0 for enough. Its deadline counts from then."""
    failures: int = 0
    """Bad intervals of this step."""
    passes: int = 0
    """Good intervals of this step."""
    analysed_at: float = 0.0
    """Of the last verdict that counts above."""
    verdict: str = ""
    """The last verdict, in words and numbers."""
    message: str = ""
    """What is waited for, or why it was reverted."""
    leaving: Leaving | None = None
    """A release on its way out that keeps a part of what is `stable`'s, as long as that has too few instances for all of it."""

    @property
    def weights(self) -> dict[int, int]:
        """Return release → percent of the requests; empty where all ready instances are alike."""
        if self.phase is RolloutPhase.REVERTED:
            found = {self.stable: 100}
        elif self.weight is None or self.phase is RolloutPhase.COMPLETE:
            return {}
        elif self.release == self.stable:
            found = {self.release: 100}
        else:
            found = {self.release: self.weight, self.stable: 100 - self.weight}
        if self.leaving is None:
            return found
        left = min(self.leaving.weight, found[self.stable])
        if not left:
            return found
        return {**found, self.stable: found[self.stable] - left, self.leaving.release: left}

    @property
    def judged(self) -> bool:
        """Whether requests of `release` count for its analysis: it has some, or had its time for them."""
        return bool(self.since or self.weight)

    @property
    def serving(self) -> int:
        """Return the release that instances should be of when nothing goes on: the old one after a revert."""
        return self.stable if self.phase is RolloutPhase.REVERTED else self.release
