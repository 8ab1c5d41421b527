"""The simulation of `bench autoscale` against a day gone through second by second with the leader's own rules."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from bench.autoscale import run
from bench.autoscale_policies import EPOCH_MINUTE, Outcome, fixed, foresee, foreseeing, hybrid, knative_window_s, total
from bench.autoscale_trace import DAY_S, App, halves, read_trace

from atoll.scheduling.forecast import LINGER_S, Forecast, awake_at


def app(*begins: float, lasts: float = 2.0) -> App:
    return App("00000000", len(begins), [(begin, begin + lasts) for begin in begins])


def second_by_second(one: App, cold_start_s: float) -> tuple[int, float]:
    """Return how often a request found it asleep, and how long it was awake for nothing."""
    forecast, cold, idle, busy_at = Forecast(), 0, 0, -1_000
    busy = {second for begin, end in one.busy for second in range(int(begin), int(end))}
    begins = {int(begin) for begin, _ in one.busy}
    for second in range(int(DAY_S)):
        now = EPOCH_MINUTE * 60.0 + second
        awake = (forecast.seen > 0 or busy_at >= 0) and awake_at(forecast, now, cold_start_s)[0]
        awake = awake or second - busy_at <= LINGER_S
        if second in busy:
            cold += second in begins and not awake
            forecast.note(int(now // 60))
            busy_at = second
        else:
            idle += awake
    return cold, idle


@pytest.mark.parametrize("cold_start_s", [60.0, 600.0])
def test_the_simulation_says_what_the_leader_s_rules_would_do(cold_start_s: float) -> None:
    draw = random.Random(5)
    habit = [minute * 60 + 20 for minute in range(0, 1_440, 15)]
    chance = [draw.randrange(int(DAY_S) // 10) * 10 + 4 for _ in range(60)]
    one = app(*sorted({*map(float, habit), *map(float, chance)}))
    cold, idle = second_by_second(one, cold_start_s)
    found = foreseeing(foresee(one), cold_start_s)
    assert found.cold == cold
    assert found.idle_s == pytest.approx(idle, rel=0.02)


def test_a_fixed_window_costs_what_it_says() -> None:
    assert fixed(app(10, 100, 1_000), 60) == Outcome(3, 60 * 3, 1.0)
    assert fixed(app(10, 100, 1_000), 600) == Outcome(2, 88 + 600 * 2, 2 / 3)


def test_knative_s_rule_lets_go_when_its_stable_window_is_empty() -> None:
    assert knative_window_s(100, 60) == 60
    assert knative_window_s(1, 60) == 60
    assert knative_window_s(100, 300) == 300


def test_the_hybrid_histogram_unloads_what_is_asked_for_regularly_and_keeps_what_it_does_not_know() -> None:
    regular = app(*(float(600 * each) for each in range(144)))
    found = hybrid(regular, 240)
    assert found.cold == 1
    assert found.idle_s < 0.5 * fixed(regular, 14_400).idle_s
    assert hybrid(app(10), 240) == Outcome(1, 14_400, 1.0)


def test_outcomes_add_up_and_the_record_is_halved_by_name() -> None:
    assert total([Outcome(1, 5.0, 0.5), Outcome(3, 7.0, 0.1, 2)]) == Outcome(4, 12.0, 0.3, 2)
    apps = [App(f"0000000{digit}", 1, [(0.0, 1.0)]) for digit in "0123"]
    assert [[each.name[-1] for each in half] for half in halves(apps)] == [["0", "2"], ["1", "3"]]


def test_counts_by_minute_become_times_in_their_minutes_the_same_for_a_seed(tmp_path: Path) -> None:
    (tmp_path / "1000_run.csv").write_text("HashFunction,percentile_Average_50\na,500\n")
    counts = ["0"] * 1_440
    counts[3], counts[700] = "2", "1"
    head = "HashFunction,HashApp,HashOwner," + ",".join(f"minute_{at}" for at in range(1, 1_441))
    (tmp_path / "1000_inv.csv").write_text(f"{head}\na,a,a,{','.join(counts)}\nb,b,b,{','.join(['0'] * 1_440)}\n")
    (one,) = read_trace(tmp_path, 1)
    assert (one.name, one.requests) == ("a", 3)
    assert [int(begin // 60) for begin, _ in one.busy][-1] == 700
    assert all(3 <= begin // 60 <= 3 for begin, _ in one.busy[:-1])
    assert read_trace(tmp_path, 1) == [one]
    assert read_trace(tmp_path, 2) != [one]


def test_without_the_record_it_says_what_is_missing(tmp_path: Path) -> None:
    (row,) = run(["--data", str(tmp_path / "none")]).results
    assert row.ours is None
    assert "1000_run.csv" in (row.why or "")
