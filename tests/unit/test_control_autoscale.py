"""How many instances a metric asks for: single decisions as tables, runs of them, and the whole loop with heartbeats."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from control_cell import Cell, run_virtual
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from atoll.control.autoscale import STEP_COUNT, STEP_S, Memory, ScaleFacts, Signal, decide_scale
from atoll.control.readings import FRESH_S
from atoll.model.records import Event, Instance
from atoll.model.spec import AppSpec, Metrics, Port, Resources, Scale
from atoll.model.units import Bytes, Seconds

DOWN_S = 60.0
SCALE = Scale(replicas=1, max=6, metric="depth", target=10, down=Seconds(DOWN_S))
WEB = AppSpec(name="web", image="x", ports=(Port(port=80),), metrics=Metrics(), scale=SCALE)


def facts(current: int, *readings: float, target: float = 10.0, ready: int | None = None, **more: Any) -> ScaleFacts:
    usual: dict[str, Any] = {"least": 1, "most": 100, "down_s": DOWN_S, "current": current}
    there = max(current, len(readings)) if ready is None else ready
    return ScaleFacts(signals=(Signal(name="depth", target=target, ready=there, readings=readings),), **usual | more)


def settled(given: ScaleFacts) -> int:
    """Return what is wanted once the same readings have come for longer than `down_s`, in one step."""
    memory = decide_scale(given, Memory(), 0.0).memory
    return decide_scale(given, memory, DOWN_S).wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (facts(1, 10), 1),
        (facts(1, 11), 1),  # within the tolerance
        (facts(1, 11.5), 2),
        (facts(2, 15, 14), 3),
        (facts(4, 0, 40, 0, 9.9), 5),  # the sum counts, whoever has it
        (facts(4, 9, 9, 9, 9.1), 4),  # within the tolerance
        (facts(4, 9, 9, 9, 2), 3),
        (facts(4, 0, 0, 0, 0), 1),
        (facts(3, -5, -5, -5), 1),
        (facts(5, 0.1, 0.1, 0.1, 0.1, 0.4, target=0.1), 8),  # exactly eight, whatever floating point says
        # Without a reading: idle where more would be wanted,
        (facts(4, 30), 4),
        (facts(4, 50), 5),
        # exactly busy enough where fewer would.
        (facts(4, 0, 0), 2),
        (facts(4, 1, 0, 0), 2),
        (facts(4), 4),
        # Who is not ready yet, or has no place, says nothing.
        (facts(4, 6, 6, ready=2), 2),
        (facts(4, 6, 16, ready=2), 3),
        (facts(4, ready=0), 4),
        # Bounds.
        (facts(4, 900, most=6), 6),
        (facts(4, 1e308, 1e308, most=6), 6),
        (facts(4, 0, 0, 0, 0, least=3), 3),
        (facts(4, least=6), 6),
        (facts(9, most=6), 6),
        (facts(3, 9, 9, 9, 9, 9), 5),  # others than those wanted, as in a rollout, serve too
    ],
)
def test_as_many_are_wanted_as_make_the_metric_at_most_the_target_for_each(given: ScaleFacts, wanted: int) -> None:
    assert settled(given) == wanted


class Run:
    """Decisions one after the other, each from what the one before left."""

    def __init__(self, current: int = 1, **more: Any) -> None:
        self.current = current
        self.more = more
        self.memory = Memory()

    def at(self, now: float, value: float | None) -> int:
        readings = () if value is None else (value / self.current,) * self.current
        choice = decide_scale(facts(self.current, *readings, **self.more), self.memory, now)
        self.current, self.memory = choice.wanted, choice.memory
        return self.current


def test_more_are_wanted_at_once_in_steps_of_twice_as_many_or_four_more() -> None:
    run = Run(1)
    assert run.at(0, 1000) == 1 + STEP_COUNT
    assert run.at(5, 1000) == 1 + STEP_COUNT, "one step at a time"
    assert run.at(STEP_S, 1000) == 2 * (1 + STEP_COUNT)
    assert run.at(2 * STEP_S, 1000) == 20
    assert run.at(2 * STEP_S + 1, 1000) == 20
    quick = Run(1)
    assert [quick.at(0, 20), quick.at(1, 40), quick.at(2, 60)] == [2, 4, 5], "a step counts from where it began"


def test_fewer_are_wanted_only_after_fewer_were_enough_for_the_whole_window() -> None:
    run = Run(8)
    assert [run.at(at, 20) for at in (0, 5, 30, 59)] == [8, 8, 8, 8]
    assert run.at(60, 50) == 5, "the most of the window, not the last"
    assert run.at(61, 20) == 5
    assert run.at(119, 20) == 5
    assert run.at(121, 20) == 2
    assert Run(8, down_s=0.0).at(0, 20) == 2


def test_a_burst_begins_the_window_anew() -> None:
    run = Run(4)
    assert [run.at(at, 10) for at in (0, 30)] == [4, 4]
    assert run.at(50, 40) == 4
    assert [run.at(at, 10) for at in (70, 109)] == [4, 4]
    assert run.at(111, 10) == 1


def test_time_without_any_reading_is_no_time_in_which_fewer_were_enough() -> None:
    run = Run(4)
    assert [run.at(at, 10) for at in (0, 30)] == [4, 4]
    assert run.at(59, None) == 4
    assert run.at(100, 10) == 4
    assert run.at(120, 10) == 1


@given(
    st.lists(st.tuples(st.floats(0.1, 30), st.one_of(st.none(), st.floats(0, 1e6)), st.booleans()), min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(0, 40),
)
def test_whatever_is_said_bounds_hold_and_nothing_is_taken_away_that_was_needed(
    story: list[tuple[float, float | None, bool]], least: int, room: int
) -> None:
    run, now, needed = Run(least, least=least, most=least + room), 0.0, [(0.0, least)]
    for wait, value, _ in story:
        now += wait
        before, began = run.current, run.memory.step_from
        wanted = run.at(now, value)
        assert least <= wanted <= least + room
        if wanted > before:
            assert wanted <= max(2 * run.memory.step_from, run.memory.step_from + STEP_COUNT)
            assert run.memory.step_from in (before, began)
        needed.append((now, before if value is None else min(least + room, max(least, int(value // 10)))))
        if wanted < before:
            assert wanted >= max(count for at, count in needed if now - at < DOWN_S and count <= before)
        assert len(run.memory.needed) <= room + 1


def test_the_reason_names_metric_value_and_target() -> None:
    def why(given: ScaleFacts) -> str:
        return decide_scale(given, Memory(), 0.0).cause.text

    assert why(facts(1, 31.5)) == "depth is 31.5 over 1 instance, target 10 each"
    assert why(facts(2, 20, 20)) == "depth is 40 over 2 instances, target 10 each"
    assert why(facts(1, least=2)) == "its bounds have changed"


class Load:
    """A queue's depth, shared evenly by those who are ready."""

    def __init__(self, cell: Cell) -> None:
        self.depth = 0.0
        self._cell = cell
        cell.metrics = self.of

    def of(self, instance: Instance) -> dict[str, float]:
        return {"depth": self.depth / max(1, self._cell.ready())}


async def started(cell: Cell, spec: AppSpec = WEB) -> Load:
    await cell.add_node("n1")
    await cell.add_node("n2")
    cell.agents()
    cell.lead()
    load = Load(cell)
    await cell.deploy(spec)
    await cell.until(lambda: cell.ready() == 1)
    return load


def scaled(cell: Cell) -> int | None:
    status = cell.app_status()
    return status.scaled if status else None


async def ready(cell: Cell, count: int, within_s: float = 30.0) -> None:
    await cell.until(lambda: cell.ready() == count and scaled(cell) == count, within_s)


def test_an_app_grows_with_its_queue_and_shrinks_after_it_and_says_why() -> None:
    async def main() -> None:
        async with Cell() as cell:
            load = await started(cell)
            load.depth = 35
            await ready(cell, 4, within_s=10)
            load.depth = 8
            before = cell.clock.now()
            await ready(cell, 1, within_s=120)
            assert cell.clock.now() - before >= DOWN_S
            told = [held.record for held in cell.state.records(Event).values() if held.record.code.startswith("scaled-")]
            up, down = sorted(told, key=lambda event: event.at)
            assert (up.code, up.message) == ("scaled-up", "scaled up from 1 to 4: depth is 35 over 1 instance, target 10 each")
            assert up.data == {"from": 1, "to": 4, "metric": "depth", "value": 35.0, "target": 10.0}
            assert (down.code, down.subject) == ("scaled-down", "app/web")
            await cell.until(lambda: len(cell.instances()) == 1)
            assert await cell.quiet(30) == 0, "and then nothing is written"

    run_virtual(main())


def test_the_user_s_number_stays_the_user_s_and_is_the_least() -> None:
    async def main() -> None:
        async with Cell() as cell:
            load = await started(cell)
            load.depth = 25
            await ready(cell, 3)
            app = await cell.change(await cell.deploy(WEB), replicas=5)
            await ready(cell, 5)
            load.depth = 0
            await asyncio.sleep(200)
            assert cell.ready() == 5
            await cell.change(app, replicas=0)
            await cell.until(lambda: not cell.instances())
            assert scaled(cell) is None

    run_virtual(main())


def test_a_new_leader_goes_on_from_what_the_last_one_wanted() -> None:
    async def main() -> None:
        async with Cell() as cell:
            load = await started(cell)
            load.depth = 40
            await ready(cell, 4)
            cell.stop_leading()
            load.depth = 5
            await asyncio.sleep(300)
            cell.lead("other")
            await asyncio.sleep(DOWN_S - 5)
            assert (cell.ready(), scaled(cell)) == (4, 4), "and watches a whole window itself"
            await ready(cell, 1)

    run_virtual(main())


def test_readings_of_a_node_that_is_silent_count_no_more() -> None:
    async def main() -> None:
        async with Cell() as cell:
            load = await started(cell)
            load.depth = 30
            await ready(cell, 3)
            cell.silent.update(("n1", "n2"))
            await asyncio.sleep(FRESH_S + 5)
            load.depth = 0
            await asyncio.sleep(DOWN_S + 20)
            assert scaled(cell) == 3

    run_virtual(main())


def test_an_app_that_gives_no_metric_stays_as_it_is() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await started(cell)
            cell.metrics = lambda instance: {"other": 1e9}
            await asyncio.sleep(200)
            assert (cell.ready(), scaled(cell)) == (1, 1)

    run_virtual(main())


def test_what_does_not_fit_waits_with_its_reason() -> None:
    async def main() -> None:
        async with Cell() as cell:
            big = structs.replace(WEB, resources=Resources(memory=Bytes(5 << 30)))
            load = await started(cell, big)
            load.depth = 40
            await cell.until(lambda: scaled(cell) == 4 and cell.ready() == 2)
            waiting = [instance for instance in cell.instances() if instance.node is None]
            assert len(waiting) == 2
            assert all(instance.rejection is not None for instance in waiting)
            load.depth = 12
            await ready(cell, 2, within_s=200)
            assert len(cell.instances()) == 2

    run_virtual(main())


def test_an_app_that_is_to_scale_from_now_on_begins_with_what_it_has() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            cell.agents()
            cell.lead()
            load = Load(cell)
            load.depth = 20
            app = await cell.deploy(structs.replace(WEB, scale=Scale(replicas=5)), replicas=5)
            await cell.until(lambda: cell.ready() == 5)
            await cell.change(app, spec=WEB, replicas=1)
            await cell.until(lambda: scaled(cell) is not None)
            assert scaled(cell) == 5
            await ready(cell, 2, within_s=120)

    run_virtual(main())


def test_a_rollout_keeps_as_many_as_the_metric_asks_for() -> None:
    async def main() -> None:
        async with Cell() as cell:
            load = await started(cell)
            load.depth = 40
            await ready(cell, 4)
            least: list[int] = []
            cell.watchers.append(lambda: least.append(cell.ready()))
            await cell.deploy(structs.replace(WEB, env={"A": "1"}), release=2)
            await cell.until(lambda: all(i.release == 2 for i in cell.instances()) and cell.ready() == 4, 200)
            assert min(least) >= 4

    run_virtual(main())
