"""Whole devices for virtual machines over a made /sys: taken from their driver, shown as held, given back whatever dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_pci import H200, Clock, FakeKernel

from atoll.devices.fake import FakeHardware
from atoll.devices.ledger import LedgerFile
from atoll.devices.node import NodeDevices
from atoll.devices.nvidia.fake_driver import FakeDriver, fake_device
from atoll.devices.passthrough import Passthrough
from atoll.devices.vfio import VFIO_DRIVER, Vfio
from atoll.model.devices import GpuDevice, GpuGrant, GpuHealth, GpuSharing
from atoll.model.errors import Conflict, Unavailable, Unsupported
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.devices import DeviceEvent, DeviceNode, Edits, Trouble
from atoll.model.spec import Gpu, RuntimeName

QEMU, RUNC = RuntimeName.QEMU, RuntimeName.RUNC
FIRST, SOUND, SECOND, NIC = "0000:10:00.0", "0000:10:00.1", "0000:20:00.0", "0000:11:00.0"


class Died(Exception):
    """The agent was killed."""


class Driver(FakeHardware):
    """NVIDIA's, which lets go of a device only while nobody asks it things."""

    aside = 0

    @contextlib.asynccontextmanager
    async def let_go(self) -> AsyncIterator[None]:
        self.aside += 1
        try:
            yield
        finally:
            self.aside -= 1

    async def discover(self) -> tuple[GpuDevice, ...]:
        if self.aside:
            raise Unavailable("the devices are set aside")
        return await super().discover()


class Bus(FakeKernel):
    """The kernel, and a driver that knows exactly the devices that are bound to it."""

    def __init__(self, sysfs: Path, hardware: Driver) -> None:
        super().__init__(sysfs)
        self.hardware = hardware
        self.addresses = dict(zip((FIRST, SECOND), hardware.ids, strict=True))
        self.taken_while_asked: list[str] = []
        for number, address in enumerate(self.addresses):
            self.add(address, "nvidia", group=number)
            device = sysfs / "bus/pci/devices" / address
            (device / "resource").write_text(H200)
            (device / "reset").write_text("")
        self.add(SOUND, "snd_hda_intel", kind="0x040300", group=0)

    def write(self, path: Path, text: str) -> None:
        if path.name == "unbind" and self.driver(text) == "nvidia" and not self.hardware.aside:
            self.taken_while_asked.append(text)
        super().write(path, text)
        for address, id in self.addresses.items():
            if self.driver(address) == "nvidia":
                self.hardware.come_back(id)
            else:
                self.hardware.vanish(id, told=False)

    def drivers(self) -> tuple[str, ...]:
        return tuple(self.driver(address) for address in (FIRST, SOUND, SECOND))


_WORKER = b"atoll.devices.nvidia.worker"
HOME = ("nvidia", "snd_hda_intel", "nvidia")


class World:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hardware = Driver(count=2)
        self.bus = Bus(directory / "sys", self.hardware)
        self.agents: list[NodeDevices] = []
        self.told: list[DeviceEvent] = []
        self.readers: list[asyncio.Task[None]] = []

    def begin(self, *, clock: Callable[[], float] | None = None, boot: str = "1", **more: Any) -> NodeDevices:
        """A new agent over what the old one left."""
        time = Clock()
        vfio = Vfio(
            self.directory / "vfio", sysfs=self.bus.sysfs, write=self.bus.write, clock=clock or time, sleep=time.sleep, let_go_s=20
        )
        passthrough = Passthrough(vfio, sysfs=self.bus.sysfs)
        devices = NodeDevices(
            [self.hardware], directory=self.directory, clock=SystemClock(), boot=boot, passthrough=passthrough, **more
        )
        self.agents.append(devices)

        async def read() -> None:
            async for event in devices.events():
                self.told.append(event)

        self.readers.append(asyncio.ensure_future(read()))
        return devices

    def whole(self, *indexes: int) -> tuple[GpuGrant, ...]:
        return tuple(GpuGrant(device=self.hardware.ids[index]) for index in indexes)

    async def health(self, devices: NodeDevices) -> list[tuple[bool, GpuHealth]]:
        return [(device.present, device.health) for device in await devices.inventory()]

    def handed(self) -> int:
        return len(LedgerFile(self.directory, "1").now.handed)

    async def end(self) -> None:
        for task in self.readers:
            task.cancel()
        await asyncio.gather(*self.readers, return_exceptions=True)
        for agent in self.agents:
            await agent.close()
        self.readers, self.agents = [], []


WELL = [(True, GpuHealth.OK)] * 2


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await world.end()
    assert world.bus.taken_while_asked == []


@pytest.mark.parametrize("runtime", [QEMU, RuntimeName.CLOUD_HYPERVISOR])
async def test_a_claim_binds_the_whole_group_and_hands_on_the_device_alone(world: World, runtime: RuntimeName) -> None:
    devices = world.begin()
    await devices.inventory()
    claim = await devices.claim("vm", world.whole(0), Gpu(), runtime)
    assert world.bus.drivers() == (VFIO_DRIVER, VFIO_DRIVER, "nvidia")
    assert claim.edits == Edits(
        pci=(FIRST,),
        nodes=(
            DeviceNode(path="/dev/vfio/vfio", host_path="/dev/vfio/vfio", major=10, minor=196),
            DeviceNode(path="/dev/vfio/0", host_path="/dev/vfio/0", major=239, minor=0),
        ),
        pci_window_bytes=1 << 40,
    )
    done = len(world.bus.written)
    assert await devices.claim("vm", world.whole(0), Gpu(), runtime) == claim
    assert len(world.bus.written) == done


async def test_a_device_that_a_machine_has_shows_as_held_and_not_as_vanished(world: World) -> None:
    devices = world.begin()
    await devices.inventory()
    await devices.claim("vm", world.whole(0), Gpu(), QEMU)
    assert world.hardware.ids[0] not in {device.id for device in await world.hardware.discover()}
    assert await world.health(devices) == WELL
    world.hardware.tell(Trouble.VANISHED, world.hardware.ids[0], "the bus says that it was removed")
    await asyncio.sleep(0)
    with pytest.raises(Conflict, match="another instance holds it"):
        await devices.claim("c", world.whole(0), Gpu(), RUNC)
    assert world.bus.driver(FIRST) == VFIO_DRIVER
    await world.end()

    second = world.begin()
    await second.recover(lambda: {"vm": world.whole(0)})
    assert await world.health(second) == WELL
    world.hardware.driver_mismatch()  # from here on the driver answers nobody
    assert [device.health for device in await second.inventory()] == [GpuHealth.OK, GpuHealth.QUARANTINED]
    assert {event.trouble for event in world.told} <= {Trouble.SILENT}
    assert world.bus.driver(FIRST) == VFIO_DRIVER


async def test_a_release_resets_the_device_before_its_driver_has_it_again(world: World) -> None:
    devices = world.begin()
    await devices.inventory()
    await devices.claim("vm", world.whole(0, 1), Gpu(count=2), QEMU)
    assert world.bus.drivers() == (VFIO_DRIVER,) * 3
    begun = len(world.bus.written)
    await devices.release("vm")
    after = world.bus.written[begun:]
    assert after[:2] == [("reset", "1"), ("reset", "1")]
    assert after[2][0] == "driver_override"
    assert world.bus.drivers() == HOME
    assert await world.health(devices) == WELL
    await devices.release("vm")
    assert (await devices.claim("c", world.whole(0), Gpu(), RUNC)).edits.env
    assert (world.handed(), world.told) == (0, [])


async def test_shares_and_partitions_are_refused_in_words(world: World) -> None:
    devices = world.begin()
    await devices.inventory()
    share = GpuGrant(device=world.hardware.ids[0], sharing=GpuSharing.TIME_SLICE, milli=500, memory_bytes=1 << 30)
    with pytest.raises(Unsupported, match=r"handed whole devices, and never a part of one \(time-slice\)") as raised:
        await devices.claim("vm", [share], Gpu(count=0.5), QEMU)
    assert raised.value.field == "resources.gpu"
    assert world.bus.written == []
    await devices.claim("c", world.whole(0), Gpu(), RUNC)  # nothing is held

    mig = FakeHardware(mig=True)
    passthrough = Passthrough(Vfio(world.directory / "v", sysfs=world.bus.sysfs), sysfs=world.bus.sysfs)
    parts = NodeDevices([mig], directory=world.directory / "mig", clock=SystemClock(), passthrough=passthrough)
    (device,) = await parts.inventory()
    kind = device.profiles[0]
    part = GpuGrant(device=device.id, sharing=GpuSharing.MIG, profile=kind.name, start=kind.starts[0], size=kind.memory_slices)
    with pytest.raises(Unsupported, match=r"never a part of one \(mig\)"):
        await parts.claim("vm", [part], Gpu(profile=kind.name), QEMU)
    await parts.close()


async def test_a_group_with_another_device_in_use_is_refused_in_words_and_nothing_is_held(world: World) -> None:
    world.bus.add(NIC, "mlx5_core", kind="0x020000", group=0)
    devices = world.begin()
    await devices.inventory()
    with pytest.raises(Unsupported, match=r"IOMMU group 0 with devices in use: 0000:11:00\.0 \(mlx5_core\)") as raised:
        await devices.claim("vm", world.whole(0), Gpu(), QEMU)
    assert "ACS" in (raised.value.mend or "")
    assert (world.bus.written, world.handed()) == ([], 0)
    await devices.claim("vm", world.whole(1), Gpu(), QEMU)
    assert world.bus.driver(SECOND) == VFIO_DRIVER


async def test_devices_of_one_group_go_together_or_not_at_all(tmp_path: Path) -> None:
    world = World(tmp_path)
    groups = world.bus.sysfs / "kernel/iommu_groups"
    for address in (FIRST, SOUND):
        device = world.bus.sysfs / "bus/pci/devices" / address
        (device / "iommu_group").unlink()
        (device / "iommu_group").symlink_to(groups / "1")
        (groups / "1/devices" / address).symlink_to(device)
    devices = world.begin()
    await devices.inventory()
    with pytest.raises(Unsupported, match="shares IOMMU group 1 with devices in use"):
        await devices.claim("vm", world.whole(0), Gpu(), QEMU)
    await devices.claim("vm", world.whole(0, 1), Gpu(count=2), QEMU)
    await devices.release("vm")
    assert world.bus.drivers() == HOME
    await world.end()


async def test_a_device_in_use_is_not_taken(world: World) -> None:
    devices = world.begin()
    await devices.inventory()
    world.hardware.use(world.hardware.ids[0], 4711, 1 << 30)
    with pytest.raises(Unavailable, match="4711"):
        await devices.claim("vm", world.whole(0), Gpu(), QEMU)
    assert world.bus.written == []


async def test_a_driver_that_does_not_let_go_keeps_its_device_on_offer(world: World) -> None:
    devices = world.begin()
    await devices.inventory()
    world.bus.stubborn = {"nvidia"}
    with pytest.raises(Unavailable, match="nvidia does not let go") as raised:
        await devices.claim("vm", world.whole(0), Gpu(), QEMU)
    assert "nvidia-persistenced" in (raised.value.mend or "")
    assert world.bus.drivers() == HOME
    assert (world.handed(), await world.health(devices)) == (0, WELL)
    await devices.claim("c", world.whole(0), Gpu(), RUNC)


async def test_a_device_that_does_not_go_back_is_taken_out_until_it_does(world: World) -> None:
    devices = world.begin()
    await devices.inventory()
    await devices.claim("vm", world.whole(0), Gpu(), QEMU)
    world.bus.refusing = {"nvidia"}
    await devices.release("vm")
    first = (await devices.inventory())[0]
    assert (first.present, first.health) == (True, GpuHealth.QUARANTINED)
    assert "nvidia does not take 0000:10:00.0" in first.reason
    await world.end()

    second = world.begin()
    await second.recover(dict)
    with pytest.raises(Unavailable, match="is taken out"):
        await second.claim("c", world.whole(0), Gpu(), RUNC)
    world.bus.refusing = set()
    assert (await second.claim("c", world.whole(0), Gpu(), RUNC)).edits
    assert world.bus.drivers() == HOME
    assert await world.health(second) == WELL
    await asyncio.sleep(0)
    assert [event.trouble for event in world.told][-1] is Trouble.RECOVERED
    assert Trouble.BROKEN in {event.trouble for event in world.told}


async def test_what_a_machine_had_goes_back_where_its_instance_is_tried_in_a_container(world: World) -> None:
    devices = world.begin()
    await devices.inventory()
    await devices.claim("a", world.whole(0), Gpu(), QEMU)
    claim = await devices.claim("a", world.whole(0), Gpu(), RUNC)
    assert world.bus.drivers() == HOME
    assert claim.edits.nodes
    assert await world.health(devices) == WELL


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("writes", range(16))
async def test_an_agent_that_dies_anywhere_is_followed_by_one_that_puts_it_right(world: World, writes: int, held: bool) -> None:
    def clock() -> float:
        if len(world.bus.written) >= writes:  # asked before each write: there the agent dies
            raise Died
        return 0.0

    first = world.begin(clock=clock)
    await first.inventory()

    async def live() -> None:
        await first.claim("vm", world.whole(0), Gpu(), QEMU)
        await first.release("vm")
        raise Died

    with pytest.raises(Died):
        await live()
    await world.end()

    second = world.begin()
    await second.recover(lambda: {"vm": world.whole(0)} if held else {})
    if held:
        assert (await second.claim("vm", world.whole(0), Gpu(), QEMU)).edits.pci == (FIRST,)
        assert world.bus.drivers() == (VFIO_DRIVER, VFIO_DRIVER, "nvidia")
        assert await world.health(second) == WELL
        await second.release("vm")
    assert world.bus.drivers() == HOME
    assert await world.health(second) == WELL
    assert (world.handed(), list((world.directory / "vfio").glob("*"))) == (0, [])
    assert not {Trouble.VANISHED, Trouble.BROKEN} & {event.trouble for event in world.told}


async def test_what_no_record_speaks_of_is_given_back(world: World) -> None:
    first = world.begin()
    await first.inventory()
    await first.claim("vm", world.whole(0), Gpu(), QEMU)
    await world.end()
    (world.directory / "devices.json").unlink()
    second = world.begin()
    await second.recover(dict)
    assert world.bus.drivers() == HOME
    assert await world.health(second) == WELL


async def test_after_a_restart_of_the_machine_devices_are_their_drivers_own(world: World) -> None:
    first = world.begin()
    await first.inventory()
    await first.claim("vm", world.whole(0), Gpu(), QEMU)
    await world.end()
    for address in (FIRST, SOUND):  # as the kernel finds them anew
        (world.bus.sysfs / "bus/pci/devices" / address / "driver").unlink()
        world.bus._bind(address, world.bus.natural[address])
    world.hardware.come_back(world.hardware.ids[0])
    second = world.begin(boot="2")
    await second.recover(dict)
    assert world.bus.drivers() == HOME
    assert await world.health(second) == WELL
    assert (await second.claim("c", world.whole(0), Gpu(), RUNC)).edits


async def test_a_node_that_cannot_says_what_is_missing(world: World) -> None:
    devices = world.begin()
    await devices.inventory()
    assert (devices.offers(QEMU), devices.offers(RuntimeName.CLOUD_HYPERVISOR)) == ("", "")
    assert "cannot hand on a device" in devices.offers(RuntimeName.FIRECRACKER)
    shutil.rmtree(world.bus.sysfs / "bus/pci/drivers" / VFIO_DRIVER)
    with pytest.raises(Unsupported, match="modprobe vfio-pci"):
        await devices.claim("vm", world.whole(0), Gpu(), QEMU)
    shutil.rmtree(world.bus.sysfs / "kernel/iommu_groups")
    with pytest.raises(Unsupported, match=r"no IOMMU at work.*intel_iommu=on"):
        await devices.claim("vm", world.whole(0), Gpu(), QEMU)
    (world.bus.sysfs / "kernel/iommu_groups").mkdir()
    assert "no IOMMU at work" in devices.offers(QEMU)
    assert devices.offers(RUNC) == ""
    assert world.bus.written == []


def workers() -> list[str]:
    """Return this process's children that have the driver open."""
    found = []
    for children in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread, or a child, that has just ended
            found += [pid for pid in children.read_text().split() if _WORKER in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


class NvidiaBus(FakeKernel):
    """The kernel with a stand-in for NVIDIA's driver and library, which the agent's workers have open."""

    def __init__(self, driver: FakeDriver, devices: list[dict[str, Any]]) -> None:
        super().__init__(driver.root / "sys")
        self.nvidia, self.devices = driver, devices
        self.open_at_unbind: list[list[str]] = []
        for number, device in enumerate(devices):
            self.add(device["pci"], "nvidia", group=number)

    def write(self, path: Path, text: str) -> None:
        if path.name == "unbind" and self.driver(text) == "nvidia":
            self.open_at_unbind.append(workers())
        super().write(path, text)
        with self.nvidia.change() as state:
            state["devices"] = [device for device in self.devices if self.driver(device["pci"]) == "nvidia"]


async def test_nvidia_s_workers_are_gone_while_a_device_is_taken_and_back_for_the_others(tmp_path: Path) -> None:
    known = [fake_device(0), fake_device(1)]
    driver = FakeDriver(tmp_path / "driver", known)
    bus = NvidiaBus(driver, known)
    vfio = Vfio(tmp_path / "vfio", sysfs=bus.sysfs, write=bus.write)
    devices = NodeDevices(
        [driver.hardware()], directory=tmp_path, clock=SystemClock(), boot="1", passthrough=Passthrough(vfio, sysfs=bus.sysfs)
    )
    whole = [GpuGrant(device=device["id"]) for device in known]
    told: list[DeviceEvent] = []

    async def read() -> None:
        async for event in devices.events():
            told.append(event)

    reader = asyncio.ensure_future(read())
    try:
        assert [device.health for device in await devices.inventory()] == [GpuHealth.OK] * 2
        assert workers()
        await devices.claim("one", whole[:1], Gpu(), QEMU)
        assert [(device.present, device.health) for device in await devices.inventory()] == WELL
        assert [sample.device for sample in await devices.samples()] == [known[1]["id"]]
        await devices.claim("two", whole[1:], Gpu(), QEMU)  # its driver has none any more
        assert [(device.present, device.health) for device in await devices.inventory()] == WELL
        for instance in ("one", "two"):
            await devices.release(instance)
        assert [(device.present, device.health) for device in await devices.inventory()] == WELL
        assert len(await devices.samples()) == 2
        assert bus.open_at_unbind == [[], []]
        assert {event.trouble for event in told} <= {Trouble.RECOVERED}
    finally:
        reader.cancel()
        await devices.close()
        driver.close()
