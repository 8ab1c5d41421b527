"""Gangs: all at once or none, through the leader's loop and in words."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from control_cell import Cell, run_virtual, succeeds

from atoll.model.devices import GpuDevice
from atoll.model.errors import Invalid
from atoll.model.records import Capacity, Instance, JobPhase, Node
from atoll.model.spec import GANG_MAX, AppSpec, Gpu, JobSpec, Placement, Quota, Resources, RuntimeName, Scale, check_app, check_job
from atoll.model.states import Desired
from atoll.model.units import Bytes, Cores
from atoll.scheduling.demand import Demand, Pending, demand_of
from atoll.scheduling.dry_run import explain_instance, plan_spec
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot

GIB = 1 << 30


def job(name: str, parallelism: int, *, memory: int = 3 * GIB, completions: int | None = None, **placement: Any) -> JobSpec:
    return JobSpec(
        name=name,
        image="x",
        completions=parallelism if completions is None else completions,
        parallelism=parallelism,
        retries=3,
        resources=Resources(cpu=Cores(0.1), memory=Bytes(memory)),
        placement=Placement(gang=True, **placement),
    )


def of(cell: Cell, name: str) -> list[Instance]:
    return [instance for instance in cell.instances() if instance.owner == name and instance.desired is Desired.RUN]


def fleet(*sites: str) -> Snapshot:
    made = Snapshot()
    for number, site in enumerate(sites):
        capacity = Capacity(cpu_milli=4000, memory_bytes=8 * GIB, disk_bytes=1 << 40)
        made.upsert_node(Node(name=f"n{number}", site=site, capacity=capacity, runtimes=(RuntimeName.RUNC,)))
    return made


def test_a_gang_waits_as_a_whole_and_gets_all_its_places_in_one_transaction() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            cell.agents()
            cell.lead()
            await cell.submit(job("train", 4))
            await cell.until(lambda: len(of(cell, "train")) == 4 and all(i.rejection for i in of(cell, "train")))
            seen: set[int] = set()
            cell.watchers.append(lambda: seen.add(sum(i.node is not None for i in of(cell, "train"))))
            await asyncio.sleep(5)
            assert seen <= {0}
            rejection = of(cell, "train")[0].rejection
            assert rejection is not None
            assert rejection.code == "no-gang"
            assert rejection.message.startswith("4 go together or not at all, and 2 would fit: ")
            assert rejection.mend.endswith("or ask for at most 2 at once")
            await cell.add_node("n2")
            await cell.until(lambda: all(i.node is not None for i in of(cell, "train")))
            assert seen <= {0, 4}

    run_virtual(main())


def test_two_gangs_that_fit_only_one_after_the_other_do_not_block_each_other() -> None:
    async def main() -> None:
        async with Cell() as cell:
            for name in ("n1", "n2"):
                await cell.add_node(name)
            cell.script = succeeds
            cell.agents()
            cell.lead()
            held: set[tuple[int, int]] = set()

            def look() -> None:
                active = [i for i in cell.instances() if i.node is not None and i.desired is Desired.RUN]
                statuses = {i.id: cell.status(i) for i in active}
                live = [i for i in active if (s := statuses[i.id]) is None or not s.phase.final]
                held.add((sum(i.owner == "one" for i in live), sum(i.owner == "two" for i in live)))

            cell.watchers.append(look)
            await cell.submit(job("one", 3))
            await cell.submit(job("two", 3))

            def over() -> bool:
                statuses = [cell.job_status("one"), cell.job_status("two")]
                return all(status is not None and status.phase is JobPhase.SUCCEEDED for status in statuses)

            await cell.until(over, 60)
            assert not [pair for pair in held if pair[0] and pair[1]], "they never shared what holds only one of them"

    run_virtual(main())


def test_a_lost_member_is_made_again_where_the_others_are() -> None:
    async def main() -> None:
        async with Cell() as cell:
            for number in range(4):
                await cell.add_node(f"a{number}", site="a")
            for number in range(8):
                await cell.add_node(f"b{number}", site="b", labels={"big": "yes"})
            cell.agents()
            cell.lead()
            await cell.submit(job("train", 3, memory=6 * GIB, together="site"))
            await cell.until(lambda: len([i for i in of(cell, "train") if i.node]) == 3)
            sites = {str(i.node)[0] for i in of(cell, "train")}
            assert len(sites) == 1
            first = of(cell, "train")[0]
            cell.silent.add(str(first.node))
            await cell.until(lambda: len([i for i in of(cell, "train") if i.node and i.node != first.node]) == 3, 200)
            assert {str(i.node)[0] for i in of(cell, "train")} == sites

    run_virtual(main())


def test_an_app_starts_as_a_whole() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            cell.agents()
            cell.lead()
            resources = Resources(cpu=Cores(0.1), memory=Bytes(3 * GIB))
            app = await cell.deploy(AppSpec(name="web", image="x", resources=resources, placement=Placement(gang=True)), replicas=3)
            await cell.until(lambda: len(of(cell, "web")) == 3 and all(i.rejection for i in of(cell, "web")))
            await asyncio.sleep(2)
            assert [i.node for i in of(cell, "web")] == [None] * 3
            await cell.change(app, replicas=2)
            await cell.until(lambda: [i.node for i in of(cell, "web")] == ["n1", "n1"])

    run_virtual(main())


def test_a_gang_that_grows_while_it_waits_is_placed_as_the_larger_one() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            cell.agents()
            cell.lead()
            resources = Resources(cpu=Cores(0.1), memory=Bytes(3 * GIB))
            app = await cell.deploy(AppSpec(name="web", image="x", resources=resources, placement=Placement(gang=True)), replicas=3)
            await cell.until(lambda: len(of(cell, "web")) == 3 and all(i.rejection for i in of(cell, "web")))
            seen: set[int] = set()
            cell.watchers.append(lambda: seen.add(sum(i.node is not None for i in of(cell, "web"))))
            await cell.change(app, replicas=4)
            await cell.until(lambda: len(of(cell, "web")) == 4)
            await asyncio.sleep(2)
            assert await cell.quiet(5) <= 2, "a gang that waits is not planned for ever"
            await cell.add_node("n2")
            await cell.until(lambda: len(of(cell, "web")) == 4 and all(i.node is not None for i in of(cell, "web")))
            assert seen <= {0, 4}

    run_virtual(main())


def test_the_words_say_how_many_would_fit_and_where() -> None:
    view = plan_spec(fleet("a", "a", "b"), job("train", 6, memory=3 * GIB, together="site"))
    assert view.unplaced == 6
    assert view.placed == {}
    assert view.rejection is not None
    assert view.rejection.message.startswith("6 go together or not at all, and 4 would fit on one site: none of 3 nodes fits: ")
    assert "not on the site where the others are" in view.rejection.message
    assert sum(view.rejection.failed.values()) == 3
    one = plan_spec(fleet("a", "a", "b"), job("train", 3, memory=3 * GIB, together="node"))
    assert one.rejection is not None
    assert "2 would fit on n0" in one.rejection.message
    rack = plan_spec(fleet("a"), job("train", 2, together="rack"))
    assert rack.rejection is not None
    assert "without the label rack" in rack.rejection.message


def test_a_gang_on_nvlink_says_how_many_devices_are_joined() -> None:
    snapshot = Snapshot()
    gpus = tuple(GpuDevice(id=f"g{n}", model="A", memory_bytes=1) for n in range(4))
    capacity = Capacity(cpu_milli=4000, memory_bytes=8 * GIB, disk_bytes=1 << 40, gpus=gpus)
    snapshot.upsert_node(Node(name="n", capacity=capacity, runtimes=(RuntimeName.RUNC,)))
    demand = Demand(cpu_milli=1, memory_bytes=1, gpu=Gpu(count=1), placement=Placement(gang=True, together="nvlink"))
    answer = plan(snapshot, [Pending(id=f"i{n}", group="job/p/t/0/0", demand=demand) for n in range(3)])
    rejection = answer.rejected["i0"]
    assert rejection.message.startswith("3 go together or not at all, and 1 would fit on n: ")
    assert "1 without 3 free GPUs that are all joined by NVLink" in rejection.message


def test_a_quota_that_holds_a_part_of_a_gang_holds_none_of_it() -> None:
    snapshot = fleet("a", "a")
    snapshot.quotas["default"] = Quota(instances=2)
    view = plan_spec(snapshot, job("train", 3, memory=GIB))
    assert view.unplaced == 3
    assert view.rejection is not None
    assert view.rejection.code == "over-quota"
    assert "these 3 ask for 3" in view.rejection.message


def test_explain_answers_for_the_whole_gang_of_a_member() -> None:
    spec = job("train", 4)
    instance = Instance(id="t-1", project="default", owner_kind="job", owner="train", created_at=1.0)  # type: ignore[arg-type]
    view = explain_instance(fleet("a"), "default/t-1", instance, spec, waiting=4)
    assert view.explanation.feasible == 1
    assert view.explanation.rejection is not None
    assert "2 would fit" in view.explanation.rejection.message
    assert explain_instance(fleet("a"), "default/t-1", instance, spec, waiting=2).explanation.rejection is None


def test_higher_priority_goes_first_and_a_gang_between_equal_ones_changes_nothing_for_others() -> None:
    snapshot = fleet("a")
    gang = demand_of(job("train", 3))
    small = Demand(cpu_milli=1, memory_bytes=3 * GIB)
    pending = [Pending(id=f"g{n}", group="job/p/t/0/0", demand=gang, created_at=float(n)) for n in range(3)]
    pending += [Pending(id=f"s{n}", group="app/p/s/1/1", demand=small, created_at=0.5) for n in range(2)]
    answer = plan(snapshot, pending)
    assert sorted(answer.rejected) == ["g0", "g1", "g2"]
    assert sorted(placed.id for placed in answer.placed) == ["s0", "s1"]


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (job("a", GANG_MAX + 1), "parallelism"),
        (job("a", 2, together="nvlink"), "placement.together"),
        (JobSpec(name="a", image="x", placement=Placement(together="site")), "placement.together"),
        (AppSpec(name="a", image="x", placement=Placement(gang=True), scale=Scale(replicas=GANG_MAX + 1)), "scale.replicas"),
        (AppSpec(name="a", image="x", placement=Placement(gang=True), scale=Scale(replicas=2, standby=1)), "scale.standby"),
    ],
)
def test_a_gang_that_could_never_be_is_refused_by_its_field(spec: AppSpec | JobSpec, field: str) -> None:
    with pytest.raises(Invalid) as caught:
        check_app(spec) if isinstance(spec, AppSpec) else check_job(spec)
    assert caught.value.field == field
