"""What becomes of an instance whose node is drained, or about to have its maintenance. Pure; apps and jobs ask.

Before the deadline only what the app's budget allows goes, replaced first where that is possible, and jobs may come to their end.
From the deadline on the rest goes all the same. Work that serves nobody (that starts, stands by or crashes) is not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from atoll.control.actions import Decision, Seen, Tell
from atoll.model.evacuation import Evacuation, in_words
from atoll.model.maintenance import Drain
from atoll.model.records import CELL_PROJECT, Event, Instance, event_id
from atoll.model.spec import Workload
from atoll.model.states import Desired
from atoll.scheduling.demand import holds_volumes

NO_ROOM_S = 30.0
"""For so long a replacement has found no place until it is taken for granted that it finds none."""


def leaving(seen: Seen) -> bool:
    """Whether an instance that is meant to run must leave its node, now or when it can."""
    return seen.evacuation is not None and seen.instance.desired is Desired.RUN and not seen.ended


def waits(seen: Seen, now: float, spec: Workload) -> bool:
    """Whether an app's instance must leave and may serve until another serves in its place."""
    evacuation = seen.evacuation
    return evacuation is not None and leaving(seen) and seen.ready and now < evacuation.deadline and not goes_whole(spec)


def due(instances: Sequence[Seen], decision: Decision, spec: Workload) -> list[Seen]:
    """Return those that go now, whatever they cost; the others serve until something serves in their place.

    A gang that is in one place goes as a whole, and only when its time is up: a part of it would find no place elsewhere.
    """
    whole = goes_whole(spec)
    found = []
    for seen in instances:
        evacuation = seen.evacuation
        if evacuation is None or not leaving(seen):
            continue
        if decision.now >= evacuation.deadline:
            found.append(seen)
            continue
        decision.wake(evacuation.deadline)
        if seen.instance.standby or (not seen.ready and not whole):
            found.append(seen)
    if whole and any(decision.now >= seen.evacuation.deadline for seen in found if seen.evacuation):
        return [s for s in instances if s.instance.desired is Desired.RUN and not s.ended and not s.instance.standby]
    return found


def due_of_job(instances: Sequence[Seen], decision: Decision, spec: Workload) -> list[Seen]:
    """Return the tries that end now and do not count: those whose time is up, and those that have not begun to work."""
    found = []
    for seen in instances:
        evacuation = seen.evacuation
        if evacuation is None or not leaving(seen):
            continue
        begun = seen.status is not None and seen.status.started_at is not None
        if decision.now >= evacuation.deadline or (not begun and not spec.placement.gang):
            found.append(seen)
        else:
            decision.wake(evacuation.deadline)
    if goes_whole(spec) and found:
        return [seen for seen in instances if seen.instance.desired is Desired.RUN and not seen.ended]
    return found


def goes_whole(spec: Workload) -> bool:
    """Whether instances leave together or not at all."""
    return spec.placement.gang and spec.placement.together is not None


def kept(instance: Instance, spec: Workload | None, *, leave_volumes: bool) -> bool:
    """Whether an instance stays for its volumes' sake, which nobody has agreed to leave behind."""
    return not leave_volumes and spec is not None and holds_volumes(spec)


def tell(decision: Decision, seen: Seen) -> None:
    """Say why the instance goes."""
    instance = seen.instance
    text = (
        f"leaves node {instance.node}: {seen.evacuation.why}" if seen.evacuation else f"leaves node {instance.node} with its gang"
    )
    decision.tell(instance.project, f"instance/{instance.id}", "evacuated", text, node=instance.node)


def why(seen: Seen) -> str:
    return f"node {seen.instance.node}: {seen.evacuation.why}" if seen.evacuation else f"its gang leaves node {seen.instance.node}"


def find_no_room(newcomers: Sequence[Seen], decision: Decision) -> bool:
    """Whether those that are to serve in the place of others have had no place for so long that waiting is no use."""
    waiting = [seen.instance for seen in newcomers if seen.instance.node is None and seen.instance.rejection is not None]
    for instance in waiting:
        at = instance.created_at + NO_ROOM_S
        if decision.now >= at:
            return True
        decision.wake(at)
    return False


def changes_in_words(changed: Mapping[str, Evacuation | None], now: float) -> Iterator[Tell]:
    """Yield what happens to nodes. Who leads next says it again under the same id, so that nothing is told twice."""
    for name, evacuation in changed.items():
        if evacuation is None:
            yield _told(name, now, now, "back-in-use", f"node {name} is used again")
        else:
            text = f"node {name} is to be empty by {in_words(evacuation.deadline)}: {evacuation.why}"
            yield _told(name, evacuation.since, now, "node-evacuated", text)


def drained(name: str, drain: Drain, kept: int, now: float) -> Tell:
    """Return what is told once of a node that is empty but for `kept` instances."""
    rest = f"; {kept} stay for their volumes' sake" if kept else ""
    return _told(name, drain.since, now, "node-drained", f"node {name} is drained{rest}")


def _told(node: str, since: float, at: float, code: str, message: str) -> Tell:
    id = event_id(since, f"{code}-{node}")
    return Tell(Event(id=id, at=at, project=CELL_PROJECT, subject=f"node/{node}", code=code, message=message, node=node))
