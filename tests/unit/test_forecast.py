"""Forecasts of an app's requests: what they learn from its past, what waking is worth, bounds, and the leader that goes by them."""

from __future__ import annotations

import asyncio
import copy
import random

import pytest
from control_cell import Cell, run_virtual
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.model.records import App, Event
from atoll.model.spec import AppSpec, Idle, Port, Scale
from atoll.model.units import Seconds
from atoll.scheduling.forecast import BITS, CELLS, LEAD_S, SILENT_MAX, Forecast, awake_at, worth_it

HOUR = 26_000_000 // 60 * 60
"""A minute of the epoch at which an hour begins."""
DAY = 1_440


def lived(minutes: list[int]) -> Forecast:
    """Return what is known after requests in these minutes, counted from `HOUR`."""
    forecast = Forecast()
    for minute in minutes:
        forecast.note(HOUR + minute)
    return forecast


def chances(forecast: Forecast, until: int) -> list[float]:
    """Return the chance in each minute from the next on, while nothing comes."""
    found = []
    for minute in range(forecast._minute + 1, HOUR + until):
        forecast.advance(minute)
        found.append(forecast.chance())
    return found


def test_an_app_that_is_asked_every_half_hour_is_expected_then_and_not_before() -> None:
    found = chances(lived(list(range(0, 600, 30))), 570 + 31)
    assert found[-1] > 0.5
    assert max(found[5:-1]) < found[-1] / 5


def test_an_app_that_is_asked_again_and_again_is_expected_in_the_next_minute() -> None:
    assert chances(lived(list(range(300))), 301)[0] > 0.9


def test_one_request_long_ago_is_no_reason_to_wait() -> None:
    found = chances(lived([0]), 600)
    assert all(0 < chance < 0.5 for chance in found)
    assert max(found[60:]) < 0.01


def test_before_the_first_request_nothing_is_expected_and_afterwards_what_goes_on_is_certain() -> None:
    forecast = Forecast()
    forecast.advance(HOUR)
    assert (forecast.chance(), forecast.chance(1), forecast.seen) == (0.0, 0.0, 0)
    forecast.note(HOUR)
    assert forecast.chance() == 1.0
    assert 0 < forecast.chance(1) < 1


def test_what_came_at_the_same_time_of_three_days_is_expected_on_the_fourth() -> None:
    start = 9 * 60
    days = [day * DAY + start for day in range(6)]
    found = chances(lived(days), 6 * DAY + start + 1)
    assert found[-1] > 0.15
    assert max(found[60:-30]) < 0.05
    assert max(chances(lived(days[:1]), DAY + start + 1)[60:]) < 0.05, "once is no habit"


def test_looking_ahead_says_what_the_next_minute_says_when_nothing_comes() -> None:
    forecast = lived([0, 7, 9, 15, 22, 30, 31, 33])
    for minute in range(34, 120):
        forecast.advance(HOUR + minute)
        ahead = forecast.chance(1)
        forecast.advance(HOUR + minute + 1)
        assert forecast.chance() == pytest.approx(ahead, rel=0.3), "but for what the quiet minute itself has taught"


def test_a_clock_that_is_set_back_and_one_that_leaps_forward_break_nothing() -> None:
    forecast = lived(list(range(0, 100, 5)))
    before = forecast.chance(1)
    forecast.advance(HOUR)
    forecast.note(HOUR - DAY)
    assert forecast.chance() == 1.0, "a request counts for the minute that goes on"
    assert 0 < before < 1
    forecast.advance(HOUR + 100_000_000)
    assert 0 <= forecast.chance() < 0.01
    assert forecast._bits == 0
    forecast.note(HOUR + 100_000_001)
    assert forecast.chance() == 1.0


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.one_of(st.integers(-5, 90), st.just(BITS), st.just(SILENT_MAX + 7)), st.booleans()), max_size=8),
)
def test_whatever_comes_chances_are_chances_and_what_is_kept_is_bounded(story: list[tuple[int, bool]]) -> None:
    forecast, minute = Forecast(), HOUR
    for step, asked in story:
        minute += step
        (forecast.note if asked else forecast.advance)(minute)
        assert 0.0 <= forecast.chance() <= 1.0
        assert 0.0 <= forecast.chance(1) <= 1.0
        assert forecast._bits.bit_length() <= BITS
        assert len(forecast._counts) == len(forecast._shares) == CELLS


@pytest.mark.parametrize(
    ("chance", "cold_start_s", "worth"),
    [(0.0, 1e9, False), (1.0, 31.0, True), (1.0, 29.0, False), (0.1, 571.0, True), (0.1, 569.0, False)],
)
def test_an_idle_minute_is_worth_it_where_it_costs_less_than_the_cold_starts_that_it_saves(
    chance: float, cold_start_s: float, worth: bool
) -> None:
    assert worth_it(chance, cold_start_s) is worth


def test_the_more_a_cold_start_is_worth_the_longer_an_app_is_awake() -> None:
    draw = random.Random(3)
    forecasts = [lived(sorted(draw.sample(range(1_000), 40))) for _ in range(20)]
    spent = []
    for cold_start_s in (600.0, 1_800.0, 7_200.0):
        each = [chance for forecast in forecasts for chance in chances(copy.deepcopy(forecast), 1_200)]
        spent.append(sum(worth_it(chance, cold_start_s) for chance in each))
    assert 0 < spent[0] < spent[1] < spent[2] < len(each)


def test_it_is_asked_again_when_it_may_answer_otherwise() -> None:
    forecast = lived(list(range(0, 600, 30)))
    at = (HOUR + 599) * 60.0
    assert awake_at(forecast, at, 300.0) == (False, at + 60 - LEAD_S)
    assert awake_at(forecast, at + 60 - LEAD_S, 300.0) == (True, at + 60), "woken ahead of the minute"
    assert awake_at(forecast, at + 60, 300.0) == (True, at + 120)
    assert awake_at(forecast, at + 300, 300.0)[0] is False


class Foreseen(Cell):
    """A cell with an app that sleeps by what is expected of it, asked for a moment at times; an ingress says so every 2 s."""

    async def begin(self, scale: Scale) -> App:
        await self.add_node("n")
        await self.add_ingress("g")
        self.agents()
        self.keep(asyncio.ensure_future(self._say()))
        self.lead()
        return await self.deploy(AppSpec(name="web", image="x", ports=(Port(port=80),), scale=scale), replicas=0)

    async def _say(self) -> None:
        while True:
            if "g" not in self.silent:
                self.demand.heard["g"] = self.clock.monotonic()
            await asyncio.sleep(2.0)

    def ask(self) -> bool:
        """A request comes; return whether it finds an instance."""
        self.demand.last["default/web"] = self.clock.monotonic()
        self.demand.forecasts.setdefault("default/web", Forecast()).note(int(self.clock.now() // 60))
        warm = self.ready() > 0
        self.demand.changed("default/web")
        return warm

    def told(self, code: str) -> list[str]:
        return [held.record.message for held in self.state.records(Event).values() if held.record.code == code]


def test_an_app_with_a_habit_is_awake_when_it_is_asked_and_asleep_between() -> None:
    async def story() -> None:
        async with Foreseen() as cell:
            await cell.begin(Scale(replicas=0, max=1, idle=Idle.PREDICT, idle_after=Seconds(120)))
            await cell.until(lambda: cell.ready() == 1)
            await asyncio.sleep(600 - cell.clock.now() % 600 + 5)  # five seconds past
            warm = []
            for _ in range(12):
                warm.append(cell.ask())
                await asyncio.sleep(360)
                assert not cell.instances()
                await asyncio.sleep(240)
            assert warm[0] is False
            assert all(warm[-4:])
            assert "woken: a request is expected" in cell.told("app-woken")
            assert "sleeps: no request is expected soon enough" in cell.told("app-asleep")

    run_virtual(story())


def test_without_a_past_it_sleeps_as_one_that_does_not_foresee_and_a_silent_ingress_keeps_it_awake() -> None:
    async def story() -> None:
        async with Foreseen() as cell:
            await cell.begin(Scale(replicas=0, max=1, idle=Idle.PREDICT, idle_after=Seconds(60)))
            await cell.until(lambda: cell.ready() == 1)
            await asyncio.sleep(50)
            assert cell.ready() == 1
            await cell.until(lambda: not cell.instances(), within_s=20)
            cell.ask()
            await cell.until(lambda: cell.ready() == 1)
            cell.silent.add("g")
            await asyncio.sleep(3_000)
            assert cell.ready() == 1, "nobody knows what it has to do"
            cell.silent.discard("g")
            await cell.until(lambda: not cell.instances(), within_s=200)

    run_virtual(story())
