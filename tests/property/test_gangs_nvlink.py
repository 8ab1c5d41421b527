"""Gangs joined by NVLink, on machines with any links at all: joined when placed, and refused only where nothing is."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.model.devices import GpuDevice, GpuGrant, GpuLink, LinkKind
from atoll.model.records import Capacity, Node
from atoll.model.spec import Gpu, Placement, RuntimeName
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot

GROUP = "job/p/train/0/0"
Pairs = frozenset[tuple[int, int]]


def machine(name: str, count: int, pairs: Pairs) -> Node:
    gpus = tuple(
        GpuDevice(
            id=f"{name}-{one}",
            model="A",
            memory_bytes=1,
            links=tuple(
                GpuLink(peer=f"{name}-{other}", kind=LinkKind.NVLINK, width=1)
                for other in range(count)
                if (min(one, other), max(one, other)) in pairs
            ),
        )
        for one in range(count)
    )
    capacity = Capacity(cpu_milli=64_000, memory_bytes=1 << 40, disk_bytes=1 << 40, gpus=gpus)
    return Node(name=name, capacity=capacity, runtimes=(RuntimeName.RUNC,))


@st.composite
def fleets(draw: st.DrawFn) -> list[tuple[int, Pairs, frozenset[int], frozenset[int]]]:
    """Machines: devices, which pairs are linked, which others hold, which one of the gang holds that runs already."""
    made = []
    runs_at = draw(st.none() | st.integers(0, 2))
    for place in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, 6))
        every = list(combinations(range(count), 2))
        pairs = frozenset(draw(st.lists(st.sampled_from(every), unique=True))) if every else frozenset()
        if draw(st.booleans()):
            pairs = frozenset(every)
        taken = draw(st.frozensets(st.integers(0, count - 1), max_size=3))
        own = frozenset({draw(st.integers(0, count - 1))}) if place == runs_at else frozenset()
        made.append((count, pairs, taken - own, own))
    return made


@given(fleets(), st.integers(1, 4), st.integers(1, 2))
@settings(max_examples=400, deadline=None)
def test_a_gang_on_nvlink_is_joined_as_a_whole_and_refused_only_where_no_node_could_join_it(
    fleet: list[tuple[int, Pairs, frozenset[int], frozenset[int]]], members: int, each: int
) -> None:
    snapshot = Snapshot()
    wish = Placement(gang=True, together="nvlink")
    asked = Demand(cpu_milli=1, memory_bytes=1, gpu=Gpu(count=each), placement=wish)
    single = Demand(cpu_milli=1, memory_bytes=1, gpu=Gpu(count=1), placement=wish)
    other = Demand(cpu_milli=1, memory_bytes=1, gpu=Gpu(count=1))
    for place, (count, pairs, taken, own) in enumerate(fleet):
        snapshot.upsert_node(machine(f"n{place}", count, pairs))
        for device in taken | own:
            grant = GpuGrant(device=f"n{place}-{device}", memory_bytes=1)
            group, demand = (GROUP, single) if device in own else ("app/p/o/1/1", other)
            snapshot.allocate(f"{place}-{device}", f"n{place}", group, demand, (grant,))
    pending = [Pending(id=f"i{n}", group=GROUP, demand=asked) for n in range(members)]
    answer = plan(snapshot, pending)

    def could(place: int) -> bool:
        count, pairs, taken, own = fleet[place]
        idle = [index for index in range(count) if index not in taken | own]
        sets = combinations(idle, members * each)
        return any(all(pair in pairs for pair in combinations(sorted({*chosen, *own}), 2)) for chosen in sets)

    held = [place for place, (_, _, _, own) in enumerate(fleet) if own]
    possible = {place for place in (held or range(len(fleet))) if could(place)}
    if not possible:
        assert answer.placed == ()
        assert {item.id for item in pending} == set(answer.rejected)
        for rejection in answer.rejected.values():
            assert rejection.message
            assert sum(rejection.failed.values()) == len(fleet)
        return
    assert len(answer.placed) == members
    assert len({placed.node for placed in answer.placed}) == 1
    place = int(answer.placed[0].node[1:])
    got = sorted(int(grant.device.partition("-")[2]) for placed in answer.placed for grant in placed.gpus)
    _, pairs, taken, own = fleet[place]
    assert [len(placed.gpus) for placed in answer.placed] == [each] * members
    assert not set(got) & (taken | own)
    assert all(pair in pairs for pair in combinations(sorted({*got, *own}), 2))
