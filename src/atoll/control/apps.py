"""Apps: as many instances of the wanted release as asked for, replaced without a gap.

A rollout keeps `replicas - max_unavailable` ready and at most `replicas + max_surge` meant to run (a blue-green one twice
`replicas`); what comes next in it is decided in `rollouts`. A rolling release that does not become ready before its deadline
fails: what served before goes on serving and is kept at its number, while the failed release's few instances stay for people to
look at and may still come round.
"""

from __future__ import annotations

from collections import Counter

from msgspec import structs

from atoll.control import evacuation, gpus, shares
from atoll.control.actions import Decision, Remove, RemoveApp, Seen
from atoll.control.appreport import Standing, report_app, tell, write_status
from atoll.control.appstatus import Rollout, has_crashed, settled, status_of, why_not_ready
from atoll.control.dependencies import in_order
from atoll.control.facts import AppFacts as AppFacts
from atoll.control.leaving import leave, retire
from atoll.control.making import UNPLACED_MAX as UNPLACED_MAX
from atoll.control.making import Kind, Maker, retry_at
from atoll.control.reconciling import reconciled
from atoll.control.rollouts import Plan, RolloutFacts, decide_rollout, is_steered
from atoll.control.standby import Standbys, served_a_while
from atoll.model.records import AppPhase, Severity
from atoll.model.rollouts import RolloutPhase, RolloutStatus
from atoll.model.states import Desired, Phase
from atoll.scheduling import budget
from atoll.scheduling.quotas import CODE as OVER_QUOTA


def decide_app(facts: AppFacts, decision: Decision) -> None:
    """Compare the app with its instances, and with those that it depends on, and add to `decision` what is missing or too much."""
    in_order(facts, decision, _decide)


def _decide(facts: AppFacts, decision: Decision) -> None:
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
        self.wanted = facts.wanted
        self.rules = self.app.spec.rollout
        order = sorted(facts.instances, key=lambda seen: (seen.instance.created_at, seen.instance.id))
        run = [seen for seen in order if seen.instance.desired is Desired.RUN and not seen.instance.standby]
        self.standbys = Standbys(facts.instances, decision)
        self.maker = Maker(facts, decision)
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
        self.failed = [seen for seen in run if seen.ended and seen.phase is not Phase.LOST]
        self.lost = [seen for seen in run if seen.phase is Phase.LOST]
        self.due: list[Seen] = []
        """Have ended for good, and are replaced now."""
        self.waiting: list[Seen] = []
        """Have ended for good, and are replaced later."""
        alive = [seen for seen in run if not seen.ended]
        self._sort(alive, self.app.release)
        self.plan, self.progressed_at = self._decide_rollout()
        if self.plan.release != self.app.release:
            self._sort(alive, self.plan.release)

    def _sort(self, alive: list[Seen], release: int) -> None:
        """Tell what is wanted, which is `release`, from what is old."""
        self.release = release
        self.new = [seen for seen in alive if self._current(seen)]
        self.old = [seen for seen in alive if not self._current(seen)]
        self.crashed = any(has_crashed(seen) for seen in (*self.new, *self.failed) if self._current(seen))
        self.ready_new = [seen for seen in self.new if seen.ready and self._settled(seen)]
        self.ready = [seen for seen in (*self.old, *self.new, *self.sick) if seen.ready]

    def _current(self, seen: Seen) -> bool:
        return (seen.instance.release, seen.instance.generation) == (self.release, self.app.generation)

    def _settled(self, seen: Seen) -> bool:
        """Whether a ready instance may stand in for another. Once a release has been proved, being ready is enough."""
        last = self.facts.status
        if not self.old and last is not None and last.served_release == self.release:
            return True
        spec = self.facts.specs.get(self.release, self.app.spec)
        at = settled(seen, spec, self.decision, replacing=bool(self.old), crashed=self.crashed)
        if at <= self.decision.now:
            return True
        self.decision.wake(at)
        return False

    def _last_rollout(self) -> RolloutStatus | None:
        rollout = self.facts.status.rollout if self.facts.status is not None else None
        if rollout is None or not rollout.short_since:
            return rollout
        return structs.replace(rollout, short_since=self.decision.past(rollout.short_since))

    def _decide_rollout(self) -> tuple[Plan, float]:
        """Return what comes next, and when the rollout last progressed."""
        app, last, updated = self.app, self.facts.status, len(self.ready_new)
        if last is None or last.release != app.release or updated > last.updated:
            progressed_at = self.decision.now
        else:
            # Written down so: a deadline that the date has run away from is counted anew, once.
            progressed_at = self.decision.past(max(last.progressed_at, app.updated_at))
        served = last.served_release if last is not None else 0
        failed = [seen for seen in self.failed if self._current(seen)]
        facts = RolloutFacts(
            rules=self.rules,
            release=app.release,
            order=app.order,
            last=self._last_rollout(),
            served=served,
            kept=served in self.facts.specs,
            wanted=self.wanted,
            least=budget.least_in_rollout(self.app.spec, self.wanted),
            made=len(self.new) + len(failed),
            ready=updated,
            others=sum(seen.instance.release != app.release for seen in self.old),
            ready_of=Counter(seen.instance.release for seen in self.ready),
            progressed_at=progressed_at,
            verdict=self.facts.verdict,
        )
        if is_steered(facts):
            facts = structs.replace(facts, why=why_not_ready(self._unready()))
        plan = decide_rollout(facts, self.decision.now)
        if plan.wake_at is not None:
            self.decision.wake(plan.wake_at)
        return plan, self.decision.now if plan.progressed else progressed_at

    def run(self) -> None:
        if self.app.deleting:
            self._delete()
            return
        rollout = self._rollout()
        for seen in self.gone:
            self._replace(seen, drain_s=None)
        self._drop_unserved()
        self._replace_failed(rollout)
        self._stand_in()
        self._fill(rollout)
        self._retire_surplus()
        self._retire_sick()
        self._retire_old(rollout)
        self._drop_lost()
        self._keep_standbys(rollout)
        self._report(rollout)

    def _rollout(self) -> Rollout:
        last, status = self.facts.status, self.plan.status
        served = last.served_release if last else 0
        complete = len(self.ready_new) >= self.wanted and not self.old
        if status is not None and status.phase is not RolloutPhase.COMPLETE:
            if status.phase is RolloutPhase.KEEPING:
                served, complete = status.release, len(self.ready_new) >= self.wanted
            elif status.phase is RolloutPhase.REVERTED:
                served = status.stable
            else:
                complete = False
            under_way = status.phase.under_way
            return Rollout(
                complete=complete, under_way=under_way, failed=self.plan.failed, progressed_at=self.progressed_at, served=served
            )
        under_way = not complete and (served != self.app.release or bool(self.old))
        deadline = self.progressed_at + self.rules.deadline
        # All there is of it serves: it has come round, or only its time was too short, and it goes on.
        stuck = len(self.ready_new) < len(self.new) or not self.new
        failed = under_way and stuck and self.decision.now >= deadline
        if under_way and self.decision.now < deadline:
            self.decision.wake(deadline)
        # Asleep, a release has proved nothing.
        served = self.app.release if complete and self.facts.awake is not False else served
        return Rollout(complete=complete, under_way=under_way, failed=failed, progressed_at=self.progressed_at, served=served)

    @property
    def _weights(self) -> dict[int, int]:
        """Release → its share of the requests, where a rollout by shares is under way."""
        return self.plan.status.weights if self.plan.status is not None else {}

    def _drop_unserved(self) -> None:
        """Take away at once what gets no request any more: a release that was taken back, or that another one overtook."""
        weights = self._weights
        unserved = [seen for seen in self.old if weights and seen.instance.release not in weights]
        if not unserved or not any(weights.get(seen.instance.release) and seen.ready for seen in (*self.old, *self.new)):
            return  # nothing else serves: it is replaced as in any rollout
        for seen in unserved:
            self._retire(seen, f"release {self.release} serves in its place")
        self._forget(unserved)

    def _replace_failed(self, rollout: Rollout) -> None:
        """Sort what has ended for good: to be replaced now, later, or not at all."""
        before = self._before(rollout)
        for seen in self.failed:
            keep = self._current(seen) or (before is not None and seen.instance.release == before)
            at = retry_at(seen, self.decision.now)
            if keep and at > self.decision.now and self.wanted:
                self.waiting.append(seen)
                self.decision.wake(at)
            else:
                if keep:
                    self.due.append(seen)
                self.decision.do(Remove(seen.instance, seen.revision))

    def _before(self, rollout: Rollout) -> int | None:
        """Return the release before, where its instances are replaced, too."""
        if self.plan.old and self.plan.status is not None:
            return self.plan.status.stable
        return rollout.served if rollout.failed else None

    def _fill(self, rollout: Rollout) -> None:
        """Make what is missing: of the release before, then of the wanted one; the other way round where that one serves alone."""
        before = self._before(rollout)
        missing = self._missing()
        alone = self.plan.status is not None and self.plan.status.phase is RolloutPhase.KEEPING
        if alone:
            self._create(Kind(self.release, self.app.generation), missing, self._due(current=True))
        if before is not None and before in self.facts.specs and before != self.release:
            self._create(Kind(before, self.app.generation), self._missing_before(rollout), self._due(current=False))
            missing = self._missing()
            if not self.plan.old:
                # One of the failed release is enough to see whether it has come round.
                missing = min(missing, 1 - len(self.new) - sum(self._current(seen) for seen in self.waiting))
        if not alone:
            self._create(Kind(self.release, self.app.generation), missing, self._due(current=True))

    def _due(self, *, current: bool) -> list[Seen]:
        return [seen for seen in self.due if self._current(seen) is current]

    def _total(self) -> int:
        return len(self.new) + len(self.old) + len(self.sick) + len(self.waiting) + self.maker.created

    def _missing(self) -> int:
        """Return how many instances of the wanted release may be made: up to the number wanted, and within the surge."""
        waiting_new = sum(self._current(seen) for seen in self.waiting)
        return min(self.plan.new - len(self.new) - waiting_new, self._room(current=True))

    def _missing_before(self, rollout: Rollout) -> int:
        """Return how many instances of the release before must be made, while it is kept or the wanted one has failed."""
        waiting_old = sum(not self._current(seen) for seen in self.waiting)
        wanted = self.plan.old or self._served_wanted()
        there = sum(seen.instance.release != self._leaving for seen in self.old)
        return min(wanted - there - waiting_old, self._room(current=False))

    def _room(self, *, current: bool) -> int:
        """Return how many more may be meant to run.

        What is to leave its node waits for another in its place where its release has none to spare for its share of the requests.
        A canary may have taken all of the surge: then one more is made.
        """
        room = self.plan.most - self._total()
        waits = [seen for seen in self.sick if seen.ready and self._current(seen) is current] if self._weights else []
        if not waits:
            return room
        least, serving = self._least_in_move(), self._serving()
        return room + any(not self._may_go(seen, serving, least) for seen in waits)

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

    def _create(self, kind: Kind, count: int, due: list[Seen]) -> None:
        """Take standbys of the release for what is missing, and make the rest. What has ended right after its start is made
        again only by and by, so no standby is used up for it."""

        def of_release(seen: Seen) -> bool:
            current = self._current(seen)
            return current if kind.release == self.release else seen.instance.release == kind.release

        brief = [seen for seen in due if not served_a_while(seen)]
        taken = len(self.standbys.take(of_release, count - len(brief), "takes the place of one that is missing"))
        self.maker.created += taken
        self.maker.make(kind, count - taken, [*brief, *[seen for seen in due if served_a_while(seen)][taken:]])

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
            self.maker.make(Kind(self.release, self.app.generation), missing - waiting, due, standby=True)

    def _retire_surplus(self) -> None:
        """After a scale-down, or when lost instances have come back: those that serve least go first."""
        surplus = len(self.new) - self.plan.new
        if surplus <= 0:
            return
        order = sorted(
            self.new,
            key=lambda s: (s.instance.node is not None, s.ready, -s.instance.created_at, s.instance.id),
        )
        leaving = self._spared(order[:surplus])
        stay = [seen for seen in order if seen not in leaving]
        why = reconciled(self.app, stay, leaving, self.decision) or f"only {self.plan.new} wanted"
        for seen in leaving:
            self._retire(seen, why)
        self._forget(leaving)
        self.crashed = any(has_crashed(seen) for seen in (*self.new, *self.failed) if self._current(seen))

    def _spared(self, surplus: list[Seen]) -> list[Seen]:
        """Return who of more than enough of the wanted release may go. While it goes by shares, what bears its share stays: of a
        canary that is tried again there may be more than its step asks for, and they all that serves.
        """
        if not self._weights or self.plan.new >= self.wanted:
            return surplus
        serving, least, found = self._serving(), budget.least_in_rollout(self.app.spec, self.wanted), list[Seen]()
        for seen in surplus:
            if not seen.ready or self._may_go(seen, serving, least):
                _count_out(seen, serving)
                found.append(seen)
        return found

    def _serving(self) -> Counter[int]:
        """Return release → its instances that take requests; where a rollout goes by shares, of those releases that have one."""
        there = Counter(seen.instance.release for seen in (*self.ready_new, *self.old, *self.sick) if seen.ready)
        weights = self._weights
        return Counter({release: count for release, count in there.items() if weights.get(release)}) or there

    def _may_go(self, seen: Seen, serving: Counter[int], least: int) -> bool:
        """Whether what takes requests may go while `least` are to stay: of all, and of its release for its share.

        What a rollout by shares keeps without requests may.
        """
        weights, release = self._weights, seen.instance.release
        if not weights.get(release) and any(count and weights.get(other) for other, count in serving.items()):
            return True
        return serving.total() > least and shares.may_go(release, weights, serving, least)

    def _least_in_move(self) -> int:
        newcomers = (*self.new, *self.old) if self._weights else self.new
        no_room = bool(self.sick) and evacuation.find_no_room(newcomers, self.decision)
        return budget.least_in_move(self.app.spec, self.wanted, no_room=no_room)

    def _retire_sick(self) -> None:
        """Take away as many of those on sick devices, or on nodes that are to be empty, as others serve in their place."""
        least, serving = self._least_in_move(), self._serving()
        for seen in list(self.sick):
            if self._may_go(seen, serving, least):
                _count_out(seen, serving)
                self.sick = [other for other in self.sick if other is not seen]
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

    @property
    def _leaving(self) -> int | None:
        """The release that keeps some requests only until another is whole again."""
        leaving = self.plan.status.leaving if self.plan.status is not None else None
        return leaving.release if leaving is not None else None

    def _retire_old(self, rollout: Rollout) -> None:
        """Take away as many of the old as the ready ones allow, those that do not serve first."""
        least = budget.least_in_rollout(self.app.spec, self.wanted)
        spare = len(self.old) + len(self.sick) + len(self.ready_new) - least
        if not self.plan.old and rollout.failed and rollout.served != self.release and rollout.served in self.facts.specs:
            spare = min(spare, len(self.old) - self._served_wanted())
        serving, stay = self._serving(), set[int]()
        leaving, reason = self._leaving, f"replaced by release {self.release}"
        kept = sum(seen.instance.release != leaving for seen in self.old)
        for seen in sorted(self.old, key=lambda s: (s.ready, s.instance.release != leaving, s.instance.created_at, s.instance.id)):
            release = seen.instance.release
            before = release != leaving
            if spare <= 0:
                break
            if self.plan.old and before and kept <= self.plan.old:
                continue  # as many of the release before stay
            if seen.ready and (release in stay or not self._may_go(seen, serving, least)):
                stay.add(release)
                continue
            self._retire(seen, reason)
            spare -= 1
            _count_out(seen, serving)
            kept -= before
            self._forget([seen])

    def _forget(self, seen: list[Seen]) -> None:
        """What has been told to leave is looked at no more."""
        ids = {each.instance.id for each in seen}
        self.new = [each for each in self.new if each.instance.id not in ids]
        self.old = [each for each in self.old if each.instance.id not in ids]
        self.ready = [each for each in self.ready if each.instance.id not in ids]
        self.ready_new = [each for each in self.ready_new if each.instance.id not in ids]

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
            tell(self.facts, self.decision, "app-deleted", "the app is gone")
            return
        status = status_of(self.app, self.facts.status, phase=AppPhase.DELETING, total=len(self.facts.instances))
        write_status(self.facts, self.decision, status)

    def _unready(self) -> list[Seen]:
        """Return what is wanted and does not serve, or not for long enough."""
        proved = {seen.instance.id for seen in self.ready_new}
        there = (*self.new, *self.failed, *self.lost, *self.sick)
        return [seen for seen in there if self._current(seen) and seen.instance.id not in proved]

    def _report(self, rollout: Rollout) -> None:
        standing = Standing(
            wanted=self.wanted,
            ready=len(self.ready),
            updated=len(self.ready_new),
            total=len(self.new) + len(self.old) + len(self.sick) + self.maker.created,
            parked=self.standbys.parked,
            crashed=self.crashed,
            unready=self._unready(),
            movers=[seen for seen in self.sick if seen.evacuation is not None],
            all=(*self.old, *self.new, *self.sick, *self.lost, *self.failed),
        )
        report_app(self.facts, rollout, self.plan, standing, self.decision)


def _count_out(seen: Seen, serving: Counter[int]) -> None:
    """Count one that goes no more among those that take requests."""
    if seen.ready and seen.instance.release in serving:
        serving[seen.instance.release] -= 1


def _promoted(seen: Seen) -> Seen:
    return structs.replace(seen, instance=structs.replace(seen.instance, standby=False))
