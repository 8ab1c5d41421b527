"""Instances that stand by: made when all that are wanted serve, parked by their nodes, taken where one is missing. Pure.

They serve nobody and count as none: not as ready, not for a rollout's bounds, not for an app's metric. What they take is room,
which they give back where it is needed for one that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from atoll.control import evacuation, gpus
from atoll.control.actions import Decision, Remove, Seen
from atoll.control.appstatus import SETTLE_CRASHED_S
from atoll.control.leaving import retire
from atoll.model.records import Severity
from atoll.model.states import Desired, Phase

SERVED_MIN_S = SETTLE_CRASHED_S
"""Only what has served for so long before it crashed is replaced by a standby; what ends sooner is its node's to start again, with
growing delays, or a crash loop would use up one standby after the other."""


class Standbys:
    """An app's standbys during one decision; those told to leave are none any more."""

    def __init__(self, instances: Iterable[Seen], decision: Decision) -> None:
        self._decision = decision
        instances = tuple(instances)
        self._leaving = sum(s.instance.standby and s.instance.desired is not Desired.RUN and not s.ended for s in instances)
        found = [seen for seen in instances if seen.instance.standby and seen.instance.desired is Desired.RUN]
        self._gone = [seen for seen in found if gpus.urgency_of(seen) is not None or evacuation.leaving(seen)]
        """On their way out because of their devices or nodes; those that are too young for it go soon."""
        self.failed = [seen for seen in found if seen.ended and seen.phase is not Phase.LOST]
        self.lost = [seen for seen in found if seen.phase is Phase.LOST]
        out = {seen.instance.id for seen in (*self._gone, *self.failed, *self.lost)}
        self.there = sorted((seen for seen in found if seen.instance.id not in out), key=_rank)
        """Those that can be taken, the best first."""

    @property
    def parked(self) -> int:
        return sum(_parked(seen) for seen in self.there)

    @property
    def going(self) -> tuple[Seen, ...]:
        """Those that are on their way out because of their devices or nodes."""
        return tuple(self._gone)

    @property
    def all(self) -> tuple[Seen, ...]:
        return (*self.there, *self._gone, *self.failed, *self.lost)

    def take(self, serves: Callable[[Seen], bool], count: int, why: str) -> list[Seen]:
        """Promote up to `count` of those of which `serves` is true and that do not fail themselves, and return them."""
        taken = [seen for seen in self.there if seen.phase is not Phase.BACKOFF and serves(seen)][: max(0, count)]
        for seen in taken:
            self.there.remove(seen)
            self._decision.update(seen, standby=False)
            instance = seen.instance
            self._decision.tell(instance.project, f"instance/{instance.id}", "promoted", why, node=instance.node)
        return taken

    def keep(self, wanted: int, current: Callable[[Seen], bool]) -> int:
        """Retire those that are too many or not `current`, and return how many are to be made.

        What has failed is counted until its time has come to be replaced, which the caller settles.
        """
        for seen in [seen for seen in self.there if not current(seen)]:
            self.retire(seen, "another release is served")
        for seen in self.there[max(0, wanted) :]:
            self.retire(seen, f"{wanted} are to stand by")
        for seen in self.lost:
            self._decision.do(Remove(seen.instance, seen.revision))
            subject, text = f"instance/{seen.instance.id}", f"node {seen.instance.node} is lost; another stands by in its place"
            self._decision.tell(seen.instance.project, subject, "lost", text, Severity.WARNING, node=seen.instance.node)
        return wanted - len(self.there) - len(self._gone)

    def make_room(self, count: int, why: str) -> None:
        """Have up to `count` leave in all, those that are on their way already among them, the least useful first."""
        for seen in [seen for seen in self.there if seen.instance.node is not None][::-1][: max(0, count - self._leaving)]:
            self.retire(seen, why)

    def retire(self, seen: Seen, why: str) -> None:
        if seen in self.there:
            self.there.remove(seen)
        retire(self._decision, seen, why, drain_s=None, ingresses=frozenset())


def served_a_while(seen: Seen) -> bool:
    """Whether an instance that has ended by itself had served before for long enough."""
    status = seen.status
    return status is not None and status.ready_at is not None and status.phase_at - status.ready_at >= SERVED_MIN_S


def _parked(seen: Seen) -> bool:
    return seen.phase is Phase.RUNNING and seen.status is not None and seen.status.parked


def _rank(seen: Seen) -> tuple[int, float, str]:
    """What serves soonest comes first: awake and ready, then parked, then what still starts, then what has no place."""
    status = seen.status
    ready = seen.phase is Phase.RUNNING and status is not None and status.ready
    failing = seen.phase is Phase.BACKOFF
    order = 0 if ready else 1 if _parked(seen) else 3 if seen.instance.node is None else 4 if failing else 2
    return order, seen.instance.created_at, seen.instance.id
