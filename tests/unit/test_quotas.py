"""Quotas of projects: in the plan, through the leader's loop, and over the API."""

from __future__ import annotations

import asyncio

import pytest
from control_cell import Cell, run_virtual

from atoll.model import codec, keys
from atoll.model.errors import Invalid
from atoll.model.records import Capacity, Node, Project
from atoll.model.spec import AppSpec, Gpu, Placement, Quota, Resources, RuntimeName
from atoll.model.units import Bytes, Cores
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot

GIB = 1 << 30


def snapshot(quota: Quota) -> Snapshot:
    made = Snapshot()
    capacity = Capacity(cpu_milli=64_000, memory_bytes=64 * GIB, disk_bytes=GIB)
    made.upsert_node(Node(name="n1", capacity=capacity, runtimes=(RuntimeName.RUNC,)))
    made.quotas["p"] = quota
    return made


def pending(count: int, project: str = "p") -> list[Pending]:
    demand = Demand(cpu_milli=500, memory_bytes=GIB)
    return [Pending(id=f"{project}{number}", group=f"app/{project}/web/1/1", demand=demand) for number in range(count)]


@pytest.mark.parametrize(
    ("quota", "fit", "said"),
    [
        (Quota(cpu=Cores(1.2)), 2, "project 'p' has 0.2 cores of its quota of cpu left, and this asks for 0.5 cores"),
        (Quota(memory=Bytes(3 * GIB)), 3, "project 'p' has 0B of its quota of memory left, and this asks for 1.0GiB"),
        (Quota(instances=1), 1, "project 'p' has 0 of its quota of instances left, and this asks for 1"),
        (Quota(instances=0), 0, "project 'p' has 0 of its quota of instances left, and this asks for 1"),
    ],
)
def test_a_project_gets_no_more_than_its_quota_and_is_told_which(quota: Quota, fit: int, said: str) -> None:
    answer = plan(snapshot(quota), [*pending(5), *pending(5, "q")])
    assert sum(placed.id.startswith("p") for placed in answer.placed) == fit
    assert sum(placed.id.startswith("q") for placed in answer.placed) == 5
    rejection = answer.rejected["p4"]
    assert (rejection.code, rejection.message) == ("over-quota", said)
    assert "raise the quota" in rejection.mend


def test_what_was_placed_before_counts_and_what_left_does_not() -> None:
    made = snapshot(Quota(instances=2))
    made.allocate("x", "n1", "app/p/old/1/1", Demand(cpu_milli=1, memory_bytes=1))
    made.allocate("y", "gone", "job/p/old/0/0", Demand(cpu_milli=1, memory_bytes=1, gpu=Gpu()))
    assert not plan(made, pending(1)).placed
    made.release("y")
    assert len(plan(made, pending(3)).placed) == 1


def test_a_raised_quota_lets_what_waited_go_and_no_priority_gets_around_one() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            cell.agents()
            cell.lead()
            await cell.put(keys.project("default"), Project(name="default", created_at=1.0, quota=Quota(memory=Bytes(3 * GIB))))
            size = Resources(cpu=Cores(0.1), memory=Bytes(GIB))
            await cell.deploy(AppSpec(name="web", image="x", resources=size, placement=Placement(priority=10)), replicas=2)
            await cell.until(lambda: cell.ready() == 2)
            await cell.deploy(AppSpec(name="high", image="x", resources=size, placement=Placement(priority=90)), replicas=2)
            await asyncio.sleep(5)
            assert cell.ready() == 3
            waiting = [instance for instance in cell.instances() if instance.node is None]
            assert [(i.owner, i.rejection.code if i.rejection else "") for i in waiting] == [("high", "over-quota")]
            await cell.put(keys.project("default"), Project(name="default", created_at=1.0))
            await cell.until(lambda: cell.ready() == 4, 5)

    run_virtual(main())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"cpu": -1}', "cpu"),
        (b'{"cpu": 1e999}', None),
        (b'{"memory": "-1GiB"}', "memory"),
        (b'{"gpu": -1}', "gpu"),
        (b'{"instances": 1.5}', "instances"),
        (b'{"instances": 1e30}', "instances"),
        (b'{"pods": 1}', "pods"),
        (b'{"cpu": NaN}', None),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused(body: bytes, field: str | None) -> None:
    with pytest.raises(Invalid) as error:
        codec.decode(body, Quota)
    assert field is None or error.value.field == field or field in str(error.value)
