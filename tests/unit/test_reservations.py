"""Reservations: made through the API, shown, and kept from others by the scheduler, on a virtual clock."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from control_cell import Cell, run_virtual
from test_cli_draining import api as api  # a fixture
from test_cli_draining import call

from atoll.model import keys
from atoll.model.devices import GpuDevice
from atoll.model.errors import Invalid
from atoll.model.records import Capacity, Node
from atoll.model.reservation import Reservation, ReservationSpec, check_reservation
from atoll.model.spec import AppSpec, Gpu, Resources, RuntimeName
from atoll.model.units import Bytes, Cores
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.explain import explain
from atoll.scheduling.plan import Plan, plan
from atoll.scheduling.snapshot import Snapshot
from atoll.sdk.fake import FakeApi

GIB = 1 << 30


def fleet(nodes: int = 3, gpus: int = 0) -> Snapshot:
    made = Snapshot()
    for number in range(nodes):
        devices = tuple(GpuDevice(id=f"GPU-{number}-{index}", model="X", memory_bytes=GIB) for index in range(gpus))
        capacity = Capacity(cpu_milli=4000, memory_bytes=8 * GIB, disk_bytes=GIB, gpus=devices)
        made.upsert_node(Node(name=f"n{number}", site="fra", capacity=capacity, runtimes=(RuntimeName.RUNC,)))
    return made


def reserve(snapshot: Snapshot, name: str = "r", *, start: float = 0.0, **more: Any) -> None:
    values = {"project": "ml", "nodes": "site=fra", "end": 1000.0, **more}
    spec = ReservationSpec(name=name, start=start, **values)
    snapshot.reservations[name] = Reservation(spec=spec, created_at=0.0)


def ask(count: int, project: str, cpu_milli: int = 1000, ends_at: float | None = None, gpu: float = 0) -> list[Pending]:
    demand = Demand(cpu_milli=cpu_milli, memory_bytes=1, gpu=Gpu(count=gpu) if gpu else None)
    return [Pending(id=f"{project}-{i:03d}", group=f"app/{project}/a/1/1", demand=demand, ends_at=ends_at) for i in range(count)]


def nodes_of(answer: Plan) -> set[str]:
    return {placed.node for placed in answer.placed}


def test_whole_nodes_take_only_the_work_of_their_project_until_the_reservation_ends() -> None:
    there = fleet()
    reserve(there, count=2)
    answer = plan(there, ask(12, "shop"), now=10.0)
    assert nodes_of(answer) == {"n2"}
    assert len(answer.placed) == 4
    rejection = answer.rejected["shop-011"]
    assert rejection.code == "no-reserved"
    assert "2 reserved for project 'ml' until 1970-01-01 00:16 UTC" in rejection.message
    assert "atoll reserve remove r" in rejection.mend
    assert nodes_of(plan(there, ask(12, "ml"), now=10.0)) == {"n0", "n1", "n2"}
    assert len(plan(there, ask(12, "shop"), now=1000.0).placed) == 12


def test_room_of_each_node_is_kept_until_the_project_holds_it_itself() -> None:
    there = fleet(1)
    reserve(there, cpu=Cores(3), memory=Bytes(GIB))
    assert len(plan(there, ask(4, "shop"), now=0.0).placed) == 1
    both = plan(there, [*ask(2, "ml"), *ask(4, "shop")], now=0.0)
    assert sum(placed.id.startswith("shop") for placed in both.placed) == 1
    for placed in plan(there, ask(3, "ml"), now=0.0).placed:
        there.allocate(placed.id, placed.node, "app/ml/a/1/1", ask(1, "ml")[0].demand)
    # The project has all that was kept for it: what is left is anyone's.
    assert len(plan(there, ask(4, "shop"), now=0.0).placed) == 1


def test_devices_are_kept_whole() -> None:
    there = fleet(1, gpus=4)
    reserve(there, gpu=3)
    assert len(plan(there, ask(4, "shop", 100, gpu=1), now=0.0).placed) == 1
    assert len(plan(there, ask(4, "shop", 100, gpu=0.5), now=0.0).placed) <= 2
    assert plan(there, ask(1, "shop", 100, gpu=2), now=0.0).placed == ()
    assert len(plan(there, ask(4, "ml", 100, gpu=1), now=0.0).placed) == 4


def test_before_it_begins_only_what_is_sure_to_be_gone_by_then_goes_there() -> None:
    there = fleet(1)
    reserve(there, start=500.0)
    assert plan(there, ask(1, "shop"), now=0.0).placed == ()
    assert plan(there, ask(1, "shop", ends_at=math.inf), now=0.0).placed == ()
    assert plan(there, ask(1, "shop", ends_at=501.0), now=0.0).placed == ()
    assert len(plan(there, ask(1, "shop", ends_at=500.0), now=0.0).placed) == 1
    rejection = plan(there, ask(1, "shop"), now=0.0).rejected["shop-000"]
    assert "(from 1970-01-01 00:08 UTC)" in rejection.message
    assert "a job whose deadline ends before it begins may run there" in rejection.mend


def test_explain_says_for_whom_a_node_is_kept() -> None:
    there = fleet(2)
    there.now = 5.0
    reserve(there, count=1)
    answer = explain(there, "app/shop/a/1/1", ask(1, "shop")[0].demand)
    assert answer.failed == {"reserved": 1}
    assert [candidate.node for candidate in answer.candidates] == ["n1"]


def test_of_many_nodes_those_first_by_name_that_are_there_are_kept() -> None:
    there = fleet(4)
    reserve(there, count=2, nodes="site=fra,node!=n0")
    assert nodes_of(plan(there, ask(8, "shop"), now=0.0)) == {"n0", "n3"}
    there.remove_node("n1")
    assert nodes_of(plan(there, ask(8, "shop"), now=0.0)) == {"n0"}


@pytest.mark.parametrize(
    ("more", "field"),
    [({"nodes": "fra"}, "nodes"), ({"end": 5.0}, "end"), ({"start": 10.0, "end": 10.0}, "end"), ({"end": 1e12}, "end")],
)
def test_what_contradicts_itself_is_refused_with_its_field(more: dict[str, Any], field: str) -> None:
    values = {"name": "r", "project": "ml", "nodes": "*", "start": 6.0, "end": 100.0, **more}
    with pytest.raises(Invalid) as error:
        check_reservation(ReservationSpec(**values))
    assert error.value.field == field


def test_the_leader_places_what_waits_when_a_reservation_ends_or_is_removed() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            cell.agents()
            cell.lead()
            now = cell.clock.now()
            spec = ReservationSpec(name="r", project="ml", nodes="*", start=now, end=now + 100)
            await cell.put(keys.reservation("r"), Reservation(spec=spec, created_at=now))
            resources = Resources(cpu=Cores(0.1), memory=Bytes(1 << 20))
            await cell.deploy(AppSpec(name="web", image="x", resources=resources), replicas=1)
            await cell.until(lambda: any(i.rejection is not None for i in cell.instances()))
            assert cell.instances()[0].rejection.code == "no-reserved"  # type: ignore[union-attr]
            await asyncio.sleep(90)
            assert cell.instances()[0].node is None
            await cell.until(lambda: cell.instances()[0].node == "n1")
            assert cell.clock.now() < now + 105

    run_virtual(main())


def test_a_reservation_is_made_listed_and_removed_from_the_command_line(api: FakeApi, tmp_path: Path) -> None:
    where = ("-p", "ml", "--nodes", "site=fra", "--cpu", "2", "--gpu", "1")
    arguments = (*where, "--from", "2100-01-03 02:00 UTC", "--for", "2h")
    made = call(api, tmp_path, "reserve", "add", *arguments)
    assert made.exit_code == 0
    held, _ = api.get("reservations", "ml-site-fra")
    assert (held.spec.project, held.spec.nodes, held.spec.cpu.milli, held.spec.gpu) == ("ml", "site=fra", 2000, 1)
    assert held.spec.end - held.spec.start == 7200
    listed = " ".join(call(api, tmp_path, "reserve").stdout.split())
    assert "ml-site-fra ml site=fra (1) 2 cores, 1 GPU planned 2100-01-03 02:00 UTC 2100-01-03 04:00 UTC" in listed
    assert call(api, tmp_path, "reserve", "remove", "ml-site-fra").exit_code == 0
    assert "nothing is reserved" in call(api, tmp_path, "reserve", "list").stderr
