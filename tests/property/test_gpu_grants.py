"""Whatever is asked of whatever devices: a plan never gives away what is not there, and refuses only what does not fit."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.devices.fake import FakeHardware
from atoll.model.devices import COMPUTE_SLICES, MILLI, GpuDevice, GpuGrant, GpuHealth, GpuLink, GpuPartition, GpuSharing, LinkKind
from atoll.model.records import Capacity, Node
from atoll.model.spec import Gpu, GpuTopology, Placement, RuntimeName
from atoll.model.units import Bytes
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.gpu.grants import fits, grant
from atoll.scheduling.gpu.inventory import Holding, Inventory
from atoll.scheduling.gpu.mig_measure import profiles_of
from atoll.scheduling.interface import View
from atoll.scheduling.plan import plan
from atoll.scheduling.preemption import preempt
from atoll.scheduling.snapshot import Snapshot

GIB = 1 << 30
PROFILES = profiles_of("H100-80GB")
WAYS = (GpuSharing.EXCLUSIVE, GpuSharing.TIME_SLICE, GpuSharing.MPS)

kinds = st.builds(
    GpuDevice,
    id=st.just(""),
    model=st.sampled_from(["NVIDIA H100 80GB HBM3", "Tesla T4"]),
    memory_bytes=st.sampled_from([16 * GIB, 80 * GIB]),
    driver=st.sampled_from(["535.1", "580.159.04"]),
    numa=st.sampled_from([-1, 0, 1]),
    mig=st.sampled_from([False, False, True]),
    profiles=st.just(PROFILES),
    foreign=st.sampled_from([(), (), (GpuPartition(id="x", profile="2g.20gb", start=2, size=2),)]),
    sharing=st.sampled_from([WAYS, WAYS, WAYS[:2], WAYS[:1]]),
    health=st.sampled_from([GpuHealth.OK, GpuHealth.OK, GpuHealth.OK, GpuHealth.DEGRADED, GpuHealth.QUARANTINED]),
)
asks = st.one_of(
    st.builds(
        Gpu, count=st.sampled_from([1, 1, 2, 3]), topology=st.sampled_from(GpuTopology), model=st.sampled_from([None, "h100"])
    ),
    st.builds(
        Gpu,
        count=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
        memory=st.sampled_from([None, Bytes(GIB), Bytes(20 * GIB)]),
        sharing=st.sampled_from([None, GpuSharing.MPS]),
        driver=st.sampled_from([None, "550"]),
    ),
    st.builds(Gpu, profile=st.sampled_from([profile.name for profile in PROFILES]), count=st.sampled_from([1, 1, 2])),
)


@st.composite
def boards(draw: st.DrawFn, prefix: str) -> tuple[GpuDevice, ...]:
    """The devices of one node, some of them joined."""
    drawn = draw(st.lists(kinds, max_size=5))
    links: dict[int, list[GpuLink]] = defaultdict(list)
    for one, other in combinations(range(len(drawn)), 2):
        kind = draw(st.sampled_from([None, LinkKind.NVLINK, LinkKind.NVLINK, LinkKind.PIX, LinkKind.SYS]))
        if kind is not None:
            links[one].append(GpuLink(peer=f"{prefix}-{other}", kind=kind, width=2))
    made = []
    for place, device in enumerate(drawn):
        fields = {name: getattr(device, name) for name in device.__struct_fields__}
        foreign = device.foreign if device.mig else ()
        made.append(GpuDevice(**fields | {"id": f"{prefix}-{place}", "links": tuple(links[place]), "foreign": foreign}))
    return tuple(made)


@st.composite
def fleets(draw: st.DrawFn) -> list[Node]:
    return [
        Node(
            name=f"n{number}",
            capacity=Capacity(cpu_milli=10**6, memory_bytes=10**15, disk_bytes=0, gpus=draw(boards(f"n{number}"))),
            runtimes=(RuntimeName.RUNC,),
        )
        for number in range(draw(st.integers(1, 3)))
    ]


def demand(gpu: Gpu | None, priority: int = 50) -> Demand:
    return Demand(cpu_milli=1, memory_bytes=1, gpu=gpu, placement=Placement(priority=priority))


def snapshot_of(nodes: Iterable[Node]) -> Snapshot:
    made = Snapshot()
    for node in nodes:
        made.upsert_node(node)
    return made


def check(devices: Sequence[GpuDevice], held: Sequence[GpuGrant]) -> None:
    """Fail where the grants together are more than the devices have, or of the wrong kind."""
    by_id = {device.id: device for device in devices}
    for device in devices:
        mine = [one for one in held if one.device == device.id]
        if not mine:
            continue
        assert device.health is not GpuHealth.QUARANTINED
        assert sum(one.milli for one in mine) <= MILLI
        assert sum(one.memory_bytes for one in mine) <= device.memory_bytes or device.mig
        ways = {one.sharing for one in mine}
        assert len(ways) == 1
        if ways == {GpuSharing.MIG}:
            assert device.mig
            slices = [place for one in mine for place in range(one.start, one.start + one.size)]
            slices += [place for one in device.foreign for place in range(one.start, one.start + one.size)]
            assert len(slices) == len(set(slices))
            kinds_ = {profile.name: profile for profile in device.profiles}
            names = [one.profile for one in (*mine, *device.foreign)]
            assert sum(kinds_[name].compute_slices for name in names) <= COMPUTE_SLICES
            assert all(names.count(name) <= kinds_[name].most for name in names)
            assert all(one.start in kinds_[one.profile].starts and one.size == kinds_[one.profile].memory_slices for one in mine)
        else:
            assert not device.mig
            assert ways <= set(device.sharing)
            if ways == {GpuSharing.EXCLUSIVE}:
                assert [(one.milli, one.memory_bytes) for one in mine] == [(MILLI, device.memory_bytes)]
    assert all(one.device in by_id for one in held)


def check_ask(devices: Sequence[GpuDevice], got: Sequence[GpuGrant], gpu: Gpu) -> None:
    """Fail where an instance did not get what it asked for."""
    by_id = {device.id: device for device in devices}
    mine = [by_id[one.device] for one in got]
    assert len(got) == max(1, int(gpu.count))
    if gpu.profile is None:
        assert len({device.id for device in mine}) == len(mine)
        assert all(one.milli == (MILLI if gpu.count >= 1 else int(gpu.count * MILLI)) for one in got)
    else:
        assert all(one.profile == gpu.profile for one in got)
    assert all(gpu.model is None or gpu.model in device.model.lower() for device in mine)
    assert all(gpu.driver is None or device.driver == "580.159.04" for device in mine)
    assert all(gpu.memory is None or gpu.count >= 1 or one.memory_bytes == gpu.memory for one in got)
    if gpu.topology is GpuTopology.NUMA:
        assert len({device.numa for device in mine}) == 1
    if gpu.topology is GpuTopology.NVLINK and len(mine) > 1:
        joined = {frozenset((d.id, link.peer)) for d in devices for link in d.links if link.kind is LinkKind.NVLINK}
        assert all(frozenset((one.id, other.id)) in joined for one, other in combinations(mine, 2))


@given(fleets(), st.lists(st.tuples(asks, st.integers(1, 12)), min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_no_plan_gives_away_more_than_there_is_and_each_gets_what_it_asked_for(
    nodes: list[Node], wanted: list[tuple[Gpu, int]]
) -> None:
    demands = {f"{group}-{n:02d}": gpu for group, (gpu, count) in enumerate(wanted) for n in range(count)}
    waiting = [Pending(id=id, group=id[0], demand=demand(gpu)) for id, gpu in demands.items()]
    snapshot = snapshot_of(nodes)
    answer = plan(snapshot, waiting)
    by_name = {node.name: node.capacity.gpus for node in nodes}
    held: dict[str, list[GpuGrant]] = defaultdict(list)
    for placed in answer.placed:
        check_ask(by_name[placed.node], placed.gpus, demands[placed.id])
        held[placed.node].extend(placed.gpus)
    for name, devices in by_name.items():
        check(devices, held[name])
    for id, rejection in answer.rejected.items():
        assert all(grant(devices, held[name], demands[id]) is None for name, devices in by_name.items())
        assert rejection.code in ("no-gpu", "no-gpu-free")
        assert rejection.mend
    for placed in answer.placed:
        snapshot.allocate(placed.id, placed.node, placed.id[0], demand(demands[placed.id]), placed.gpus)
    again = plan(snapshot, [Pending(id=f"x{id}", group="x", demand=demand(demands[id])) for id in answer.rejected])
    assert not again.placed, "what is written down is what the plan had counted"


@given(boards("n"), st.lists(asks, max_size=6), asks)
@settings(max_examples=300, deadline=None)
def test_room_is_how_many_are_placed_one_after_the_other(devices: tuple[GpuDevice, ...], before: list[Gpu], asked: Gpu) -> None:
    held: list[GpuGrant] = []
    for gpu in before:
        held.extend(grant(devices, held, gpu) or ())
    check(devices, held)
    inventory = Inventory()
    inventory.describe(0, devices)
    inventory.hold(0, [Holding("x", tuple(held))])
    view = inventory.view(1)
    room = int(view.room(asked)[0])
    assert room == fits(devices, held, asked)
    assert room <= int(view.possible(asked)[0])
    for _ in range(room):
        held.extend(view.take(0, asked))
    check(devices, held)
    assert int(view.room(asked)[0]) == 0


@given(st.lists(boards("n"), min_size=1, max_size=4), st.lists(st.tuples(st.integers(0, 3), asks), max_size=12), asks)
@settings(max_examples=150, deadline=None)
def test_states_that_no_node_is_in_can_be_forgotten_at_any_time(
    fleet: list[tuple[GpuDevice, ...]], todo: list[tuple[int, Gpu]], asked: Gpu
) -> None:
    kept, fresh = Inventory(), Inventory(states_min=0)
    held: dict[int, list[GpuGrant]] = defaultdict(list)
    for row, devices in enumerate(fleet):
        kept.describe(row, devices)
        fresh.describe(row, devices)
    for number, gpu in todo:
        row = number % len(fleet)
        old = fresh.view(len(fleet))
        before = old.room(asked)
        held[row].extend(grant(fleet[row], held[row], gpu) or ())
        for inventory in (kept, fresh):
            inventory.hold(row, [Holding("x", tuple(held[row]))])
        assert (kept.view(len(fleet)).room(asked) == fresh.view(len(fleet)).room(asked)).all()
        assert (old.room(asked) == before).all(), "a view sees what was when it was made"
    rows = np.arange(len(fleet))
    gains = [inventory.view(len(fleet)).gains(rows, rows % 2, asked) for inventory in (kept, fresh)]
    assert (gains[0] == gains[1]).all()


@given(fleets(), st.lists(st.tuples(asks, st.integers(0, 9), st.booleans()), max_size=25), asks)
@settings(max_examples=150, deadline=None)
def test_a_snapshot_kept_step_by_step_has_the_devices_of_one_made_at_once(
    nodes: list[Node], todo: list[tuple[Gpu, int, bool]], asked: Gpu
) -> None:
    kept = snapshot_of(nodes)
    held: dict[str, tuple[str, Gpu, tuple[GpuGrant, ...]]] = {}
    for gpu, number, comes in todo:
        id = f"i{number}"
        if not comes:
            assert kept.release(id) == (held.pop(id, None) is not None)
        elif id not in held:
            for placed in plan(kept, [Pending(id=id, group="g", demand=demand(gpu))]).placed:
                # Some are older records, which do not say what they hold.
                grants = () if number == 9 else placed.gpus
                kept.allocate(id, placed.node, "g", demand(gpu), grants)
                held[id] = (placed.node, gpu, grants)
    fresh = snapshot_of(reversed(nodes))
    for id, (name, gpu, grants) in reversed(held.items()):
        fresh.allocate(id, name, "g", demand(gpu), grants)
    probe = [Pending(id=f"p{n:02d}", group="p", demand=demand(asked)) for n in range(30)]
    assert plan(kept, probe) == plan(fresh, probe)


@given(boards("n0"), st.lists(st.tuples(asks, st.sampled_from([10, 20, 60])), min_size=1, max_size=8), asks, st.booleans())
@settings(max_examples=300, deadline=None)
def test_what_preemption_takes_makes_room_on_the_right_devices_and_nothing_of_it_could_stay(
    devices: tuple[GpuDevice, ...], before: list[tuple[Gpu, int]], asked: Gpu, one_leaves: bool
) -> None:
    capacity = Capacity(cpu_milli=10**6, memory_bytes=10**15, disk_bytes=0, gpus=devices)
    snapshot = snapshot_of([Node(name="n0", capacity=capacity, runtimes=(RuntimeName.RUNC,))])
    held: dict[str, tuple[tuple[GpuGrant, ...], int]] = {}
    for number, (gpu, priority) in enumerate(before):
        for placed in plan(snapshot, [Pending(id=f"i{number}", group="g", demand=demand(gpu))]).placed:
            snapshot.allocate(placed.id, "n0", f"g{number}", demand(gpu, priority), placed.gpus)
            held[placed.id] = (placed.gpus, priority)
    item = Pending(id="new", group="new", demand=demand(asked))
    leaving = set(list(held)[:1]) if one_leaves else set()
    if not plan(snapshot, [item]).rejected:
        return

    def granted(gone: Iterable[str]) -> tuple[GpuGrant, ...] | None:
        stays = [one for id, (grants, _) in held.items() if id not in gone and id not in leaving for one in grants]
        return grant(devices, stays, asked)

    lower = [id for id, (_, priority) in held.items() if priority < 50 and id not in leaving]
    found = preempt(View(snapshot), item, lambda id: True, lambda id: id in leaving, lambda owner: 9)
    if found is None:
        anything = any(priority < 50 for _, priority in held.values())
        assert not anything or granted(lower) is None
        return
    assert set(found.victims) <= set(lower)
    assert found.gpus == granted(found.victims)
    assert all(granted([other for other in found.victims if other != one]) is None for one in found.victims)
    # Set aside while the victims leave, it is still there once they have.
    snapshot.allocate("new", "n0", "new", demand(asked), found.gpus)
    for id in {*found.victims, *leaving}:
        snapshot.release(id)
    stays = [one for id, (grants, _) in held.items() if id not in found.victims and id not in leaving for one in grants]
    check(devices, [*stays, *found.gpus])


@given(
    st.sampled_from(["A100-40GB", "A100-80GB", "H100-80GB", "H100-94GB", "H200-141GB"]),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=6),
)
@settings(max_examples=100, deadline=None)
def test_what_a_plan_says_about_partitions_the_hardware_does(model: str, count: int, wanted: list[tuple[int, int, int]]) -> None:
    async def main() -> None:
        hardware = FakeHardware(model, count, mig=True)
        devices = await hardware.discover()
        names = [profile.name for profile in devices[0].profiles]
        waiting = [
            Pending(id=f"{group}-{n}", group=f"{group}", demand=demand(Gpu(profile=names[kind], count=parts)))
            for group, (kind, parts, times) in enumerate(wanted)
            for n in range(times)
        ]
        capacity = Capacity(cpu_milli=10**6, memory_bytes=10**15, disk_bytes=0, gpus=devices)
        snapshot = snapshot_of([Node(name="n", capacity=capacity, runtimes=(RuntimeName.RUNC,))])
        for placed in plan(snapshot, waiting).placed:
            for part in placed.gpus:
                made = await hardware.make_partition(part.device, part.profile, part.start)
                assert (made.profile, made.start, made.size) == (part.profile, part.start, part.size)

    asyncio.run(main())
