"""Proposals to move instances: what they promise is free afterwards, and no rule or budget is broken on the way."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from test_scheduling import RUNTIMES, Machine, permitted

from atoll.model.devices import GpuDevice, GpuGrant, GpuSharing
from atoll.model.records import Capacity, Node
from atoll.model.spec import Affinity, Constraint, Gpu, Operator, Placement, SpreadBy
from atoll.scheduling.defrag import MOVES_MAX, propose
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot, Standing

Placed = dict[str, tuple[str, str, Demand]]
"""Id → node, group, demand."""


def world(chance: random.Random) -> tuple[dict[str, Node], Snapshot, Placed]:
    """What a plan has placed, with holes: much of it has left again."""
    nodes = {}
    snapshot = Snapshot()
    for number in range(chance.randint(2, 12)):
        gpus = tuple(GpuDevice(id=f"n{number}-{n}", model="x", memory_bytes=1 << 20) for n in range(chance.choice((0, 0, 2))))
        capacity = Capacity(cpu_milli=chance.choice((1000, 2000)), memory_bytes=2000, disk_bytes=100, gpus=gpus)
        site = number % 3
        nodes[f"n{number}"] = Node(name=f"n{number}", site=f"s{site}", region="r", capacity=capacity, runtimes=RUNTIMES)
        snapshot.upsert_node(nodes[f"n{number}"])
    pending = []
    for name in "abcd":
        rules = chance.choice(
            (
                (),
                (),
                (Constraint(label="node", operator=Operator.UNIQUE),),
                (Constraint(label="site", operator=Operator.GROUP_BY),),
                (Constraint(label="site", operator=Operator.CLUSTER),),
            )
        )
        near = chance.choice(((), (), (Affinity(app=chance.choice("abcd"), by=chance.choice(("node", "site"))),)))
        far = chance.choice(((), (), (Affinity(app=chance.choice("abcd"), by="node"),)))
        spread = chance.choice(list(SpreadBy))
        skew = chance.choice((None, None, 1))
        wish = Placement(constraints=rules, affinity=near, anti_affinity=far, spread=spread, max_skew=skew)
        gpu = chance.choice((None, None, Gpu(count=0.25), Gpu(count=1)))
        demand = Demand(cpu_milli=chance.randint(50, 400), memory_bytes=chance.randint(50, 400), gpu=gpu, placement=wish)
        group = f"app/p/{name}/1/1"
        pending += [Pending(id=f"p/{name}-{n}", group=group, demand=demand) for n in range(chance.randint(1, 8))]
    by_id = {item.id: item for item in pending}
    placed: Placed = {}
    for one in plan(snapshot, pending).placed:
        if chance.random() < 0.6:
            item = by_id[one.id]
            snapshot.allocate(one.id, one.node, item.group, item.demand, one.gpus)
            placed[one.id] = (one.node, item.group, item.demand)
    return nodes, snapshot, placed


def machines_of(nodes: dict[str, Node], placed: Placed) -> dict[str, Machine]:
    machines = {name: Machine(node, Standing.OPEN) for name, node in nodes.items()}
    for node, group, demand in placed.values():
        machines[node].held.append((group, demand))
    return machines


def broken(nodes: dict[str, Node], placed: Placed) -> set[str]:
    """Return those whose own rules, or whose neighbours' rules about them, do not hold where they are."""
    found = set()
    for id, (node, group, demand) in placed.items():
        machines = machines_of(nodes, {other: at for other, at in placed.items() if other != id})
        if not permitted(list(machines.values()), machines[node], group, demand):
            found.add(id)
    return found


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_moves_free_what_they_say_in_any_order_and_break_no_rule_and_no_budget(seed: int) -> None:
    chance = random.Random(seed)
    nodes, snapshot, placed = world(chance)
    budgets = {f"app/p/{name}": chance.choice((0, 1, 2, 8)) for name in "abcd"}
    movable = {id for id in placed if chance.random() < 0.9}
    demands = {group: demand for _, group, demand in placed.values()}
    before = broken(nodes, placed)
    view = propose(snapshot, demands, movable, lambda owner: budgets[owner])
    moves = [move for step in view.steps for move in step.moves]
    assert len(moves) <= MOVES_MAX
    assert len({move.instance for move in moves}) == len(moves)
    assert not {move.node for move in moves} & {move.to for move in moves}
    for name in "abcd":
        assert sum(move.instance.startswith(f"{name}-") for move in moves) <= budgets[f"app/p/{name}"]
    # The new one is made before the old one goes, in any order.
    chance.shuffle(moves)
    both = list(placed.values()) + [(move.to, *placed[f"p/{move.instance}"][1:]) for move in moves]
    for name, node in nodes.items():
        held = [demand for at, _, demand in both if at == name]
        assert sum(demand.cpu_milli for demand in held) <= node.capacity.cpu_milli
        assert sum(demand.memory_bytes for demand in held) <= node.capacity.memory_bytes
    for move in moves:
        id = f"p/{move.instance}"
        assert id in movable
        assert placed[id][0] == move.node
        placed[id] = (move.to, *placed[id][1:])
    assert broken(nodes, placed) <= before
    devices: dict[str, int] = {}
    for id, (node, _, _) in placed.items():
        [held] = [allocation for other, allocation in snapshot.allocations_on(node) if other == id]
        for grant in held.gpus:
            assert grant.device.startswith(f"{node}-")
            devices[grant.device] = devices.get(grant.device, 0) + grant.milli
    assert all(milli <= 1000 for milli in devices.values())
    for step in view.steps:
        what = step.frees.split()
        if what[0] == "node":
            assert not any(node == what[1].rstrip(":") for node, _, _ in placed.values())
        else:
            assert what[1] not in devices


def fleet(count: int, devices: int) -> Snapshot:
    snapshot = Snapshot()
    for number in range(count):
        gpus = tuple(GpuDevice(id=f"n{number}-{n}", model="x", memory_bytes=1 << 20) for n in range(devices))
        capacity = Capacity(cpu_milli=1000, memory_bytes=2048, disk_bytes=100, gpus=gpus)
        snapshot.upsert_node(Node(name=f"n{number}", site="s", region="r", capacity=capacity, runtimes=RUNTIMES))
    return snapshot


QUARTER = Demand(cpu_milli=10, memory_bytes=1, gpu=Gpu(count=0.25))
SHARE = GpuGrant(device="", sharing=GpuSharing.TIME_SLICE, milli=250, memory_bytes=1 << 18)


def test_a_node_that_few_keep_from_being_empty_is_freed_and_what_waits_would_fit() -> None:
    snapshot = fleet(2, devices=2)
    for number in range(2):
        grant = replace(SHARE, device=f"n{number}-0")
        snapshot.allocate(f"p/a-{number}", f"n{number}", "app/p/a/1/1", QUARTER, (grant,))
    waits = [Pending(id="p/b-0", group="app/p/b/1/1", demand=Demand(cpu_milli=10, memory_bytes=1, gpu=Gpu(count=2)))]
    view = propose(snapshot, {"app/p/a/1/1": QUARTER}, {"p/a-0", "p/a-1"}, lambda owner: 1, waits)
    assert [step.frees for step in view.steps] == ["node n0: 1 cores, 2.0KiB, 2 GPUs"]
    [move] = view.steps[0].moves
    assert (move.instance, move.project, move.node, move.to) == ("a-0", "p", "n0", "n1")
    assert [grant.device for grant in move.gpus] == ["n1-0"]
    assert (view.waiting, view.fit_now, view.fit_then) == (1, 0, 1)


def test_a_device_is_made_whole_where_its_node_stays_in_use() -> None:
    snapshot = fleet(2, devices=1)
    job = Demand(cpu_milli=500, memory_bytes=1)
    for number in range(2):
        snapshot.allocate(f"p/job-{number}", f"n{number}", "job/p/job/0/0", job)
        snapshot.allocate(f"p/a-{number}", f"n{number}", "app/p/a/1/1", QUARTER, (replace(SHARE, device=f"n{number}-0"),))
    demands = {"app/p/a/1/1": QUARTER, "job/p/job/0/0": job}
    view = propose(snapshot, demands, {"p/a-0", "p/a-1"}, lambda owner: 1)
    assert [step.frees for step in view.steps] == ["GPU n0-0 of node n0"]
    assert [(move.node, move.to) for move in view.steps[0].moves] == [("n0", "n1")]
    nothing = propose(fleet(3, devices=1), {}, set(), lambda owner: 1)
    assert nothing.steps == ()
