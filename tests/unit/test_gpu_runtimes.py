"""Which runtime hands on a GPU: what no node can, what this one cannot, and that nothing is placed where it would be refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from test_node_devices import CLOCK, World, until, virtual
from test_node_streams import ask

from atoll.cli.gpus import notes
from atoll.devices.fake import FakeHardware
from atoll.devices.fake_models import make_devices
from atoll.devices.node import NodeDevices
from atoll.model.codec import decode
from atoll.model.devices import GpuDevice, GpuGrant, GpuSharing, GpuVendor
from atoll.model.errors import Invalid
from atoll.model.ports.control_plane import StreamKind
from atoll.model.records import Capacity, Node
from atoll.model.spec import AppSpec, Gpu, Isolation, JobSpec, Resources, RuntimeName, check_job
from atoll.model.spec.gpu import check_gpu
from atoll.model.states import Phase
from atoll.model.streams import ErrorBody, Kind
from atoll.node.fake import FakeControlPlane
from atoll.node.gpus import LOOK_S, Gpus
from atoll.node.report import Reporter
from atoll.scheduling.demand import Demand, Pending, demand_of
from atoll.scheduling.explain import explain
from atoll.scheduling.plan import Plan, plan
from atoll.scheduling.snapshot import Snapshot

UNKNOWN = "gVisor's proxy does not know driver 999.1"
NO_IOMMU = "this machine has no IOMMU"
VM = (RuntimeName.CLOUD_HYPERVISOR, RuntimeName.QEMU)


@pytest.mark.parametrize(
    ("runtimes", "gpu", "field"),
    [
        (VM, Gpu(count=0.5), "resources.gpu.count"),
        (VM, Gpu(profile="1g.10gb"), "resources.gpu.profile"),
        ((RuntimeName.GVISOR,), Gpu(profile="1g.10gb"), "resources.gpu.profile"),
        ((RuntimeName.GVISOR,), Gpu(count=0.5, sharing=GpuSharing.MPS), "resources.gpu.sharing"),
        ((RuntimeName.GVISOR,), Gpu(vendor=GpuVendor.AMD), "resources.gpu.vendor"),
    ],
)
def test_what_no_node_s_runtime_hands_on_is_refused_by_its_field_with_the_runtimes_that_do(
    runtimes: tuple[RuntimeName, ...], gpu: Gpu, field: str
) -> None:
    with pytest.raises(Invalid) as raised:
        check_gpu(gpu, runtimes)
    assert raised.value.field == field
    assert "runc" in raised.value.mend
    check_gpu(gpu, (*runtimes, RuntimeName.CRUN))


def test_a_share_goes_to_none_but_the_runtimes_that_hand_shares_on() -> None:
    def wanted(isolation: Isolation, **gpu: Any) -> tuple[RuntimeName, ...]:
        return demand_of(AppSpec(name="x", image="y", isolation=isolation, resources=Resources(gpu=Gpu(**gpu)))).runtimes

    assert set(wanted(Isolation.VM)) == set(VM)
    assert wanted(Isolation.SANDBOX, count=0.5) == (RuntimeName.GVISOR,)
    assert RuntimeName.RUNC in wanted(Isolation.CONTAINER, profile="1g.10gb")


def node(name: str, *runtimes: RuntimeName, refusals: dict[RuntimeName, str] | None = None, gpus: int = 1) -> Node:
    devices: tuple[GpuDevice, ...] = (
        tuple(make_devices("H100-80GB", gpus, in_mig=(), nvlink=0, driver="580.159.04", cuda="13.0", name=name)) if gpus else ()
    )
    capacity = Capacity(
        cpu_milli=64_000,
        memory_bytes=1 << 39,
        disk_bytes=1 << 40,
        gpus=devices,
        gpu_refusals=refusals if refusals is not None else {},
    )
    return Node(name=name, capacity=capacity, runtimes=runtimes)


def snapshot(*nodes: Node) -> Snapshot:
    made = Snapshot()
    for one in nodes:
        made.upsert_node(one)
    return made


def demand(*runtimes: RuntimeName, gpu: Gpu | None = Gpu()) -> Demand:
    return Demand(cpu_milli=1000, memory_bytes=1 << 30, gpu=gpu, runtimes=runtimes)


def place(nodes: Snapshot, asked: Demand, count: int = 1) -> Plan:
    return plan(nodes, [Pending(id=f"i{n}", group="g", demand=asked) for n in range(count)])


def test_work_with_a_gpu_goes_only_where_its_runtime_hands_it_on() -> None:
    nodes = snapshot(
        node("a", RuntimeName.RUNC, RuntimeName.GVISOR, refusals={RuntimeName.GVISOR: UNKNOWN}),
        node("b", RuntimeName.RUNC, RuntimeName.GVISOR),
    )
    answer = place(nodes, demand(RuntimeName.GVISOR), 2)
    assert [(placed.node, placed.runtime) for placed in answer.placed] == [("b", RuntimeName.GVISOR)]
    (rejection,) = answer.rejected.values()
    assert rejection.failed["gpu-runtime"] == 1
    assert {placed.node for placed in place(nodes, demand(RuntimeName.RUNC), 2).placed} == {"a", "b"}
    # without a GPU the refusal is nobody's
    assert {placed.node for placed in place(nodes, demand(RuntimeName.GVISOR, gpu=None), 50).placed} == {"a", "b"}


def test_where_no_node_can_the_reason_and_the_runtimes_that_can_are_said() -> None:
    refusals = {RuntimeName.GVISOR: UNKNOWN, RuntimeName.QEMU: NO_IOMMU}
    nodes = snapshot(node("a", RuntimeName.RUNC, RuntimeName.GVISOR, RuntimeName.QEMU, refusals=refusals))
    for runtime, why in refusals.items():
        asked = demand(runtime)
        rejection = place(nodes, asked).rejected["i0"]
        assert rejection.code == "no-gpu-runtime"
        assert why in rejection.message
        assert "runc" in rejection.mend
        assert explain(nodes, "g", asked).rejection == rejection


def test_of_several_runtimes_the_first_that_hands_the_gpu_on_is_chosen() -> None:
    nodes = snapshot(node("a", RuntimeName.RUNC, RuntimeName.CRUN, refusals={RuntimeName.RUNC: "why not"}))
    (placed,) = place(nodes, demand(RuntimeName.RUNC, RuntimeName.CRUN)).placed
    assert placed.runtime is RuntimeName.CRUN
    (placed,) = place(nodes, demand(RuntimeName.RUNC, RuntimeName.CRUN, gpu=None)).placed
    assert placed.runtime is RuntimeName.RUNC


def test_a_node_s_word_counts_from_the_moment_that_it_changes() -> None:
    nodes = snapshot(node("a", RuntimeName.GVISOR, refusals={RuntimeName.GVISOR: UNKNOWN}))
    copy = nodes.copy()
    nodes.upsert_node(node("a", RuntimeName.GVISOR))
    assert place(nodes, demand(RuntimeName.GVISOR)).placed
    assert not place(copy, demand(RuntimeName.GVISOR)).placed
    for n in range(100):  # the columns grow
        nodes.upsert_node(node(f"n{n}", RuntimeName.GVISOR, refusals={RuntimeName.GVISOR: UNKNOWN}, gpus=n % 2))
    assert [placed.node for placed in place(nodes, demand(RuntimeName.GVISOR), 3).placed] == ["a"]


@virtual
async def test_a_node_registers_which_of_its_runtimes_do_not_hand_its_gpus_on_and_again_when_that_changes(tmp_path: Path) -> None:
    world = World(tmp_path / "agent", driver="999.1")
    world.runtimes = (RuntimeName.RUNC, RuntimeName.GVISOR)
    world.gvisor_drivers = {"580.159.04"}
    async with world.agent():
        await until(lambda: "n1" in world.control.nodes)
        refusals = world.control.nodes["n1"].capacity.gpu_refusals
        assert set(refusals) == {RuntimeName.GVISOR}
        assert "does not know driver 999.1" in refusals[RuntimeName.GVISOR]
        assert world.hardware is not None
        world.hardware.driver_change("580.159.04")
        await until(lambda: world.control.nodes["n1"].capacity.gpu_refusals == {}, timeout_s=3 * LOOK_S)


@virtual
async def test_a_silent_driver_takes_no_runtime_away(tmp_path: Path) -> None:
    hardware = FakeHardware(clock=CLOCK)
    devices = NodeDevices([hardware], directory=tmp_path, clock=CLOCK, boot="1")
    gpus = Gpus(
        devices,
        node="n1",
        reporter=Reporter("n1", FakeControlPlane(), CLOCK, random.Random(1)),
        clock=CLOCK,
        holders=lambda device: (),
        file=tmp_path / "gpus.json",
        runtimes=lambda: (RuntimeName.RUNC, RuntimeName.GVISOR),
    )
    await gpus.look()
    before = gpus.refusals
    assert set(before) == {RuntimeName.GVISOR}
    hardware.hang()
    await gpus.look()
    assert gpus.refusals == before
    hardware.answer()
    await gpus.close()


def test_a_node_s_page_says_which_runtimes_cannot() -> None:
    capacity = node("a", RuntimeName.GVISOR, refusals={RuntimeName.GVISOR: UNKNOWN}).capacity
    assert notes(capacity) == [f"not with gvisor: {UNKNOWN}"]
    assert notes(replace(capacity, gpu_refusals={})) == []


@virtual
async def test_what_holds_a_device_is_not_written_down_and_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path / "agent", count=2)
    async with world.agent():
        world.app("web-1", GpuGrant(device=world.ids[1]))
        await world.phase("web-1", Phase.RUNNING)
        ((kind, payload), *_) = await ask(world.control, StreamKind.SNAPSHOT)
        assert kind is Kind.ERROR
        error = decode(payload, ErrorBody)
        assert (error.code, error.field) == ("unsupported", "resources.gpu")
        assert "in no snapshot" in error.message
        assert "web-1" in world.host.running()


def test_nothing_goes_on_from_a_snapshot_with_devices() -> None:
    spec = JobSpec(name="x", image="i", sandbox=True, snapshot="sha256:" + "0" * 64)
    check_job(spec)
    for resources in (Resources(gpu=Gpu()), Resources(devices=("vendor.com/nic=port0",))):
        with pytest.raises(Invalid) as raised:
            check_job(replace(spec, resources=resources))
        assert raised.value.field == "snapshot"
