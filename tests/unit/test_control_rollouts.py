"""What comes next in a rollout, as tables; what an analysis says of numbers; and whole decisions about an app."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from msgspec import structs

from atoll.control.actions import Create, Decision, Seen, Tell, Update, WriteAppStatus
from atoll.control.analysis import Outcome, Verdict, decide_analysis
from atoll.control.apps import AppFacts, decide_app
from atoll.control.rollouts import Plan, RolloutFacts, canary_count, decide_rollout
from atoll.model.errors import Invalid
from atoll.model.evacuation import Evacuation
from atoll.model.records import App, AppPhase, AppStatus, Instance, OwnerKind, Status
from atoll.model.rollouts import RolloutOrder, RolloutPhase, RolloutStatus
from atoll.model.spec import Analysis, AppSpec, CanaryStep, Health, Port, Rollout, Strategy, check_app
from atoll.model.states import Desired, Phase
from atoll.model.traffic import BOUNDS_MS, Counts
from atoll.model.units import Seconds

NOW = 10_000.0
ANALYSIS = Analysis(error_rate_max=0.01, latency_p99_max=Seconds(0.3), requests_min=100, failures_max=1)
STEPS = (CanaryStep(weight=5, pause=Seconds(60)), CanaryStep(weight=50), CanaryStep(weight=80, pause=Seconds(10)))
CANARY = Rollout(strategy=Strategy.CANARY, steps=STEPS, max_surge=2, deadline=Seconds(100))
BLUE_GREEN = Rollout(strategy=Strategy.BLUE_GREEN, keep_old=Seconds(300), deadline=Seconds(100))
STEP_1 = RolloutStatus(release=2, stable=1, strategy=Strategy.CANARY, weight=5, since=NOW - 30)
STEP_2 = structs.replace(STEP_1, step=1, weight=50)
BAD = Verdict(outcome=Outcome.FAILED, words="48 of 100 requests failed", at=NOW)
GOOD = Verdict(outcome=Outcome.PASSED, words="0 of 100 requests failed", at=NOW)
NONE = Verdict(outcome=Outcome.NONE, words="3 of the 100 requests", at=NOW)


def plan(rules: Rollout = CANARY, last: RolloutStatus | None = STEP_1, **more: Any) -> Plan:
    usual: dict[str, Any] = {"rules": rules, "release": 2, "last": last, "served": 1, "wanted": 10, "made": 1, "ready": 1}
    facts = {**usual, "others": 10, "progressed_at": NOW - 30, **more}
    ready_of = {1: 10, 2: 0, facts["release"]: facts["ready"]}
    return decide_rollout(RolloutFacts(**{"ready_of": ready_of, **facts}), NOW)


def order(**more: Any) -> RolloutOrder:
    return RolloutOrder(release=2, by="ann", **more)


def judged(rules: Rollout = CANARY, **more: Any) -> Rollout:
    return structs.replace(rules, analysis=structs.replace(ANALYSIS, **more))


def codes(made: Plan) -> list[str]:
    return [told.code for told in made.told]


def status_of(made: Plan) -> RolloutStatus:
    assert made.status is not None
    return made.status


@pytest.mark.parametrize(
    ("last", "more", "after"),
    [
        (None, {"ready": 0}, (RolloutPhase.PROGRESSING, 0, 0)),
        (None, {"ready": 1}, (RolloutPhase.PROGRESSING, 0, 5)),
        (STEP_1, {}, (RolloutPhase.PROGRESSING, 0, 5)),
        (structs.replace(STEP_1, since=NOW - 60), {}, (RolloutPhase.PROGRESSING, 1, 10)),
        (structs.replace(STEP_1, since=NOW - 60), {"ready": 0}, (RolloutPhase.PROGRESSING, 0, 5)),
        (structs.replace(STEP_1, since=NOW - 60), {"order": order(paused=True)}, (RolloutPhase.WAITING, 0, 5)),
        (structs.replace(STEP_1, step=1, since=0.0), {"ready": 4}, (RolloutPhase.PROGRESSING, 1, 40)),
        (structs.replace(STEP_1, step=1, since=0.0), {"ready": 5}, (RolloutPhase.WAITING, 1, 50)),
        (STEP_2, {"ready": 5}, (RolloutPhase.WAITING, 1, 50)),
        (STEP_2, {"ready": 5, "order": order(step=1)}, (RolloutPhase.WAITING, 1, 50)),
        (STEP_2, {"ready": 5, "order": order(step=2)}, (RolloutPhase.PROGRESSING, 2, 50)),
        (STEP_2, {"ready": 8, "order": order(step=2)}, (RolloutPhase.PROGRESSING, 2, 80)),
        (STEP_2, {"ready": 5, "order": order(promoted=True)}, (RolloutPhase.PROMOTING, 1, 50)),
        (STEP_2, {"ready": 7, "order": order(promoted=True)}, (RolloutPhase.PROMOTING, 1, 70)),
        (STEP_2, {"ready": 10, "order": order(promoted=True)}, (RolloutPhase.PROMOTING, 1, 100)),
        (STEP_2, {"ready": 10, "others": 0, "order": order(promoted=True)}, (RolloutPhase.COMPLETE, 1, 100)),
        (STEP_2, {"order": order(aborted=True)}, (RolloutPhase.REVERTED, 1, None)),
        (STEP_1, {"ready": 0, "progressed_at": NOW - 100}, (RolloutPhase.PROGRESSING, 0, 5)),
        (structs.replace(STEP_1, short_since=NOW - 99), {"ready": 0, "progressed_at": NOW - 500}, (RolloutPhase.PROGRESSING, 0, 5)),
        (
            structs.replace(STEP_1, short_since=NOW - 100),
            {"ready": 0, "progressed_at": NOW - 500},
            (RolloutPhase.REVERTED, 0, None),
        ),
        (STEP_1, {"ready": 1, "progressed_at": NOW - 100}, (RolloutPhase.PROGRESSING, 0, 5)),
        (structs.replace(STEP_1, phase=RolloutPhase.REVERTED, weight=None), {"ready": 10}, (RolloutPhase.REVERTED, 0, None)),
        (structs.replace(STEP_1, phase=RolloutPhase.REVERTED), {"order": order(attempt=1)}, (RolloutPhase.PROGRESSING, 0, 5)),
        (structs.replace(STEP_1, release=3), {"ready": 0}, (RolloutPhase.PROGRESSING, 0, 0)),
        (STEP_1, {"wanted": 0, "ready": 0}, (RolloutPhase.PROGRESSING, 0, 5)),
    ],
)
def test_the_steps_of_a_canary(
    last: RolloutStatus | None, more: dict[str, Any], after: tuple[RolloutPhase, int, int | None]
) -> None:
    status = status_of(plan(last=last, **more))
    assert (status.phase, status.step, status.weight) == after
    assert not status.weights or sum(status.weights.values()) == 100


@pytest.mark.parametrize(
    ("last", "verdict", "phase", "step", "failures"),
    [
        (STEP_1, NONE, RolloutPhase.PROGRESSING, 0, 0),
        (STEP_1, BAD, RolloutPhase.PROGRESSING, 0, 1),
        (structs.replace(STEP_1, failures=1), BAD, RolloutPhase.REVERTED, 0, 2),
        (structs.replace(STEP_1, failures=1, analysed_at=NOW), BAD, RolloutPhase.PROGRESSING, 0, 1),
        (structs.replace(STEP_1, since=NOW - 60), NONE, RolloutPhase.PROGRESSING, 0, 0),
        (structs.replace(STEP_1, since=NOW - 60), GOOD, RolloutPhase.PROGRESSING, 1, 0),
        (structs.replace(STEP_1, since=NOW - 60, passes=1), None, RolloutPhase.PROGRESSING, 1, 0),
        (structs.replace(STEP_1, since=NOW + 1), BAD, RolloutPhase.PROGRESSING, 0, 0),
    ],
)
def test_a_step_ends_well_only_with_a_good_interval_and_each_verdict_counts_once(
    last: RolloutStatus, verdict: Verdict | None, phase: RolloutPhase, step: int, failures: int
) -> None:
    made = plan(judged(), last, verdict=verdict)
    status = status_of(made)
    assert (status.phase, status.step, status.failures) == (phase, step, failures)
    if phase is RolloutPhase.REVERTED:
        assert status.weights == {1: 100}
        assert made.release == 1
        assert "48 of 100 requests failed" in status.message
        assert codes(made) == ["rollout-analysis-failed", "rollout-reverted"]


def test_without_revert_a_failed_analysis_waits_for_a_person_who_may_go_on() -> None:
    rules = structs.replace(judged(), auto_revert=False)
    last = structs.replace(STEP_1, failures=1, since=NOW - 60)
    held = status_of(plan(rules, last, verdict=BAD))
    assert (held.phase, held.weight) == (RolloutPhase.WAITING, 5)
    assert "48 of 100" in held.message
    assert status_of(plan(rules, held, order=order(step=1))).step == 1


@pytest.mark.parametrize(
    ("weight", "new", "old"),
    [(5, 1, 10), (20, 2, 10), (50, 5, 7), (80, 8, 4), (99, 10, 2)],
)
def test_the_surge_bounds_both_sets_and_the_old_one_shrinks_only_as_far_as_it_must(weight: int, new: int, old: int) -> None:
    rules = structs.replace(CANARY, steps=(CanaryStep(weight=weight),))
    assert canary_count(10, weight) == new
    made = plan(rules, None, ready=0)
    assert (made.new, made.old, made.most) == (new, 10, 12)
    made = plan(rules, None, ready=new)
    assert (status_of(made).weight, made.new, made.old, made.most) == (weight, new, old, 12)


@pytest.mark.parametrize(
    ("last", "more", "after"),
    [
        (None, {"ready": 9}, (RolloutPhase.PROGRESSING, 0)),
        (None, {"ready": 10}, (RolloutPhase.WAITING, 0)),
        ({"since": NOW - 5}, {"ready": 10, "order": order(promoted=True)}, (RolloutPhase.KEEPING, 100)),
        ({"since": NOW - 5}, {"ready": 10, "order": order(step=1)}, (RolloutPhase.KEEPING, 100)),
        ({"since": NOW - 5}, {"ready": 10, "order": order(step=1, paused=True)}, (RolloutPhase.WAITING, 0)),
        ({"since": NOW - 5}, {"ready": 9, "order": order(promoted=True)}, (RolloutPhase.PROGRESSING, 0)),
        ({"since": NOW - 5}, {"ready": 10, "order": order(aborted=True)}, (RolloutPhase.REVERTED, None)),
        ({"weight": 100, "phase": RolloutPhase.KEEPING, "since": NOW - 5}, {"ready": 10}, (RolloutPhase.KEEPING, 100)),
        (
            {"weight": 100, "phase": RolloutPhase.KEEPING, "since": NOW - 5},
            {"ready": 10, "served": 2, "order": order(promoted=True, aborted=True)},
            (RolloutPhase.REVERTED, None),
        ),
        (
            {"weight": 100, "phase": RolloutPhase.KEEPING, "since": NOW - 300},
            {"ready": 10, "others": 0, "served": 2},
            (RolloutPhase.COMPLETE, 100),
        ),
    ],
)
def test_a_blue_green_set_is_switched_to_at_once_and_back(
    last: dict[str, Any] | None, more: dict[str, Any], after: tuple[RolloutPhase, int | None]
) -> None:
    was = RolloutStatus(**{"release": 2, "stable": 1, "strategy": Strategy.BLUE_GREEN, "weight": 0, **last}) if last else None
    made = plan(BLUE_GREEN, was, **more)
    status = status_of(made)
    assert (status.phase, status.weight) == after
    if status.phase in (RolloutPhase.PROGRESSING, RolloutPhase.WAITING):
        assert (made.new, made.old, made.most) == (10, 10, 20)
        assert status.weights == {2: 0, 1: 100}


def test_a_blue_green_set_is_promoted_by_itself_when_it_was_ready_for_so_long() -> None:
    rules = structs.replace(BLUE_GREEN, promote_after=Seconds(20))
    was = RolloutStatus(release=2, stable=1, strategy=Strategy.BLUE_GREEN, weight=0, since=NOW - 5)
    early = plan(rules, was, ready=10)
    assert (status_of(early).phase, early.wake_at) == (RolloutPhase.PROGRESSING, NOW + 15)
    assert status_of(plan(rules, structs.replace(was, since=NOW - 20), ready=10)).phase is RolloutPhase.KEEPING
    held = plan(rules, structs.replace(was, since=NOW - 20), ready=10, order=order(paused=True))
    assert status_of(held).phase is RolloutPhase.WAITING


def test_a_rolling_rollout_that_nobody_steers_has_no_status_and_one_that_is_paused_stays_as_it_is() -> None:
    rules = Rollout()
    assert plan(rules, None).status is None
    held = plan(rules, None, order=order(paused=True), made=4, ready=4, others=6)
    assert (status_of(held).phase, held.new, held.old) == (RolloutPhase.WAITING, 4, 6)
    assert status_of(held).weights == {}
    back = plan(rules, held.status, order=order(aborted=True))
    assert (back.release, status_of(back).weights) == (1, {1: 100})
    rules = structs.replace(rules, auto_revert=True)
    late = plan(rules, None, ready=0, progressed_at=NOW - 300, why="web-1: exited with status 1")
    assert status_of(late).phase is RolloutPhase.REVERTED
    assert "exited with status 1" in status_of(late).message


def test_what_overtakes_a_canary_takes_its_requests_away_as_fast_as_the_old_release_can_take_them() -> None:
    third = plan(last=STEP_2, release=3, ready=0, ready_of={1: 10, 2: 5})
    assert status_of(third).weights == {3: 0, 1: 100}
    few = plan(last=STEP_2, release=3, ready=0, ready_of={1: 7, 2: 5})
    assert status_of(few).weights == {3: 0, 1: 70, 2: 30}
    assert status_of(plan(last=few.status, release=3, ready=0, ready_of={1: 9, 2: 3})).weights == {3: 0, 1: 90, 2: 10}
    begun = plan(last=few.status, release=3, ready=1, ready_of={1: 7, 2: 4, 3: 1})
    assert status_of(begun).weights == {3: 5, 1: 70, 2: 25}
    assert status_of(plan(last=few.status, release=3, ready=0, ready_of={1: 7})).weights == {3: 0, 1: 100}


def test_what_was_overtaken_serves_what_nobody_else_can_past_a_deadline_and_when_the_next_one_is_taken_back() -> None:
    """It is not bad; and where the next one is promoted at once nobody makes more of the old one. (Seed 7506.)"""
    few = plan(last=STEP_2, release=3, ready=0, ready_of={1: 7, 2: 5})
    usual: dict[str, Any] = {"rules": CANARY, "served": 1, "wanted": 10, "made": 1, "others": 12, "progressed_at": NOW + 990}
    facts = RolloutFacts(**usual, release=3, last=few.status, ready=0, ready_of={1: 7, 2: 5})
    assert status_of(decide_rollout(facts, NOW + 1000)).weights == {3: 0, 1: 70, 2: 30}
    back = decide_rollout(structs.replace(facts, order=structs.replace(order(aborted=True), release=3)), NOW + 1000)
    assert (status_of(back).phase, status_of(back).weights) == (RolloutPhase.REVERTED, {1: 70, 2: 30})


def test_who_goes_back_by_hand_gives_the_old_release_what_it_has_instances_for() -> None:
    whole = plan(last=STEP_2, release=1, ready=10, others=5)
    assert status_of(whole).weights == {1: 100}
    done = plan(last=whole.status, release=1, ready=10, others=0)
    assert (status_of(done).phase, status_of(done).weights) == (RolloutPhase.COMPLETE, {})
    few = plan(last=STEP_2, release=1, ready=7, others=5, ready_of={1: 7, 2: 5})
    assert (status_of(few).weights, few.wake_at) == ({1: 70, 2: 30}, NOW + 100)
    assert status_of(going_on(few, 5, 6)).weights == {1: 70, 2: 30}
    assert status_of(going_on(few, 2, 10)).weights == {1: 100}
    assert status_of(going_on(few, 5, 7, NOW + 100)).weights == {1: 100}


def counts(requests: int, errors: int = 0, slow: int = 0) -> Counts:
    """`slow` of them took 400 ms, the others 10 ms."""
    classes = [0] * len(BOUNDS_MS)
    classes[BOUNDS_MS.index(10)], classes[BOUNDS_MS.index(400)] = requests - slow, slow
    return Counts(requests, errors, tuple(classes))


@pytest.mark.parametrize(
    ("new", "old", "outcome"),
    [
        (counts(99, 99), counts(1000), Outcome.NONE),
        (counts(100), counts(1000), Outcome.PASSED),
        (counts(100, 1), counts(1000), Outcome.PASSED),
        (counts(100, 2), counts(1000), Outcome.FAILED),
        (counts(100, 50), counts(10), Outcome.FAILED),
        (counts(100, 50), counts(1000, 480), Outcome.NONE),
        (counts(100, 80), counts(1000, 480), Outcome.FAILED),
        (counts(1000, slow=5), counts(1000), Outcome.PASSED),
        (counts(1000, slow=50), counts(1000), Outcome.FAILED),
        (counts(1000, slow=50), counts(1000, slow=60), Outcome.NONE),
        (counts(1000, 100, slow=50), counts(1000, slow=60), Outcome.FAILED),
    ],
)
def test_a_release_is_bad_beyond_its_bounds_and_worse_than_the_old_one(new: Counts, old: Counts, outcome: Outcome) -> None:
    verdict = decide_analysis(ANALYSIS, new, old)
    assert verdict.outcome is outcome
    assert str(new.requests) in verdict.words


@pytest.mark.parametrize(
    ("rollout", "field"),
    [
        ({"strategy": "canary"}, "rollout.steps"),
        ({"strategy": "canary", "steps": (CanaryStep(weight=5),), "max_surge": 0, "max_unavailable": 1}, "rollout.max_surge"),
        ({"strategy": "canary", "steps": (CanaryStep(weight=50), CanaryStep(weight=5))}, "rollout.steps[1].weight"),
        ({"steps": (CanaryStep(weight=5),)}, "rollout.steps"),
        ({"promote_after": Seconds(5)}, "rollout.promote_after"),
        ({"analysis": Analysis()}, "rollout.analysis"),
        ({"analysis": Analysis(error_rate_max=0.1, interval=Seconds(0.1))}, "rollout.analysis.interval"),
    ],
)
def test_rules_that_contradict_themselves_are_refused_by_name(rollout: dict[str, Any], field: str) -> None:
    rules = Rollout(**{**rollout, "strategy": Strategy(rollout.get("strategy", "rolling"))})
    with pytest.raises(Invalid) as refused:
        check_app(AppSpec(name="web", image="x", ports=(Port(port=80),), rollout=rules))
    assert refused.value.field == field


def test_shares_of_requests_need_a_port_that_is_served() -> None:
    with pytest.raises(Invalid, match="without an http port"):
        check_app(AppSpec(name="web", image="x", rollout=BLUE_GREEN))


def seen(id: str, release: int, *, ready: bool = True) -> Seen:
    instance = Instance(
        id=id, project="p", owner_kind=OwnerKind.APP, owner="web", release=release, generation=1, node="n", created_at=NOW - 500
    )
    phase = Phase.RUNNING if ready else Phase.BACKOFF
    status = Status(
        instance=id, project="p", node="n", phase=phase, ready=ready, phase_at=NOW - 400, started_at=NOW - 400, ready_at=NOW - 400
    )
    return Seen(instance=instance, revision=7, status=status)


def decide(rules: Rollout, instances: list[Seen], last: RolloutStatus | None, **more: Any) -> Decision:
    spec = AppSpec(name="web", image="x", ports=(Port(port=80),), health=Health(), rollout=rules)
    app = App(
        project="p",
        name="web",
        spec=spec,
        release=2,
        replicas=4,
        created_at=0.0,
        updated_at=more.pop("updated_at", NOW - 50),
        order=more.pop("order", None),
    )
    status = AppStatus(
        project="p",
        name="web",
        phase=AppPhase.DEPLOYING,
        release=2,
        served_release=1,
        updated=1,
        progressed_at=NOW - 30,
        rollout=last,
    )
    facts = AppFacts(
        app=app,
        revision=3,
        status=structs.replace(status, **more.pop("status", {})),
        instances=tuple(instances),
        specs={1: spec, 2: spec},
        ingresses=frozenset("g"),
        **more,
    )
    numbers = itertools.count()
    made = Decision(NOW, lambda: f"{next(numbers):06d}")
    decide_app(facts, made)
    return made


def test_a_reverted_release_is_taken_away_and_the_old_one_is_made_whole_again() -> None:
    there = [*(seen(f"o{n}", 1) for n in range(3)), *(seen(f"n{n}", 2) for n in range(2))]
    last = structs.replace(STEP_2, failures=1)
    made = decide(judged(structs.replace(CANARY, max_unavailable=1)), there, last, verdict=BAD)
    gone = {a.instance.id for a in made.actions if isinstance(a, Update) and a.instance.desired is Desired.DRAIN}
    assert gone == {"n0", "n1"}
    assert [a.instance.release for a in made.actions if isinstance(a, Create)] == [1]
    (status,) = (a.status for a in made.actions if isinstance(a, WriteAppStatus))
    assert (status.phase, status.served_release, status.release) == (AppPhase.FAILED, 1, 2)
    assert "48 of 100 requests failed" in status.message
    assert "rollout-reverted" in {a.event.code for a in made.actions if isinstance(a, Tell)}
    again = decide(judged(), [seen(f"o{n}", 1) for n in range(4)], status.rollout, status={"phase": status.phase})
    assert not [a for a in again.actions if isinstance(a, (Create, Update))], "it is not tried again by itself"


def test_a_bad_release_that_alone_is_left_serves_on_until_the_old_one_is_there() -> None:
    made = decide(judged(), [seen("n0", 2), seen("n1", 2)], structs.replace(STEP_2, failures=1), verdict=BAD)
    assert not [a for a in made.actions if isinstance(a, Update)]
    assert [a.instance.release for a in made.actions if isinstance(a, Create)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("last", "ready", "old_ready", "unavailable", "left"),
    [
        (STEP_1, 1, 10, 0, None),  # whole
        (STEP_2, 5, 7, 0, 30),
        (STEP_2, 5, 2, 0, 50),  # never more than it had
        (STEP_2, 5, 9, 1, None),  # as many as a rollout must leave
        (STEP_2, 5, 8, 1, 12),
        (STEP_2, 0, 3, 0, None),  # nothing of it serves
        (structs.replace(STEP_2, strategy=Strategy.ROLLING, weight=None), 4, 6, 0, 40),
        (structs.replace(STEP_2, strategy=Strategy.ROLLING, weight=None), 1, 4, 0, 20),  # its part of what serves
    ],
)
def test_a_release_that_is_taken_back_keeps_what_the_old_one_has_too_few_instances_for(
    last: RolloutStatus, ready: int, old_ready: int, unavailable: int, left: int | None
) -> None:
    rules = structs.replace(CANARY, max_unavailable=unavailable)
    if last.strategy is Strategy.ROLLING:
        rules = structs.replace(rules, strategy=Strategy.ROLLING, steps=())
    made = plan(rules, last, ready=ready, ready_of={1: old_ready, 2: ready}, order=order(aborted=True))
    status = status_of(made)
    assert (status.phase, status.weight) == (RolloutPhase.REVERTED, None)
    assert status.weights == ({1: 100} if left is None else {2: left, 1: 100 - left})
    assert made.wake_at == (None if left is None else NOW + rules.deadline)
    (told,) = made.told
    assert ("has all requests" in told.message) is (left is None)


def going_on(last: Plan, new: int, old: int, now: float = NOW) -> Plan:
    """Return what becomes of a rollout when so many of release 2 and 1 are ready."""
    status = status_of(last)
    facts = {"rules": CANARY, "release": status.release, "last": status, "served": 1, "wanted": 10, "others": new}
    ready = {1: old, 2: new}
    return decide_rollout(RolloutFacts(**facts, progressed_at=NOW - 30, ready=ready.get(status.release, 0), ready_of=ready), now)


def test_going_back_gives_the_old_release_more_as_it_comes_back_and_never_less_and_all_of_it_by_the_deadline() -> None:
    back = plan(CANARY, STEP_2, ready=5, ready_of={1: 7, 2: 5}, order=order(aborted=True))
    more = going_on(back, 3, 9)
    assert status_of(more).weights == {2: 10, 1: 90}
    assert status_of(going_on(more, 3, 5)).weights == {2: 10, 1: 90}
    whole = going_on(more, 1, 10)
    assert (status_of(whole).weights, codes(whole)) == ({1: 100}, ["rollout-restored"])
    assert status_of(going_on(whole, 1, 2)).weights == {1: 100}
    assert status_of(going_on(more, 3, 9, NOW + 99)).weights == {2: 10, 1: 90}
    assert status_of(going_on(more, 3, 9, NOW + 100)).weights == {1: 100}


def test_of_a_canary_that_is_taken_back_only_as_many_leave_as_the_old_one_has_stand_ins_for() -> None:
    there = [*(seen(f"o{n}", 1) for n in range(2)), *(seen(f"n{n}", 2) for n in range(4))]
    last = structs.replace(STEP_2, step=2, weight=80, failures=1)
    made = decide(judged(), there, last, verdict=BAD)
    (status,) = (a.status for a in made.actions if isinstance(a, WriteAppStatus))
    assert status.rollout is not None
    assert (status.rollout.phase, status.rollout.weights) == (RolloutPhase.REVERTED, {2: 50, 1: 50})
    assert "release 1 has 50 % of the requests, and gets more as it comes back" in status.message
    leave = {a.instance.id for a in made.actions if isinstance(a, Update) and a.instance.desired is Desired.DRAIN}
    assert leave == {"n0", "n1"}
    left = [one for one in there if one.instance.id not in leave]
    then = decide(judged(), left, status.rollout, status={"phase": status.phase})
    assert [a.instance.release for a in then.actions if isinstance(a, Create)] == [1, 1]
    whole = decide(judged(), [*left, seen("o2", 1), seen("o3", 1)], status.rollout, status={"phase": status.phase})
    (status,) = (a.status for a in whole.actions if isinstance(a, WriteAppStatus))
    assert status.rollout is not None
    assert status.rollout.weights == {1: 100}
    gone = {a.instance.id for a in whole.actions if isinstance(a, Update) and a.instance.desired is Desired.DRAIN}
    assert gone == {"n2", "n3"}


def test_an_instance_of_the_old_release_that_is_missing_is_made_while_the_canary_is_on() -> None:
    there = [*(seen(f"o{n}", 1) for n in range(3)), seen("n0", 2)]
    made = decide(CANARY, there, STEP_1)
    assert [a.instance.release for a in made.actions if isinstance(a, Create)] == [1]


def test_a_canary_takes_no_old_instance_away_that_the_surge_has_room_for() -> None:
    there = [*(seen(f"o{n}", 1) for n in range(4)), seen("n0", 2)]
    made = decide(CANARY, there, STEP_1)
    assert not [a for a in made.actions if isinstance(a, (Create, Update))]
    half = decide(CANARY, [*there, seen("n1", 2)], structs.replace(STEP_2, since=0.0))
    assert not [a for a in half.actions if isinstance(a, (Create, Update))]
    (status,) = (a.status for a in half.actions if isinstance(a, WriteAppStatus))
    assert status.rollout is not None
    assert status.rollout.weights == {2: 50, 1: 50}


def test_what_is_kept_without_requests_leaves_a_drained_node_at_once_and_lets_nothing_that_serves_go() -> None:
    """Seed 18: a node was drained just after a blue-green switch, and what was kept counted as serving."""
    drained = Evacuation(why="it is being drained", since=NOW - 1, deadline=NOW + 300)
    last = RolloutStatus(
        release=2,
        stable=1,
        strategy=Strategy.BLUE_GREEN,
        weight=100,
        since=NOW - 5,
        phase=RolloutPhase.KEEPING,
    )
    there = [*(seen(f"o{n}", 1) for n in range(4)), *(seen(f"n{n}", 2) for n in range(4))]
    moving = [structs.replace(one, evacuation=drained) if one.instance.id in ("o0", "n0") else one for one in there]
    made = decide(BLUE_GREEN, moving, last, status={"phase": AppPhase.RUNNING, "served_release": 2})
    assert [a.instance.id for a in made.actions if isinstance(a, Update)] == ["o0"]
    without = [one for one in moving if one.instance.id != "o0"]
    made = decide(BLUE_GREEN, without, last, status={"phase": AppPhase.RUNNING, "served_release": 2})
    assert [a.instance.release for a in made.actions if isinstance(a, Create)] == [2]
    then = [*(one for one in moving if one.instance.id != "o0"), seen("n4", 2)]
    made = decide(BLUE_GREEN, then, last, status={"phase": AppPhase.RUNNING, "served_release": 2})
    assert [a.instance.id for a in made.actions if isinstance(a, Update)] == ["n0"]
