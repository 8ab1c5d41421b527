"""Apps that sleep while nobody asks for them: the rule as a table, and the whole loop with ingresses that say what they have."""

from __future__ import annotations

import asyncio
import math

import pytest
from control_cell import Cell, LoopClock, fails, run_virtual

from atoll.control.sleeping import FRESH_S, idle_for
from atoll.model.records import App, AppPhase
from atoll.model.spec import AppSpec, Port, Scale
from atoll.model.states import Desired
from atoll.model.units import Seconds

IDLE_S = 30.0
WEB = AppSpec(name="web", image="x", ports=(Port(port=80),), scale=Scale(replicas=0, max=1, idle_after=Seconds(IDLE_S)))
LONG_AGO = -math.inf


@pytest.mark.parametrize(
    ("asked", "changed", "began", "heard", "runs", "idle"),
    [
        (90.0, 0.0, 0.0, [99.0], True, 10.0),
        (LONG_AGO, 60.0, 0.0, [99.0], True, 40.0),  # a deploy is as good as a request
        (LONG_AGO, 0.0, 80.0, [99.0], True, 20.0),  # a new leader knows nothing of before
        (LONG_AGO, 0.0, 80.0, [99.0], False, 100.0),  # but lets what sleeps sleep
        (LONG_AGO, 0.0, 0.0, [99.0, 100.0 - FRESH_S - 1], True, 0.0),  # a silent ingress may have requests
        (LONG_AGO, 0.0, 0.0, [LONG_AGO], True, 0.0),
        (LONG_AGO, 0.0, 0.0, [LONG_AGO], False, 100.0),
        (101.0, 0.0, 0.0, [], True, 0.0),
    ],
)
def test_nobody_has_asked_for_so_long_for_certain(
    asked: float, changed: float, began: float, heard: list[float], runs: bool, idle: float
) -> None:
    assert idle_for(100.0, asked=asked, changed=changed, began=began, heard=heard, runs=runs) == idle


class SetClock(LoopClock):
    ahead_s = 3600.0

    def now(self) -> float:
        return super().now() + self.ahead_s


class Sleepers(Cell):
    """A cell with an ingress that is heard, unless it is `silent`, and one app that sleeps."""

    async def begin(self) -> App:
        await self.add_node("n")
        await self.add_ingress("g")
        self.agents()
        self.keep(asyncio.ensure_future(self._say()))
        self.lead()
        return await self.deploy(WEB, replicas=0)

    async def _say(self) -> None:
        while True:
            if "g" not in self.silent:
                self.demand.heard["g"] = self.clock.monotonic()
            await asyncio.sleep(2.0)

    def ask(self) -> None:
        self.demand.last["default/web"] = self.clock.monotonic()
        self.demand.changed("default/web")

    def phase(self) -> AppPhase | None:
        status = self.app_status()
        return status.phase if status is not None else None

    async def asleep(self) -> float:
        """Return when the app sleeps and nothing of it is left."""
        await self.until(lambda: self.phase() is AppPhase.ASLEEP and not self.instances(), within_s=300.0)
        return self.clock.monotonic()


def test_a_deploy_runs_once_then_sleeps_and_a_request_wakes_one_instance_at_once() -> None:
    async def story() -> None:
        async with Sleepers() as cell:
            await cell.begin()
            await cell.until(lambda: cell.ready() == 1)
            assert IDLE_S <= await cell.asleep() < IDLE_S + 3
            await asyncio.sleep(1000)
            assert not cell.instances()
            for _ in range(100):
                cell.ask()
            asked_at = cell.clock.monotonic()
            await cell.until(lambda: cell.ready() == 1)
            assert cell.clock.monotonic() - asked_at < 0.2
            assert len(cell.instances()) == 1
            assert IDLE_S <= await cell.asleep() - asked_at < IDLE_S + 3
            assert cell.codes().count("app-woken") == 1
            assert cell.codes().count("app-asleep") == 2

    run_virtual(story())


def test_one_that_was_deployed_before_the_date_was_set_back_sleeps_all_the_same() -> None:
    async def story() -> None:
        async with Sleepers() as cell:
            cell.clock = clock = SetClock()
            await cell.begin()
            await cell.until(lambda: cell.ready() == 1)
            clock.ahead_s = 0.0
            set_back_at = clock.monotonic()
            assert IDLE_S <= await cell.asleep() - set_back_at < IDLE_S + 3

    run_virtual(story())


def test_it_stays_awake_while_it_is_asked_for_or_an_ingress_is_silent() -> None:
    async def story() -> None:
        async with Sleepers() as cell:
            await cell.begin()
            await cell.until(lambda: cell.ready() == 1)
            first = cell.instances()
            for _ in range(20):
                await asyncio.sleep(IDLE_S / 2)
                cell.ask()
            cell.silent.add("g")
            await asyncio.sleep(20 * IDLE_S)
            assert cell.instances() == first
            cell.silent.discard("g")
            await cell.asleep()

    run_virtual(story())


def test_a_request_while_it_goes_to_sleep_makes_another_instance_beside_the_one_that_drains() -> None:
    async def story() -> None:
        async with Sleepers() as cell:
            await cell.begin()
            await cell.until(lambda: cell.ready() == 1)
            (first,) = cell.instances()
            await cell.until(lambda: any(i.desired is not Desired.RUN for i in cell.instances()), within_s=300)
            cell.ask()
            await cell.until(lambda: cell.ready() == 1)
            assert first.id not in {i.id for i in cell.instances() if i.desired is Desired.RUN}

    run_virtual(story())


def test_a_new_leader_puts_nothing_to_sleep_before_it_has_listened_for_as_long() -> None:
    async def story() -> None:
        async with Sleepers() as cell:
            await cell.begin()
            await cell.until(lambda: cell.ready() == 1)
            await asyncio.sleep(IDLE_S - 5)
            cell.demand.heard.clear()
            cell.stop_leading()
            cell.lead("another")
            await asyncio.sleep(IDLE_S - 5)
            assert cell.ready() == 1
            await cell.asleep()

    run_virtual(story())


def test_a_release_that_cannot_start_is_followed_by_the_one_before_when_a_request_comes() -> None:
    async def story() -> None:
        async with Sleepers() as cell:
            app = await cell.begin()
            await cell.asleep()
            good = cell.script
            cell.script = lambda instance: fails(instance) if instance.release == 2 else good(instance)
            await cell.deploy(WEB, release=2, replicas=0, order=app.order)
            await cell.until(lambda: any(instance.release == 2 for instance in cell.instances()))
            await cell.asleep()
            status = cell.app_status()
            assert status is not None
            assert (status.release, status.served_release) == (2, 1)
            await asyncio.sleep(1000)
            cell.ask()
            await cell.until(lambda: cell.ready() == 1)
            assert {i.release for i in cell.instances() if (s := cell.status(i)) and s.ready} == {1}

    run_virtual(story())
