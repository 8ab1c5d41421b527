"""What a newer server has written about limits, and this version cannot read, lets nothing through: what was read last holds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from control_cell import Cell, node, run_virtual
from msgspec.structs import replace
from test_stored import newer

from atoll.control.world import World
from atoll.model import keys
from atoll.model.maintenance import Maintenance, MaintenanceSpec
from atoll.model.records import Project
from atoll.model.reservation import Reservation, ReservationSpec
from atoll.model.spec import AppSpec, Quota, Resources
from atoll.model.units import Bytes, Cores, Seconds
from atoll.scheduling.assembly import Records, complete
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot

WEB = AppSpec(name="web", image="x", resources=Resources(cpu=Cores(0.1), memory=Bytes(1 << 20)))
PROJECT = Project(name="default", created_at=1.0, quota=Quota(instances=2))


async def break_off(cell: Cell, key: str, record: Any, field: str) -> None:
    """Write `record` as a newer version does that uses a field more."""
    await cell.state.reach(await cell.store.put(key, newer(record, field, 1, used=True)))


def rejections(cell: Cell) -> set[str]:
    return {instance.rejection.message if instance.rejection else "" for instance in cell.instances() if instance.node is None}


def test_a_quota_that_cannot_be_read_any_more_stays_as_it_was() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            cell.agents()
            cell.lead()
            await cell.put(keys.project("default"), PROJECT)
            await cell.deploy(WEB, replicas=4)
            await cell.until(lambda: cell.ready() == 2)
            await break_off(cell, keys.project("default"), PROJECT, "quota.to_come")
            await asyncio.sleep(5.0)
            assert cell.ready() == 2
            await cell.put(keys.project("default"), replace(PROJECT, quota=Quota(instances=3)))
            await cell.until(lambda: cell.ready() == 3)

    run_virtual(main())


@pytest.mark.parametrize("end", ["read", "gone"])
def test_a_leader_that_never_could_read_a_quota_places_nothing_new_until_it_can(end: str) -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            cell.agents()
            await break_off(cell, keys.project("default"), PROJECT, "quota.to_come")
            cell.lead()
            await cell.deploy(WEB, replicas=2)
            await asyncio.sleep(5.0)
            assert cell.ready() == 0
            (said,) = rejections(cell)
            assert said == "the quota of project 'default' is of a newer version, or damaged: nothing new is placed"
            if end == "read":
                await cell.put(keys.project("default"), Project(name="default", created_at=1.0))
            else:
                await cell.state.reach(await cell.store.delete(keys.project("default")))
            await cell.until(lambda: cell.ready() == 2)

    run_virtual(main())


def test_dry_runs_go_by_what_is_known_of_a_quota_too() -> None:
    pending = [Pending(id=str(n), group="app/p/web/1/1", demand=Demand(cpu_milli=1, memory_bytes=1)) for n in range(3)]

    def placed(**quotas: Quota) -> int:
        snapshot = Snapshot()
        snapshot.upsert_node(node("n1"))
        snapshot.quotas.update(quotas)
        complete(
            snapshot,
            Records(
                nodes={}, policies={}, liveness={}, instances={}, statuses={}, app_statuses={}, projects_unread=frozenset({"p"})
            ),
        )
        return len(plan(snapshot.copy(), pending).placed)

    assert (placed(), placed(p=Quota(instances=2)), placed(q=Quota(instances=2))) == (0, 2, 0)


def test_a_reservation_that_cannot_be_read_any_more_is_kept_until_it_is_gone() -> None:
    async def main() -> None:
        async with Cell() as cell:
            spec = ReservationSpec(name="r", project="ml", nodes="*", start=0.0, end=cell.clock.now() + 1e6)
            reservation = Reservation(spec=spec, created_at=1.0)
            await cell.add_node("n1")
            cell.agents()
            await cell.put(keys.reservation("r"), reservation)
            cell.lead()
            await asyncio.sleep(2.0)
            await break_off(cell, keys.reservation("r"), reservation, "spec.to_come")
            await cell.deploy(WEB, replicas=1)
            await asyncio.sleep(5.0)
            assert cell.ready() == 0
            await cell.state.reach(await cell.store.delete(keys.reservation("r")))
            await cell.until(lambda: cell.ready() == 1)

    run_virtual(main())


def test_a_window_of_maintenance_that_cannot_be_read_any_more_goes_on() -> None:
    async def main() -> None:
        async with Cell() as cell:
            now = cell.clock.now()
            spec = MaintenanceSpec(name="w", nodes="*", start=now - 10.0, length=Seconds(3600))
            maintenance = Maintenance(spec=spec, created_at=1.0)
            await cell.add_node("n1")
            await cell.put(keys.maintenance("w"), maintenance)
            world = World(cell.state, cell.clock.monotonic)
            world.rebuild()
            changes = cell.state.changes()
            await break_off(cell, keys.maintenance("w"), maintenance, "spec.to_come")
            world.apply(await anext(changes))
            world.look(now)
            assert set(world.evacuations) == {"n1"}
            await cell.state.reach(await cell.store.delete(keys.maintenance("w")))
            world.look(now)
            assert not world.evacuations

    run_virtual(main())
