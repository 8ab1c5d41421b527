"""AMD's and Intel's devices over a made /sys, and the kernel's messages."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from atoll.devices.bounded import Bounded
from atoll.devices.sysfs import AmdHardware, IntelHardware
from atoll.devices.uevents import Uevent, kernel_uevents, parse
from atoll.model.devices import GpuGrant, GpuHealth, GpuSharing, GpuVendor, LinkKind
from atoll.model.errors import NotFound, Unavailable, Unsupported
from atoll.model.ports.devices import DeviceEvent, DeviceNode, Trouble

GIB = 1 << 30
MI300X = {
    "vendor": "0x1002",
    "device": "0x74a1",
    "unique_id": "0x1234567890abcdef",
    "mem_info_vram_total": 192 * GIB,
    "mem_info_vram_used": 3 * GIB,
    "gpu_busy_percent": 37,
    "numa_node": 0,
    "local_cpulist": "0-47",
    "ras/umc_err_count": "ue: 0\nce: 4\nde: 0",
    "hwmon/hwmon3/power1_average": 140_000_000,
    "hwmon/hwmon3/temp1_input": 51_000,
}
FLEX = {
    "vendor": "0x8086",
    "device": "0x56c0",
    "numa_node": -1,
    "local_cpulist": "0-3",
    "resource": "0x00000000a0000000 0x00000000a0ffffff 0x0000000000040200\n"
    "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
    "0x0000007c00000000 0x0000007fffffffff 0x000000000014220c\n",
}


class Machine:
    """A made /sys and /dev."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/sys/kernel/osrelease", "6.12.1")

    def write(self, path: str, value: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")

    def add(self, pci: str, minor: int, driver: str, files: dict[str, object]) -> None:
        device = self.root / f"sys/devices/pci0000:00/0000:00:01.0/{pci}"
        for name, value in files.items():
            self.write(str((device / name).relative_to(self.root)), value)
        render = device / f"drm/renderD{minor}"
        render.mkdir(parents=True)
        (render / "dev").write_text(f"226:{minor}\n")
        (render / "device").symlink_to("../..")
        (self.root / f"sys/bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
        (device / "driver").symlink_to(self.root / f"sys/bus/pci/drivers/{driver}")
        for place, target in (("sys/class/drm", render), ("sys/bus/pci/devices", device)):
            (self.root / place).mkdir(parents=True, exist_ok=True)
            (self.root / place / target.name).symlink_to(target)
        self.write(f"dev/dri/renderD{minor}", "")

    def add_kfd(self, minor: int, gpu: int, version: int) -> None:
        self.write("dev/kfd", "")
        self.write("sys/class/kfd/kfd/dev", "240:0")
        self.write(f"sys/class/kfd/kfd/topology/nodes/{gpu}/gpu_id", gpu)
        self.write(
            f"sys/class/kfd/kfd/topology/nodes/{gpu}/properties",
            f"simd_count 1216\ngfx_target_version {version}\ndrm_render_minor {minor}",
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def said(*events: Uevent) -> AsyncIterator[Uevent]:
    async def stream() -> AsyncIterator[Uevent]:
        for event in events:
            yield event

    return stream()


async def told(events: AsyncIterator[DeviceEvent]) -> list[DeviceEvent]:
    return [event async for event in events]


async def test_an_amd_device_is_told_in_full(machine: Machine) -> None:
    machine.add("0000:05:00.0", 128, "amdgpu", MI300X)
    machine.add_kfd(128, 77, 90402)
    (device,) = await AmdHardware(root=machine.root).discover()
    assert (device.id, device.model, device.vendor) == ("GPU-1234567890abcdef", "AMD Instinct MI300X", GpuVendor.AMD)
    assert (device.memory_bytes, device.compute_capability, device.driver) == (192 * GIB, "gfx942", "6.12.1")
    assert (device.pci, device.minor, device.numa, device.cpus) == ("0000:05:00.0", 128, 0, "0-47")
    assert (device.ecc, device.ecc_errors, device.health, device.mig, device.profiles) == (True, 0, GpuHealth.OK, False, ())
    assert device.sharing == (GpuSharing.EXCLUSIVE, GpuSharing.TIME_SLICE)


async def test_an_intel_device_is_told_in_full(machine: Machine) -> None:
    machine.add("0000:4d:00.0", 129, "xe", FLEX)
    (device,) = await IntelHardware(root=machine.root).discover()
    assert (device.id, device.model, device.vendor) == ("0000:4d:00.0", "Intel Data Center GPU Flex 170", GpuVendor.INTEL)
    assert (device.memory_bytes, device.pci, device.minor, device.numa) == (16 * GIB, "0000:4d:00.0", 129, -1)
    assert device.ecc is None


async def test_the_size_of_intels_own_memory_is_what_its_driver_says(machine: Machine) -> None:
    machine.add("0000:4d:00.0", 128, "i915", FLEX | {"drm/card0/lmem_total_bytes": 14 * GIB})
    (device,) = await IntelHardware(root=machine.root).discover()
    assert device.memory_bytes == 14 * GIB


async def test_a_device_that_is_not_in_the_table_is_named_by_its_numbers(machine: Machine) -> None:
    machine.add("0000:05:00.0", 128, "amdgpu", MI300X | {"device": "0xbeef", "unique_id": "0x0"})
    (device,) = await AmdHardware(root=machine.root).discover()
    assert (device.model, device.id) == ("pci 1002:beef", "0000:05:00.0")


async def test_the_drivers_own_version_and_the_boards_own_name_come_first(machine: Machine) -> None:
    machine.add("0000:05:00.0", 128, "amdgpu", MI300X | {"product_name": "AMD Instinct MI300X OAM"})
    machine.write("sys/module/amdgpu/version", "6.10.5")
    (device,) = await AmdHardware(root=machine.root).discover()
    assert (device.model, device.driver) == ("AMD Instinct MI300X OAM", "6.10.5")


async def test_each_vendor_sees_its_own_devices_in_order_of_their_place(machine: Machine) -> None:
    machine.add("0000:85:00.0", 128, "amdgpu", MI300X | {"numa_node": 1, "unique_id": "0x2"})
    machine.add("0000:05:00.0", 130, "amdgpu", MI300X | {"unique_id": "0x1"})
    machine.add("0000:4d:00.0", 129, "xe", FLEX)
    first, second = await AmdHardware(root=machine.root).discover()
    assert (first.pci, second.pci) == ("0000:05:00.0", "0000:85:00.0")
    assert [(link.peer, link.kind) for link in first.links] == [(second.id, LinkKind.SYS)]
    assert len(await IntelHardware(root=machine.root).discover()) == 1


async def test_a_machine_without_such_devices_has_none(machine: Machine) -> None:
    assert await AmdHardware(root=machine.root).discover() == ()
    assert await IntelHardware(root=machine.root).samples() == ()


IGPU = {"vendor": "0x8086", "device": "0x46a6", "numa_node": -1, "local_cpulist": "0-3", "resource": FLEX["resource"]}


@pytest.mark.parametrize("driver", ["i915", "xe"])
async def test_intels_gpu_inside_a_processor_is_not_offered_and_says_why(machine: Machine, driver: str) -> None:
    machine.add("0000:00:02.0", 128, driver, IGPU)
    machine.add("0000:4d:00.0", 129, driver, FLEX)
    hardware = IntelHardware(root=machine.root)
    assert [device.pci for device in await hardware.discover()] == ["0000:4d:00.0"]
    assert [sample.device for sample in await hardware.samples()] == ["0000:4d:00.0"]
    ((place, why),) = hardware.withheld()
    assert (place, "no memory of its own" in why) == ("0000:00:02.0", True)


@pytest.mark.parametrize(
    "more", [{"drm/card0/lmem_total_bytes": GIB}, {"tile0/physical_vram_size_bytes": GIB}, {"device": "0x56c0"}]
)
async def test_one_with_memory_of_its_own_is_offered_wherever_it_is(machine: Machine, more: dict[str, object]) -> None:
    machine.add("0000:00:02.0", 128, "xe", IGPU | more)
    hardware = IntelHardware(root=machine.root)
    assert (len(await hardware.discover()), hardware.withheld()) == (1, ())


@pytest.mark.parametrize(("own", "offered"), [(GIB // 2, False), (None, False), (2 * GIB, True)])
async def test_amds_gpu_inside_a_processor_is_told_by_its_memory(machine: Machine, own: int | None, offered: bool) -> None:
    files = {name: value for name, value in MI300X.items() if name != "mem_info_vram_total"}
    machine.add("0000:05:00.0", 128, "amdgpu", files | ({"mem_info_vram_total": own} if own else {}))
    hardware = AmdHardware(root=machine.root)
    assert (len(await hardware.discover()) == 1, hardware.withheld() == ()) == (offered, offered)


async def test_uncorrected_memory_errors_are_shown(machine: Machine) -> None:
    machine.add("0000:05:00.0", 128, "amdgpu", MI300X | {"ras/umc_err_count": "ue: 2\nce: 4"})
    (device,) = await AmdHardware(root=machine.root).discover()
    assert (device.ecc_errors, device.health) == (2, GpuHealth.DEGRADED)
    assert "2 uncorrected" in device.reason


async def test_samples_tell_what_a_device_does_and_who_uses_it(machine: Machine) -> None:
    machine.add("0000:05:00.0", 128, "amdgpu", MI300X)
    machine.add_kfd(128, 77, 90402)
    machine.write("sys/class/kfd/kfd/proc/4321/vram_77", 2 * GIB)
    machine.write("sys/class/kfd/kfd/proc/4322/vram_78", GIB)
    (sample,) = await AmdHardware(root=machine.root).samples()
    assert (sample.busy_milli, sample.memory_bytes, sample.power_milliwatts, sample.temperature_c) == (370, 3 * GIB, 140_000, 51)
    assert sample.processes == {4321: 2 * GIB}


async def test_an_instance_gets_the_render_node_of_its_own_device_only(machine: Machine) -> None:
    machine.add("0000:05:00.0", 128, "amdgpu", MI300X | {"unique_id": "0x1"})
    machine.add("0000:85:00.0", 129, "amdgpu", MI300X | {"unique_id": "0x2"})
    machine.add_kfd(128, 77, 90402)
    hardware = AmdHardware(root=machine.root)
    await hardware.discover()
    edits = hardware.edits([GpuGrant(device="GPU-2")], [], [])
    assert edits.nodes == (
        DeviceNode("/dev/kfd", "/dev/kfd", 240, 0),
        DeviceNode("/dev/dri/renderD129", "/dev/dri/renderD129", 226, 129),
    )
    assert (edits.devices, edits.pci, edits.mounts) == (("amd.com/gpu=GPU-2",), ("0000:85:00.0",), ())


async def test_intel_needs_its_render_node_alone(machine: Machine) -> None:
    machine.add("0000:4d:00.0", 128, "xe", FLEX)
    hardware = IntelHardware(root=machine.root)
    await hardware.discover()
    edits = hardware.edits([GpuGrant(device="0000:4d:00.0", sharing=GpuSharing.TIME_SLICE, milli=500)], [], [])
    assert [node.path for node in edits.nodes] == ["/dev/dri/renderD128"]
    assert edits.pci == (), "a share is never handed on as a PCI device"


async def test_a_missing_device_file_is_named(machine: Machine) -> None:
    machine.add("0000:05:00.0", 128, "amdgpu", MI300X)
    hardware = AmdHardware(root=machine.root)
    await hardware.discover()
    with pytest.raises(Unsupported, match="/dev/kfd"):
        hardware.edits([GpuGrant(device="GPU-1234567890abcdef")], [], [])


async def test_partitions_are_refused_with_a_reason(machine: Machine) -> None:
    machine.add("0000:4d:00.0", 128, "xe", FLEX)
    hardware = IntelHardware(root=machine.root)
    (device,) = await hardware.discover()
    assert await hardware.partitions(device.id) == ()
    await hardware.remove_partition(device.id, 0)
    with pytest.raises(Unsupported, match="cannot be partitioned"):
        await hardware.make_partition(device.id, "1g.10gb", 0)
    with pytest.raises(Unsupported, match="cannot be partitioned"):
        hardware.edits([GpuGrant(device=device.id, sharing=GpuSharing.MIG)], [], ["MIG-1"])
    with pytest.raises(NotFound):
        hardware.edits([GpuGrant(device="0000:99:00.0")], [], [])


async def test_a_device_that_is_removed_has_vanished_and_is_told_again_when_it_is_back(machine: Machine) -> None:
    machine.add("0000:05:00.0", 128, "amdgpu", MI300X)
    place = {"SUBSYSTEM": "pci", "PCI_SLOT_NAME": "0000:05:00.0"}
    other = {"SUBSYSTEM": "pci", "PCI_SLOT_NAME": "0000:06:00.0"}
    events = said(
        Uevent("remove", "", other),
        Uevent("remove", "", place),
        Uevent("remove", "", place),
        Uevent("bind", "", place | {"DRIVER": "amdgpu"}),
    )
    hardware = AmdHardware(root=machine.root, uevents=lambda: events)
    (device,) = await hardware.discover()
    assert [(event.trouble, event.device) for event in await told(hardware.events())] == [
        (Trouble.VANISHED, device.id),
        (Trouble.RECOVERED, device.id),
    ]


@pytest.mark.parametrize(
    ("how", "trouble", "mend"),
    [
        ("none", Trouble.SUSPECT, "start anew"),
        ("rebind,bus-reset", Trouble.BROKEN, "bind its driver anew, or reset it on its bus"),
        ("unknown", Trouble.BROKEN, "restart the node"),
    ],
)
async def test_a_device_that_hangs_is_told_with_what_would_mend_it(machine: Machine, how: str, trouble: Trouble, mend: str) -> None:
    machine.add("0000:4d:00.0", 128, "xe", FLEX)
    wedged = Uevent("change", "/devices/pci0000:00/0000:00:01.0/0000:4d:00.0/drm/card0", {"SUBSYSTEM": "drm", "WEDGED": how})
    hardware = IntelHardware(root=machine.root, uevents=lambda: said(wedged))
    await hardware.discover()
    (event,) = await told(hardware.events())
    assert (event.trouble, event.device) == (trouble, "0000:4d:00.0")
    assert mend in event.mend


async def test_a_device_that_is_found_after_the_waiting_began_is_told_of_too(machine: Machine) -> None:
    found = asyncio.Event()
    wedged = Uevent("change", "/devices/pci0000:00/0000:00:01.0/0000:4d:00.0/drm/card0", {"SUBSYSTEM": "drm", "WEDGED": "none"})

    async def late() -> AsyncIterator[Uevent]:
        await found.wait()
        yield wedged

    hardware = IntelHardware(root=machine.root, uevents=late)
    telling = asyncio.ensure_future(told(hardware.events()))
    await asyncio.sleep(0)
    machine.add("0000:4d:00.0", 128, "xe", FLEX)
    await hardware.discover()
    found.set()
    assert [(event.trouble, event.device) for event in await telling] == [(Trouble.SUSPECT, "0000:4d:00.0")]


# The kernel's messages, and looks with a deadline.


def test_a_message_of_the_kernel_is_read() -> None:
    data = b"remove@/devices/pci0000:00/0000:00:06.0\0ACTION=remove\0SUBSYSTEM=pci\0PCI_SLOT_NAME=0000:00:06.0\0SEQNUM=7\0"
    event = parse(data)
    assert event is not None
    assert (event.action, event.subsystem, event.pci) == ("remove", "pci", "0000:00:06.0")
    assert parse(b"libudev\0\xfe\xed") is None


def test_the_place_on_the_bus_is_found_in_the_path() -> None:
    assert Uevent("change", "/devices/pci0000:00/0000:00:01.0/0000:4d:00.0/drm/card0").pci == "0000:4d:00.0"
    assert Uevent("add", "/module/nvidia").pci == ""


async def test_the_kernel_itself_is_heard() -> None:
    trigger = Path("/sys/devices/virtual/net/lo/uevent")
    if not os.access(trigger, os.W_OK):
        pytest.skip("needs a /sys that can be written")
    events = kernel_uevents()
    first = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    trigger.write_text("change")
    async with asyncio.timeout(10):
        while (event := await first).path != "/devices/virtual/net/lo":
            first = asyncio.ensure_future(anext(events))
    assert (event.action, event.subsystem) == ("change", "net")
    await events.aclose()  # type: ignore[attr-defined]


async def test_a_look_that_hangs_is_unavailable_and_the_next_waits_for_its_end() -> None:
    bounded, release = Bounded("the driver"), threading.Event()
    with pytest.raises(Unavailable, match="the driver did not answer"):
        await bounded(release.wait, 0.05)
    with pytest.raises(Unavailable):
        await bounded(lambda: 1, 0.05)
    release.set()
    assert await bounded(lambda: 2, 30.0) == 2


async def test_what_a_look_raises_is_raised() -> None:
    bounded = Bounded("the driver")
    with pytest.raises(Unsupported):
        await bounded(lambda: (_ for _ in ()).throw(Unsupported("no")), 30.0)
    assert await bounded(lambda: 3, 30.0) == 3
