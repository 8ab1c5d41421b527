"""What the ingresses counted, in intervals of the analysis of each rollout that is under way, and the verdict about each.

Kept in memory only: with a new leader an interval begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from atoll.control.analysis import Outcome, Verdict, decide_analysis
from atoll.control.facts import AppFacts
from atoll.control.world import World
from atoll.model.ports.clock import Clock
from atoll.model.records import App
from atoll.model.rollouts import RolloutPhase, RolloutStatus
from atoll.model.traffic import Counts

Traffic = Mapping[str, Mapping[int, Counts]]
"""App (`project/app`) → release → all that was counted. Owned by whoever takes it, and read live; it only grows."""


class _Interval(Struct, frozen=True, kw_only=True):
    of: tuple[int, int, int, float]
    """Which step of which rollout: release, attempt, step, since."""
    began_at: float
    """On the monotonic clock."""
    looked_at: float
    new: Counts
    old: Counts
    """What had been counted of both releases when it began."""
    verdict: Verdict | None = None
    """The last one of this step."""


class Judging:
    def __init__(self, world: World, clock: Clock, traffic: Traffic) -> None:
        self._world = world
        self._clock = clock
        self._traffic = traffic
        self._intervals: dict[str, _Interval] = {}

    def look(self) -> None:
        """Forget apps that are gone."""
        for key in [key for key in self._intervals if self._world.state.get(App, key) is None]:
            del self._intervals[key]

    def join(self, facts: AppFacts) -> AppFacts:
        """Return `facts` with the last verdict about the release that is being rolled out, where there is one.

        An interval ends when it has lasted for so long and there were requests enough: with few of them it lasts longer.
        """
        app, rules = facts.app, facts.app.spec.rollout.analysis
        key = f"{app.project}/{app.name}"
        status = facts.status.rollout if facts.status is not None else None
        if rules is None or status is None or not _judged(status, app):
            self._intervals.pop(key, None)
            return facts
        counted = self._traffic.get(key, {})
        new, old = counted.get(status.release, Counts()), counted.get(status.stable, Counts())
        of = (status.release, status.attempt, status.step, status.since)
        now = self._clock.monotonic()
        interval = self._intervals.get(key)
        if interval is None or interval.of != of:
            interval = _Interval(of=of, began_at=now, looked_at=now, new=new, old=old)
        elif now - interval.looked_at >= rules.interval:
            verdict = decide_analysis(rules, new.since(interval.new), old.since(interval.old))
            verdict = replace(verdict, at=self._clock.now())
            if verdict.outcome is Outcome.NONE and new.since(interval.new).requests < rules.requests_min:
                interval = replace(interval, looked_at=now, verdict=verdict)
            else:
                interval = _Interval(of=of, began_at=now, looked_at=now, new=new, old=old, verdict=verdict)
        self._intervals[key] = interval
        return replace(facts, verdict=interval.verdict)


def _judged(status: RolloutStatus, app: App) -> bool:
    attempt = app.order.attempt if app.order is not None and app.order.release == app.release else 0
    if (status.release, status.attempt) != (app.release, attempt) or not status.judged:
        return False
    return status.phase.under_way or status.phase is RolloutPhase.KEEPING
