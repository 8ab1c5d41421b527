"""The planner against a slow one that places instance by instance with nothing but loops."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.model.records import Capacity, GpuDevice, Node
from atoll.model.spec import Constraint, Gpu, Operator, Placement, RuntimeName, SpreadBy
from atoll.scheduling.constraints import holds
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot, Standing

RUNTIMES = (RuntimeName.RUNC, RuntimeName.CRUN, RuntimeName.GVISOR)


@dataclass
class Machine:
    """One node of the reference planner."""

    node: Node
    standing: Standing
    held: list[tuple[str, Demand]] = field(default_factory=list)

    def label(self, key: str) -> str | None:
        own = {"node": self.node.name, "site": self.node.site, "region": self.node.region, "arch": self.node.arch}
        return own.get(key, self.node.labels.get(key))

    def free(self, what: str) -> int:
        return getattr(self.node.capacity, what) - sum(getattr(demand, what) for _, demand in self.held)

    def allowed(self, demand: Demand) -> bool:
        """Every hard rule."""
        wish, node = demand.placement, self.node
        if self.standing is not Standing.OPEN or not set(demand.runtimes) & set(node.runtimes):
            return False
        if wish.regions and "any" not in wish.regions and node.region not in wish.regions:
            return False
        if "*" not in wish.tolerations and set(node.taints) - set(wish.tolerations):
            return False
        if not all(holds(rule, self.label(rule.label)) for rule in wish.constraints):
            return False
        if node.capacity.disk_bytes < demand.disk_bytes:
            return False
        return self.free("cpu_milli") >= demand.cpu_milli and self.free("memory_bytes") >= demand.memory_bytes and self.gpus(demand)

    def gpus(self, demand: Demand) -> bool:
        if demand.gpu is None:
            return True
        right = sum(demand.gpu.model in (None, device.model) for device in self.node.capacity.gpus)
        return right - sum(other.gpus for _, other in self.held) >= demand.gpus

    def count(self, group: str) -> int:
        return sum(held == group for held, _ in self.held)

    def packing(self, demand: Demand) -> float:
        capacity = self.node.capacity
        cpu = 1.0 - (self.free("cpu_milli") - demand.cpu_milli) / max(capacity.cpu_milli, 1)
        memory = 1.0 - (self.free("memory_bytes") - demand.memory_bytes) / max(capacity.memory_bytes, 1)
        return (cpu + memory) / 2.0


def one_by_one(machines: list[Machine], pending: list[Pending]) -> dict[str, str | None]:
    """Place each instance on the best machine that is allowed, as the ones before it have left things."""
    answer: dict[str, str | None] = {}
    for item in sorted(pending, key=lambda item: item.order):
        wish = item.demand.placement

        def worth(machine: Machine, item: Pending = item, wish: Placement = wish) -> tuple[float, ...]:
            place = wish.spread
            together = [] if place is SpreadBy.NODE else [m for m in machines if m.label(place) == machine.label(place)]
            regions = wish.regions
            listed = regions.index(machine.node.region) if machine.node.region in regions else len(regions)
            if "any" in regions and machine.node.region not in regions:
                listed = regions.index("any")
            rank = listed if len(regions) > 1 else 0
            total = -rank * 10**10 - 100_000 * sum(m.count(item.group) for m in together) - 10 * machine.count(item.group)
            return (total * 10**6 + round(machine.packing(item.demand) * 10**6),)

        allowed = sorted((m for m in machines if m.allowed(item.demand)), key=lambda m: m.node.name)
        best = max(allowed, key=worth, default=None)
        answer[item.id] = best.node.name if best else None
        if best:
            best.held.append((item.group, item.demand))
    return answer


values = st.sampled_from(["a", "b", "1.2", "1.10"])
rules = st.one_of(
    st.builds(
        Constraint,
        label=st.sampled_from(["disk", "gen", "site", "arch"]),
        operator=st.sampled_from([Operator.EQUAL, Operator.NOT_EQUAL, Operator.IN, Operator.NOT_IN]),
        value=st.lists(values, min_size=1, max_size=2).map(tuple),
    ),
    st.builds(Constraint, label=st.just("gen"), operator=st.sampled_from([Operator.EXISTS, Operator.NOT_EXISTS])),
    st.builds(Constraint, label=st.just("gen"), operator=st.just(Operator.VERSION), value=st.just(">= 1.2, < 1.9")),
    st.builds(Constraint, label=st.just("disk"), operator=st.just(Operator.REGEXP), value=st.just("^[ab]$")),
)
nodes = st.builds(
    Node,
    name=st.just(""),
    site=st.sampled_from(["s1", "s2", "s3"]),
    region=st.sampled_from(["r1", "r2"]),
    capacity=st.builds(
        Capacity,
        cpu_milli=st.integers(0, 4000),
        memory_bytes=st.integers(0, 4000),
        disk_bytes=st.integers(50, 100),
        gpus=st.lists(st.sampled_from(["x", "y"]).map(lambda m: GpuDevice(id="", model=m, memory_bytes=1)), max_size=3).map(tuple),
    ),
    labels=st.dictionaries(st.sampled_from(["disk", "gen"]), values, max_size=2),
    taints=st.lists(st.sampled_from(["t1", "t2"]), max_size=1).map(tuple),
    runtimes=st.lists(st.sampled_from(RUNTIMES), min_size=1, unique=True).map(tuple),
    arch=st.sampled_from(["amd64", "arm64"]),
)
demands = st.builds(
    Demand,
    cpu_milli=st.integers(1, 1500),
    memory_bytes=st.integers(1, 1500),
    disk_bytes=st.integers(0, 80),
    gpu=st.none() | st.builds(Gpu, model=st.sampled_from([None, "x"]), count=st.sampled_from([0.5, 1, 2])),
    runtimes=st.sampled_from([RUNTIMES[:2], RUNTIMES[2:], RUNTIMES[1::-1]]),
    placement=st.builds(
        Placement,
        regions=st.sampled_from([(), (), ("r1",), ("r2", "any"), ("r2", "r1")]),
        constraints=st.lists(rules, max_size=1).map(tuple),
        spread=st.sampled_from(SpreadBy),
        tolerations=st.sampled_from([(), ("t1",), ("*",)]),
        priority=st.sampled_from([10, 50]),
    ),
)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Machine], list[Pending]]:
    machines = []
    for number, node in enumerate(draw(st.lists(nodes, max_size=7))):
        named = Node(**{name: getattr(node, name) for name in node.__struct_fields__} | {"name": f"n{number}"})
        machines.append(Machine(named, draw(st.sampled_from([Standing.OPEN] * 5 + list(Standing)))))
    pending = []
    for group, demand in enumerate(draw(st.lists(demands, max_size=4))):
        for number in range(draw(st.integers(1, 9))):
            created = draw(st.integers(0, 1))
            pending.append(Pending(id=f"g{group}-{number}", group=f"g{group}", demand=demand, created_at=float(created)))
    return machines, pending


def snapshot_of(machines: list[Machine]) -> Snapshot:
    snapshot = Snapshot()
    for machine in machines:
        snapshot.upsert_node(machine.node, machine.standing)
    return snapshot


@given(worlds())
@settings(max_examples=300, deadline=None)
def test_bulk_placement_is_what_placing_one_by_one_gives(world: tuple[list[Machine], list[Pending]]) -> None:
    machines, pending = world
    got = plan(snapshot_of(machines), pending)
    expected = one_by_one(machines, pending)
    assert {item.id: item.node for item in got.placed} | dict.fromkeys(got.rejected) == expected


@given(st.integers(0, 2**32), st.sampled_from(SpreadBy))
@settings(max_examples=150, deadline=None)
def test_bulk_equals_one_by_one_also_with_many_open_nodes(seed: int, spread: SpreadBy) -> None:
    chance = random.Random(seed)
    machines = []
    for number in range(chance.randint(10, 40)):
        sizes = (chance.choice((1000, 2000, 8000)), chance.choice((1000, 4000)))
        capacity = Capacity(cpu_milli=sizes[0], memory_bytes=sizes[1], disk_bytes=100)
        site = chance.randrange(6)
        node = Node(name=f"n{number}", site=f"s{site}", region=f"r{site % 2}", capacity=capacity, runtimes=RUNTIMES)
        machines.append(Machine(node, Standing.OPEN))
    snapshot = snapshot_of(machines)
    for number in range(chance.randint(0, 40)):
        machine = chance.choice(machines)
        held = Demand(cpu_milli=chance.randint(1, 300), memory_bytes=chance.randint(1, 300))
        snapshot.allocate(f"h{number}", machine.node.name, f"g{number % 3}", held)
        machine.held.append((f"g{number % 3}", held))
    pending = []
    for group in range(chance.randint(1, 3)):
        wish = Placement(spread=spread, regions=chance.choice(((), ("r1", "any"))))
        asked = Demand(cpu_milli=chance.randint(50, 900), memory_bytes=chance.randint(50, 900), placement=wish)
        pending += [Pending(id=f"g{group}-{n:03d}", group=f"g{group}", demand=asked) for n in range(chance.randint(1, 60))]
    got = plan(snapshot, pending)
    expected = one_by_one(machines, pending)
    assert {item.id: item.node for item in got.placed} | dict.fromkeys(got.rejected) == expected


@given(worlds())
@settings(max_examples=150, deadline=None)
def test_no_plan_over_commits_a_node_or_breaks_a_hard_rule(world: tuple[list[Machine], list[Pending]]) -> None:
    machines, pending = world
    demands_by_id = {item.id: item.demand for item in pending}
    by_name = {machine.node.name: machine for machine in machines}
    for item in plan(snapshot_of(machines), pending).placed:
        machine, demand = by_name[item.node], demands_by_id[item.id]
        assert machine.allowed(demand)
        assert item.runtime == next(name for name in demand.runtimes if name in machine.node.runtimes)
        machine.held.append(("", demand))
        assert machine.free("cpu_milli") >= 0
        assert machine.free("memory_bytes") >= 0


@given(worlds(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_the_order_of_nodes_and_of_instances_does_not_matter(
    world: tuple[list[Machine], list[Pending]], chance: random.Random
) -> None:
    machines, pending = world
    first = plan(snapshot_of(machines), pending)
    shuffled_machines, shuffled = machines[:], pending[:]
    chance.shuffle(shuffled_machines)
    chance.shuffle(shuffled)
    assert plan(snapshot_of(shuffled_machines), shuffled) == first


@given(worlds())
@settings(max_examples=150, deadline=None)
def test_every_instance_is_placed_or_told_why_not(world: tuple[list[Machine], list[Pending]]) -> None:
    machines, pending = world
    snapshot = snapshot_of(machines)
    used = snapshot.used.copy()
    answer = plan(snapshot, pending)
    assert (snapshot.used == used).all()
    assert sorted([item.id for item in answer.placed] + list(answer.rejected)) == sorted(item.id for item in pending)
    for rejection in answer.rejected.values():
        assert rejection.message
        assert rejection.mend
        assert sum(rejection.failed.values()) == len(machines)


steps = st.lists(
    st.tuples(st.sampled_from(["node", "drop", "allocate", "release"]), st.integers(0, 4), st.integers(0, 6), demands), max_size=40
)


@given(steps, st.lists(nodes, min_size=5, max_size=5))
@settings(max_examples=150, deadline=None)
def test_a_snapshot_kept_step_by_step_equals_one_made_at_once(
    todo: list[tuple[str, int, int, Demand]], machines: list[Node]
) -> None:
    kept, there, held = Snapshot(), {}, {}
    named = [Node(**{f: getattr(n, f) for f in n.__struct_fields__} | {"name": f"n{i}"}) for i, n in enumerate(machines)]
    for what, number, id, demand in todo:
        name = f"n{number}"
        if what == "node":
            kept.upsert_node(named[number])
            there[name] = named[number]
        elif what == "drop":
            kept.remove_node(name)
            there.pop(name, None)
        elif what == "allocate":
            kept.allocate(f"i{id}", name, f"g{id % 2}", demand)
            held[f"i{id}"] = (name, f"g{id % 2}", demand)
        else:
            assert kept.release(f"i{id}") == (held.pop(f"i{id}", None) is not None)
    fresh = Snapshot()
    for node in there.values():
        fresh.upsert_node(node)
    for id_, (name, group, demand) in held.items():
        fresh.allocate(id_, name, group, demand)
    assert len(kept) == len(fresh) == len(there)
    for name in there:
        old, new = kept.row_of(name), fresh.row_of(name)
        assert old is not None
        assert new is not None
        assert (kept.used[:, old] == fresh.used[:, new]).all()
        assert (kept.total[:, old] == fresh.total[:, new]).all()
        for group in ("g0", "g1"):
            assert kept.count_by_row(group).get(old, 0) == fresh.count_by_row(group).get(new, 0)
    probe = [Pending(id=f"p{n}", group="g0", demand=step[3]) for n, step in enumerate(todo[:5])]
    assert plan(kept, probe) == plan(fresh, probe)
