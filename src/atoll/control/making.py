"""Instances of an app come into being: new ones, and those in place of what has ended for good."""

from __future__ import annotations

from msgspec import Struct

from atoll.control.actions import Create, Decision, Seen
from atoll.control.facts import AppFacts
from atoll.model.records import Instance, OwnerKind

RETRY_MIN_S = 1.0
RETRY_MAX_S = 60.0
"""Before an instance that has failed for good is replaced; doubled with each failure of its line."""
UNPLACED_MAX = 2_000
"""Instances of one app that wait for a place at the same time; the rest is made when these have theirs. So a wish that no
fleet can fulfil costs no more than one that is just too large."""
RETRY_RESET_S = 60.0
"""An instance that was ready for so long starts its line anew."""


class Kind(Struct, frozen=True):
    """What an instance is made of."""

    release: int
    generation: int


class Maker:
    """Makes instances during one decision. `created` counts those that are to serve, those that were taken for them too."""

    def __init__(self, facts: AppFacts, decision: Decision) -> None:
        self._facts = facts
        self._decision = decision
        self.created = 0

    def make(self, kind: Kind, count: int, due: list[Seen], *, standby: bool = False) -> None:
        """Make `count` of them, the first ones in place of `due`."""
        waiting = [seen.instance for seen in self._facts.instances if seen.instance.node is None and not seen.ended]
        room = max(0, UNPLACED_MAX - len(waiting) - self.created)
        if count > room:
            count = room
            if not any(instance.rejection for instance in waiting):
                self._decision.wake(self._decision.now)  # else the next place that one of them gets is what wakes
        app = self._facts.app
        for number in range(count):
            before = due[number] if number < len(due) else None
            self._decision.do(
                Create(
                    Instance(
                        id=self._decision.new_id(app.name),
                        project=app.project,
                        owner_kind=OwnerKind.APP,
                        owner=app.name,
                        release=kind.release,
                        generation=kind.generation,
                        attempt=next_attempt(before) if before else 0,
                        created_at=self._decision.now,
                        standby=standby,
                    )
                )
            )
        if count > 0:
            self.created += 0 if standby else count
            what = "1 instance" if count == 1 else f"{count} instances"
            text = f"made {what} of release {kind.release}{' to stand by' if standby else ''}"
            subject = f"app/{app.name}"
            self._decision.tell(app.project, subject, "instances-created", text, count=count, release=kind.release)


def next_attempt(seen: Seen) -> int:
    """Return which failure in a row of its line an instance that has ended for good was, counted from 1."""
    status = seen.status
    if status is not None and status.ready_at is not None and status.phase_at - status.ready_at >= RETRY_RESET_S:
        return 1
    return seen.instance.attempt + 1


def retry_at(seen: Seen, now: float) -> float:
    """Return when an instance that has ended for good is replaced."""
    ended_at = seen.status.phase_at if seen.status else 0.0
    if not 0.0 < ended_at <= now:
        # The node's clock is ahead of ours, or says nothing: ours knows when the instance was made.
        ended_at = seen.instance.created_at
    return ended_at + min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(next_attempt(seen) - 1, 30))
