"""What comes next in a rollout: how many of each release, who gets which share of the requests, and when it goes back. Pure.

    progressing ─▶ waiting ─▶ promoting ─▶ complete             a canary goes through its steps, then is promoted
         │   ◀───────  │   ────▶ keeping ─▶ complete            a blue-green set is switched to, and the old one kept
         └─────────────┴──▶ reverted ◀──┘                       aborted, bad by its analysis, or over its deadline

A rollout that only replaces instances, and that nobody steers, has no status of its own (`Plan.status` is None).
"""

from __future__ import annotations

import math
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from atoll.control.analysis import Outcome, Verdict
from atoll.model.records import Severity
from atoll.model.rollouts import RolloutOrder, RolloutPhase, RolloutStatus
from atoll.model.spec import Rollout, Strategy
from atoll.model.units import format_seconds


class RolloutFacts(Struct, frozen=True, kw_only=True):
    rules: Rollout
    release: int
    """Which should have all requests in the end."""
    order: RolloutOrder | None = None
    last: RolloutStatus | None = None
    served: int = 0
    """The release that had all requests when this rollout began; 0 for none."""
    kept: bool = True
    """Whether the spec of `served` is still held, so that one can go back."""
    wanted: int
    """Instances."""
    made: int = 0
    """Instances of `release` that there are, or that wait for their next try."""
    ready: int = 0
    """Of them those that last."""
    others: int = 0
    """Instances of other releases that are meant to run."""
    progressed_at: float = 0.0
    """When the last instance became ready."""
    verdict: Verdict | None = None
    why: str = ""
    """Why instances of `release` are not ready."""


class Told(Struct, frozen=True):
    """An event of the app."""

    code: str
    message: str
    severity: Severity = Severity.INFO
    data: dict[str, Any] = {}


class Plan(Struct, frozen=True, kw_only=True):
    status: RolloutStatus | None = None
    release: int
    """Which instances should be of in the end: after a revert the old one."""
    new: int
    """How many of `release` there should be for now."""
    old: int = 0
    """How many of the release before are kept."""
    most: int
    """How many may be meant to run, of all releases."""
    failed: bool = False
    """It made no progress for too long, and stays as it is."""
    wake_at: float | None = None
    told: tuple[Told, ...] = ()
    progressed: bool = False
    """Its deadline counts from now."""


def is_steered(facts: RolloutFacts) -> bool:
    """Whether a rollout has a status of its own: it goes by shares, is judged, may go back by itself, or was spoken of."""
    rules = facts.rules
    weighted = rules.strategy is not Strategy.ROLLING
    return weighted or rules.analysis is not None or rules.reverts or _order(facts) is not None


def decide_rollout(facts: RolloutFacts, now: float) -> Plan:
    """Return what the rollout comes to at `now`, in seconds since the epoch."""
    order, last = _order(facts), facts.last
    attempt = order.attempt if order is not None else 0
    status = last if last is not None and (last.release, last.attempt) == (facts.release, attempt) else None
    if status is not None and status.phase in (RolloutPhase.REVERTED, RolloutPhase.COMPLETE):
        return _plan(facts, status)
    if status is not None and status.phase is RolloutPhase.KEEPING:
        return _Step(facts, status, order, now).keep()
    if facts.served == facts.release:
        return _plan(facts, _returning(facts, status, attempt))
    if not facts.served or not facts.kept or not is_steered(facts):
        return _plan(facts, None)
    if status is None:
        rolling = facts.rules.strategy is Strategy.ROLLING
        status = RolloutStatus(
            release=facts.release,
            stable=facts.served,
            attempt=attempt,
            strategy=facts.rules.strategy,
            weight=None if rolling else 0,
            since=now if rolling else 0.0,
        )
    return _Step(facts, status, order, now).go_on()


def canary_count(wanted: int, weight: int) -> int:
    """Return how many of `wanted` instances a share of `weight` percent of the requests needs."""
    return min(wanted, max(1, math.ceil(wanted * weight / 100)))


def _order(facts: RolloutFacts) -> RolloutOrder | None:
    return facts.order if facts.order is not None and facts.order.release == facts.release else None


def _returning(facts: RolloutFacts, status: RolloutStatus | None, attempt: int) -> RolloutStatus | None:
    """What is wanted serves already: of another release, on the way out, nothing is served from now on."""
    if status is None and facts.last is not None and facts.last.weights and facts.others:
        own = facts.release
        return RolloutStatus(
            release=own, stable=own, attempt=attempt, strategy=facts.last.strategy, phase=RolloutPhase.PROMOTING, weight=100
        )
    if status is not None and not facts.others:
        return replace(status, phase=RolloutPhase.COMPLETE, message="")
    return status


def _plan(facts: RolloutFacts, status: RolloutStatus | None, **more: Any) -> Plan:
    usual: dict[str, Any] = {"new": facts.wanted, "most": facts.wanted + facts.rules.max_surge}
    return Plan(**{"status": status, "release": status.serving if status is not None else facts.release, **usual, **more})


class _Step:
    """One decision about one rollout that is under way, or whose old set is kept."""

    def __init__(self, facts: RolloutFacts, status: RolloutStatus, order: RolloutOrder | None, now: float) -> None:
        self.facts = facts
        self.rules = facts.rules
        self.status = status
        self.order = order or RolloutOrder(release=facts.release)
        self.now = now
        self.told: list[Told] = []
        self.wake_at: float | None = None
        self.progressed = False

    def go_on(self) -> Plan:
        if self.order.aborted:
            return self._revert(f"aborted{self._by()}")
        if (bad := self._judge()) is not None:
            return bad
        if (late := self._late()) is not None:
            return late
        match self.status.strategy:
            case Strategy.CANARY:
                return self._canary()
            case Strategy.BLUE_GREEN:
                return self._blue_green()
            case Strategy.ROLLING:
                return self._rolling()

    def keep(self) -> Plan:
        """The new release has all requests. Until the old set goes, going back takes but a moment."""
        if self.order.aborted:
            return self._revert(f"switched back{self._by()}")
        if (bad := self._judge()) is not None:
            return bad
        until = self.status.since + self.rules.keep_old
        if self.now < until:
            self._wake(until)
            return self._end(old=self.facts.wanted, most=self._twice())
        if not self.facts.others:
            self._set(phase=RolloutPhase.COMPLETE, message="")
        return self._end(most=self._twice())

    def _judge(self) -> Plan | None:
        """Count a new verdict; return the plan that goes back if it was one too many."""
        rules, verdict = self.rules.analysis, self.facts.verdict
        if rules is None:
            return None
        if self.status.since:
            self._wake(self.now + rules.interval)
        if verdict is None or verdict.at <= self.status.analysed_at or verdict.at < self.status.since:
            return None
        if verdict.outcome is Outcome.NONE:
            self._set(verdict=verdict.words)
            return None
        failed = verdict.outcome is Outcome.FAILED
        failures, passes = self.status.failures + failed, self.status.passes + (not failed)
        self._set(failures=failures, passes=passes, analysed_at=verdict.at, verdict=verdict.words)
        if not failed:
            return None
        text = f"release {self.facts.release}: {verdict.words}; bad interval {failures}, {rules.failures_max} are forgiven"
        self._tell("rollout-analysis-failed", text, Severity.WARNING, failures=failures)
        if failures > rules.failures_max and self.rules.reverts:
            return self._revert(f"its analysis failed: {verdict.words}")
        return None

    @property
    def _stuck(self) -> bool:
        """Whether the analysis says no and only a person may go on."""
        rules = self.rules.analysis
        return rules is not None and self.status.failures > rules.failures_max and self.order.step <= self.status.step

    def _needed(self) -> int:
        """Return how many ready instances what comes next waits for."""
        steps = self.rules.steps
        if self.status.strategy is not Strategy.CANARY or self.order.promoted or self.status.step >= len(steps):
            return self.facts.wanted
        return canary_count(self.facts.wanted, steps[self.status.step].weight) if self.facts.wanted else 0

    def _late(self) -> Plan | None:
        """Return the plan for a rollout whose instances do not become ready in time."""
        deadline = self.facts.progressed_at + self.rules.deadline
        if self.facts.ready >= self._needed() and (self.status.strategy is not Strategy.ROLLING or not self.facts.others):
            return None
        if self.order.paused:
            return None
        if self.now < deadline:
            self._wake(deadline)
            return None
        why = f": {self.facts.why}" if self.facts.why else ""
        reason = f"made no progress for {format_seconds(self.rules.deadline)}{why}"
        if self.rules.reverts:
            return self._revert(reason)
        if self.status.strategy is Strategy.ROLLING:
            return self._end(failed=True)
        return self._end(failed=True, **self._sets(self._needed()))

    def _canary(self) -> Plan:
        wanted, ready = self.facts.wanted, self.facts.ready
        if not wanted:
            return self._end()
        steps = self.rules.steps
        while self.status.step < len(steps) and not self.order.promoted:
            step = steps[self.status.step]
            needed = canary_count(wanted, step.weight)
            if not self.status.since:
                if ready < needed:
                    message = f"{ready} of {needed} instances are ready for {step.weight} %"
                    self._set(phase=RolloutPhase.PROGRESSING, message=message)
                    return self._end(**self._sets(needed))
                self._begin_step(step.weight, f"step {self.status.step + 1} of {len(steps)}")
            if not self._step_over(step.pause, ready >= needed):
                return self._end(**self._sets(needed))
            self.progressed = True
            self._set(step=self.status.step + 1, since=0.0, failures=0, passes=0)
        if self.status.phase is not RolloutPhase.PROMOTING:
            self._set(phase=RolloutPhase.PROMOTING, since=self.now, failures=0, passes=0, message="")
            self.progressed = True
            self._tell("rollout-promoted", f"release {self.facts.release} is to have all requests{self._by()}")
        weight = self.status.weight or 0
        weight = 100 if ready >= wanted else max(weight, min(99, 100 * ready // wanted))
        self._set(weight=weight)
        if ready >= wanted and not self.facts.others:
            self._set(phase=RolloutPhase.COMPLETE)
        return self._end()

    def _begin_step(self, weight: int, what: str) -> None:
        self.progressed = True
        self._set(weight=weight, since=self.now, failures=0, passes=0)
        text = f"release {self.facts.release} gets {weight} % of the requests, release {self.status.stable} the rest ({what})"
        self._tell("rollout-step", text, weight=weight)

    def _step_over(self, pause: float | None, ready: bool) -> bool:
        """Whether the step that is in force has lasted long enough and well enough."""
        until = math.inf if pause is None else self.status.since + pause
        if self._waits_for_a_person(pause is None):
            return False
        if self.order.step > self.status.step:
            return ready
        judged = self.rules.analysis is None or self.status.passes > 0
        message = ""
        if self.now < until:
            self._wake(until)
        elif not judged:
            message = f"has had no good interval yet ({self.status.verdict or 'no requests so far'})"
        self._set(phase=RolloutPhase.PROGRESSING, message=message)
        return ready and judged and self.now >= until

    def _waits_for_a_person(self, asked: bool) -> bool:
        """Set why nothing goes on by itself, if that is so; `asked`: there comes a point where a person is asked."""
        if self.order.paused:
            message = f"paused{self._by()}; resume, promote or abort it"
        elif self._stuck:
            message = f"its analysis failed ({self.status.verdict}); resume, promote or abort it"
        elif asked and self.order.step <= self.status.step:
            message = "waits for a person: resume, promote or abort it"
        else:
            return False
        self._set(phase=RolloutPhase.WAITING, message=message)
        return True

    def _sets(self, new: int) -> dict[str, int]:
        """Return how many of both releases there are while both serve; of the old one all that the surge leaves room for."""
        wanted = self.facts.wanted
        if self.status.strategy is Strategy.BLUE_GREEN:
            return {"new": new, "old": wanted, "most": self._twice()}
        most = wanted + self.rules.max_surge
        return {"new": new, "old": min(wanted, most - new), "most": most}

    def _twice(self) -> int:
        return max(2 * self.facts.wanted, self.facts.wanted + self.rules.max_surge)

    def _blue_green(self) -> Plan:
        wanted, ready = self.facts.wanted, self.facts.ready
        if not wanted:
            return self._end()
        if ready < wanted:
            self._set(phase=RolloutPhase.PROGRESSING, message=f"{ready} of {wanted} instances are ready beside the old set")
            return self._end(**self._sets(wanted))
        if not self.status.since:
            self._set(since=self.now)
            self.progressed = True
            self._tell("rollout-ready", f"release {self.facts.release} is ready beside release {self.status.stable}")
        after = self.rules.promote_after
        at = math.inf if after is None else self.status.since + after
        if not self.order.promoted and (self.order.paused or self.order.step <= self.status.step):
            if self._waits_for_a_person(after is None):
                return self._end(**self._sets(wanted))
            if self.now < at:
                self._wake(at)
                self._set(phase=RolloutPhase.PROGRESSING, message="is ready, and gets all requests soon")
                return self._end(**self._sets(wanted))
        self._set(phase=RolloutPhase.KEEPING, weight=100, since=self.now, failures=0, passes=0, message="")
        kept = f"kept for {format_seconds(self.rules.keep_old)}"
        text = f"release {self.facts.release} has all requests{self._by()}; release {self.status.stable} is {kept}"
        self._tell("rollout-switched", text)
        self._wake(self.now + self.rules.keep_old)
        return self._end(**self._sets(wanted))

    def _rolling(self) -> Plan:
        wanted = self.facts.wanted
        if self.facts.ready >= wanted and not self.facts.others:
            self._set(phase=RolloutPhase.COMPLETE, message="")
            return self._end()
        if self._waits_for_a_person(False):
            new = min(wanted, self.facts.made)
            return self._end(new=new, old=wanted - new)
        self._set(phase=RolloutPhase.PROGRESSING, message="")
        return self._end()

    def _revert(self, why: str) -> Plan:
        self._set(phase=RolloutPhase.REVERTED, weight=None, since=self.now, message=why)
        text = f"release {self.facts.release} was taken back: {why}. Release {self.status.stable} has all requests"
        asked = self.order.aborted
        self._tell("rollout-reverted", text, Severity.WARNING if asked else Severity.ERROR, to=self.status.stable)
        self.progressed = True
        return self._end()

    def _end(self, **more: Any) -> Plan:
        found = {"wake_at": self.wake_at, "told": tuple(self.told), "progressed": self.progressed}
        return _plan(self.facts, self.status, **found, **more)

    def _by(self) -> str:
        return f" by {self.order.by}" if self.order.by else ""

    def _set(self, **changes: Any) -> None:
        self.status = replace(self.status, **changes)

    def _wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)

    def _tell(self, code: str, message: str, severity: Severity = Severity.INFO, **data: Any) -> None:
        self.told.append(Told(code, message, severity, {"release": self.facts.release, **data}))
