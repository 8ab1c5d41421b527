"""Fair shares between projects where there is not room for all that wait."""

from __future__ import annotations

from atoll.model.records import Capacity, Instance, Node
from atoll.model.spec import AppSpec, Placement, Quota, RuntimeName
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.dry_run import explain_instance
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot

GIB = 1 << 30


def fleet(count: int) -> Snapshot:
    made = Snapshot()
    for number in range(count):
        capacity = Capacity(cpu_milli=10_000, memory_bytes=100 * GIB, disk_bytes=GIB)
        made.upsert_node(Node(name=f"n{number:03d}", capacity=capacity, runtimes=(RuntimeName.RUNC,)))
    return made


def wait(project: str, count: int, created: float, *, cpu: int = 100, memory: int = 1, priority: int = 50) -> list[Pending]:
    demand = Demand(cpu_milli=cpu, memory_bytes=memory, placement=Placement(priority=priority))
    group = f"app/{project}/web/1/1"
    return [Pending(id=f"{project}-{n:05d}", group=group, demand=demand, created_at=created) for n in range(count)]


def placed(snapshot: Snapshot, pending: list[Pending]) -> dict[str, int]:
    answer = plan(snapshot, pending)
    assert len(answer.placed) + len(answer.rejected) == len(pending)
    return {name: sum(one.id.startswith(name) for one in answer.placed) for name in ("p", "q")}


def test_a_project_that_asks_for_much_and_was_first_leaves_others_their_part() -> None:
    got = placed(fleet(20), [*wait("p", 4000, 1.0), *wait("q", 3000, 2.0)])
    assert sum(got.values()) == 2000
    assert abs(got["p"] - got["q"]) <= 4000 // 16


def test_weights_count_and_so_does_what_was_placed_before() -> None:
    snapshot = fleet(20)
    snapshot.quotas["q"] = Quota(weight=3)
    got = placed(snapshot, [*wait("p", 3000, 1.0), *wait("q", 3000, 2.0)])
    assert abs(got["q"] - 3 * got["p"]) <= 3 * 3000 // 16
    for number in range(20):
        demand = Demand(cpu_milli=5_000, memory_bytes=1)
        snapshot.allocate(f"held{number}", f"n{number:03d}", "app/q/db/1/1", demand)
    assert placed(snapshot, [*wait("p", 3000, 1.0), *wait("q", 3000, 2.0)])["p"] >= 1000 - 3000 // 16 - 700


def test_what_the_dominant_resource_is_decides() -> None:
    # p holds memory in the end, q cpu: each may have two thirds of what it needs most of, the classical example.
    snapshot = Snapshot()
    capacity = Capacity(cpu_milli=9_000, memory_bytes=18 * GIB, disk_bytes=GIB)
    snapshot.upsert_node(Node(name="n", capacity=capacity, runtimes=(RuntimeName.RUNC,)))
    pending = [*wait("p", 9, 1.0, cpu=1_000, memory=4 * GIB), *wait("q", 9, 1.0, cpu=3_000, memory=GIB)]
    assert placed(snapshot, pending) == {"p": 3, "q": 2}


def test_priority_comes_before_shares() -> None:
    got = placed(fleet(1), [*wait("p", 100, 2.0, priority=60), *wait("q", 100, 1.0)])
    assert got == {"p": 100, "q": 0}


def test_explain_says_what_the_project_holds() -> None:
    snapshot = fleet(2)
    snapshot.allocate("x", "n000", "app/p/db/1/1", Demand(cpu_milli=5_000, memory_bytes=GIB))
    instance = Instance(id="i", project="p", owner_kind="app", owner="web", created_at=1.0)  # type: ignore[arg-type]
    view = explain_instance(snapshot, "p/i", instance, AppSpec(name="web", project="p", image="x"))
    assert view.explanation.share == "project 'p' holds 25.0% of all cpu"
