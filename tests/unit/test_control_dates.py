"""The leader's date is set back: what waits by a date waits no longer than it was meant to."""

from __future__ import annotations

import asyncio
from typing import Any

from control_cell import Cell, LoopClock, run_virtual
from hypothesis import given
from hypothesis import strategies as st

from atoll.control.actions import Decision
from atoll.control.dates import Dates
from atoll.model.records import AppPhase, Instance
from atoll.model.spec import AppSpec, Port, Rollout
from atoll.model.states import Phase
from atoll.model.units import Seconds

BACK_S = 3600.0
DEADLINE_S = 60.0
WEB = AppSpec(name="web", image="x", ports=(Port(port=80),), rollout=Rollout(deadline=Seconds(DEADLINE_S)))


class SetClock(LoopClock):
    ahead_s = BACK_S

    def now(self) -> float:
        return super().now() + self.ahead_s


def never_ready(instance: Instance) -> list[tuple[float, dict[str, Any]]]:
    return [(0.03, {"phase": Phase.RUNNING, "started_at": 0.0, "address": "10.64.0.2"})]


def test_a_rollout_ends_when_its_instances_have_lasted_though_the_date_was_set_back_meanwhile() -> None:
    async def main() -> None:
        async with Cell() as cell:
            cell.clock = clock = SetClock()
            await cell.add_node("n1")
            cell.agents()
            cell.lead()
            await asyncio.sleep(1)
            await cell.deploy(WEB, replicas=2)
            await cell.until(lambda: cell.ready() == 2)
            before = cell.app_status()
            assert before is None or before.phase is not AppPhase.RUNNING, "nothing has lasted yet"
            clock.ahead_s = 0.0
            await cell.until(lambda: (status := cell.app_status()) and status.phase is AppPhase.RUNNING, within_s=10)

    run_virtual(main())


def test_a_rollout_that_is_stuck_fails_by_its_deadline_though_the_date_was_set_back_meanwhile() -> None:
    async def main() -> None:
        async with Cell() as cell:
            cell.clock = clock = SetClock()
            await cell.add_node("n1")
            cell.agents()
            cell.lead()
            await asyncio.sleep(1)
            cell.script = never_ready
            await cell.deploy(WEB)
            await cell.quiet(10)
            clock.ahead_s = 0.0
            await cell.until(lambda: (status := cell.app_status()) and status.phase is AppPhase.FAILED, within_s=2 * DEADLINE_S)
            assert await cell.quiet(DEADLINE_S) <= 2, "what its deadline is counted from is not written again and again"

    run_virtual(main())


@given(date=st.floats(0, 1e6), steps=st.lists(st.floats(-1e4, 1e4)), stamp=st.floats(0, 2e6), wait_s=st.floats(0.1, 1e4))
def test_whatever_the_date_did_a_wait_from_a_stamp_is_over_within_twice_its_length_once_the_date_goes_forward(
    date: float, steps: list[float], stamp: float, wait_s: float
) -> None:
    dates = Dates(date)
    for step in steps:
        date += step
        dates.look(date)
    over = []
    for now in (date + wait_s, date + 2 * wait_s):
        dates.look(now)
        since = Decision(now, str, forward_since=dates.forward_since).past(stamp)
        assert since <= now
        over.append(since + wait_s <= now + 1e-6)
    assert any(over)
