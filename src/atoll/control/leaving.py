"""How an instance leaves: `run → drain → stop`, then its record goes once its node says that it has ended."""

from __future__ import annotations

from atoll.control.actions import Decision, Remove, Seen
from atoll.control.appstatus import exit_in_words
from atoll.model.states import Desired, Phase


def retire(
    decision: Decision, seen: Seen, reason: str, *, drain_s: float | None, ingresses: frozenset[str], excused: bool = False
) -> None:
    """Begin to take away an instance that is meant to run; one that cannot run any more goes at once.

    `drain_s` is the longest wait for active requests, None for what receives none; `excused` says that its device is to blame.
    """
    instance = seen.instance
    if instance.node is None or seen.ended:
        decision.do(Remove(instance, seen.revision))
        return
    subject = f"instance/{instance.id}"
    if drain_s is not None and drain_s > 0 and ingresses and seen.phase is Phase.RUNNING and not seen.idle:
        until = decision.now + drain_s
        decision.update(seen, desired=Desired.DRAIN, drain_until=until, reason=reason, excused=excused)
        decision.tell(instance.project, subject, "draining", f"takes no new request: {reason}", node=instance.node)
        decision.wake(until)
    else:
        decision.update(seen, desired=Desired.STOP, reason=reason, excused=excused)
        decision.tell(instance.project, subject, "stopping", f"told to stop: {reason}", node=instance.node)


def leave(decision: Decision, seen: Seen, *, drain_s: float | None, ingresses: frozenset[str]) -> None:
    """Take an instance that is already leaving one step further, if its time has come."""
    instance = seen.instance
    if instance.node is None or seen.ended:
        decision.do(Remove(instance, seen.revision))
        code, words = ("lost", "its node is lost") if seen.phase is Phase.LOST else ("stopped", "has stopped")
        decision.tell(instance.project, f"instance/{instance.id}", code, words, node=instance.node)
        return
    if instance.desired is not Desired.DRAIN:
        return
    running = seen.phase is Phase.RUNNING and not seen.idle
    until = instance.drain_until
    if until is None:
        # Told to drain by the API, which leaves the time to us.
        if running and drain_s and ingresses:
            decision.update(seen, drain_until=decision.now + drain_s)
            decision.wake(decision.now + drain_s)
        else:
            decision.update(seen, desired=Desired.STOP)
        return
    if not running or not ingresses or ingresses <= seen.drained or decision.now >= until:
        decision.update(seen, desired=Desired.STOP)
    else:
        decision.wake(until)


def leave_running(decision: Decision, seen: Seen) -> None:
    """What serves no requests, as a job's instance, and was told to drain is told to stop."""
    if seen.instance.node is None or seen.instance.desired is Desired.DRAIN:
        leave(decision, seen, drain_s=None, ingresses=frozenset())


def how_it_ended(seen: Seen) -> str:
    """Return in words how an instance of a job ended."""
    status = seen.status
    if seen.phase is Phase.LOST:
        return f"node {seen.instance.node} was lost"
    if seen.phase is Phase.STOPPED:
        return seen.instance.reason or "was stopped"
    if status is None:
        return "failed"
    return status.message or (exit_in_words(status.exit) if status.exit else "failed")
