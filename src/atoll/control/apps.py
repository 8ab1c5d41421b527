"""Apps: as many instances of the wanted release as asked for, replaced without a gap.

A rollout keeps `replicas - max_unavailable` ready and at most `replicas + max_surge` meant to run. A release that does not become
ready before its deadline fails: what served before goes on serving and is kept at its number, while the failed release's few
instances stay for people to look at and may still come round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import UNSET, Struct, structs

from atoll.control import evacuation, gpus
from atoll.control.actions import Create, Decision, Remove, RemoveApp, Seen, WriteAppStatus
from atoll.control.appstatus import Rollout, has_crashed, settled, status_of, why_not_ready
from atoll.control.autoscale import Choice, why
from atoll.control.leaving import leave, retire
from atoll.control.standby import Standbys, served_a_while
from atoll.model.records import App, AppPhase, AppStatus, Instance, OwnerKind, Severity
from atoll.model.spec import AppSpec
from atoll.model.states import Desired, Phase
from atoll.model.units import format_seconds
from atoll.scheduling import budget
from atoll.scheduling.demand import holds_volumes
from atoll.scheduling.quotas import CODE as OVER_QUOTA

RETRY_MIN_S = 1.0
RETRY_MAX_S = 60.0
"""Before an instance that has failed for good is replaced; doubled with each failure of its line."""
UNPLACED_MAX = 2_000
"""Instances of one app that wait for a place at the same time; the rest is made when these have theirs. So a wish that no
fleet can fulfil costs no more than one that is just too large."""
RETRY_RESET_S = 60.0
"""An instance that was ready for so long starts its line anew."""


class AppFacts(Struct, frozen=True, kw_only=True):
    """All that a decision about one app may depend on."""

    app: App
    revision: int
    status: AppStatus | None
    instances: tuple[Seen, ...]
    specs: Mapping[int, AppSpec] = {}
    """Release → spec, of those that are still held."""
    ingresses: frozenset[str] = frozenset()
    choice: Choice | None = None
    """What the app's metric asks for, where it scales by one."""

    def drain_s(self, seen: Seen) -> float | None:
        if seen.idle:
            return None
        spec = self.specs.get(seen.instance.release, self.app.spec)
        return float(spec.rollout.drain) if spec.port_named(None) is not None else None


def decide_app(facts: AppFacts, decision: Decision) -> None:
    """Compare the app with its instances and add to `decision` what is missing or too much."""
    for seen in facts.instances:
        if seen.instance.desired is not Desired.RUN:
            leave(decision, seen, drain_s=facts.drain_s(seen), ingresses=facts.ingresses)
    _Step(facts, decision).run()


class _Step:
    """One decision about one app; only instances that are meant to run are looked at."""

    def __init__(self, facts: AppFacts, decision: Decision) -> None:
        self.facts = facts
        self.app = facts.app
        self.decision = decision
        self.wanted = 0 if self.app.deleting else facts.choice.wanted if facts.choice else self.app.wanted(facts.status)
        self.rules = self.app.spec.rollout
        order = sorted(facts.instances, key=lambda seen: (seen.instance.created_at, seen.instance.id))
        run = [seen for seen in order if seen.instance.desired is Desired.RUN and not seen.instance.standby]
        self.standbys = Standbys(facts.instances, decision)
        due = (*gpus.due(facts.instances, decision), *evacuation.due(facts.instances, decision, self.app.spec))
        self.gone = list({seen.instance.id: seen for seen in due}.values())
        """Told to go now, because of their devices or because their nodes are to be empty."""
        self.sick = [
            seen
            for seen in run
            if gpus.urgency_of(seen) is gpus.Urgency.SERVING or evacuation.waits(seen, decision.now, self.app.spec)
        ]
        """They serve until others do in their place."""
        leaving = {seen.instance.id for seen in (*self.gone, *self.sick)}
        run = [seen for seen in run if seen.instance.id not in leaving]
        self.new = [seen for seen in run if self._current(seen) and not seen.ended]
        self.old = [seen for seen in run if not self._current(seen) and not seen.ended]
        self.failed = [seen for seen in run if seen.ended and seen.phase is not Phase.LOST]
        self.lost = [seen for seen in run if seen.phase is Phase.LOST]
        self.crashed = any(has_crashed(seen) for seen in (*self.new, *self.failed) if self._current(seen))
        self.ready_new = [seen for seen in self.new if seen.ready and self._settled(seen)]
        self.ready = [seen for seen in (*self.old, *self.new, *self.sick) if seen.ready]
        self.created = 0

    def _current(self, seen: Seen) -> bool:
        return (seen.instance.release, seen.instance.generation) == (self.app.release, self.app.generation)

    def _settled(self, seen: Seen) -> bool:
        """Whether a ready instance may stand in for another. Once a release has been proved, being ready is enough."""
        last = self.facts.status
        if not self.old and last is not None and last.served_release == self.app.release:
            return True
        at = settled(seen, self.app.spec, self.decision.now, replacing=bool(self.old), crashed=self.crashed)
        if at <= self.decision.now:
            return True
        self.decision.wake(at)
        return False

    def run(self) -> None:
        if self.app.deleting:
            self._delete()
            return
        rollout = self._rollout()
        for seen in self.gone:
            self._replace(seen, drain_s=None)
        self._replace_failed(rollout)
        self._stand_in()
        missing = self._missing()
        if rollout.failed and rollout.served in self.facts.specs:
            self._create(rollout.served, self.app.generation, self._missing_served(), self._due(current=False))
            # One of the failed release is enough to see whether it has come round.
            missing = min(self._missing(), 1 - len(self.new) - sum(self._current(seen) for seen in self.waiting))
        self._create(self.app.release, self.app.generation, missing, self._due(current=True))
        self._retire_surplus()
        self._retire_sick()
        self._retire_old(rollout)
        self._drop_lost()
        self._keep_standbys(rollout)
        self._report(rollout)

    def _rollout(self) -> Rollout:
        updated = len(self.ready_new)
        last = self.facts.status
        served = last.served_release if last else 0
        complete = updated >= self.wanted and not self.old
        if last is None or last.release != self.app.release or updated > last.updated:
            progressed_at = self.decision.now
        else:
            progressed_at = max(last.progressed_at, self.app.updated_at)
        under_way = not complete and (served != self.app.release or bool(self.old))
        deadline = progressed_at + self.rules.deadline
        failed = under_way and self.decision.now >= deadline
        if under_way and not failed:
            self.decision.wake(deadline)
        return Rollout(
            complete=complete,
            under_way=under_way,
            failed=failed,
            progressed_at=progressed_at,
            served=self.app.release if complete else served,
        )

    def _replace_failed(self, rollout: Rollout) -> None:
        """Sort what has ended for good: to be replaced now, later, or not at all."""
        self.due: list[Seen] = []
        self.waiting: list[Seen] = []
        for seen in self.failed:
            keep = self._current(seen) or (rollout.failed and seen.instance.release == rollout.served)
            at = retry_at(seen, self.decision.now)
            if keep and at > self.decision.now and self.wanted:
                self.waiting.append(seen)
                self.decision.wake(at)
            else:
                if keep:
                    self.due.append(seen)
                self.decision.do(Remove(seen.instance, seen.revision))

    def _due(self, *, current: bool) -> list[Seen]:
        return [seen for seen in self.due if self._current(seen) is current]

    def _missing(self) -> int:
        """Return how many instances of the wanted release may be made: up to the number wanted, and within the surge."""
        waiting_new = sum(self._current(seen) for seen in self.waiting)
        total = len(self.new) + len(self.old) + len(self.sick) + len(self.waiting) + self.created
        return min(self.wanted - len(self.new) - waiting_new, self.wanted + self.rules.max_surge - total)

    def _missing_served(self) -> int:
        """Return how many instances of what served before must be made while the wanted release has failed."""
        waiting_old = sum(not self._current(seen) for seen in self.waiting)
        total = len(self.new) + len(self.old) + len(self.sick) + len(self.waiting) + self.created
        most = self.wanted + self.rules.max_surge
        return min(self._served_wanted() - len(self.old) - waiting_old, most - total)

    def _served_wanted(self) -> int:
        """Return how many of what served before are kept while the wanted release has failed.

        One place is left to the failed release, or the two would take turns in it.
        """
        return max(0, min(self.wanted - len(self.ready_new), self.wanted + self.rules.max_surge - 1))

    def _stand_in(self) -> None:
        """Have standbys take the places of those that have crashed, or that find no place of their own."""
        for seen in list(self.new):
            starves = seen.instance.node is None and seen.instance.rejection is not None
            if not starves and not (seen.phase is Phase.BACKOFF and served_a_while(seen)):
                continue
            why = f"takes the place of {seen.instance.id}, which {'has none' if starves else 'has crashed'}"
            taken = self.standbys.take(lambda each: self._current(each) and each.instance.node is not None, 1, why)
            if not taken:
                return
            self._retire(seen, f"{taken[0].instance.id} has taken its place")
            self.new = [other for other in self.new if other is not seen] + [_promoted(each) for each in taken]

    def _create(self, release: int, generation: int, count: int, due: list[Seen]) -> None:
        """Take standbys of the release for what is missing, and make the rest. What has ended right after its start is made
        again only by and by, so no standby is used up for it."""

        def of_release(seen: Seen) -> bool:
            current = self._current(seen)
            return current if release == self.app.release else seen.instance.release == release

        brief = [seen for seen in due if not served_a_while(seen)]
        taken = len(self.standbys.take(of_release, count - len(brief), "takes the place of one that is missing"))
        self.created += taken
        self._make(release, generation, count - taken, [*brief, *[seen for seen in due if served_a_while(seen)][taken:]])

    def _keep_standbys(self, rollout: Rollout) -> None:
        """Make, replace and retire standbys: last of all, when what is wanted serves."""
        wanted = self.app.standby if self.wanted else 0
        due: list[Seen] = []
        waiting = 0
        for seen in self.standbys.failed:
            at = retry_at(seen, self.decision.now)
            if wanted and self._current(seen) and at > self.decision.now:
                waiting += 1
                self.decision.wake(at)
            else:
                self.decision.do(Remove(seen.instance, seen.revision))
                due += [seen] if self._current(seen) else []
        starved = [seen for seen in self.new if (why := seen.instance.rejection) is not None and why.code == OVER_QUOTA]
        self.standbys.make_room(len(starved), "its part of the project's quota is needed")
        missing = self.standbys.keep(wanted, self._current if rollout.complete else lambda seen: True)
        if rollout.complete:
            self._make(self.app.release, self.app.generation, missing - waiting, due, standby=True)

    def _make(self, release: int, generation: int, count: int, due: list[Seen], *, standby: bool = False) -> None:
        waiting = [seen.instance for seen in self.facts.instances if seen.instance.node is None and not seen.ended]
        room = max(0, UNPLACED_MAX - len(waiting) - self.created)
        if count > room:
            count = room
            if not any(instance.rejection for instance in waiting):
                self.decision.wake(self.decision.now)  # else the next place that one of them gets is what wakes
        for number in range(count):
            before = due[number] if number < len(due) else None
            self.decision.do(
                Create(
                    Instance(
                        id=self.decision.new_id(self.app.name),
                        project=self.app.project,
                        owner_kind=OwnerKind.APP,
                        owner=self.app.name,
                        release=release,
                        generation=generation,
                        attempt=next_attempt(before) if before else 0,
                        created_at=self.decision.now,
                        standby=standby,
                    )
                )
            )
        if count > 0:
            self.created += 0 if standby else count
            what = "1 instance" if count == 1 else f"{count} instances"
            text = f"made {what} of release {release}{' to stand by' if standby else ''}"
            self._tell("instances-created", text, count=count, release=release)

    def _retire_surplus(self) -> None:
        """After a scale-down, or when lost instances have come back: those that serve least go first."""
        surplus = len(self.new) - self.wanted
        if surplus <= 0:
            return
        order = sorted(
            self.new,
            key=lambda s: (s.instance.node is not None, s.ready, -s.instance.created_at, s.instance.id),
        )
        for seen in order[:surplus]:
            self._retire(seen, f"only {self.wanted} wanted")
        gone = {seen.instance.id for seen in order[:surplus]}
        self.new = [seen for seen in self.new if seen.instance.id not in gone]
        self.ready = [seen for seen in self.ready if seen.instance.id not in gone]
        self.crashed = any(has_crashed(seen) for seen in (*self.new, *self.failed) if self._current(seen))
        self.ready_new = [seen for seen in self.ready_new if seen.instance.id not in gone]

    def _serving(self) -> int:
        return len(self.ready_new) + sum(seen.ready for seen in (*self.old, *self.sick))

    def _retire_sick(self) -> None:
        """Take away as many of those on sick devices, or on nodes that are to be empty, as others serve in their place."""
        no_room = bool(self.sick) and evacuation.find_no_room(self.new, self.decision)
        least = budget.least_in_move(self.app.spec, self.wanted, no_room=no_room)
        while self.sick and self._serving() > least:
            seen = self.sick.pop(0)
            self.ready = [other for other in self.ready if other is not seen]
            self._replace(seen, drain_s=self.facts.drain_s(seen))

    def _replace(self, seen: Seen, *, drain_s: float | None) -> None:
        """Let an instance go because of its device, or off its node."""
        if gpus.urgency_of(seen) is None:
            evacuation.tell(self.decision, seen)
            drain_s = self.facts.drain_s(seen)
            retire(self.decision, seen, evacuation.why(seen), drain_s=drain_s, ingresses=self.facts.ingresses)
            return
        gpus.tell(self.decision, seen)
        why = seen.ailment.why if seen.ailment else ""
        retire(self.decision, seen, why, drain_s=drain_s, ingresses=self.facts.ingresses, excused=True)

    def _retire_old(self, rollout: Rollout) -> None:
        """Take away as many of the old as the ready ones allow, those that do not serve first."""
        serving = self._serving()
        least = budget.least_in_rollout(self.app.spec, self.wanted)
        spare = len(self.old) + len(self.ready_new) - least
        if rollout.failed and rollout.served in self.facts.specs:
            spare = min(spare, len(self.old) - self._served_wanted())
        reason = f"replaced by release {self.app.release}"
        for seen in sorted(self.old, key=lambda s: (s.ready, s.instance.created_at, s.instance.id)):
            if spare <= 0 or (seen.ready and serving <= least):
                break
            self._retire(seen, reason)
            spare -= 1
            serving -= seen.ready
            self.old = [other for other in self.old if other is not seen]
            self.ready = [other for other in self.ready if other is not seen]

    def _drop_lost(self) -> None:
        """Forget instances on lost nodes once others serve in their place. Until then they would be taken back."""
        if self.lost and len(self.ready) >= self.wanted:
            for seen in self.lost:
                self.decision.do(Remove(seen.instance, seen.revision))
                subject = f"instance/{seen.instance.id}"
                text = f"node {seen.instance.node} is lost; others serve in its place"
                self.decision.tell(self.app.project, subject, "lost", text, Severity.WARNING, node=seen.instance.node)

    def _retire(self, seen: Seen, reason: str) -> None:
        retire(self.decision, seen, reason, drain_s=self.facts.drain_s(seen), ingresses=self.facts.ingresses)

    def _delete(self) -> None:
        standbys = [seen for seen in self.standbys.all if seen not in self.gone]
        for seen in (*self.old, *self.new, *self.failed, *self.lost, *self.sick, *self.gone, *standbys):
            self._retire(seen, "the app is being deleted")
        if not self.facts.instances:
            self.decision.do(RemoveApp(self.app.project, self.app.name, self.facts.revision))
            self._tell("app-deleted", "the app is gone")
            return
        self._write(status_of(self.app, self.facts.status, phase=AppPhase.DELETING, total=len(self.facts.instances)))

    def _report(self, rollout: Rollout) -> None:
        last = self.facts.status
        proved = {seen.instance.id for seen in self.ready_new}
        unready = [
            seen
            for seen in (*self.new, *self.failed, *self.lost, *self.sick)
            if self._current(seen) and seen.instance.id not in proved
        ]
        why = why_not_ready(unready)
        phase, message = self._phase(rollout, unready, why)
        self._write(
            status_of(
                self.app,
                last,
                phase=phase,
                ready=len(self.ready),
                updated=len(self.ready_new),
                total=len(self.new) + len(self.old) + len(self.sick) + self.created,
                message=message,
                progressed_at=rollout.progressed_at,
                served_release=rollout.served,
                homes=self._homes(),
                scaled=self.wanted if self.app.most is not None else None,
                parked=self.standbys.parked,
            )
        )
        self._tell_scaled()
        if last is None or last.release != self.app.release:
            self._tell("app-deployed", f"release {self.app.release} is being rolled out", release=self.app.release)
        if rollout.complete and self.wanted and (last is None or last.served_release != self.app.release):
            self._tell("rollout-finished", f"release {self.app.release} serves", release=self.app.release)
        if rollout.failed and (last is None or last.phase is not AppPhase.FAILED):
            self._tell("rollout-failed", message, Severity.ERROR, release=self.app.release)

    def _tell_scaled(self) -> None:
        choice, scale = self.facts.choice, self.app.spec.scale
        if choice is None or choice.wanted == choice.before or scale is UNSET:
            return
        up = choice.wanted > choice.before
        reason = why(choice, scale.metric or "", scale.target or 0.0)
        text = f"scaled {'up' if up else 'down'} from {choice.before} to {choice.wanted}: {reason}"
        data: dict[str, Any] = {
            "from": choice.before,
            "to": choice.wanted,
            "metric": scale.metric,
            "value": choice.value,
            "target": scale.target,
        }
        self._tell("scaled-up" if up else "scaled-down", text, **data)

    def _homes(self) -> tuple[str, ...]:
        """Return the nodes that hold the app's volumes; while none is wanted, those of before."""
        before = self.facts.status.homes if self.facts.status else ()
        if not holds_volumes(self.app.spec):
            return ()
        if not self.wanted:
            return before
        used = [seen.instance.node for seen in (*self.old, *self.new, *self.sick, *self.lost, *self.failed) if seen.instance.node]
        return tuple(dict.fromkeys((*used, *before)))[: self.wanted]

    def _phase(self, rollout: Rollout, unready: list[Seen], why: str) -> tuple[AppPhase, str]:
        if not self.wanted:
            return AppPhase.STOPPED, ""
        if rollout.complete:
            return AppPhase.RUNNING, ""
        last = self.facts.status
        if not why and self.crashed and last is not None and last.release == self.app.release:
            # Its next try has just begun: what ended the one before is still the best word on it.
            if rollout.failed and last.phase is AppPhase.FAILED:
                return AppPhase.FAILED, last.message
            why = last.message
        movers = [seen for seen in self.sick if seen.evacuation is not None]
        if movers and not rollout.under_way and len(self.ready) >= self.wanted:
            return AppPhase.RUNNING, f"{movers[0].instance.id} leaves {evacuation.why(movers[0])}"
        if rollout.failed:
            waited = format_seconds(self.rules.deadline)
            return AppPhase.FAILED, f"release {self.app.release} made no progress for {waited}" + (f": {why}" if why else "")
        if rollout.under_way or all(self._fresh(seen) for seen in unready):
            return AppPhase.DEPLOYING, why
        return AppPhase.DEGRADED, why

    def _fresh(self, seen: Seen) -> bool:
        """Whether the instance is on its first way to being ready, as after a scale-up."""
        if seen.idle:
            return True  # it is being woken
        young = self.decision.now - seen.instance.created_at < self.rules.deadline
        return young and not seen.ended and seen.instance.attempt == 0 and (seen.status is None or seen.status.restarts == 0)

    def _write(self, status: AppStatus) -> None:
        if status != self.facts.status:
            self.decision.do(WriteAppStatus(status))

    def _tell(self, code: str, message: str, severity: Severity = Severity.INFO, **data: Any) -> None:
        self.decision.tell(self.app.project, f"app/{self.app.name}", code, message, severity, **data)


def _promoted(seen: Seen) -> Seen:
    return structs.replace(seen, instance=structs.replace(seen.instance, standby=False))


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
