"""What comes next in a rollout: how many of each release, who gets which share of the requests, and when it goes back. Pure.

    progressing ─▶ waiting ─▶ promoting ─▶ complete             a canary goes through its steps, then is promoted
         │   ◀───────  │   ────▶ keeping ─▶ complete            a blue-green set is switched to, and the old one kept
         └─────────────┴──▶ reverted ◀──┘                       aborted, bad by its analysis, or over its deadline

A rollout that only replaces instances, and that nobody steers, has no status of its own (`Plan.status` is None).
"""

from __future__ import annotations

from msgspec.structs import replace

from atoll.control.rollout_facts import Plan as Plan
from atoll.control.rollout_facts import RolloutFacts as RolloutFacts
from atoll.control.rollout_facts import Told as Told
from atoll.control.rollout_facts import canary_count as canary_count
from atoll.control.rollout_facts import leaves, order_of, plan_of, still_leaves
from atoll.control.rollout_steps import Step
from atoll.control.shares import borne
from atoll.model.rollouts import Leaving, RolloutPhase, RolloutStatus
from atoll.model.spec import Strategy

OVERTAKEN_S = 86_400.0
"""How long a release that another overtook keeps what nobody else has the instances for: it is not bad, and where the next one was
promoted at once nobody makes more of the one before them."""


def is_steered(facts: RolloutFacts) -> bool:
    """Whether a rollout has a status of its own: it goes by shares, is judged, may go back by itself, or was spoken of."""
    rules = facts.rules
    weighted = rules.strategy is not Strategy.ROLLING
    return weighted or rules.analysis is not None or rules.reverts or order_of(facts) is not None


def decide_rollout(facts: RolloutFacts, now: float) -> Plan:
    """Return what the rollout comes to at `now`, in seconds since the epoch."""
    made = _decide(facts, now)
    if made.status is not None and made.status.leaving is not None:
        made = replace(made, status=_relieved(facts, made.status, now))
    leaving = made.status.leaving if made.status is not None else None
    if leaving is not None and (made.wake_at is None or leaving.until < made.wake_at):
        made = replace(made, wake_at=leaving.until)
    return made


def _decide(facts: RolloutFacts, now: float) -> Plan:
    order, last = order_of(facts), facts.last
    attempt = order.attempt if order is not None else 0
    status = last if last is not None and (last.release, last.attempt) == (facts.release, attempt) else None
    if status is not None and status.leaving is not None:
        status = _relieved(facts, status, now)
        if status.leaving is None and status.phase is RolloutPhase.REVERTED:
            text = f"release {status.stable} has all requests again"
            return plan_of(facts, status, told=(Told("rollout-restored", text, data={"release": status.release}),))
    if status is not None and status.phase in (RolloutPhase.REVERTED, RolloutPhase.COMPLETE):
        return plan_of(facts, status)
    if status is not None and status.phase is RolloutPhase.KEEPING:
        return Step(facts, status, order, now).keep()
    if facts.served == facts.release:
        return plan_of(facts, _returning(facts, status, attempt, now))
    if not facts.served or not facts.kept or not is_steered(facts):
        return plan_of(facts, None)
    if status is None and last is not None and _still_needed(facts, last):
        message = f"is tried again once release {last.stable} has as many ready instances as all requests need"
        return plan_of(facts, replace(_relieved(facts, last, now), message=message))
    if status is None:
        rolling = facts.rules.strategy is Strategy.ROLLING
        status = RolloutStatus(
            release=facts.release,
            stable=facts.served,
            attempt=attempt,
            strategy=facts.rules.strategy,
            weight=None if rolling else _had(facts),
            since=now if rolling else 0.0,
            leaving=None if rolling else _overtaken(facts, facts.served, now, patience_s=OVERTAKEN_S),
        )
    return Step(facts, status, order, now).go_on()


def _still_needed(facts: RolloutFacts, last: RolloutStatus) -> bool:
    """Whether a blue-green release that is asked for again while it is being taken back serves what the old one cannot yet.

    To try it again takes all its requests away.
    """
    again = last.phase is RolloutPhase.REVERTED and (last.release, last.stable) == (facts.release, facts.served)
    promoted = facts.order is not None and facts.order.promoted
    too_few = bool(facts.wanted) and borne(facts.ready_of.get(last.stable, 0), max(1, facts.enough)) < 100
    serves = facts.ready_of.get(facts.release, 0) > 0
    return facts.rules.strategy is Strategy.BLUE_GREEN and again and not promoted and too_few and serves


def _had(facts: RolloutFacts) -> int:
    """Return the share of a canary's release that it still has from a try before, which is being taken back."""
    last = facts.last
    again = facts.rules.strategy is Strategy.CANARY and last is not None and last.stable == facts.served
    return last.weights.get(facts.release, 0) if last is not None and again else 0


def _relieved(facts: RolloutFacts, status: RolloutStatus, now: float) -> RolloutStatus:
    """Leave to a release on its way out what `stable` has too few instances for, beside what the wanted release takes."""
    takes = (status.weight or 0) if status.release != status.stable else 0
    return replace(status, leaving=still_leaves(facts, status.stable, status.leaving, now, 100 - takes))


def _returning(facts: RolloutFacts, status: RolloutStatus | None, attempt: int, now: float) -> RolloutStatus | None:
    """What is wanted served before: nothing else is served from now on, but what its own instances are too few for."""
    own, last = facts.release, facts.last
    if status is None and last is not None and last.weights and facts.others:
        return RolloutStatus(
            release=own,
            stable=own,
            attempt=attempt,
            strategy=last.strategy,
            phase=RolloutPhase.PROMOTING,
            weight=100,
            leaving=_overtaken(facts, own, now),
        )
    if status is not None and not facts.others:
        return replace(status, phase=RolloutPhase.COMPLETE, message="", leaving=None)
    return status


def _overtaken(facts: RolloutFacts, stable: int, now: float, *, patience_s: float | None = None) -> Leaving | None:
    """Return what is left to the release that had requests until now, and is neither the wanted one nor `stable`."""
    before = facts.last.weights if facts.last is not None else {}
    others = {release: weight for release, weight in before.items() if release not in (facts.release, stable) and weight > 0}
    release = max(others, key=lambda each: (others[each], each), default=0)
    return leaves(facts, stable, release, others[release], now, patience_s=patience_s) if release else None
