"""The leader's whole loop with rollouts by shares, on a virtual clock: what was counted decides, and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from control_cell import Cell, run_virtual

from atoll.model.records import App, AppPhase, AppStatus, Event
from atoll.model.rollouts import RolloutOrder, RolloutPhase, RolloutStatus
from atoll.model.spec import Analysis, AppSpec, CanaryStep, Health, Port, Rollout, Strategy
from atoll.model.traffic import Counts
from atoll.model.units import Seconds

ANALYSIS = Analysis(error_rate_max=0.01, requests_min=100, interval=Seconds(10), failures_max=2)
CANARY = Rollout(
    strategy=Strategy.CANARY,
    steps=(CanaryStep(weight=10, pause=Seconds(30)), CanaryStep(weight=50, pause=Seconds(30))),
    analysis=ANALYSIS,
    max_surge=2,
    deadline=Seconds(120),
)


def status(cell: Cell) -> AppStatus:
    held = cell.state.get(AppStatus, "default/web")
    assert held is not None
    return held.record


def rollout(cell: Cell) -> RolloutStatus | None:
    held = cell.state.get(AppStatus, "default/web")
    return held.record.rollout if held is not None else None


def is_in(cell: Cell, phase: RolloutPhase) -> bool:
    found = rollout(cell)
    return found is not None and found.phase is phase


def ask(cell: Cell, per_s: float, error_rate: dict[int, float]) -> None:
    """Let requests come for ever, by the weights, and fail by release."""

    async def come() -> None:
        done = dict.fromkeys(error_rate, 0.0)
        while True:
            await asyncio.sleep(1)
            found = rollout(cell)
            weights = found.weights if found is not None and found.weights else {status(cell).served_release: 100}
            for release, weight in weights.items():
                done[release] = done.get(release, 0.0) + per_s * weight / 100
                errors = int(done[release] * error_rate.get(release, 0.0))
                counts = cell.traffic.setdefault("default/web", {})
                counts[release] = Counts(int(done[release]), errors, (int(done[release]),))

    cell.keep(asyncio.ensure_future(come()))


async def begin(cell: Cell, rules: Rollout = CANARY, **more: Any) -> App:
    """Have release 1 serve, and ask for release 2."""
    spec = AppSpec(name="web", image="x", ports=(Port(port=80),), health=Health(), rollout=rules)
    await cell.add_node("n1")
    await cell.add_ingress()
    cell.agents()
    cell.lead()
    app = await cell.deploy(spec, replicas=4)
    await cell.until(lambda: cell.state.get(AppStatus, "default/web") and status(cell).phase is AppPhase.RUNNING)
    app = await cell.change(app, **more) if more else app
    return await cell.deploy(spec, release=2, replicas=4)


def test_a_bad_release_goes_back_after_as_many_intervals_as_are_forgiven_and_one_more() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell)
            began = cell.clock.now()
            ask(cell, 200, {1: 0.0, 2: 0.3})
            await cell.until(lambda: is_in(cell, RolloutPhase.REVERTED))
            assert 30 <= cell.clock.now() - began <= 40
            assert "requests failed (30 %, at most 1 %)" in status(cell).message
            await cell.until(lambda: {i.release for i in cell.instances()} == {1} and status(cell).ready == 4)
            told = [held.record for held in cell.state.records(Event).values()]
            codes = [event.code for event in sorted(told, key=lambda event: event.id)]
            assert codes.count("rollout-analysis-failed") == 3
            assert codes.count("rollout-reverted") == 1
            await cell.quiet(300)
            assert (status(cell).phase, status(cell).served_release) == (AppPhase.FAILED, 1)
            assert {i.release for i in cell.instances()} == {1}, "it is not tried again by itself"

    run_virtual(main())


def test_a_good_release_goes_through_its_steps_in_their_time() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell)
            began = cell.clock.now()
            ask(cell, 200, {1: 0.001, 2: 0.001})
            await cell.until(lambda: is_in(cell, RolloutPhase.COMPLETE), within_s=200)
            assert 60 <= cell.clock.now() - began <= 75
            assert (status(cell).phase, status(cell).served_release) == (AppPhase.RUNNING, 2)

    run_virtual(main())


def test_what_is_wrong_with_both_releases_is_no_reason_to_go_back_and_no_reason_to_go_on() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell)
            ask(cell, 1000, {1: 0.3, 2: 0.3})
            await cell.until(lambda: (r := rollout(cell)) is not None and r.since > 0)
            await cell.quiet(400)
            found = rollout(cell)
            assert found is not None
            assert (found.phase, found.step, found.failures) == (RolloutPhase.PROGRESSING, 0, 0)
            assert "both releases suffer alike" in found.verdict

    run_virtual(main())


def test_with_few_requests_it_takes_longer_and_with_none_it_waits_without_being_late() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell)
            await cell.until(lambda: (r := rollout(cell)) is not None and r.since > 0)
            await cell.quiet(400)
            found = rollout(cell)
            assert found is not None
            assert (found.phase, found.step) == (RolloutPhase.PROGRESSING, 0)
            assert "0 of the 100 requests" in status(cell).message
            began = cell.clock.now()
            ask(cell, 20, {1: 0.0, 2: 0.0})
            await cell.until(lambda: (r := rollout(cell)) is not None and r.step == 1)
            assert 50 <= cell.clock.now() - began <= 65, "2 requests a second make 100 in 50 s"

    run_virtual(main())


def test_a_new_leader_begins_the_interval_anew_and_forgets_no_bad_one() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell)
            ask(cell, 200, {1: 0.0, 2: 0.3})
            await cell.until(lambda: (r := rollout(cell)) is not None and r.failures == 2)
            cell.stop_leading()
            await asyncio.sleep(6)
            cell.lead("other")
            await cell.until(lambda: is_in(cell, RolloutPhase.REVERTED))
            found = rollout(cell)
            assert found is not None
            assert found.failures == 3

    run_virtual(main())


@pytest.mark.parametrize("reverts", [True, False])
def test_a_canary_that_does_not_become_ready_is_late_and_takes_nothing_from_the_old_release(reverts: bool) -> None:
    async def main() -> None:
        async with Cell() as cell:
            healthy = cell.script
            cell.script = lambda instance: [] if instance.release == 2 else healthy(instance)
            rules = Rollout(strategy=Strategy.CANARY, steps=CANARY.steps, deadline=Seconds(120), auto_revert=reverts)
            await begin(cell, rules)
            began = cell.clock.now()
            await cell.until(lambda: status(cell).phase is AppPhase.FAILED, within_s=200)
            assert 120 <= cell.clock.now() - began <= 125
            assert "no progress for 2m00s" in status(cell).message
            assert status(cell).ready == 4
            assert is_in(cell, RolloutPhase.REVERTED) is reverts

    run_virtual(main())


def test_a_blue_green_set_that_fails_after_the_switch_is_switched_back() -> None:
    async def main() -> None:
        async with Cell() as cell:
            rules = Rollout(strategy=Strategy.BLUE_GREEN, promote_after=Seconds(5), analysis=ANALYSIS)
            app = await begin(cell, rules)
            ask(cell, 200, {1: 0.0, 2: 0.3})
            await cell.until(lambda: is_in(cell, RolloutPhase.KEEPING))
            assert status(cell).served_release == 2
            assert len(cell.instances()) == 8
            await cell.until(lambda: is_in(cell, RolloutPhase.REVERTED))
            assert status(cell).served_release == 1
            await cell.until(lambda: {i.release for i in cell.instances()} == {1})
            await cell.change(app, order=RolloutOrder(release=2, attempt=1))
            await cell.until(lambda: is_in(cell, RolloutPhase.KEEPING))

    run_virtual(main())
