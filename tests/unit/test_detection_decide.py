"""The pure parts of failure detection: one node, one process's own time, the brake, places."""

from __future__ import annotations

from typing import Any

import pytest

from atoll.control.detection import brake as brakes
from atoll.control.detection.awake import STEP_MAX_S, AwakeClock
from atoll.control.detection.brake import Brake
from atoll.control.detection.decide import Asked, Believe, Clear, Denied, Looked, Probe, Standing, Watch, decide
from atoll.control.detection.places import dark
from atoll.control.detection.rules import TICK_S, Rules

RULES = Rules()


def live(
    heard_at: float, until: float, *, helpers: int = 3, denials: bool = True, others: float | None = 0.0
) -> tuple[Watch, list]:
    """Look at one node every tick from its last sign on; return the watch, and when each action came. `others` is how long ago
    somebody else was heard at each look."""
    watch, came = Watch(), []
    for step in range(int((until - heard_at) / TICK_S) + 1):
        now = heard_at + step * TICK_S
        watch, actions = decide(RULES, watch, Looked(heard_at, None if others is None else now - others), now)
        for action in actions:
            came.append((round(now - heard_at, 1), type(action)))
            if isinstance(action, Probe):
                watch, _ = decide(RULES, watch, Asked(helpers), now)
                if denials and helpers:
                    watch, _ = decide(RULES, watch, Denied(), now)
    return watch, came


def when(came: list, kind: type[Any]) -> list[float]:
    return [at for at, what in came if what is kind]


def test_a_silent_node_is_asked_and_then_believed() -> None:
    watch, came = live(100.0, 106.0)
    assert watch.standing is Standing.SILENT
    assert when(came, Probe)[0] == pytest.approx(RULES.suspect_s, abs=TICK_S)
    assert when(came, Believe) == pytest.approx([RULES.silent_s], abs=2 * TICK_S)
    assert sum(at < RULES.silent_s for at in when(came, Probe)) >= RULES.rounds_min


def test_a_pause_of_three_seconds_is_no_death() -> None:
    watch, came = live(100.0, 103.0 + 0.5 + 0.5)
    assert watch.standing is Standing.SUSPECT
    watch, actions = decide(RULES, watch, Looked(104.0, 104.0), 104.0)
    assert (watch, actions) == (Watch(), (Clear(Standing.SUSPECT),))
    assert not when(came, Believe)


@pytest.mark.parametrize("others", [None, RULES.others_s + 0.1])
def test_who_hears_nobody_at_all_believes_nothing_of_the_others(others: float | None) -> None:
    watch, came = live(100.0, 130.0, others=others)
    assert watch.standing is Standing.SUSPECT
    assert not when(came, Believe)


def test_without_a_helpers_word_one_waits_a_little_longer() -> None:
    _, came = live(100.0, 106.0, denials=False)
    assert when(came, Believe) == pytest.approx([RULES.silent_s + RULES.denials_wait_s], abs=2 * TICK_S)
    _, came = live(100.0, 106.0, helpers=0)
    assert when(came, Believe) == pytest.approx([RULES.silent_s], abs=2 * TICK_S)


def test_a_leader_that_has_just_begun_asks_before_it_believes() -> None:
    watch, rounds = Watch(), 0
    for step in range(100):
        now = 100.0 + step * TICK_S
        watch, actions = decide(RULES, watch, Looked(0.0, now), now)
        for action in actions:
            if isinstance(action, Probe):
                rounds += 1
                watch, _ = decide(RULES, watch, Asked(0), now)
            if isinstance(action, Believe):
                assert rounds >= RULES.rounds_min
                return
    pytest.fail("never believed")


def test_one_that_is_believed_silent_is_asked_seldom_and_is_back_at_any_sign() -> None:
    watch, came = live(100.0, 130.0)
    assert len([at for at in when(came, Probe) if at > 6]) == pytest.approx(24 / RULES.probe_silent_every_s, abs=1)
    watch, actions = decide(RULES, watch, Looked(130.0, 130.0), 130.1)
    assert (watch, actions) == (Watch(), (Clear(Standing.SILENT),))


def test_the_awake_clock_does_not_count_a_pause() -> None:
    clock = AwakeClock(10.0)
    for step in range(1, 11):
        clock.tick(10.0 + step * TICK_S)
    assert clock.now() == pytest.approx(1.0)
    clock.tick(14.0)
    assert clock.now() == pytest.approx(1.0 + STEP_MAX_S)
    assert clock.paused_s == pytest.approx(3.0 - STEP_MAX_S)
    clock.tick(13.0)
    assert clock.now() == pytest.approx(1.0 + STEP_MAX_S), "and never goes back"


def look(brake: Brake, silent: int, nodes: int, now: float, *, released: bool = False) -> Brake:
    return brakes.look(brake, silent=silent, nodes=nodes, released=released, now=now)


@pytest.mark.parametrize(("nodes", "most"), [(1, 2), (3, 2), (10, 2), (20, 4), (100, 20), (5_000, 1_000)])
def test_one_more_than_a_fifth_puts_the_brake_on(nodes: int, most: int) -> None:
    assert look(Brake(), most, nodes, 1.0).on_since is None
    on = look(Brake(), most + 1, nodes, 1.0)
    assert on.on_since == 1.0
    assert brakes.take(on) == (on, False)


def test_the_brake_lets_go_when_enough_answer_an_operator_says_so_or_time_is_up() -> None:
    on = look(Brake(), 50, 100, 1.0)
    assert look(on, 20, 100, 2.0).on_since is None
    released = look(on, 50, 100, 2.0, released=True)
    assert released.on_since is None
    assert look(released, 50, 100, 3.0).on_since is None, "and does not come on again for the same"
    assert look(on, 50, 100, brakes.HOLD_S).on_since == 1.0
    assert look(on, 50, 100, 1.0 + brakes.HOLD_S).on_since is None
    over = look(released, 0, 100, 4.0)
    assert look(over, 50, 100, 5.0).on_since == 5.0, "the next time is another"


def test_nodes_are_given_up_no_faster_than_the_rate() -> None:
    brake, given_up = Brake(), 0
    for step in range(101):
        brake = look(brake, 20, 100, 1_000.0 + step / 10)
        may = True
        while may:
            brake, may = brakes.take(brake)
            given_up += may
    assert given_up == pytest.approx(100 * brakes.BURST_SHARE + 10.0 * 100 * brakes.RATE_SHARE, abs=1)


def test_a_node_a_site_and_a_region_are_told_apart() -> None:
    def nodes(*silent: str) -> list[tuple[str, str, bool]]:
        fleet = {
            "a1": ("a", "r"),
            "a2": ("a", "r"),
            "b1": ("b", "r"),
            "b2": ("b", "r"),
            "c1": ("c", "q"),
            "d1": ("d", "q"),
            "d2": ("d", "q"),
        }
        return [(*place, name in silent) for name, place in fleet.items()]

    assert dark(nodes("a1")) == frozenset()
    assert dark(nodes("c1")) == frozenset(), "a site of one node is that node"
    assert dark(nodes("a1", "a2", "b1")) == {("site", "a")}
    assert dark(nodes("a1", "a2", "b1", "b2")) == {("region", "r")}
    assert dark(nodes("d1", "d2")) == {("site", "d")}
    assert dark(nodes("c1", "d1", "d2")) == {("region", "q")}
