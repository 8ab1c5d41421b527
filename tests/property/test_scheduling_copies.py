"""A copy of a snapshot answers as the original does, and each changes by itself."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from test_scheduling import neighbours, snapshot_with_held

from atoll.model.devices import GpuDevice, GpuSharing
from atoll.model.records import Capacity, Node
from atoll.model.spec import Gpu, Placement, RuntimeName
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.plan import Plan, plan
from atoll.scheduling.snapshot import Snapshot

RUNTIMES = (RuntimeName.RUNC,)


def enter(snapshot: Snapshot, answer: Plan, pending: list[Pending]) -> None:
    """Count what was placed."""
    by_id = {item.id: item for item in pending}
    for placed in answer.placed:
        item = by_id[placed.id]
        snapshot.allocate(item.id, placed.node, item.group, item.demand, placed.gpus)


@given(neighbours(gangs=True), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_copy_plans_as_the_original_and_neither_hears_of_what_becomes_of_the_other(
    world: tuple[list, list[Pending], dict[str, tuple[str, ...]]],  # type: ignore[type-arg]
    first: bool,
) -> None:
    machines, pending, homes = world
    original = snapshot_with_held(machines, homes)
    copied = original.copy(original.copy())
    expected = plan(original, pending)
    assert plan(copied, pending) == expected
    changing, still = (copied, original) if first else (original, copied)
    enter(changing, expected, pending)
    for machine in machines[1:]:
        changing.remove_node(machine.node.name)
    for place in range(2):
        changing.release(f"n0-{place}")
    changing.upsert_node(Node(name="another", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1), labels={"disk": "new"}))
    assert plan(still, pending) == expected
    assert plan(changing.copy(), pending) == plan(changing, pending)


asks = st.one_of(
    st.builds(Gpu, count=st.sampled_from([1, 2, 4])),
    st.builds(Gpu, count=st.sampled_from([0.25, 0.5]), sharing=st.just(GpuSharing.TIME_SLICE)),
)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.lists(asks, max_size=10), st.lists(asks, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_copy_grants_the_same_devices_also_with_what_an_earlier_copy_knew(
    counts: list[int], held: list[Gpu], wanted: list[Gpu]
) -> None:
    original = Snapshot()
    for number, count in enumerate(counts):
        gpus = tuple(GpuDevice(id=f"g{number}-{place}", model="T", memory_bytes=16 << 30) for place in range(count))
        capacity = Capacity(cpu_milli=64_000, memory_bytes=1 << 40, disk_bytes=1 << 40, gpus=gpus)
        original.upsert_node(Node(name=f"n{number}", capacity=capacity, runtimes=RUNTIMES))

    def item(kind: str, number: int, gpu: Gpu) -> Pending:
        demand = Demand(cpu_milli=100, memory_bytes=1 << 20, runtimes=RUNTIMES, placement=Placement(), gpu=gpu)
        return Pending(id=f"{kind}{number}", group=f"app/p/{kind}{number}/1/1", demand=demand)

    before = [item("h", number, gpu) for number, gpu in enumerate(held)]
    pending = [item("w", number, gpu) for number, gpu in enumerate(wanted)]
    copied = original.copy()
    plan(copied, pending)
    for one in before:
        enter(original, plan(original, [one]), [one])
        copied = original.copy(copied)
    expected = plan(original, pending)
    assert plan(copied, pending) == expected
    enter(copied, expected, pending)
    assert plan(original, pending) == expected


def test_a_copy_shuns_what_the_original_shuns_and_neither_hears_of_the_other_s_taints() -> None:
    original = Snapshot()
    capacity = Capacity(cpu_milli=4000, memory_bytes=1 << 30, disk_bytes=1 << 30)
    shunned = Node(name="a", capacity=capacity, runtimes=RUNTIMES, taints=("old:prefer-no-schedule",))
    original.upsert_node(shunned)
    original.upsert_node(Node(name="b", capacity=capacity, runtimes=RUNTIMES))
    demand = Demand(cpu_milli=100, memory_bytes=1 << 20, runtimes=RUNTIMES, placement=Placement())
    pending = [Pending(id="one", group="app/p/web/1/1", demand=demand)]
    copied = original.copy()
    assert [placed.node for placed in plan(copied, pending).placed] == ["b"]
    original.upsert_node(replace(shunned, taints=()))
    assert [placed.node for placed in plan(original, pending).placed] == ["a"]
    assert [placed.node for placed in plan(copied, pending).placed] == ["b"]
