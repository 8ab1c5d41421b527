"""GPUs in the plan: which devices an instance gets, what is said where there are none, and what others must give up for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from msgspec import structs

from atoll.devices.fake_models import make_devices
from atoll.model.devices import (
    MILLI,
    GpuDevice,
    GpuGrant,
    GpuHealth,
    GpuLink,
    GpuPartition,
    GpuSharing,
    GpuVendor,
    LinkKind,
    MigProfile,
)
from atoll.model.records import Capacity, Node
from atoll.model.spec import AppSpec, Gpu, GpuTopology, Isolation, Placement, Quota, Resources, RuntimeName
from atoll.model.spec.gpu import check_gpu
from atoll.model.units import Bytes
from atoll.scheduling.demand import Demand, Pending, demand_of
from atoll.scheduling.explain import explain
from atoll.scheduling.gpu.grants import fits, grant
from atoll.scheduling.interface import View
from atoll.scheduling.plan import Plan, plan
from atoll.scheduling.preemption import preempt
from atoll.scheduling.snapshot import GPU, Snapshot

GIB = 1 << 30


def devices(
    model: str = "H100-80GB", count: int = 1, *, mig: Sequence[int] = (), nvlink: int = 0, name: str = "n", **more: Any
) -> Any:
    made = make_devices(model, count, in_mig=mig, nvlink=nvlink, driver="580.159.04", cuda="13.0", name=name)
    return tuple(structs.replace(device, **more) for device in made)


def plain(count: int, **more: Any) -> tuple[GpuDevice, ...]:
    return tuple(GpuDevice(**{"id": f"d{n}", "model": "A", "memory_bytes": 80 * GIB, **more}) for n in range(count))


def node(name: str, gpus: tuple[GpuDevice, ...] = (), *, cpu: int = 64_000) -> Node:
    capacity = Capacity(cpu_milli=cpu, memory_bytes=512 * GIB, disk_bytes=1 << 40, gpus=gpus)
    return Node(name=name, capacity=capacity, runtimes=(RuntimeName.RUNC,))


def snapshot(*nodes: Node) -> Snapshot:
    made = Snapshot()
    for one in nodes:
        made.upsert_node(one)
    return made


def demand(gpu: Gpu | None = None, *, priority: int = 50, **more: Any) -> Demand:
    return Demand(**{"cpu_milli": 1000, "memory_bytes": GIB, "gpu": gpu, "placement": Placement(priority=priority), **more})


def place(nodes: Snapshot, gpu: Gpu | None, count: int = 1, group: str = "g") -> Plan:
    return plan(nodes, [Pending(id=f"{group}{n:03d}", group=group, demand=demand(gpu)) for n in range(count)])


def given(nodes: Snapshot, gpu: Gpu, count: int = 1) -> list[list[str]]:
    return [[one.device for one in placed.gpus] for placed in place(nodes, gpu, count).placed]


def said(nodes: Snapshot, gpu: Gpu) -> Any:
    return place(nodes, gpu).rejected["g000"]


@pytest.mark.parametrize(
    ("asked", "name", "does"),
    [
        ("H100", "NVIDIA H100 80GB HBM3", True),
        ("h100 80gb", "NVIDIA H100 80GB HBM3", True),
        ("nvidia", "NVIDIA H100 80GB HBM3", True),
        ("a100-sxm4", "NVIDIA A100-SXM4-80GB", True),
        ("A100", "NVIDIA A100-SXM4-80GB", True),
        ("100", "NVIDIA H100 80GB HBM3", False),
        ("H100 NVL", "NVIDIA H100 80GB HBM3", False),
        ("A10", "NVIDIA A100-SXM4-80GB", False),
        ("--", "NVIDIA A100-SXM4-80GB", False),
    ],
)
def test_a_model_is_asked_for_by_words_of_its_name(asked: str, name: str, does: bool) -> None:
    assert (grant(plain(1, model=name), (), Gpu(model=asked)) is not None) is does


@pytest.mark.parametrize(
    ("asked", "has", "does"),
    [("550", "580.159.04", True), ("580.159.4", "580.159.04", True), ("580.160", "580.159.04", False), ("1", "", False)],
)
def test_a_driver_must_be_as_new_as_asked(asked: str, has: str, does: bool) -> None:
    assert (grant(plain(1, driver=has), (), Gpu(driver=asked)) is not None) is does


def test_whole_devices_have_the_vendor_and_the_memory_asked_for() -> None:
    mixed = (*plain(1, vendor=GpuVendor.AMD), *(structs.replace(d, id=f"big{d.id}", memory_bytes=160 * GIB) for d in plain(1)))
    assert grant(mixed, (), Gpu(vendor=GpuVendor.AMD)) == (GpuGrant(device="d0", memory_bytes=80 * GIB),)
    assert grant(mixed, (), Gpu(memory=Bytes(100 * GIB))) == (GpuGrant(device="bigd0", memory_bytes=160 * GIB),)
    assert grant(mixed, (), Gpu(memory=Bytes(100 * GIB), vendor=GpuVendor.AMD)) is None


def test_shares_fill_one_device_before_they_begin_another() -> None:
    nodes = snapshot(node("a", plain(2)))
    assert given(nodes, Gpu(count=0.3), 6) == [["d0"]] * 3 + [["d1"]] * 3
    placed = place(nodes, Gpu(count=0.25)).placed[0].gpus
    assert placed == (GpuGrant(device="d0", sharing=GpuSharing.TIME_SLICE, milli=250, memory_bytes=20 * GIB),)


def test_the_memory_of_a_share_is_asked_for_apart_from_its_compute() -> None:
    nodes = snapshot(node("a", plain(1)))
    assert len(given(nodes, Gpu(count=0.1, memory=Bytes(30 * GIB)), 5)) == 2
    assert len(given(nodes, Gpu(count=0.4, memory=Bytes(GIB)), 5)) == 2


def test_a_device_is_shared_in_one_way_only_and_only_as_it_can_be() -> None:
    ways = (GpuSharing.EXCLUSIVE, GpuSharing.TIME_SLICE, GpuSharing.MPS)
    nodes = snapshot(node("a", plain(2, sharing=ways)))
    answer = plan(
        nodes,
        [
            Pending(id=f"{number}", group=sharing, demand=demand(Gpu(count=0.2, sharing=sharing)))
            for number, sharing in enumerate((GpuSharing.MPS, GpuSharing.TIME_SLICE, GpuSharing.MPS))
        ],
    )
    assert [placed.gpus[0].device for placed in answer.placed] == ["d0", "d1", "d0"]
    assert said(snapshot(node("a", plain(1))), Gpu(count=0.5, sharing=GpuSharing.MPS)).mend == (
        "the devices there can be shared by exclusive, time-slice: change resources.gpu.sharing"
    )


def test_whole_devices_come_from_those_that_nobody_shares() -> None:
    nodes = snapshot(node("a", plain(3)))
    nodes.allocate("s", "a", "s", demand(Gpu(count=0.1)), (GpuGrant(device="d1", sharing=GpuSharing.TIME_SLICE, milli=100),))
    assert given(nodes, Gpu(), 3) == [["d0"], ["d2"]]
    nodes.release("s")
    assert given(nodes, Gpu(), 3) == [["d0"], ["d1"], ["d2"]]


def pairs(count: int) -> tuple[GpuDevice, ...]:
    """Devices of which each two neighbours are joined by NVLink, the others by the host bridge."""
    return tuple(
        structs.replace(
            device,
            numa=place // (count // 2),
            links=tuple(
                GpuLink(peer=f"d{other}", kind=LinkKind.NVLINK if other == place ^ 1 else LinkKind.PHB, width=4)
                for other in range(count)
                if other != place
            ),
        )
        for place, device in enumerate(plain(count))
    )


def test_several_devices_are_near_each_other_and_good_sets_stay_whole() -> None:
    assert given(snapshot(node("a", pairs(4))), Gpu(count=2), 2) == [["d0", "d1"], ["d2", "d3"]]
    nodes = snapshot(node("a", pairs(4)))
    nodes.allocate("x", "a", "x", demand(Gpu()), (GpuGrant(device="d1"),))
    assert given(nodes, Gpu(), 1) == [["d0"]], "the one whose partner is gone goes first"
    assert given(nodes, Gpu(count=2), 1) == [["d2", "d3"]]


def test_topology_is_a_rule() -> None:
    nodes = snapshot(node("a", pairs(8)))
    assert given(nodes, Gpu(count=2, topology=GpuTopology.NVLINK), 9) == [["d0", "d1"], ["d2", "d3"], ["d4", "d5"], ["d6", "d7"]]
    assert said(nodes, Gpu(count=3, topology=GpuTopology.NVLINK)).mend == (
        "at most 2 of one node are all joined by NVLink: ask for fewer, or leave topology out"
    )
    assert given(nodes, Gpu(count=3, topology=GpuTopology.NUMA), 9) == [["d0", "d1", "d2"], ["d4", "d5", "d6"]]
    assert "at most 4 are on one NUMA node" in said(nodes, Gpu(count=5, topology=GpuTopology.NUMA)).mend
    full = snapshot(node("a", devices(count=8, nvlink=18)))
    assert [len(one) for one in given(full, Gpu(count=4, topology=GpuTopology.NVLINK), 9)] == [4, 4]
    many = snapshot(node("a", tuple(structs.replace(d, id=f"d{n}", links=()) for n, d in enumerate(plain(32)))))
    assert [len(one) for one in given(many, Gpu(count=16), 9)] == [16, 16]


def test_partitions_go_where_the_largest_stay_possible() -> None:
    nodes = snapshot(node("a", devices(mig=[0])))
    placed = [one.gpus[0] for one in place(nodes, Gpu(profile="1g.10gb"), 9).placed]
    assert [one.start for one in placed] == [6, 5, 4, 3, 2, 1, 0]
    assert {(one.sharing, one.milli, one.size, one.profile) for one in placed} == {(GpuSharing.MIG, 142, 1, "1g.10gb")}
    nodes.allocate("x", "a", "x", demand(Gpu(profile="1g.10gb")), (placed[0],))
    assert [one.gpus[0].start for one in place(nodes, Gpu(profile="3g.40gb"), 9).placed] == [0]
    assert [one.gpus[0].start for one in place(nodes, Gpu(profile="4g.40gb"), 9).placed] == [0]


def test_partitions_of_one_instance_may_be_on_several_devices_and_a_used_device_is_filled_first() -> None:
    nodes = snapshot(node("a", devices(count=2, mig=[0, 1])))
    first, second = [one.id for one in nodes.nodes["a"].capacity.gpus]
    grants = place(nodes, Gpu(profile="3g.40gb", count=3)).placed[0].gpus
    assert [(one.device, one.start) for one in grants] == [(first, 4), (first, 0), (second, 4)]
    assert given(nodes, Gpu(profile="1g.10gb"), 3) == [[first], [first], [first]]


def rtx_pro_6000() -> tuple[GpuDevice, ...]:
    """A device with twelve memory slices, as its driver describes it."""
    kinds = (("1g.24gb", 1, 3, (0, 3, 6, 9), 4), ("2g.48gb", 2, 6, (0, 6), 2), ("4g.96gb", 4, 12, (0,), 1))
    media = (("1g.24gb+me", 1, 3, (0, 3, 6, 9), 1), ("1g.24gb+me.all", 1, 3, (0, 3, 6, 9), 1))
    plain_ones = (("1g.24gb+gfx", 1, 3, (0, 3, 6, 9), 4), ("1g.24gb-me", 1, 3, (0, 3, 6, 9), 4))
    profiles = tuple(
        MigProfile(name=name, compute_slices=compute, memory_slices=size, memory_bytes=8 * size * GIB, starts=starts, most=most)
        for name, compute, size, starts, most in (*kinds, *media, *plain_ones)
    )
    return plain(1, memory_bytes=96 * GIB, mig=True, profiles=profiles, sharing=(GpuSharing.MIG,))


def test_a_device_of_twelve_memory_slices_is_given_to_the_last_one() -> None:
    nodes = snapshot(node("a", rtx_pro_6000()))
    for profile, starts in {"1g.24gb": {0, 3, 6, 9}, "2g.48gb": {0, 6}, "4g.96gb": {0}, "1g.24gb-me": {0, 3, 6, 9}}.items():
        assert {one.gpus[0].start for one in place(nodes, Gpu(profile=profile), 9).placed} == starts


def test_one_partition_of_a_device_alone_has_the_media_engines_whatever_its_suffix_says_more() -> None:
    nodes = snapshot(node("a", rtx_pro_6000()))
    (held,) = place(nodes, Gpu(profile="1g.24gb+me.all"), 9).placed
    nodes.allocate("x", "a", "x", demand(Gpu(profile="1g.24gb+me.all")), held.gpus)
    assert not place(nodes, Gpu(profile="1g.24gb+me")).placed
    assert len(place(nodes, Gpu(profile="1g.24gb-me"), 9).placed) == 3
    assert len(place(nodes, Gpu(profile="1g.24gb+gfx"), 9).placed) == 3


@pytest.mark.parametrize("profile", ["1g.10gb", "1g.10gb+me", "1g.24gb+me.all", "1g.24gb-me", "2g.48gb+gfx"])
def test_every_name_of_a_profile_can_be_asked_for(profile: str) -> None:
    check_gpu(Gpu(profile=profile), (RuntimeName.RUNC,))


def test_what_another_partitioned_is_never_given_away() -> None:
    foreign = (GpuPartition(id="MIG-x", profile="4g.40gb", start=0, size=4),)
    nodes = snapshot(node("a", devices(mig=[0], foreign=foreign)))
    assert [one.gpus[0].start for one in place(nodes, Gpu(profile="1g.10gb"), 9).placed] == [6, 5, 4]
    unknown = (GpuPartition(id="MIG-y", profile="7g.5gb", start=0, size=1),)
    assert not place(snapshot(node("a", devices(mig=[0], foreign=unknown))), Gpu(profile="1g.10gb")).placed


def test_a_device_in_mig_mode_is_given_in_partitions_only() -> None:
    nodes = snapshot(node("a", devices(mig=[0])))
    for gpu in (Gpu(), Gpu(count=0.5)):
        answer = said(nodes, gpu)
        assert answer.code == "no-gpu"
        assert "in MIG mode" in answer.message
        assert answer.mend.startswith("ask for a profile: 1g.10gb")


def test_an_impossible_profile_names_those_that_there_are() -> None:
    assert said(snapshot(node("a", devices(mig=[0]))), Gpu(profile="3g.20gb")).mend == (
        "the profiles there are 1g.10gb+me, 1g.10gb, 1g.20gb, 2g.20gb, 3g.40gb, 4g.40gb, 7g.80gb: change resources.gpu.profile"
    )
    answer = said(snapshot(node("a", devices())), Gpu(profile="3g.40gb"))
    assert answer.message == "the only node does not fit: without 1 MIG partition 3g.40gb: no device is in MIG mode"
    assert "count instead of profile" in answer.mend
    assert "room for 2 at most" in said(snapshot(node("a", devices(mig=[0]))), Gpu(profile="3g.40gb", count=3)).mend


def test_an_unknown_model_or_vendor_and_too_many_say_what_there_is() -> None:
    nodes = snapshot(node("a", devices(count=4)), node("b"))
    answer = said(nodes, Gpu(model="B200"))
    models = "the models there are NVIDIA H100 80GB HBM3: change resources.gpu.model, or leave it out"
    assert (answer.code, answer.mend) == ("no-gpu", models)
    assert said(nodes, Gpu(vendor=GpuVendor.AMD)).mend == (
        "the vendors there are nvidia: change resources.gpu.vendor, or leave it out"
    )
    assert said(nodes, Gpu(count=5)).mend == "the largest node has 4 of them: ask for fewer"
    assert (
        "the largest there is has 79.6GiB: ask for less in resources.gpu.memory" in said(nodes, Gpu(memory=Bytes(100 * GIB))).mend
    )
    assert "the drivers there are 580.159.04" in said(nodes, Gpu(driver="600")).mend
    assert said(snapshot(node("b")), Gpu()).mend == "remove resources.gpu, or add a node with GPUs"


def test_what_is_free_at_most_is_said() -> None:
    nodes = snapshot(node("a", plain(4)))
    nodes.allocate("x", "a", "x", demand(Gpu(count=3)), tuple(GpuGrant(device=f"d{n}") for n in range(3)))
    answer = said(nodes, Gpu(count=2))
    assert (answer.code, answer.mend) == (
        "no-gpu-free",
        "at most 1 are free on one node: wait, stop what holds them, or add a node",
    )
    shared = GpuGrant(device="d3", sharing=GpuSharing.TIME_SLICE, milli=700, memory_bytes=60 * GIB)
    nodes.allocate("y", "a", "y", demand(Gpu(count=0.7)), (shared,))
    assert said(nodes, Gpu(count=0.5)).mend.startswith("at most 0.3 of a device with 20.0GiB is free")
    assert said(nodes, Gpu()).mend.startswith("none is free")
    mig = snapshot(node("a", devices(mig=[0])))
    held = place(mig, Gpu(profile="4g.40gb")).placed[0].gpus
    mig.allocate("x", "a", "x", demand(Gpu(profile="4g.40gb")), held)
    assert said(mig, Gpu(profile="4g.40gb")).mend.startswith("free is only room for 1g.10gb, 1g.10gb+me, 1g.20gb, 2g.20gb, 3g.40gb")


def test_a_quarantined_device_is_not_offered_and_is_mentioned() -> None:
    sick = structs.replace(plain(1)[0], id="sick", health=GpuHealth.QUARANTINED, reason="XID 79")
    answer = said(snapshot(node("a", (sick,))), Gpu())
    assert answer.code == "no-gpu"
    assert "quarantined" in answer.message
    nodes = snapshot(node("a", (sick, *plain(1, health=GpuHealth.DEGRADED))))
    assert given(nodes, Gpu(), 2) == [["d0"]]
    assert nodes.total[GPU, 0] == MILLI
    nodes.allocate("x", "a", "x", demand(Gpu()), (GpuGrant(device="d0"),))
    assert "(1 more quarantined)" in said(nodes, Gpu()).message


def test_an_older_record_without_grants_counts_whole_devices() -> None:
    nodes = snapshot(node("a", plain(3)))
    nodes.allocate("old", "a", "old", demand(Gpu(count=0.5)))
    nodes.allocate("new", "a", "new", demand(Gpu()), (GpuGrant(device="d0"),))
    assert given(nodes, Gpu(count=0.5), 9) == [["d2"], ["d2"]]
    assert given(nodes, Gpu(), 9) == [["d2"]]


def test_a_grant_of_a_device_that_is_gone_or_contradicts_another_frees_nothing() -> None:
    nodes = snapshot(node("a", plain(1)))
    nodes.allocate("x", "a", "x", demand(Gpu()), (GpuGrant(device="gone"),))
    assert given(nodes, Gpu(), 2) == [["d0"]]
    nodes.allocate("y", "a", "y", demand(Gpu(count=0.1)), (GpuGrant(device="d0", sharing=GpuSharing.MPS, milli=100),))
    nodes.allocate("z", "a", "z", demand(Gpu(count=0.1)), (GpuGrant(device="d0", sharing=GpuSharing.TIME_SLICE, milli=100),))
    for gpu in (Gpu(), Gpu(count=0.1), Gpu(count=0.1, sharing=GpuSharing.MPS)):
        assert not place(nodes, gpu).placed


def test_the_inventory_of_a_node_may_change_under_what_it_holds() -> None:
    nodes = snapshot(node("a", plain(2)))
    nodes.allocate("x", "a", "x", demand(Gpu()), (GpuGrant(device="d1"),))
    assert given(nodes, Gpu(), 9) == [["d0"]]
    nodes.upsert_node(node("a", tuple(reversed(plain(3)))))
    assert given(nodes, Gpu(), 9) == [["d2"], ["d0"]]
    nodes.remove_node("a")
    nodes.upsert_node(node("a", plain(2)))
    assert given(nodes, Gpu(), 9) == [["d0"]]
    nodes.upsert_node(node("a"))
    assert said(nodes, Gpu()).code == "no-gpu"


def test_work_without_a_gpu_keeps_off_nodes_with_gpus_while_others_have_room() -> None:
    nodes = snapshot(node("a", plain(8)), node("b", cpu=3000), node("c", plain(2)))
    answer = place(nodes, None, 5)
    assert [placed.node for placed in answer.placed[:3]] == ["b"] * 3
    assert {placed.node for placed in answer.placed[3:]} == {"a", "c"}


def test_small_asks_leave_whole_nodes_whole() -> None:
    nodes = snapshot(node("a", plain(8)), node("b", plain(8)), node("c", plain(2)))
    answer = place(nodes, Gpu(), 3)
    assert [placed.node for placed in answer.placed[:2]] == ["c", "c"]
    nodes.allocate("x", "b", "x", demand(Gpu()), (GpuGrant(device="d0"),))
    nodes.allocate("y", "c", "y", demand(Gpu(count=2)), (GpuGrant(device="d0"), GpuGrant(device="d1")))
    assert {placed.node for placed in place(nodes, Gpu(), 3).placed} == {"b"}
    assert place(nodes, Gpu(count=8)).placed[0].node == "a"
    assert place(nodes, Gpu(count=0.5)).placed[0].node == "b"


def test_several_devices_go_where_they_are_joined() -> None:
    nodes = snapshot(node("a", devices(count=4, name="a")), node("b", devices(count=4, nvlink=18, name="b")))
    assert place(nodes, Gpu(count=4)).placed[0].node == "b"


def test_explain_shows_the_devices_and_how_hard_the_wall_is() -> None:
    nodes = snapshot(node("a", plain(2, sharing=(GpuSharing.EXCLUSIVE, GpuSharing.TIME_SLICE, GpuSharing.MPS))))
    for gpu, words in (
        (Gpu(count=2), "exclusive (hard"),
        (Gpu(count=0.5), "time-slice (a convention"),
        (Gpu(count=0.5, sharing=GpuSharing.MPS), "mps (the driver holds each program"),
        (Gpu(profile="1g.10gb"), "mig (hard"),
    ):
        assert explain(nodes, "g", demand(gpu)).wall.startswith(words)
    candidate = explain(nodes, "g", demand(Gpu(count=2))).candidates[0]
    assert ([one.device for one in candidate.gpus], candidate.room) == (["d0", "d1"], 1)
    assert "gpu" in candidate.scores
    assert explain(nodes, "g", demand()).wall == ""


def test_a_quota_of_gpus_counts_shares_and_partitions_as_parts() -> None:
    nodes = snapshot(node("a", plain(8)))
    nodes.quotas["p"] = Quota(gpu=1)
    answer = place(nodes, Gpu(count=0.4), 5, group="app/p/web/1/1")
    assert len(answer.placed) == 2
    rejection = next(iter(answer.rejected.values()))
    assert rejection.message == "project 'p' has 0.2 of its quota of gpu left, and this asks for 0.4"
    assert len(place(nodes, Gpu(), 5, group="app/p/web/1/1").placed) == 1


def test_a_gpu_is_never_given_to_a_runtime_that_cannot_hand_it_on() -> None:
    spec = AppSpec(name="x", image="y", isolation=Isolation.VM, resources=Resources(gpu=Gpu()))
    assert RuntimeName.FIRECRACKER not in demand_of(spec).runtimes
    assert RuntimeName.FIRECRACKER in demand_of(structs.replace(spec, resources=Resources())).runtimes


def victims(nodes: Snapshot, gpu: Gpu, leaving: Sequence[str] = ()) -> Any:
    item = Pending(id="new", group="new", demand=demand(gpu, priority=90))
    assert plan(nodes, [item]).rejected
    return preempt(View(nodes), item, lambda id: not id.startswith("job"), lambda id: id in leaving, lambda owner: 9)


def test_preemption_frees_the_devices_that_are_needed_and_no_others() -> None:
    nodes = snapshot(node("a", pairs(4)))
    for number in range(4):
        nodes.allocate(f"i{number}", "a", f"g{number}", demand(Gpu(), priority=10 + number), (GpuGrant(device=f"d{number}"),))
    nodes.allocate("cpu", "a", "c", demand(priority=1))
    found = victims(nodes, Gpu(count=2, topology=GpuTopology.NVLINK))
    assert (found.victims, [one.device for one in found.gpus]) == (("i0", "i1"), ["d0", "d1"])
    assert victims(nodes, Gpu()).victims == ("i0",)
    assert victims(nodes, Gpu(), leaving=["i3"]).victims == ()
    assert victims(nodes, Gpu(count=2, topology=GpuTopology.NVLINK), leaving=["i1"]).victims == ("i0",)


def test_preemption_of_partitions_makes_room_at_a_start() -> None:
    nodes = snapshot(node("a", devices(mig=[0])))
    id = nodes.nodes["a"].capacity.gpus[0].id
    for start in range(7):
        part = GpuGrant(device=id, sharing=GpuSharing.MIG, milli=142, profile="1g.10gb", start=start, size=1)
        nodes.allocate(f"i{start}", "a", f"g{start}", demand(Gpu(profile="1g.10gb"), priority=10), (part,))
    found = victims(nodes, Gpu(profile="2g.20gb"))
    assert len(found.victims) == 2
    assert {f"i{found.gpus[0].start}", f"i{found.gpus[0].start + 1}"} == set(found.victims)
    assert len(victims(nodes, Gpu(profile="3g.40gb")).victims) == 3, "the eighth memory slice is free, but no compute"


def test_a_gpu_that_no_lower_one_holds_is_not_waited_for() -> None:
    nodes = snapshot(node("a", plain(1)))
    nodes.allocate("high", "a", "h", demand(Gpu(), priority=95), (GpuGrant(device="d0"),))
    nodes.allocate("low", "a", "l", demand(priority=1))
    assert victims(nodes, Gpu()) is None


def test_fits_counts_what_grant_would_give() -> None:
    assert fits(devices(mig=[0]), (), Gpu(profile="2g.20gb")) == 3
    assert fits(plain(2), (), Gpu(count=0.3)) == 6
    assert fits(plain(8), (GpuGrant(device="d0"),), Gpu(count=2)) == 3
