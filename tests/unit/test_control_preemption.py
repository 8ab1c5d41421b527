"""Higher priority takes the place of lower: through the leader's loop, as a rollout would take it away."""

from __future__ import annotations

import asyncio

from control_cell import Cell, run_virtual

from atoll.model.records import Event, Instance
from atoll.model.spec import AppSpec, Placement, Resources, Rollout, Volume
from atoll.model.states import Desired
from atoll.model.units import Bytes, Cores, Seconds

GIB = 1 << 30


def app(name: str, memory: int, priority: int = 50, unavailable: int = 0) -> AppSpec:
    resources = Resources(cpu=Cores(0.1), memory=Bytes(memory))
    rollout = Rollout(deadline=Seconds(600), drain=Seconds(5), max_unavailable=unavailable)
    return AppSpec(name=name, image="x", resources=resources, rollout=rollout, placement=Placement(priority=priority))


def of(cell: Cell, name: str) -> list[Instance]:
    return [instance for instance in cell.instances() if instance.owner == name]


def placed(cell: Cell, name: str) -> int:
    return sum(instance.node is not None and instance.desired is Desired.RUN for instance in of(cell, name))


async def start(cell: Cell, *nodes: str) -> None:
    for name in nodes:
        await cell.add_node(name)
    cell.agents()
    cell.lead()
    await asyncio.sleep(1)


def test_a_higher_priority_gets_its_place_and_the_lower_waits_with_its_reason() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell, "n1")
            await cell.deploy(app("low", 3 * GIB, 10, unavailable=2), replicas=2)
            await cell.until(lambda: placed(cell, "low") == 2 and cell.ready() == 2)
            await cell.deploy(app("high", 3 * GIB, 90), replicas=1)
            await cell.until(lambda: placed(cell, "high") == 1, 60)
            await asyncio.sleep(5)
            assert placed(cell, "low") == 1
            waiting = [i for i in of(cell, "low") if i.node is None]
            assert len(waiting) == 1
            assert waiting[0].rejection is not None
            events = [held.record for held in cell.state.records(Event).values()]
            assert any("which has a higher priority" in event.message for event in events)

    run_virtual(main())


def test_two_victims_make_room_though_the_first_ones_place_is_wanted_by_its_own_replacement() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell, "n1")
            await cell.deploy(app("low", 2 * GIB, 10, unavailable=4), replicas=4)
            await cell.until(lambda: placed(cell, "low") == 4 and cell.ready() == 4)
            await cell.deploy(app("high", 4 * GIB, 90), replicas=1)
            await cell.until(lambda: placed(cell, "high") == 1, 60)
            await asyncio.sleep(10)
            assert placed(cell, "high") == 1
            assert placed(cell, "low") == 2
            assert cell.codes().count("stopping") == 2, "nobody else had to go"

    run_virtual(main())


def test_equal_priorities_never_displace_each_other() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell, "n1")
            await cell.deploy(app("low", 5 * GIB), replicas=1)
            await cell.until(lambda: cell.ready() == 1)
            await cell.deploy(app("other", 5 * GIB), replicas=1)
            await asyncio.sleep(20)
            assert placed(cell, "low") == 1
            assert placed(cell, "other") == 0

    run_virtual(main())


def test_an_app_loses_no_more_at_a_time_than_its_rollout_may() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell, "n1", "n2")
            await cell.deploy(app("low", 4 * GIB, 10), replicas=4)
            await cell.until(lambda: placed(cell, "low") == 4 and cell.ready() == 4)
            least = [4]
            cell.watchers.append(lambda: least.append(placed(cell, "low")))
            await cell.deploy(app("high", 3 * GIB, 90), replicas=4)
            await asyncio.sleep(120)
            # With one missing for want of room, the app has none to spare any more.
            assert placed(cell, "high") == 1
            assert placed(cell, "low") == 3
            assert min(least) == 3

    run_virtual(main())


def test_an_app_with_volumes_waits_for_the_node_that_holds_them() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell, "n1", "n2")
            resources = Resources(cpu=Cores(0.1), memory=Bytes(GIB))
            spec = AppSpec(name="db", image="x", resources=resources, volumes=(Volume(name="data", path="/data"),))
            made = await cell.deploy(spec, replicas=1)
            await cell.until(lambda: cell.ready() == 1)
            home = of(cell, "db")[0].node
            await cell.until(lambda: (cell.app_status("db") or made).homes == (home,))  # type: ignore[union-attr]
            await cell.change(made, replicas=0)
            await cell.until(lambda: not of(cell, "db"))
            # The other node is fuller, and would be taken otherwise.
            other = "n2" if home == "n1" else "n1"
            await cell.deploy(
                AppSpec(name="fill", image="x", resources=resources, placement=Placement(regions=("local",))), replicas=3
            )
            await cell.until(lambda: cell.ready() == 3)
            await cell.change(made, replicas=1)
            await cell.until(lambda: placed(cell, "db") == 1)
            assert of(cell, "db")[0].node == home != other

    run_virtual(main())
