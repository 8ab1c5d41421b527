"""The contract of `Hardware`: what a node may rely on, whatever driver is behind it.

Run on the fake, on NVIDIA's over a stand-in for its library, on AMD's and Intel's over a made /sys, and on the real thing where
this machine has one.

What a kind cannot be made to do (a real GPU falls off the bus for nobody) is skipped there, with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pynvml
import pytest
from msgspec import Struct

from atoll.devices.fake import FakeHardware
from atoll.devices.node import NodeDevices
from atoll.devices.nvidia.fake_driver import FakeDriver, fake_device
from atoll.devices.nvidia.hardware import Deadlines, NvidiaHardware
from atoll.devices.sysfs import AmdHardware, IntelHardware
from atoll.devices.uevents import Uevent
from atoll.devices.watch import Patience
from atoll.model.devices import MEMORY_SLICES, MILLI, GpuDevice, GpuGrant, GpuHealth, GpuSharing, MigProfile
from atoll.model.errors import AtollError, Conflict, Invalid, NotFound, Unavailable, Unsupported
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.devices import DeviceEvent, Hardware, Trouble
from atoll.model.spec import Gpu, GpuCapability, RuntimeName

WAIT_S = 30.0
HANG_S = 1.5
KINDS = ("fake", "nvidia-stand-in", "amd", "intel", "nvidia")


class Machine(Struct, kw_only=True):
    """A driver, and what can be done to it; None where that cannot be."""

    hardware: Hardware
    error: Callable[[str, int], None] | None = None
    """The driver reports an XID."""
    lose: Callable[[str], None] | None = None
    hang: Callable[[], None] | None = None
    heal: Callable[[], None] | None = None
    """It hangs no more."""
    fail_half_way: Callable[[], None] | None = None
    """The next partition is made half-way only."""
    mismatch: Callable[[], None] | None = None
    owned: bool = True
    """Nobody else uses these devices, and partitions may be made."""


def able(action: Callable[..., None] | None, what: str) -> Callable[..., None]:
    if action is None:
        pytest.skip(f"{what} cannot be brought about here")
    return action


def fake() -> Iterator[Machine]:
    hardware = FakeHardware(count=3, mig=[2], nvlink=18, call_s=HANG_S)
    yield Machine(
        hardware=hardware,
        error=hardware.xid,
        lose=hardware.vanish,
        hang=lambda: hardware.hang(honest=True),
        heal=hardware.answer,
        fail_half_way=hardware.half_make_next_partition,
        mismatch=hardware.driver_mismatch,
    )


async def no_uevents() -> AsyncIterator[Uevent]:
    await asyncio.Event().wait()
    yield Uevent(action="", subsystem="", pci="", properties={})


def stand_in(directory: Path) -> Iterator[Machine]:
    driver = FakeDriver(directory / "driver", [fake_device(0), fake_device(1), fake_device(2, mig=True)])
    short = Deadlines(discover_s=HANG_S, samples_s=HANG_S, partitions_s=HANG_S, quiet_s=WAIT_S)

    def mismatch() -> None:
        driver.fail("nvmlInit", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    yield Machine(
        hardware=driver.hardware(deadlines=short, uevents=no_uevents),
        error=driver.xid,
        lose=driver.lose,
        hang=lambda: driver.hang("nvmlDeviceGetMemoryInfo", times=-1),
        heal=driver.heal,
        fail_half_way=lambda: driver.crash("nvmlGpuInstanceCreateComputeInstance"),
        mismatch=mismatch,
    )
    driver.close()


def made_sysfs(root: Path, kind: str) -> Iterator[Machine]:
    vendor, device, driver = ("0x1002", "0x74a1", "amdgpu") if kind == "amd" else ("0x8086", "0x56c0", "xe")
    files = {"vendor": vendor, "device": device, "mem_info_vram_total": 192 << 30, "numa_node": 0, "local_cpulist": "0-7"}
    files["resource"] = "0x0000007c00000000 0x0000007fffffffff 0x000000000014220c"
    for index in range(2):
        place = root / f"sys/devices/pci0000:00/0000:0{5 + index}:00.0"
        render = place / f"drm/renderD{128 + index}"
        render.mkdir(parents=True)
        for name, value in {**files, "unique_id": f"0x{index + 1:016x}"}.items():
            (place / name).write_text(f"{value}\n")
        (render / "dev").write_text(f"226:{128 + index}\n")
        (render / "device").symlink_to("../..")
        for link, target in ((root / "sys/class/drm", render), (root / "sys/bus/pci/devices", place)):
            link.mkdir(parents=True, exist_ok=True)
            (link / target.name).symlink_to(target)
        (root / f"sys/bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
        (place / "driver").symlink_to(root / f"sys/bus/pci/drivers/{driver}")
        file = root / f"dev/dri/renderD{128 + index}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for path, value in (("proc/sys/kernel/osrelease", "6.12.1"), ("sys/class/kfd/kfd/dev", "240:0"), ("dev/kfd", "")):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(value)
    make = AmdHardware if kind == "amd" else IntelHardware

    def lose(id: str) -> None:
        card = next(path for path in (root / "sys/class/drm").iterdir() if _id(path, kind) == id)
        card.unlink()

    yield Machine(hardware=make(root=root, uevents=no_uevents), lose=lose)


def _id(render: Path, kind: str) -> str:
    device = (render / "device").resolve()
    return f"GPU-{(device / 'unique_id').read_text().strip()[2:]}" if kind == "amd" else device.name


def real() -> Iterator[Machine]:
    if not Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has no NVIDIA driver")
    yield Machine(hardware=NvidiaHardware(), owned=False)


@pytest.fixture(params=KINDS)
async def machine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Machine]:
    match request.param:
        case "fake":
            makers = fake()
        case "nvidia-stand-in":
            makers = stand_in(tmp_path)
        case "nvidia":
            makers = real()
        case kind:
            makers = made_sysfs(tmp_path, kind)
    for made in makers:
        yield made
        await made.hardware.close()


async def discovered(machine: Machine) -> tuple[GpuDevice, ...]:
    async with asyncio.timeout(WAIT_S):
        found = await machine.hardware.discover()
    if not found:
        pytest.skip("the driver has no device")
    return found


async def partitionable(machine: Machine) -> GpuDevice:
    """Return a device in MIG mode that nothing uses."""
    for device in await discovered(machine):
        if device.mig and not await machine.hardware.partitions(device.id):
            return device
    pytest.skip("no device in MIG mode without partitions")


def kind_of(device: GpuDevice, compute_slices: int) -> MigProfile:
    """Return the smallest kind of partition with so much compute."""
    kinds = [kind for kind in device.profiles if kind.compute_slices == compute_slices and "+" not in kind.name]
    return min(kinds, key=lambda kind: kind.memory_slices)


async def next_event(events: AsyncIterator[DeviceEvent]) -> DeviceEvent:
    async with asyncio.timeout(WAIT_S):
        return await anext(events)


# discovery


async def test_discovery_tells_each_device_fully_and_in_order_of_the_bus(machine: Machine) -> None:
    found = await discovered(machine)
    assert len({device.id for device in found}) == len(found)
    assert [device.pci for device in found] == sorted(device.pci for device in found)
    for device in found:
        assert device.vendor is machine.hardware.vendor
        assert device.model
        assert device.driver
        assert device.memory_bytes > 1 << 30
        assert device.minor >= 0
        assert re.fullmatch(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", device.pci), device.pci
        assert device.present
        assert device.answers
        assert device.health is GpuHealth.OK or device.reason


async def test_discovery_repeats_itself(machine: Machine) -> None:
    first = await discovered(machine)
    assert await machine.hardware.discover() == first


async def test_links_lead_both_ways_and_to_devices_of_this_machine(machine: Machine) -> None:
    found = {device.id: device for device in await discovered(machine)}
    for device in found.values():
        for link in device.links:
            assert link.peer in found
            assert link.peer != device.id
            back = next(other for other in found[link.peer].links if other.peer == device.id)
            assert (back.kind, back.width) == (link.kind, link.width)


async def test_profiles_are_there_in_mig_mode_only_and_fit_the_device(machine: Machine) -> None:
    for device in await discovered(machine):
        assert bool(device.profiles) == device.mig
        for kind in device.profiles:
            assert kind.starts
            assert all(start >= 0 and start + kind.memory_slices <= MEMORY_SLICES for start in kind.starts)
            assert 0 < kind.memory_bytes <= device.memory_bytes
            assert kind.most >= 1


async def test_every_device_has_a_sample_within_its_bounds(machine: Machine) -> None:
    found = {device.id: device for device in await discovered(machine)}
    samples = {sample.device: sample for sample in await machine.hardware.samples()}
    assert set(found) <= set(samples)
    for id, device in found.items():
        assert 0 <= samples[id].busy_milli <= MILLI
        assert 0 <= samples[id].memory_bytes <= device.memory_bytes


# edits


async def test_edits_name_what_was_granted_and_no_other_device(machine: Machine) -> None:
    found = await discovered(machine)
    whole = [device for device in found if not device.mig]
    if not whole:
        pytest.skip("no device outside MIG mode")
    granted, *others = whole
    try:
        edits = machine.hardware.edits([GpuGrant(device=granted.id)], [GpuCapability.COMPUTE], [])
    except Unsupported as error:
        pytest.skip(f"this made machine has not all files: {error}")
    assert [name for name in edits.devices if granted.id in name] == list(edits.devices)
    assert edits.pci == (granted.pci,)
    numbers = {node.minor for node in edits.nodes if re.search(r"/(nvidia|renderD)\d+$", node.path)}
    assert numbers == {granted.minor}
    assert not numbers & {device.minor for device in others}


async def test_edits_of_a_device_that_is_not_there_are_refused(machine: Machine) -> None:
    await discovered(machine)
    with pytest.raises((Unsupported, NotFound)):
        machine.hardware.edits([GpuGrant(device="GPU-none")], [GpuCapability.COMPUTE], [])


# partitions


async def test_a_device_outside_mig_mode_is_not_partitioned(machine: Machine) -> None:
    device = next((device for device in await discovered(machine) if not device.mig), None)
    if device is None:
        pytest.skip("no device outside MIG mode")
    assert await machine.hardware.partitions(device.id) == ()
    with pytest.raises((Invalid, Unsupported)):
        await machine.hardware.make_partition(device.id, "1g.10gb", 0)


async def test_a_partition_is_made_once_listed_and_removed(machine: Machine) -> None:
    device = await partitionable(machine)
    kind = kind_of(device, 2)
    hardware = machine.hardware
    made = await hardware.make_partition(device.id, kind.name, kind.starts[1])
    assert made.id
    assert (made.profile, made.start, made.size) == (kind.name, kind.starts[1], kind.memory_slices)
    assert await hardware.make_partition(device.id, kind.name, kind.starts[1]) == made
    other = await hardware.make_partition(device.id, kind.name, kind.starts[0])
    assert await hardware.partitions(device.id) == (other, made)
    for start in (kind.starts[0], kind.starts[1], kind.starts[1]):
        await hardware.remove_partition(device.id, start)
    assert await hardware.partitions(device.id) == ()


async def test_every_place_that_is_offered_can_be_had(machine: Machine) -> None:
    device = await partitionable(machine)
    for kind in device.profiles:
        for start in kind.starts if machine.owned else kind.starts[:1]:
            made = await machine.hardware.make_partition(device.id, kind.name, start)
            assert (made.profile, made.start, made.size) == (kind.name, start, kind.memory_slices)
            await machine.hardware.remove_partition(device.id, start)
    assert await machine.hardware.partitions(device.id) == ()


async def test_no_two_partitions_overlap_and_no_more_are_made_than_there_are_slices(machine: Machine) -> None:
    device = await partitionable(machine)
    half, small = kind_of(device, 3), kind_of(device, 1)
    hardware = machine.hardware
    await hardware.make_partition(device.id, half.name, 0)
    with pytest.raises(Conflict):
        await hardware.make_partition(device.id, small.name, 0)
    with pytest.raises(Conflict):
        await hardware.make_partition(device.id, small.name, 3)
    for start in (4, 5, 6):
        await hardware.make_partition(device.id, small.name, start)
    assert [(partition.start, partition.size) for partition in await hardware.partitions(device.id)] == [
        (0, 4),
        (4, 1),
        (5, 1),
        (6, 1),
    ]
    for start in (0, 4, 5, 6):
        await hardware.remove_partition(device.id, start)


async def test_a_profile_or_start_that_is_none_is_refused_with_those_that_are(machine: Machine) -> None:
    device = await partitionable(machine)
    with pytest.raises(Invalid) as profile:
        await machine.hardware.make_partition(device.id, "9g.999gb", 0)
    assert device.profiles[0].name in f"{profile.value} {profile.value.mend}"
    kind = kind_of(device, 3)
    with pytest.raises(Invalid) as start:
        await machine.hardware.make_partition(device.id, kind.name, 1)
    assert all(str(good) in f"{start.value.mend}" for good in kind.starts)


async def test_two_that_want_the_same_slices_at_once_end_with_one(machine: Machine) -> None:
    device = await partitionable(machine)
    half, small = kind_of(device, 3), kind_of(device, 1)
    tries = await asyncio.gather(
        machine.hardware.make_partition(device.id, half.name, 0),
        machine.hardware.make_partition(device.id, small.name, 0),
        return_exceptions=True,
    )
    assert sorted(isinstance(one, Conflict) for one in tries) == [False, True]
    assert len(await machine.hardware.partitions(device.id)) == 1
    await machine.hardware.remove_partition(device.id, 0)


async def test_an_unknown_device_is_not_found(machine: Machine) -> None:
    await discovered(machine)
    if machine.hardware.vendor != "nvidia":
        pytest.skip("these devices are never partitioned: the answer is the same for all")
    with pytest.raises(NotFound):
        await machine.hardware.partitions("GPU-none")
    with pytest.raises(NotFound):
        await machine.hardware.make_partition("GPU-none", "1g.10gb", 0)


async def test_a_partition_that_fails_half_way_is_shown_or_gone_and_can_be_made_again(machine: Machine) -> None:
    device = await partitionable(machine)
    kind = kind_of(device, 3)
    able(machine.fail_half_way, "a half-made partition")()
    with pytest.raises(Unavailable):
        await machine.hardware.make_partition(device.id, kind.name, 0)
    left = await machine.hardware.partitions(device.id)
    assert [(partition.id, partition.start) for partition in left] in ([], [("", 0)])
    await machine.hardware.remove_partition(device.id, 0)
    assert await machine.hardware.partitions(device.id) == ()
    made = await machine.hardware.make_partition(device.id, kind.name, 0)
    assert made.id
    await machine.hardware.remove_partition(device.id, 0)


# what befalls


async def test_errors_come_with_their_meaning_device_and_code(machine: Machine) -> None:
    device = (await discovered(machine))[0]
    error = able(machine.error, "an error of the driver")
    events = machine.hardware.events()
    for code, trouble in ((31, Trouble.FAULT), (95, Trouble.BROKEN), (92, Trouble.SUSPECT)):
        error(device.id, code)
        event = await next_event(events)
        assert (event.code, event.trouble, event.device) == (code, trouble, device.id)
        assert event.message
        assert event.at > 0
    await events.aclose()  # type: ignore[attr-defined]


async def test_a_lost_device_is_told(machine: Machine) -> None:
    device = (await discovered(machine))[0]
    if machine.error is None:
        pytest.skip("the loss of a device is not told here")
    events = machine.hardware.events()
    able(machine.lose, "the loss of a device")(device.id)
    event = await next_event(events)
    assert (event.trouble, event.device) == (Trouble.VANISHED, device.id)
    assert event.mend
    await events.aclose()  # type: ignore[attr-defined]


async def test_a_lost_device_is_discovered_no_more_and_the_others_are(machine: Machine) -> None:
    found = await discovered(machine)
    able(machine.lose, "the loss of a device")(found[0].id)
    assert [device.id for device in await machine.hardware.discover()] == [device.id for device in found[1:]]
    if found[0].vendor == "nvidia":
        with pytest.raises((NotFound, Unavailable)):
            await machine.hardware.make_partition(found[0].id, "1g.10gb", 0)


async def test_a_driver_that_hangs_is_unavailable_within_its_deadline(machine: Machine) -> None:
    await discovered(machine)
    able(machine.hang, "a hang")()
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(Unavailable) as hung:
            await machine.hardware.discover()
    assert hung.value.retry == "safe"


async def test_a_driver_that_differs_from_its_library_is_unavailable_and_says_so(machine: Machine) -> None:
    able(machine.mismatch, "a driver of another version than its library")()
    with pytest.raises(Unavailable) as differs:
        await machine.hardware.discover()
    assert "library" in str(differs.value)
    assert differs.value.mend


async def test_a_call_that_was_given_up_does_not_spoil_the_next(machine: Machine) -> None:
    found = await discovered(machine)
    for _ in range(3):
        call = asyncio.ensure_future(machine.hardware.discover())
        await asyncio.sleep(0)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError, AtollError):
            await call
    assert await machine.hardware.discover() == found


async def test_closing_twice_is_no_error(machine: Machine) -> None:
    await discovered(machine)
    await machine.hardware.close()
    await machine.hardware.close()


# a node over it


async def test_a_node_offers_what_the_driver_shows_and_leaves_nothing_of_a_claim(machine: Machine, tmp_path: Path) -> None:
    found = await discovered(machine)
    node = NodeDevices([machine.hardware], directory=tmp_path / "kept", clock=SystemClock())
    try:
        assert [device.id for device in await node.inventory()] == [device.id for device in found]
        free = [device for device in found if not device.mig and device.health is GpuHealth.OK]
        mig = [device for device in found if device.mig and not await machine.hardware.partitions(device.id)]
        grants = [GpuGrant(device=device.id) for device in free[:1]]
        for device in mig[:1]:
            kind = kind_of(device, 3)
            size = kind.memory_slices
            grants.append(GpuGrant(device=device.id, sharing=GpuSharing.MIG, profile=kind.name, start=kind.starts[0], size=size))
        for grant in grants:
            # a made machine has no files of devices, and of a real one another may have the device
            with contextlib.suppress(Unsupported, Unavailable):
                claim = await node.claim("i-1", [grant], Gpu(capabilities=()), RuntimeName.RUNC)
                assert len(claim.partitions) == (grant.sharing is GpuSharing.MIG)
                assert claim.edits
            await node.release("i-1")
        for device in mig[:1]:
            assert await machine.hardware.partitions(device.id) == ()
    finally:
        await node.close()


async def test_a_node_outlasts_a_hang_of_the_driver(machine: Machine, tmp_path: Path) -> None:
    found = await discovered(machine)
    hang = able(machine.hang, "a hang")
    patience = Patience(silent_s=2 * HANG_S, again_s=0.01, look_s=0.1)
    node = NodeDevices([machine.hardware], directory=tmp_path / "kept", clock=SystemClock(), patience=patience)
    events = node.events()
    try:
        assert all(device.answers for device in await node.inventory())
        hang()
        assert (await next_event(events)).trouble is Trouble.SILENT
        silent = await node.inventory()
        assert [(device.id, device.health, device.answers) for device in silent] == [
            (device.id, GpuHealth.QUARANTINED, False) for device in found
        ]
        able(machine.heal, "an end of the hang")()
        recovered = {(await next_event(events)).device for _ in found}
        assert recovered == {device.id for device in found}
        again = await node.inventory()
        assert [(device.id, device.health, device.answers) for device in again] == [
            (device.id, GpuHealth.OK, True) for device in found
        ]
    finally:
        await events.aclose()  # type: ignore[attr-defined]
        await node.close()


async def test_a_process_that_uses_no_device_is_not_taken_off_one(machine: Machine) -> None:
    """Not every driver can do it at all, and says so in the same call."""
    await machine.hardware.discover()
    with pytest.raises((Unsupported, Unavailable)):
        await machine.hardware.suspend(os.getpid())
