"""Preemption against a search through every set of victims on every node."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.model.records import Capacity, Node
from atoll.model.spec import Placement, RuntimeName
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.interface import View
from atoll.scheduling.plan import plan
from atoll.scheduling.preemption import preempt
from atoll.scheduling.snapshot import Snapshot

PRIORITIES = (10, 20, 50)
demands = st.builds(
    Demand,
    cpu_milli=st.integers(1, 600),
    memory_bytes=st.integers(1, 600),
    placement=st.sampled_from(PRIORITIES).map(lambda priority: Placement(priority=priority)),
)
held = st.tuples(demands, st.sampled_from(["a", "b", "c"]), st.sampled_from(["stays", "goes", "gone"]))
worlds = st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 1500), st.lists(held, max_size=5)), min_size=1, max_size=4)


@given(worlds, demands, st.sampled_from([{}, {"a": 0}, {"a": 1, "b": 2}]))
@settings(max_examples=400, deadline=None)
def test_preemption_takes_the_lowest_and_fewest_and_nothing_that_it_need_not(
    world: list[tuple[int, int, list[tuple[Demand, str, str]]]], asked: Demand, budgets: dict[str, int]
) -> None:
    snapshot = Snapshot()
    standing: dict[str, tuple[str, Demand, str, str]] = {}
    for number, (cpu, memory, instances) in enumerate(world):
        name = f"n{number}"
        capacity = Capacity(cpu_milli=cpu, memory_bytes=memory, disk_bytes=0)
        snapshot.upsert_node(Node(name=name, capacity=capacity, runtimes=(RuntimeName.RUNC,)))
        for place, (demand, owner, fate) in enumerate(instances):
            id = f"{name}-{place}"
            snapshot.allocate(id, name, owner, demand)
            standing[id] = (name, demand, owner, fate)
    item = Pending(id="new", group="new", demand=asked)
    if not plan(snapshot, [item]).rejected:
        return

    def fits(name: str, gone: tuple[str, ...]) -> bool:
        capacity = snapshot.nodes[name].capacity
        left = [d for id, (node, d, _, fate) in standing.items() if node == name and fate != "gone" and id not in gone]
        cpu = capacity.cpu_milli - sum(d.cpu_milli for d in left) >= asked.cpu_milli
        return cpu and capacity.memory_bytes - sum(d.memory_bytes for d in left) >= asked.memory_bytes

    def may(ids: tuple[str, ...]) -> bool:
        owners = [standing[id][2] for id in ids]
        return all(owners.count(owner) <= budgets.get(owner, 9) for owner in owners)

    found = preempt(
        View(snapshot),
        item,
        lambda id: standing[id][3] == "goes",
        lambda id: standing[id][3] == "gone",
        lambda owner: budgets.get(owner, 9),
    )
    lower = [id for id, (_, d, _, fate) in standing.items() if fate == "goes" and d.placement.priority < asked.placement.priority]
    options = [
        (max((standing[id][1].placement.priority for id in ids), default=-1), len(ids))
        for name in snapshot.nodes
        for count in range(6)
        for ids in combinations([id for id in lower if standing[id][0] == name], count)
        if may(ids) and fits(name, ids)
    ]
    if found is None:
        # It may be careful where an app's budget makes it choose, and where nothing of lower priority is placed at all.
        anything = any(d.placement.priority < asked.placement.priority for _, d, _, _ in standing.values())
        assert not options or budgets or not anything
        return
    assert set(found.victims) <= set(lower)
    assert may(found.victims)
    assert fits(found.node, found.victims)
    assert all(not fits(found.node, tuple(v for v in found.victims if v != one)) for one in found.victims)
    if not budgets:
        worth = (max((standing[id][1].placement.priority for id in found.victims), default=-1), len(found.victims))
        reachable = [option for option in options if option[1] <= 3 or option[0] < worth[0]]
        assert worth <= min(reachable, default=worth) or worth[0] == min(options)[0]
