"""The planner against a slow one that places instance by instance with nothing but loops."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from atoll.model.devices import MILLI, GpuDevice
from atoll.model.records import Capacity, Node
from atoll.model.spec import Affinity, Constraint, Gpu, Operator, Placement, Quota, RuntimeName, SpreadBy
from atoll.model.units import Bytes, Cores
from atoll.scheduling.constraints import holds
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.gpu.usable import EXPECTED_SHARES, EXPECTED_WHOLE
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot, Standing

RUNTIMES = (RuntimeName.RUNC, RuntimeName.CRUN, RuntimeName.GVISOR)


@dataclass
class Machine:
    """One node of the reference planner."""

    node: Node
    standing: Standing
    held: list[tuple[str, Demand]] = field(default_factory=list)
    images: tuple[str, ...] = ()

    def label(self, key: str) -> str | None:
        own = {"node": self.node.name, "site": self.node.site, "region": self.node.region, "arch": self.node.arch}
        return own.get(key, self.node.labels.get(key))

    def shunned(self) -> set[str]:
        return {taint for taint in self.node.taints if taint.endswith(":prefer-no-schedule")}

    def free(self, what: str) -> int:
        return getattr(self.node.capacity, what) - sum(getattr(demand, what) for _, demand in self.held)

    def suits(self, demand: Demand) -> bool:
        """Every hard rule about facts."""
        wish, node = demand.placement, self.node
        if self.standing is not Standing.OPEN or not set(demand.runtimes) & set(node.runtimes):
            return False
        if wish.regions and "any" not in wish.regions and node.region not in wish.regions:
            return False
        if "*" not in wish.tolerations and set(node.taints) - set(wish.tolerations) - self.shunned():
            return False
        if not all(holds(rule, self.label(rule.label)) for rule in wish.constraints):
            return False
        return (
            node.capacity.disk_bytes >= demand.disk_bytes and self.take([MILLI] * len(node.capacity.gpus), demand.gpu) is not None
        )

    def allowed(self, demand: Demand) -> bool:
        """Every hard rule but those about what is placed."""
        if not self.suits(demand):
            return False
        return self.free("cpu_milli") >= demand.cpu_milli and self.free("memory_bytes") >= demand.memory_bytes and self.gpus(demand)

    def take(self, free: list[int], gpu: Gpu | None) -> list[int] | None:
        """Return what is free of each device (thousandths) once `gpu` has its part; None where it does not fit."""
        if gpu is None:
            return free
        models = [device.model for device in self.node.capacity.gpus]
        right = [place for place, model in enumerate(models) if gpu.model in (None, model)]
        left = free[:]
        if gpu.count < 1:
            share = int(gpu.count * MILLI)
            open_ = [place for place in right if share <= free[place]]
            if not open_:
                return None
            left[min(open_, key=lambda place: (free[place], place))] -= share
            return left
        idle = [place for place in right if free[place] == MILLI]
        sets = combinations(idle, int(gpu.count))
        best = min(sets, key=lambda chosen: (len({models[place] for place in chosen}), chosen), default=None)
        for place in best or ():
            left[place] = 0
        return left if best else None

    def gpus_free(self) -> list[int]:
        free = [MILLI] * len(self.node.capacity.gpus)
        for _, demand in self.held:
            free = self.take(free, demand.gpu) or free
        return free

    def gpus(self, demand: Demand) -> bool:
        return self.take(self.gpus_free(), demand.gpu) is not None

    def gpu_scores(self, demand: Demand) -> int:
        """Return what both scores about GPUs say, weighted, in millionths."""
        free = self.gpus_free()
        total = MILLI * len(free)
        if demand.gpu is None:
            return 100 * -round((1 + sum(free) / total) / 2 * 10**6) if total else 0
        after = self.take(free, demand.gpu)
        assert after is not None
        left = (sum(free) - demand.gpu_milli) / max(total, 1)
        cpu = (self.free("cpu_milli") - demand.cpu_milli) / max(self.node.capacity.cpu_milli, 1)
        memory = (self.free("memory_bytes") - demand.memory_bytes) / max(self.node.capacity.memory_bytes, 1)
        stranded = min(max(left - min(cpu, memory), 0.0), 1.0)
        return 30 * round((usable_of(after) - usable_of(free) - stranded) * 10**6)

    def count(self, group: str) -> int:
        return sum(held == group for held, _ in self.held)

    def packing(self, demand: Demand) -> float:
        capacity = self.node.capacity
        cpu = 1.0 - (self.free("cpu_milli") - demand.cpu_milli) / max(capacity.cpu_milli, 1)
        memory = 1.0 - (self.free("memory_bytes") - demand.memory_bytes) / max(capacity.memory_bytes, 1)
        return (cpu + memory) / 2.0


def usable_of(free: list[int]) -> float:
    idle = free.count(MILLI)
    shares = sum(often * milli / MILLI for milli in free for share, often in EXPECTED_SHARES if milli >= share)
    return shares + sum(often * idle for count, often in EXPECTED_WHOLE if idle >= count)


def owner(group: str) -> str:
    return group.split("/")[2] if "/" in group else group


def mates(machines: list[Machine], machine: Machine, label: str) -> list[Machine]:
    """Return the machines in the same place; none for one that has no such label."""
    return [m for m in machines if m.label(label) == machine.label(label)] if machine.label(label) is not None else []


def number(near: list[Machine], name: str) -> int:
    return sum(owner(group) == name for m in near for group, _ in m.held)


def permitted(machines: list[Machine], machine: Machine, group: str, demand: Demand, homes: tuple[str, ...] = ()) -> bool:
    """Every hard rule about what is placed already."""
    wish, name = demand.placement, owner(group)
    caps = [(rule.by, 1) for rule in wish.anti_affinity if rule.weight is None and rule.app == name]
    evens = [] if wish.max_skew is None else [(str(wish.spread), wish.max_skew, 0)]
    clusters = [rule.by for rule in wish.affinity if rule.weight is None and rule.app == name]
    for rule in wish.constraints:
        if rule.operator in (Operator.UNIQUE, Operator.MAX_PER):
            caps.append((rule.label, int(rule.value or 1)))  # type: ignore[arg-type]  # texts only here
        elif rule.operator is Operator.GROUP_BY:
            evens.append((rule.label, 1, int(rule.value or 0)))  # type: ignore[arg-type]
        elif rule.operator is Operator.CLUSTER and not rule.value:
            clusters.append(rule.label)
    if any(number(mates(machines, machine, label), name) >= most for label, most in caps):
        return False
    for label in clusters:
        somewhere = any(number([m], name) for m in machines if m.label(label) is not None)
        if machine.label(label) is None or (somewhere and not number(mates(machines, machine, label), name)):
            return False
    if wish.together is not None:
        near = [m for m in machines if m.standing is not Standing.LOST and m.label(wish.together) is not None and number([m], name)]
        there = {m.label(wish.together) for m in near}
        if machine.label(wish.together) is None or (there and machine.label(wish.together) not in there):
            return False
    for label, skew, least in evens:
        usable = {m.label(label) for m in machines if m.label(label) is not None and m.suits(demand)}
        count = {v: sum(m.count(group) for m in machines if m.label(label) == v) for v in usable}
        low = min(count.values()) if len(count) >= max(least, 1) else 0
        if machine.label(label) is None or sum(m.count(group) for m in mates(machines, machine, label)) + 1 - low > skew:
            return False
    for near in wish.affinity:
        if near.weight is None and near.app != name and not number(mates(machines, machine, near.by), near.app):
            return False
    for far in wish.anti_affinity:
        if far.weight is None and far.app != name and number(mates(machines, machine, far.by), far.app):
            return False
    for other in machines:
        for theirs, held in other.held:
            for far in held.placement.anti_affinity:
                if far.weight is None and far.app == name and owner(theirs) != name and other in mates(machines, machine, far.by):
                    return False
    if demand.pinned:
        holders = [m for m in machines if m.node.name in homes or number([m], name)]
        waiting = [m for m in holders if not m.count(group) or m.standing not in (Standing.OPEN, Standing.CORDONED)]
        if waiting and machine not in waiting:
            return False
    return True


def liking(machines: list[Machine], machine: Machine, item: Pending) -> float:
    """The soft rules about other apps, and about images."""
    total = 0
    for sign, wishes in ((1, item.demand.placement.affinity), (-1, item.demand.placement.anti_affinity)):
        for wish in wishes:
            if wish.weight is not None and wish.app != owner(item.group):
                total += sign * wish.weight * bool(number(mates(machines, machine, wish.by), wish.app))
    images = item.demand.images
    return 20.0 * total + (5.0 * sum(image in machine.images for image in images) / len(images) if images else 0.0)


def within(quota: Quota, machines: list[Machine], demand: Demand) -> bool:
    """Whether one more may be placed; everything is of one project."""
    all_held = [held for machine in machines for _, held in machine.held] + [demand]
    return (
        (quota.cpu is None or sum(held.cpu_milli for held in all_held) <= quota.cpu.milli)
        and (quota.memory is None or sum(held.memory_bytes for held in all_held) <= quota.memory)
        and (quota.instances is None or len(all_held) <= quota.instances)
    )


def one_by_one(
    machines: list[Machine],
    pending: list[Pending],
    homes: dict[str, tuple[str, ...]] | None = None,
    quota: Quota = Quota(),
) -> dict[str, str | None]:
    """Place each instance on the best machine that is allowed, as the ones before it have left things; gangs as a whole."""
    answer: dict[str, str | None] = {}
    ordered = sorted(pending, key=lambda item: item.order)
    for item in ordered:
        if item.id in answer:
            continue
        at = (homes or {}).get(item.group, ())
        if not item.demand.placement.gang:
            answer[item.id] = put_one(machines, item, at, quota, machines)
            continue
        members = [other for other in ordered if other.group == item.group]
        label = item.demand.placement.together
        places: list[list[Machine]] = [machines]
        if label is not None:
            order = dict.fromkeys(m.label(label) for m in allowed_best_first(machines, item, at, quota))
            places = [[m for m in machines if m.label(label) == value] for value in order if value is not None]
        for place in places:
            before = [machine.held[:] for machine in machines]
            went = [put_one(machines, member, at, quota, place) for member in members]
            if None not in went:
                answer.update((member.id, name) for member, name in zip(members, went, strict=True))
                break
            for machine, held in zip(machines, before, strict=True):
                machine.held = held
        else:
            answer.update((member.id, None) for member in members)
    return answer


def worth(machines: list[Machine], machine: Machine, item: Pending) -> float:
    wish = item.demand.placement
    together = [] if wish.spread is SpreadBy.NODE else [m for m in machines if m.label(wish.spread) == machine.label(wish.spread)]
    regions = wish.regions
    listed = regions.index(machine.node.region) if machine.node.region in regions else len(regions)
    if "any" in regions and machine.node.region not in regions:
        listed = regions.index("any")
    rank = listed if len(regions) > 1 else 0
    total = -rank * 10**10 - 100_000 * sum(m.count(item.group) for m in together) - 10 * machine.count(item.group)
    total -= 50_000 * len(machine.shunned()) * ("*" not in wish.tolerations)
    total += liking(machines, machine, item)
    return total * 10**6 + round(machine.packing(item.demand) * 10**6) + machine.gpu_scores(item.demand)


def allowed_best_first(machines: list[Machine], item: Pending, at: tuple[str, ...], quota: Quota) -> list[Machine]:
    free = machines if within(quota, machines, item.demand) else []
    may = [m for m in free if m.allowed(item.demand) and permitted(machines, m, item.group, item.demand, at)]
    return sorted(may, key=lambda m: (-worth(machines, m, item), m.node.name))


def put_one(machines: list[Machine], item: Pending, at: tuple[str, ...], quota: Quota, among: list[Machine]) -> str | None:
    best = next((m for m in allowed_best_first(machines, item, at, quota) if m in among), None)
    if best is None:
        return None
    best.held.append((item.group, item.demand))
    return best.node.name


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
    taints=st.lists(st.sampled_from(["t1", "t2", "t3:prefer-no-schedule"]), max_size=2, unique=True).map(tuple),
    runtimes=st.lists(st.sampled_from(RUNTIMES), min_size=1, unique=True).map(tuple),
    arch=st.sampled_from(["amd64", "arm64"]),
)
images = st.sampled_from([(), (), ("a",), ("b", "a"), ("c",)])
demands = st.builds(
    Demand,
    images=images,
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
    for place, node in enumerate(draw(st.lists(nodes, max_size=7))):
        named = Node(**{name: getattr(node, name) for name in node.__struct_fields__} | {"name": f"n{place}"})
        machines.append(Machine(named, draw(st.sampled_from([Standing.OPEN] * 5 + list(Standing))), images=draw(images)))
    pending = []
    for group, demand in enumerate(draw(st.lists(demands, max_size=4))):
        for number in range(draw(st.integers(1, 9))):
            created = draw(st.integers(0, 1))
            pending.append(Pending(id=f"g{group}-{number}", group=f"g{group}", demand=demand, created_at=float(created)))
    return machines, pending


def snapshot_of(machines: list[Machine]) -> Snapshot:
    snapshot = Snapshot()
    for machine in machines:
        snapshot.set_images(machine.node.name, machine.images)
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
        rules = chance.choice(((), (), (Constraint(label="site", operator=Operator.MAX_PER, value="3"),)))
        skew = chance.choice((None, None, 1, 2))
        wish = Placement(spread=spread, regions=chance.choice(((), ("r1", "any"))), constraints=rules, max_skew=skew)
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


labels = st.sampled_from(["node", "site", "region", "disk", "gen"])
apps = st.sampled_from(["a", "b", "c"])
wishes = st.lists(st.builds(Affinity, app=apps, by=labels, weight=st.sampled_from([None, None, 1, 60])), max_size=2).map(tuple)
counting = st.one_of(
    st.builds(Constraint, label=labels, operator=st.sampled_from([Operator.UNIQUE, Operator.CLUSTER, Operator.GROUP_BY])),
    st.builds(Constraint, label=labels, operator=st.just(Operator.MAX_PER), value=st.sampled_from(["1", "2"])),
    st.builds(Constraint, label=labels, operator=st.just(Operator.GROUP_BY), value=st.sampled_from(["2", "4"])),
)


@st.composite
def neighbours(draw: st.DrawFn, gangs: bool = False) -> tuple[list[Machine], list[Pending], dict[str, tuple[str, ...]]]:
    """Nodes with instances of three apps on them, and more to come, with rules about each other."""
    machines, _ = draw(worlds())
    demands_by_group: dict[str, Demand] = {}
    pending, homes = [], {}
    for name in ("a", "b", "c"):
        for release in (1, 2):
            placement = draw(
                st.builds(
                    Placement,
                    constraints=st.lists(counting, max_size=1).map(tuple),
                    affinity=wishes,
                    anti_affinity=wishes,
                    spread=st.sampled_from(SpreadBy),
                    max_skew=st.sampled_from([None, None, 1, 2]),
                    gang=st.booleans() if gangs else st.just(False),
                    together=st.sampled_from([None, "node", "site", "region", "disk"]) if gangs else st.none(),
                )
            )
            if not placement.gang:
                placement = replace(placement, together=None)
            demands_by_group[f"app/p/{name}/{release}/1"] = Demand(
                cpu_milli=draw(st.integers(1, 600)),
                memory_bytes=draw(st.integers(1, 600)),
                runtimes=RUNTIMES,
                placement=placement,
                pinned=draw(st.sampled_from([False, False, False, True])),
            )
    for group, demand in demands_by_group.items():
        for machine in draw(st.lists(st.sampled_from(machines), max_size=2)) if machines else []:
            machine.held.append((group, demand))
        if draw(st.booleans()):
            homes[group] = tuple(draw(st.lists(st.sampled_from(["n0", "n3", "gone"]), max_size=2, unique=True)))
            for other in demands_by_group:
                if owner(other) == owner(group):
                    homes[other] = homes[group]
        for index in range(draw(st.integers(0, 6))):
            pending.append(Pending(id=f"{group}-{index}", group=group, demand=demand, created_at=float(draw(st.integers(0, 1)))))
    return machines, pending, homes


def snapshot_with_held(machines: list[Machine], homes: dict[str, tuple[str, ...]]) -> Snapshot:
    snapshot = snapshot_of(machines)
    for machine in machines:
        for place, (group, demand) in enumerate(machine.held):
            snapshot.allocate(f"{machine.node.name}-{place}", machine.node.name, group, demand)
    snapshot.homes = {group.rsplit("/", 2)[0]: names for group, names in homes.items()}
    return snapshot


@given(neighbours())
@settings(max_examples=400, deadline=None)
def test_rules_about_other_instances_hold_in_bulk_as_they_do_one_by_one(
    world: tuple[list[Machine], list[Pending], dict[str, tuple[str, ...]]],
) -> None:
    machines, pending, homes = world
    got = plan(snapshot_with_held(machines, homes), pending)
    expected = one_by_one(machines, pending, homes)
    assert {item.id: item.node for item in got.placed} | dict.fromkeys(got.rejected) == expected
    for rejection in got.rejected.values():
        assert rejection.message
        assert sum(rejection.failed.values()) == len(machines)


@given(neighbours(gangs=True))
@settings(max_examples=500, deadline=None)
def test_gangs_are_placed_as_a_whole_where_placing_one_by_one_finds_room_for_all(
    world: tuple[list[Machine], list[Pending], dict[str, tuple[str, ...]]],
) -> None:
    machines, pending, homes = world
    got = plan(snapshot_with_held(machines, homes), pending)
    expected = one_by_one(machines, pending, homes)
    assert {item.id: item.node for item in got.placed} | dict.fromkeys(got.rejected) == expected
    for rejection in got.rejected.values():
        assert rejection.message
        assert sum(rejection.failed.values()) == len(machines)


@given(st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_several_gangs_over_many_nodes_are_placed_as_a_whole_and_none_in_parts(seed: int) -> None:
    chance = random.Random(seed)
    machines = []
    for number in range(chance.randint(5, 25)):
        capacity = Capacity(cpu_milli=chance.choice((1000, 2000, 4000)), memory_bytes=4000, disk_bytes=100)
        site = chance.randrange(4)
        node = Node(name=f"n{number}", site=f"s{site}", region=f"r{site % 2}", capacity=capacity, runtimes=RUNTIMES)
        machines.append(Machine(node, Standing.OPEN))
        for index in range(chance.randint(0, 3)):
            machines[-1].held.append((f"app/p/h/{index}/1", Demand(cpu_milli=chance.randint(100, 400), memory_bytes=100)))
    pending = []
    for name in "abc":
        wish = Placement(
            gang=chance.random() < 0.8,
            spread=chance.choice(list(SpreadBy)),
            constraints=chance.choice(((), (), (Constraint(label="node", operator=Operator.MAX_PER, value="2"),))),
        )
        wish = replace(wish, together=chance.choice((None, "node", "site", "site", "region")) if wish.gang else None)
        asked = Demand(cpu_milli=chance.choice((200, 500, 900)), memory_bytes=100, placement=wish)
        for n in range(chance.randint(1, 14)):
            created = float(chance.randint(0, 2))
            pending.append(Pending(id=f"{name}-{n:03d}", group=f"app/p/{name}/1/1", demand=asked, created_at=created))
    got = plan(snapshot_with_held(machines, {}), pending)
    expected = one_by_one(machines, pending)
    assert {item.id: item.node for item in got.placed} | dict.fromkeys(got.rejected) == expected


def fairly(machines: list[Machine], pending: list[Pending], weights: dict[str, int]) -> dict[str, str | None]:
    """One by one: of the highest priority, the oldest of the project that holds least by its dominant resource and weight."""
    answer: dict[str, str | None] = {}

    def project(group: str) -> str:
        return group.split("/")[1]

    def share(name: str) -> float:
        parts = []
        for what in ("cpu_milli", "memory_bytes"):
            total = sum(getattr(m.node.capacity, what) for m in machines)
            used = sum(getattr(held, what) for m in machines for group, held in m.held if project(group) == name)
            parts.append(used / total if total else 0.0)
        return max(parts) / weights.get(name, 1)

    left = pending[:]
    while left:
        top = max(item.demand.placement.priority for item in left)
        first = {}
        for item in sorted(left, key=lambda item: item.order):
            if item.demand.placement.priority == top:
                first.setdefault(project(item.group), item)
        item = min(first.values(), key=lambda item: (share(project(item.group)), item.order))
        answer[item.id] = put_one(machines, item, (), Quota(), machines)
        left.remove(item)
    return answer


@given(st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_projects_of_equal_priority_take_turns_by_their_dominant_share_and_weight(seed: int) -> None:
    chance = random.Random(seed)
    machines = []
    for number in range(chance.randint(1, 8)):
        sizes = (chance.choice((1000, 3000)), chance.choice((1000, 4000)))
        capacity = Capacity(cpu_milli=sizes[0], memory_bytes=sizes[1], disk_bytes=100)
        node = Node(name=f"n{number}", site=f"s{number % 3}", capacity=capacity, runtimes=RUNTIMES)
        machines.append(Machine(node, Standing.OPEN))
        for index in range(chance.randint(0, 2)):
            held = Demand(cpu_milli=chance.randint(1, 300), memory_bytes=chance.randint(1, 300))
            machines[-1].held.append((f"app/{chance.choice('pqr')}/h/{index}/1", held))
    weights = {name: chance.choice((1, 1, 3)) for name in "pqr"}
    pending = []
    for index in range(chance.randint(1, 4)):
        wish = Placement(priority=chance.choice((10, 50, 50)), spread=chance.choice(list(SpreadBy)))
        asked = Demand(cpu_milli=chance.randint(50, 600), memory_bytes=chance.randint(50, 600), placement=wish)
        group = f"app/{chance.choice('pqr')}/{index}/1/1"
        for n in range(chance.randint(1, 7)):
            pending.append(Pending(id=f"{group}-{n}", group=group, demand=asked, created_at=float(chance.randint(0, 3))))
    snapshot = snapshot_with_held(machines, {})
    snapshot.quotas = {name: Quota(weight=weight) for name, weight in weights.items() if weight > 1}
    got = plan(snapshot, pending)
    chance.shuffle(pending)
    assert plan(snapshot, pending) == got
    expected = fairly(machines, pending, weights)
    assert {item.id: item.node for item in got.placed} | dict.fromkeys(got.rejected) == expected


quota_limits = st.builds(
    Quota,
    cpu=st.none() | st.integers(1, 4000).map(lambda milli: Cores(milli / 1000)),
    memory=st.none() | st.integers(0, 4000).map(Bytes),
    instances=st.none() | st.integers(0, 12),
)


@given(neighbours(), quota_limits)
@settings(max_examples=150, deadline=None)
def test_no_plan_goes_over_a_projects_quota_and_bulk_stays_one_by_one(
    world: tuple[list[Machine], list[Pending], dict[str, tuple[str, ...]]], quota: Quota
) -> None:
    machines, pending, homes = world
    snapshot = snapshot_with_held(machines, homes)
    snapshot.quotas["p"] = quota
    got = plan(snapshot, pending)
    expected = one_by_one(machines, pending, homes, quota)
    assert {item.id: item.node for item in got.placed} | dict.fromkeys(got.rejected) == expected


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
