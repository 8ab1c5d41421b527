"""How many instances requests ask for: the rule with its two windows as a table and as stories, averages from what ingresses say,
and the whole loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from control_cell import Cell, run_virtual
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from test_control_layouts import ask, by_site, web, world

from atoll.control.autoscale import ROUNDING
from atoll.control.loads import POINTS, Track
from atoll.control.optimiser import QuickOptimiser
from atoll.control.pressure import DECIDE_S, Pressure, PressureFacts, PressureMemory, decide_pressure
from atoll.control.sleeping import FRESH_S
from atoll.model.records import App, Event, Instance
from atoll.model.spec import AppSpec, Port, Scale, ScaleWindow
from atoll.model.states import Desired
from atoll.model.traffic import Load
from atoll.model.units import Seconds

STABLE_S = 60.0
PANIC_S = 6.0


def facts(current: int, stable: float, panic: float | None = None, **more: Any) -> PressureFacts:
    asked = Pressure(name="requests under way", target=10.0, stable=stable, panic=stable if panic is None else panic)
    usual: dict[str, Any] = {"pressures": (asked,), "most": 100, "ready": current, "stable_s": STABLE_S, "known": True}
    return PressureFacts(current=current, **usual | more)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (facts(1, 0), 0),
        (facts(1, 10), 1),
        (facts(1, 10.1), 2),
        (facts(4, 30), 3),
        (facts(3, 30.0000000001), 3),
        (facts(8, 5), 4),  # at most half of what is ready goes at once
        (facts(8, 5, ready=2), 1),
        (facts(1, 500, most=7), 7),
        # The short window counts from twice of what is ready on,
        (facts(2, 15, 39), 4),
        (facts(2, 15, 30), 2),
        (facts(2, 25, 90), 9),
        # and what starts is not ready.
        (facts(2, 15, 20, ready=1), 2),
        (facts(1, 12, 200, ready=0), 20),
        # What nobody knows takes nothing away, and is no reason not to add.
        (facts(5, 0, known=False), 5),
        (facts(5, 70, known=False), 7),
        (facts(5, 0, pressures=()), 2),
    ],
)
def test_as_many_are_needed_as_bring_the_averages_to_the_target(given: PressureFacts, count: int) -> None:
    assert decide_pressure(given, PressureMemory(), 0.0)[0].count == count


def test_of_two_things_that_requests_are_measured_by_the_larger_counts() -> None:
    rate = Pressure(name="requests a second", target=100.0, stable=450.0, panic=450.0)
    both = facts(3, 20, pressures=(*facts(3, 20).pressures, rate), ready=9)
    need, _ = decide_pressure(both, PressureMemory(), 0.0)
    assert (need.count, need.cause.text) == (5, "450 requests a second on average over 60 s, target 100 each")


class Run:
    """Decisions one after the other; what is wanted is ready at once."""

    def __init__(self, current: int = 1) -> None:
        self.current = current
        self.memory = PressureMemory()

    def at(self, now: float, stable: float, panic: float) -> int:
        need, self.memory = decide_pressure(facts(self.current, stable, panic), self.memory, now)
        self.current = max(1, need.count)
        return self.current


def test_in_panic_nothing_is_taken_away_until_a_whole_stable_window_has_been_without_it() -> None:
    run = Run(1)
    assert run.at(0, 5, 100) == 10
    assert [run.at(at, 5, 0) for at in (2, 30, 60)] == [10, 10, 10]
    assert run.at(61, 5, 0) == 5, "half of what is ready"
    assert run.at(61 + DECIDE_S / 2, 5, 0) == 5
    assert [run.at(61 + DECIDE_S * times, 5, 0) for times in (1, 2, 3)] == [2, 1, 1]


def test_more_panic_begins_the_time_anew_and_the_most_of_it_stays() -> None:
    run = Run(1)
    assert run.at(0, 5, 50) == 5
    assert run.at(50, 5, 150) == 15
    assert [run.at(at, 5, 40) for at in (70, 110)] == [15, 15]
    assert run.at(111, 5, 40) == 7


@given(
    st.lists(st.tuples(st.floats(0.1, 40), st.floats(0, 400), st.floats(0, 400), st.booleans()), min_size=1, max_size=80),
    st.integers(1, 30),
)
def test_whatever_comes_it_asks_for_enough_and_takes_nothing_in_panic(
    story: list[tuple[float, float, float, bool]], most: int
) -> None:
    memory, current, now = PressureMemory(), 1, 0.0
    for wait, stable, panic, known in story:
        now += wait
        need, memory = decide_pressure(facts(current, stable, panic, most=most, known=known), memory, now)
        assert min(most, stable / 10 - ROUNDING) <= need.count <= max(most, current)
        if memory.panic_at is not None or not known:
            assert need.count >= current
        if need.count < current:
            assert need.count >= current // 2
        current = max(1, min(most, need.count))


def load(at: float, *, rps: float, concurrency: float, started: float = 0.0) -> Load:
    return Load(started, at, int(at * rps), at * concurrency)


def test_means_are_of_the_window_that_is_asked_for_and_bounded_in_what_they_keep() -> None:
    track = Track(load(0, rps=0, concurrency=0), STABLE_S, 0.0)
    assert track.means(STABLE_S) is None
    spent = requests = 0.0
    for at in range(1, 1001):
        busy = at > 994
        spent, requests = spent + (30 if busy else 2), requests + (100 if busy else 10)
        track.add(Load(0.0, float(at), int(requests), spent), float(at))
        assert len(track._points) <= POINTS + 2
    panic, stable = track.means(PANIC_S), track.means(STABLE_S)
    assert panic is not None
    assert stable is not None
    assert (panic.concurrency, panic.rps) == (30, 100)
    assert stable.concurrency == pytest.approx((54 * 2 + 6 * 30) / 60)
    assert track.covered


def test_an_ingress_that_has_begun_anew_is_watched_anew() -> None:
    track = Track(load(0, rps=5, concurrency=3), STABLE_S, 0.0)
    track.add(load(100, rps=5, concurrency=3), 100.0)
    assert track.covered
    track.add(load(1, rps=5, concurrency=3, started=101.0), 101.0)
    assert (track.covered, track.means(STABLE_S)) == (False, None)
    track.add(load(3, rps=5, concurrency=3, started=101.0), 103.0)
    means = track.means(STABLE_S)
    assert means is not None
    assert means.concurrency == 3


class Busy(Cell):
    """A cell with ingresses that say how many requests are under way, and an app that scales by it."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way = 0.0
        self._spent = 0.0

    async def begin(self, scale: Scale) -> App:
        for name in ("n1", "n2"):
            await self.add_node(name)
        await self.add_ingress("g")
        self.agents()
        self.keep(asyncio.ensure_future(self._say()))
        self.lead()
        spec = AppSpec(name="web", image="x", ports=(Port(port=80),), scale=scale)
        return await self.deploy(spec, replicas=scale.replicas)

    async def _say(self) -> None:
        while True:
            await asyncio.sleep(2.0)
            self._spent += 2.0 * self.under_way
            now = self.clock.monotonic()
            if "g" not in self.silent:
                self.demand.heard["g"] = now
                self.demand.loads["g"] = {"default/web": Load(1.0, now, int(10 * self._spent), self._spent)}
                if self.under_way:
                    self.demand.last["default/web"] = now

    def wanted(self) -> int | None:
        status = self.app_status()
        return status.scaled if status is not None else None

    def events(self, code: str) -> list[Event]:
        found = [held.record for held in self.state.records(Event).values() if held.record.code == code]
        return sorted(found, key=lambda event: event.id)


BY_CONCURRENCY = Scale(replicas=1, max=8, concurrency=10)


def test_an_app_grows_with_its_requests_within_the_panic_window_and_shrinks_after_the_stable_one() -> None:
    async def story() -> None:
        async with Busy() as cell:
            await cell.begin(BY_CONCURRENCY)
            await cell.until(lambda: cell.ready() == 1)
            await asyncio.sleep(100)
            assert cell.wanted() == 1
            cell.under_way = 50.0
            before = cell.clock.monotonic()
            await cell.until(lambda: cell.ready() == 5, within_s=12)
            assert cell.clock.monotonic() - before < 10
            (first, *_) = cell.events("scaled-up")
            assert "requests under way on average over 6 s, target 10 each" in first.message
            assert first.data["metric"] == "requests under way"
            cell.under_way = 5.0
            before = cell.clock.monotonic()
            await cell.until(lambda: cell.wanted() == 1 and len(cell.instances()) == 1, within_s=200)
            assert cell.clock.monotonic() - before > STABLE_S - 3
            assert await cell.quiet(30) == 0, "and then nothing is written"

    run_virtual(story())


def test_while_an_ingress_is_silent_or_has_not_been_watched_for_a_window_nothing_is_taken_away() -> None:
    async def story() -> None:
        async with Busy() as cell:
            await cell.begin(BY_CONCURRENCY)
            cell.under_way = 40.0
            await cell.until(lambda: cell.ready() == 4)
            await asyncio.sleep(100)
            cell.silent.add("g")
            cell.under_way = 1.0
            await asyncio.sleep(300 + FRESH_S)
            assert cell.wanted() == 4
            cell.stop_leading()
            cell.silent.discard("g")
            cell.demand.loads.clear()  # another server has heard nothing before
            cell.lead("another")
            await asyncio.sleep(STABLE_S - 10)
            assert cell.wanted() == 4
            await cell.until(lambda: cell.wanted() == 1, within_s=100)

    run_virtual(story())


def test_what_goes_is_told_to_drain_and_waits_for_its_requests() -> None:
    async def story() -> None:
        async with Busy() as cell:
            await cell.begin(BY_CONCURRENCY)
            cell.under_way = 30.0
            await cell.until(lambda: cell.ready() == 3)
            await asyncio.sleep(100)
            cut: list[str] = []
            seen: dict[str, set[Desired]] = {}

            def watch() -> None:
                for one in cell.instances():
                    seen.setdefault(one.id, set()).add(one.desired)
                    if one.desired is Desired.STOP and Desired.DRAIN not in seen[one.id]:
                        cut.append(one.id)

            cell.watchers.append(watch)
            cell.under_way = 0.0
            await cell.until(lambda: len(cell.instances()) == 1, within_s=300)
            assert (cut, sum(Desired.DRAIN in each for each in seen.values())) == ([], 2)

    run_virtual(story())


def test_an_app_that_sleeps_grows_by_its_requests_while_it_is_awake_and_goes_back_to_sleep() -> None:
    async def story() -> None:
        async with Busy() as cell:
            await cell.begin(Scale(replicas=0, max=4, rps=100, idle_after=Seconds(30)))
            await cell.until(lambda: cell.ready() == 1)
            await cell.until(lambda: not cell.instances())
            cell.under_way = 35.0  # 350 a second
            await cell.until(lambda: cell.ready() == 4)
            cell.under_way = 0.0
            await cell.until(lambda: not cell.instances(), within_s=200)
            assert cell.codes().count("app-asleep") == 2

    run_virtual(story())


def test_processor_and_memory_count_as_shares_of_what_an_instance_may_use() -> None:
    async def story() -> None:
        async with Busy() as cell:
            work = {"milli": 300, "memory": 64 << 20}

            def uses(instance: Instance) -> dict[str, int]:
                return {"cpu_milli": work["milli"] // max(1, cell.ready()), "memory_bytes": work["memory"]}

            cell.uses = uses
            await cell.begin(Scale(replicas=1, max=6, cpu=0.5, memory=0.75, down=Seconds(30)))  # of 0.1 cores and 128 MiB
            await cell.until(lambda: cell.ready() == 6, within_s=60)
            assert any("cpu is 3 over 1 instance, target 0.5 each" in event.message for event in cell.events("scaled-up"))
            work["milli"] = 100
            await cell.until(lambda: cell.ready() == 4, within_s=100)  # its memory, which does not shrink, asks for so many
            work["memory"] = 10 << 20
            await cell.until(lambda: cell.ready() == 2, within_s=100)

    run_virtual(story())


def test_in_a_window_of_its_schedule_an_app_has_at_least_so_many_and_sleeps_after_it() -> None:
    async def story() -> None:
        async with Busy() as cell:
            # It is 13:46:40 UTC when the clock starts.
            window = ScaleWindow(start="50 13 * * *", end="55 13 * * *", replicas=3)
            scale = Scale(replicas=0, max=5, windows=(window,), idle_after=Seconds(30))
            await cell.begin(scale)
            await cell.until(lambda: cell.ready() == 1)
            await cell.until(lambda: not cell.instances(), within_s=100)
            await cell.until(lambda: cell.ready() == 3, within_s=200)
            assert cell.clock.now() % 86_400 // 60 == 13 * 60 + 50
            await cell.until(lambda: not cell.instances(), within_s=500)
            assert cell.clock.now() % 86_400 // 60 >= 13 * 60 + 55

    run_virtual(story())


def test_what_is_added_near_users_goes_to_the_site_where_their_requests_come_in() -> None:
    async def story() -> None:
        async with Cell() as cell:
            cell.optimiser = QuickOptimiser()  # what is added goes by the quick way, whatever moves later
            ask(cell, ams=90.0, sin=10.0)
            await world(cell)
            await cell.deploy(replace(web(), scale=Scale(replicas=2, max=6, rps=50)), replicas=2)
            await cell.until(lambda: cell.ready() == 2)
            await asyncio.sleep(60)
            ask(cell, ams=15.0, sin=170.0)

            async def say() -> None:
                while True:
                    await asyncio.sleep(2.0)
                    now = cell.clock.monotonic()
                    for site, rate in (("ams", 15), ("iad", 0), ("sin", 170)):
                        cell.demand.loads[site] = {"default/web": Load(1.0, now, int(rate * now), 0.0)}

            before = by_site(cell)
            cell.keep(asyncio.ensure_future(say()))
            await cell.until(lambda: cell.ready() == 4, within_s=100)
            assert by_site(cell).get("sin", 0) == before.get("sin", 0) + 2

    run_virtual(story())
