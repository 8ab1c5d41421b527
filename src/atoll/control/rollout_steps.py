"""One decision about one rollout that is under way, whose old set is kept, or that goes back. Pure."""

from __future__ import annotations

import math
from typing import Any

from msgspec.structs import replace

from atoll.control.analysis import Outcome
from atoll.control.rollout_facts import Plan, RolloutFacts, Told, canary_count, leaves, plan_of, still_leaves
from atoll.control.shares import borne, needed
from atoll.model.records import Severity
from atoll.model.rollouts import RolloutOrder, RolloutPhase, RolloutStatus
from atoll.model.spec import Strategy
from atoll.model.units import format_seconds


class Step:
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
        if self.status.judged:
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
        """Return the plan for a rollout whose instances do not become ready in time.

        What was ready, and is not any more, has its time from then on: a step may wait for a person, or for requests, much longer.
        """
        short = self.facts.ready < self._needed()
        rolling = self.status.strategy is Strategy.ROLLING
        if self.order.paused or not short:
            self._set(short_since=0.0)
        elif self.status.since and not self.status.short_since and not rolling:
            self._set(short_since=self.now)
        deadline = max(self.facts.progressed_at, self.status.short_since) + self.rules.deadline
        if self.order.paused or not (short or (rolling and self.facts.others)):
            return None
        if self.now < deadline:
            self._wake(deadline)
            return None
        why = f": {self.facts.why}" if self.facts.why else ""
        reason = f"made no progress for {format_seconds(self.rules.deadline)}{why}"
        if self.rules.reverts:
            return self._revert(reason)
        if rolling:
            return self._end(failed=True)
        return self._end(failed=True, **self._sets(self._needed()))

    def _canary(self) -> Plan:
        wanted, ready = self.facts.wanted, self.facts.ready
        if not wanted:
            return self._end()
        steps = self.rules.steps
        while self.status.step < len(steps) and not self.order.promoted:
            step = steps[self.status.step]
            count = canary_count(wanted, step.weight)
            if not self.status.since:
                weight = self._on_the_way(step.weight, count)
                if ready < count or weight > step.weight:
                    message = f"{ready} of {count} instances are ready for {step.weight} %"
                    if ready >= count:
                        message = f"release {self.status.stable} has too few ready instances for {100 - step.weight} %"
                    self._set(phase=RolloutPhase.PROGRESSING, message=message, weight=weight)
                    return self._end(**self._sets(count))
                self._begin_step(step.weight, f"step {self.status.step + 1} of {len(steps)}")
            if not self._step_over(step.pause, ready >= count):
                return self._end(**self._sets(count))
            self.progressed = True
            self._set(step=self.status.step + 1, since=0.0, failures=0, passes=0)
        if self.status.phase is not RolloutPhase.PROMOTING:
            self._set(phase=RolloutPhase.PROMOTING, since=self.now, failures=0, passes=0, message="")
            self.progressed = True
            self._tell("rollout-promoted", f"release {self.facts.release} is to have all requests{self._by()}")
        self._set(weight=max(self.status.weight or 0, borne(ready, self.facts.enough)))
        if ready >= wanted and not self.facts.others:
            self._set(phase=RolloutPhase.COMPLETE)
        return self._end()

    def _on_the_way(self, weight: int, count: int) -> int:
        """Return the share while instances are made for `weight`. Where the surge has no room for `count` of them beside all that
        the old release needs for its share, they take over from it one by one. Where the release had more, since it is tried again
        while it is being taken back, it gives back no more than the old one bears, for as long as a step may take.
        """
        now = self.status.weight or 0
        if now > weight:
            deadline = self.facts.progressed_at + self.rules.deadline
            if self.now >= deadline:
                return weight
            self._wake(deadline)
            return max(weight, min(now, 100 - borne(self.facts.ready_of.get(self.status.stable, 0), self.facts.enough)))
        if self._room_beside(count) >= needed(100 - now, self.facts.enough):
            return now
        return max(now, min(weight, borne(self.facts.ready, self.facts.enough)))

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
        """Return how many of both releases there are while both serve; of the old one all that the surge leaves room for, and of
        both in any case what their shares need.
        """
        wanted = self.facts.wanted
        if self.status.strategy is Strategy.BLUE_GREEN:
            return {"new": new, "old": wanted, "most": self._twice()}
        own, least = (needed(share, self.facts.enough) for share in (self.status.weight or 0, 100 - (self.status.weight or 0)))
        new = max(new, own)
        return {"new": new, "old": max(least, self._room_beside(new)), "most": wanted + self.rules.max_surge}

    def _room_beside(self, new: int) -> int:
        """Return how many of the old release the surge of a canary leaves room for."""
        return min(self.facts.wanted, self.facts.wanted + self.rules.max_surge - new)

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
        before = self.status.weight if self.status.strategy is not Strategy.ROLLING else None
        # What it overtook is not bad, and serves on where there is too little of the old one.
        overtaken = still_leaves(self.facts, self.status.stable, self.status.leaving, self.now)
        leaving = overtaken or leaves(self.facts, self.status.stable, self.facts.release, before, self.now)
        self._set(phase=RolloutPhase.REVERTED, weight=None, since=self.now, message=why, leaving=leaving)
        stable = f"Release {self.status.stable} has all requests"
        if leaving is not None:
            stable = (
                f"Release {self.status.stable} has {100 - leaving.weight} % of the requests, and more as its instances come back"
            )
        text = f"release {self.facts.release} was taken back: {why}. {stable}"
        asked = self.order.aborted
        self._tell("rollout-reverted", text, Severity.WARNING if asked else Severity.ERROR, to=self.status.stable)
        self.progressed = True
        return self._end()

    def _end(self, **more: Any) -> Plan:
        found = {"wake_at": self.wake_at, "told": tuple(self.told), "progressed": self.progressed}
        return plan_of(self.facts, self.status, **found, **more)

    def _by(self) -> str:
        return f" by {self.order.by}" if self.order.by else ""

    def _set(self, **changes: Any) -> None:
        self.status = replace(self.status, **changes)

    def _wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)

    def _tell(self, code: str, message: str, severity: Severity = Severity.INFO, **data: Any) -> None:
        self.told.append(Told(code, message, severity, {"release": self.facts.release, **data}))
