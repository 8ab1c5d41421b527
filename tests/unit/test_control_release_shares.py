"""A share of the requests and the instances that bear it move together: what stays, what goes, and how fast a share moves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from test_control_rollouts import CANARY, NOW, STEP_1, STEP_2, decide, plan, seen, status_of

from atoll.control.actions import Create, Decision, Seen, Update, WriteAppStatus
from atoll.control.shares import borne, may_go, must_stay, needed
from atoll.model.evacuation import Evacuation
from atoll.model.rollouts import Leaving, RolloutOrder, RolloutPhase, RolloutStatus
from atoll.model.spec import CanaryStep, Rollout, Strategy
from atoll.model.states import Desired
from atoll.model.units import Seconds

DRAINED = Evacuation(why="it is being drained", since=NOW - 1, deadline=NOW + 300)
NARROW = structs.replace(CANARY, max_surge=1, steps=(CanaryStep(weight=50, pause=Seconds(60)),))
AT_5 = structs.replace(STEP_1, since=NOW - 5)


def old(count: int) -> list[Seen]:
    return [seen(f"o{n}", 1) for n in range(count)]


def new(count: int) -> list[Seen]:
    return [seen(f"n{n}", 2) for n in range(count)]


def moving(there: list[Seen], *ids: str) -> list[Seen]:
    return [structs.replace(one, evacuation=DRAINED) if one.instance.id in ids else one for one in there]


def left(made: Decision) -> list[str]:
    return sorted(a.instance.id for a in made.actions if isinstance(a, Update) and a.instance.desired is not Desired.RUN)


def created(made: Decision) -> list[int]:
    return [a.instance.release for a in made.actions if isinstance(a, Create)]


def weights(made: Decision) -> dict[int, int]:
    (status,) = (a.status for a in made.actions if isinstance(a, WriteAppStatus))
    assert status.rollout is not None
    return status.rollout.weights


@pytest.mark.parametrize(
    ("ready", "enough", "share"),
    [(0, 4, 0), (1, 4, 25), (1, 3, 33), (2, 3, 66), (3, 3, 100), (5, 4, 100), (1, 300, 1), (299, 300, 99), (0, 0, 0), (1, 0, 100)],
)
def test_each_instance_bears_as_much_as_the_others_of_all_requests(ready: int, enough: int, share: int) -> None:
    assert borne(ready, enough) == share


@pytest.mark.parametrize(
    ("share", "enough", "least"),
    [(100, 4, 4), (95, 4, 4), (76, 4, 4), (75, 4, 3), (67, 3, 2), (5, 4, 1), (1, 10, 1), (0, 10, 0), (50, 0, 0)],
)
def test_a_share_needs_so_few_instances(share: int, enough: int, least: int) -> None:
    assert needed(share, enough) == least


@given(st.integers(1, 2000), st.data())
@settings(deadline=None)
def test_what_a_release_takes_over_and_the_rest_never_need_more_than_all_requests_do(enough: int, data: st.DataObject) -> None:
    ready = data.draw(st.integers(1, enough))
    assert ready + needed(100 - borne(ready, enough), enough) <= enough
    assert needed(borne(ready, enough), enough) <= max(ready, enough // 100 + 1)


@given(st.integers(1, 2000), st.integers(1, 100))
@settings(deadline=None)
def test_what_is_needed_bears_the_share_but_for_less_than_a_percent(enough: int, share: int) -> None:
    least = needed(share, enough)
    assert 100 * least > (share - 1) * enough
    assert 100 * (least - 1) <= (share - 1) * enough


def test_a_release_of_which_nothing_is_ready_gives_its_share_to_the_others() -> None:
    assert must_stay({1: 50, 2: 50}, {1: 4, 2: 0}, 4) == {1: 4}
    assert must_stay({1: 50, 2: 25, 3: 25}, {1: 4, 2: 1}, 4) == {1: 3, 2: 2}
    assert must_stay({1: 100, 2: 0}, {1: 4, 2: 4}, 4) == {1: 4}
    assert must_stay({1: 100}, {2: 4}, 4) == {}


def test_the_last_of_a_release_goes_only_if_the_others_bear_its_share() -> None:
    assert may_go(2, {1: 95, 2: 5}, {1: 4, 2: 1}, 4)
    assert not may_go(2, {1: 95, 2: 5}, {1: 3, 2: 1}, 4)
    assert not may_go(1, {1: 95, 2: 5}, {1: 4, 2: 1}, 4)
    assert may_go(1, {1: 75, 2: 25}, {1: 4, 2: 1}, 4)


def test_no_old_instance_goes_for_a_canary_that_has_no_requests_yet() -> None:
    first = decide(NARROW, [*old(4), *new(1)], None)
    assert (weights(first), left(first)) == ({2: 25, 1: 75}, ["o0"])
    start = decide(NARROW, old(4), None)
    assert (weights(start), left(start), created(start)) == ({2: 0, 1: 100}, [], [2])
    roomy = decide(structs.replace(NARROW, max_surge=2), [*old(4), *new(1)], None)
    assert (weights(roomy), left(roomy), created(roomy)) == ({2: 0, 1: 100}, [], [2])


def test_a_share_grows_with_the_instances_that_are_ready_as_far_as_the_old_ones_must_give_way() -> None:
    last: RolloutStatus | None = None
    shares = []
    for ready in range(6):
        last = status_of(plan(structs.replace(CANARY, steps=(CanaryStep(weight=45),)), last, ready=ready))
        shares.append(last.weight)
    assert shares == [0, 10, 20, 30, 30, 45], "7 old ones may stay beside 5 new ones, and bear 70 %"
    assert status_of(plan(NARROW, last, ready=2)).weight == 45, "what has been given is not taken away on the way"


def test_what_is_on_its_way_to_a_share_is_judged() -> None:
    assert not RolloutStatus(release=2, stable=1, weight=0).judged
    assert RolloutStatus(release=2, stable=1, weight=10).judged


def test_max_unavailable_counts_only_against_what_must_serve() -> None:
    rules = structs.replace(NARROW, max_unavailable=1)
    half = decide(rules, [*old(4), *new(1)], None)
    assert (weights(half), left(half)) == ({2: 0, 1: 100}, ["o0"]), "3 of 4 are enough for all requests"
    rules = structs.replace(rules, steps=(CanaryStep(weight=75),))
    most = decide(rules, [*old(4), *new(1)], None)
    assert (weights(most), left(most)) == ({2: 33, 1: 67}, ["o0", "o1"])
    few = decide(rules, [*old(2), *new(1)], structs.replace(STEP_1, weight=33, since=0.0))
    assert left(few) == [], "2 of 3 bear 67 %"


def test_an_old_instance_on_a_drained_node_waits_for_another_though_a_canary_has_all_of_the_surge() -> None:
    rules = structs.replace(NARROW, steps=(CanaryStep(weight=5, pause=Seconds(60)),))
    there = moving([*old(4), *new(1)], "o0")
    made = decide(rules, there, AT_5)
    assert (left(made), created(made)) == ([], [1]), "one more is made"
    starts = structs.replace(seen("o4", 1), status=None)
    made = decide(rules, [*there, starts], AT_5)
    assert (left(made), created(made)) == ([], []), "but no other beside it"
    made = decide(rules, [*there, seen("o4", 1)], AT_5)
    assert (left(made), created(made)) == (["o0"], [])


def test_an_old_instance_on_a_drained_node_goes_first_where_the_share_has_moved() -> None:
    made = decide(NARROW, moving([*old(4), *new(1)], "o2"), structs.replace(STEP_1, weight=25, since=0.0))
    assert left(made) == ["o2"]


def test_of_a_canary_on_a_drained_node_as_many_stay_as_its_share_needs() -> None:
    there = moving([*old(3), *new(2)], "n0")
    made = decide(NARROW, there, structs.replace(AT_5, weight=50))
    assert (left(made), created(made)) == ([], [2])
    made = decide(NARROW, [*there, seen("n2", 2)], structs.replace(AT_5, weight=50))
    assert (left(made), created(made)) == (["n0"], [])
    alone = decide(NARROW, moving([*old(4), *new(1)], "n0"), AT_5)
    assert left(alone) == ["n0"], "the old ones bear its share meanwhile"


def test_what_has_no_requests_goes_without_a_place_of_what_has() -> None:
    kept = RolloutStatus(release=2, stable=1, strategy=STEP_2.strategy, weight=100, phase=RolloutPhase.PROMOTING, since=NOW - 5)
    there = moving([*old(2), *new(4), seen("n4", 2)], "o0", "o1", "n0")
    assert left(decide(NARROW, there, structs.replace(kept, step=1))) == ["n0", "o0", "o1"]


def test_what_leaves_keeps_its_instances_until_the_old_release_bears_its_share() -> None:
    back = Leaving(release=2, weight=50, until=NOW + 100)
    last = RolloutStatus(release=2, stable=1, strategy=STEP_2.strategy, phase=RolloutPhase.REVERTED, since=NOW - 5, leaving=back)
    for ready, stays in ((2, 2), (3, 1), (4, 0)):
        made = decide(NARROW, [*old(ready), *new(2)], last)
        assert len(left(made)) == 2 - stays
        assert set(left(made)) <= {"n0", "n1"}


def test_what_overtakes_a_canary_relieves_what_leaves_by_the_share_that_it_takes_itself() -> None:
    leaving = Leaving(release=2, weight=30, until=NOW + 100)
    last = RolloutStatus(release=3, stable=1, strategy=STEP_1.strategy, weight=0, leaving=leaving)
    rules: Rollout = structs.replace(CANARY, steps=(CanaryStep(weight=20),))
    made = plan(rules, last, release=3, ready=2, ready_of={1: 8, 2: 3, 3: 2})
    assert status_of(made).weights == {3: 20, 1: 80}


def test_a_canary_that_is_tried_again_while_it_is_taken_back_returns_only_what_the_old_release_bears() -> None:
    back = Leaving(release=2, weight=60, until=NOW + 100)
    last = RolloutStatus(release=2, stable=1, strategy=STEP_1.strategy, phase=RolloutPhase.REVERTED, leaving=back)
    again = RolloutOrder(release=2, attempt=1)
    shares = []
    for ready in (4, 5, 9, 10):
        status = status_of(plan(last=last, order=again, ready=6, ready_of={1: ready, 2: 6}))
        shares.append((status.weight, bool(status.since)))
        assert status.weights == {2: status.weight, 1: 100 - (status.weight or 0)}
    assert shares == [(60, False), (50, False), (10, False), (5, True)]
    late = plan(last=last, order=again, ready=6, ready_of={1: 4, 2: 6}, progressed_at=NOW - 100)
    assert (status_of(late).weight, bool(status_of(late).since)) == (5, True), "not for ever"


def test_what_does_not_serve_makes_way_though_all_that_serves_is_to_leave() -> None:
    rolling = Rollout(max_surge=0, max_unavailable=1, deadline=Seconds(20))
    there = moving([*[seen(f"n{n}", 2) for n in range(3)], seen("o0", 1, ready=False)], "n0", "n1", "n2")
    assert left(decide(rolling, there, None, status={"served_release": 2})) == ["o0"]


def test_a_canary_that_is_tried_again_loses_nothing_of_what_serves() -> None:
    back = Leaving(release=2, weight=75, until=NOW + 100)
    last = RolloutStatus(release=2, stable=1, strategy=STEP_1.strategy, phase=RolloutPhase.REVERTED, leaving=back)
    rules = structs.replace(NARROW, steps=(CanaryStep(weight=25, pause=Seconds(60)),))
    again = RolloutOrder(release=2, attempt=1)
    made = decide(rules, [*old(1), *new(3)], last, order=again)
    assert (weights(made), left(made), created(made)) == ({2: 75, 1: 25}, [], [1])
    made = decide(
        rules, [*old(2), *new(3)], structs.replace(last, attempt=1, phase=RolloutPhase.PROGRESSING, weight=75), order=again
    )
    assert (weights(made), left(made)) == ({2: 50, 1: 50}, ["n0"]), "as the old ones come back, new ones go"
    over = structs.replace(last, leaving=None)
    starts = [seen("o0", 1, ready=False)]
    assert left(decide(rules, [*starts, *new(4)], over, order=again)) == [], "nothing else serves"


def test_a_blue_green_release_that_is_tried_again_serves_until_the_old_one_can() -> None:
    rules = Rollout(strategy=Strategy.BLUE_GREEN, deadline=Seconds(100))
    back = Leaving(release=2, weight=100, until=NOW + 100)
    last = RolloutStatus(release=2, stable=1, strategy=Strategy.BLUE_GREEN, phase=RolloutPhase.REVERTED, leaving=back)
    again = RolloutOrder(release=2, attempt=1)
    down = [seen(f"o{n}", 1, ready=False) for n in range(4)]
    made = decide(rules, [*down, *new(4)], last, order=again)
    assert (weights(made), [id for id in left(made) if id.startswith("n")]) == ({2: 100, 1: 0}, [])
    assert weights(decide(rules, [*old(4), *new(4)], last, order=again)) == {2: 0, 1: 100}
    promoted = structs.replace(again, promoted=True)
    assert weights(decide(rules, [*down, *new(4)], last, order=promoted)) == {2: 100, 1: 0}


def test_who_only_waits_is_not_late_when_an_instance_falls_over_or_more_are_wanted() -> None:
    waits = structs.replace(AT_5, weight=25, since=NOW - 3000)
    rules = structs.replace(NARROW, steps=(CanaryStep(weight=25),))
    long_ago = {"progressed_at": NOW - 3000}
    for there in ([*old(3), seen("n0", 2, ready=False)], moving([*old(3), *new(1)], "n0")):
        made = decide(rules, there, waits, status=long_ago, updated_at=NOW - 3000)
        assert weights(made) == {2: 25, 1: 75}, "it has its time from now on"
    fallen = structs.replace(waits, short_since=NOW - 101)
    made = decide(rules, [*old(3), seen("n0", 2, ready=False)], fallen, status=long_ago, updated_at=NOW - 3000)
    assert weights(made) == {1: 100}, "and no more than that"
    more = plan(rules, waits, wanted=16, ready=1, made=1, progressed_at=NOW - 3000)
    assert (status_of(more).phase, status_of(more).short_since) == (RolloutPhase.WAITING, NOW)
    assert status_of(plan(rules, status_of(more), wanted=16, ready=4, made=4, progressed_at=NOW - 3000)).short_since == 0.0
