"""NVIDIA's devices: the real worker, its protocol and its end, over a fake of NVML that is as faithful as its errors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pynvml
import pytest

from atoll.devices.node import NodeDevices
from atoll.devices.nvidia.channel import Channel, command, environment_of
from atoll.devices.nvidia.fake_driver import DRIVER, FakeDriver, fake_device
from atoll.devices.nvidia.hardware import Deadlines, NvidiaHardware
from atoll.devices.nvidia.watch import Stream, Watch
from atoll.devices.uevents import Uevent
from atoll.model.devices import GpuGrant, GpuHealth, GpuSharing, LinkKind
from atoll.model.errors import Conflict, Invalid, NotFound, Unavailable, Unsupported
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.devices import DeviceEvent, Edits, Trouble
from atoll.model.spec import GpuCapability

GIB = 1 << 30
SHORT_S = 0.3
FIRST, SECOND, THIRD = (fake_device(index)["id"] for index in range(3))


class Bus:
    """The kernel's messages, said by the test."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Uevent] = asyncio.Queue()

    def say(self, event: Uevent) -> None:
        self._queue.put_nowait(event)

    async def __call__(self) -> AsyncIterator[Uevent]:
        while True:
            yield await self._queue.get()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[FakeDriver]:
    switched = fake_device(0, nvlinks=["switch", "switch", ""]), fake_device(1, nvlinks=["switch", "switch", "switch"])
    driver = FakeDriver(tmp_path / "driver", [*switched, fake_device(2, mig=True)])
    yield driver
    driver.close()


@pytest.fixture
async def hardware(driver: FakeDriver) -> AsyncIterator[NvidiaHardware]:
    hardware = driver.hardware(uevents=Bus())
    yield hardware
    await hardware.close()


@contextlib.asynccontextmanager
async def opened(driver: FakeDriver, deadlines: Deadlines, bus: Bus | None = None) -> AsyncIterator[NvidiaHardware]:
    hardware = driver.hardware(deadlines=deadlines, uevents=bus or Bus())
    try:
        yield hardware
    finally:
        await hardware.close()


async def next_event(events: AsyncIterator[DeviceEvent]) -> DeviceEvent:
    async with asyncio.timeout(30):
        return await anext(events)


async def followed(driver: FakeDriver, hardware: NvidiaHardware) -> AsyncIterator[DeviceEvent]:
    """Return the stream of events once something waits in the driver for them."""
    events = hardware.events()
    driver.xid(FIRST, 31)
    assert (await next_event(events)).code == 31
    return events


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_discovery_tells_all_of_a_device(hardware: NvidiaHardware) -> None:
    first, second, third = await hardware.discover()
    assert (first.id, first.model, first.memory_bytes) == (FIRST, "NVIDIA H100 80GB HBM3", 80 * GIB)
    assert (first.compute_capability, first.driver, first.cuda) == ("9.0", DRIVER, "13.0")
    assert (first.pci, first.minor, first.numa, first.cpus) == ("0000:1b:00.0", 0, 0, "0-7")
    assert (second.numa, second.cpus) == (1, "8-15")
    assert (first.ecc, first.ecc_errors, first.remapped_rows, first.remap_pending, first.remap_failed) == (True, 0, 0, False, False)
    assert (first.health, first.reason, first.mig, first.profiles, first.foreign) == (GpuHealth.OK, "", False, (), ())
    assert first.sharing == (GpuSharing.EXCLUSIVE, GpuSharing.TIME_SLICE)
    assert third.mig
    assert third.sharing == (GpuSharing.MIG,)


async def test_devices_on_one_switch_are_joined_by_as_many_links_as_the_weaker_has(hardware: NvidiaHardware) -> None:
    first, second, _ = await hardware.discover()
    assert [(link.peer, link.kind, link.width) for link in first.links] == [
        (SECOND, LinkKind.NVLINK, 2),
        (THIRD, LinkKind.SYS, 0),
    ]
    assert second.links[0].width == 2


async def test_a_device_tells_the_nvlink_domain_of_several_machines_that_it_has_joined(tmp_path: Path) -> None:
    cluster, done, under_way = "0123456789abcdef" * 2, 3, 2
    joined = (
        {"cluster": cluster, "clique": 7, "state": done},
        {"cluster": cluster, "clique": 7, "state": under_way},
        {"cluster": "00" * 16, "clique": 0, "state": done},  # a domain of this machine alone
        None,
    )
    devices = [fake_device(index) | {"fabric": each} for index, each in enumerate(joined)]
    driver = FakeDriver(tmp_path / "driver", devices)
    async with opened(driver, Deadlines()) as hardware:
        found = await hardware.discover()
    driver.close()
    assert [device.fabric for device in found] == [f"{cluster}.7", "", "", ""]
    assert all(device.health is GpuHealth.OK for device in found)


async def test_devices_without_nvlink_tell_how_near_they_are(tmp_path: Path) -> None:
    one, other, third = fake_device(0, nvlinks=["0000:1d:00.0"]), fake_device(1), fake_device(2, nvlinks=["0000:1b:00.0"])
    one["ancestors"] = {other["id"]: pynvml.NVML_TOPOLOGY_MULTIPLE}
    driver = FakeDriver(tmp_path / "driver", [one, other, third])
    async with opened(driver, Deadlines()) as hardware:
        first, _, _ = await hardware.discover()
    assert {link.peer: (link.kind, link.width) for link in first.links} == {
        SECOND: (LinkKind.PXB, 0),
        THIRD: (LinkKind.NVLINK, 1),
    }
    driver.close()


async def test_profiles_and_their_places_are_the_drivers(hardware: NvidiaHardware) -> None:
    *_, third = await hardware.discover()
    profiles = {profile.name: profile for profile in third.profiles}
    assert set(profiles) == {"1g.10gb", "1g.10gb+me", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"}
    middle = profiles["3g.40gb"]
    assert (middle.compute_slices, middle.memory_slices, middle.memory_bytes, middle.starts, middle.most) == (
        3,
        4,
        40 * GIB,
        (0, 4),
        2,
    )


@pytest.mark.parametrize(
    ("counters", "health", "words"),
    [
        ({"remapped": [0, 1, 0, 1]}, GpuHealth.QUARANTINED, "could not be remapped"),
        ({"remapped": [0, 1, 1, 0]}, GpuHealth.QUARANTINED, "wait for a reset"),
        ({"remapped": [1, 0, 1, 0]}, GpuHealth.DEGRADED, "wait for a reset"),
        ({"recovery": 1}, GpuHealth.QUARANTINED, "must be reset"),
        ({"ecc_errors": 3}, GpuHealth.DEGRADED, "3 uncorrected memory errors"),
        ({"remapped": [2, 3, 0, 0]}, GpuHealth.OK, ""),
    ],
)
async def test_health_follows_the_counters(
    driver: FakeDriver, hardware: NvidiaHardware, tmp_path: Path, counters: dict[str, object], health: GpuHealth, words: str
) -> None:
    with driver.change() as state:
        state["devices"][0] |= counters
    first, *_ = await hardware.discover()
    assert first.health is health
    assert words in first.reason
    assert bool(words) == bool(first.reason)
    node = NodeDevices([hardware], directory=tmp_path, clock=SystemClock(), boot="1")
    offered = next(device for device in await node.inventory() if device.id == first.id)
    assert offered.health is health, "the node says no other than the driver's counters"
    await node.close()


async def test_a_device_without_error_correction_says_so(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    with driver.change() as state:
        state["devices"][0]["ecc"] = None
    assert (await hardware.discover())[0].ecc is None


async def test_a_device_that_does_not_answer_is_shown_and_taken_away_and_the_others_are_well(
    driver: FakeDriver, hardware: NvidiaHardware
) -> None:
    driver.fail("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_UNKNOWN, times=2)
    first, second, _ = await hardware.discover()
    assert first.health is GpuHealth.QUARANTINED
    assert "nvmlDeviceGetMemoryInfo" in first.reason
    assert second.health is GpuHealth.OK


async def test_a_lost_device_is_not_among_those_that_are_there(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    driver.lose(FIRST)
    assert [device.id for device in await hardware.discover()] == [SECOND, THIRD]
    assert {sample.device for sample in await hardware.samples()} == {SECOND, THIRD}


async def test_without_a_trace_of_the_driver_there_are_no_devices_and_no_process(tmp_path: Path) -> None:
    hardware = NvidiaHardware(root=tmp_path)
    assert await hardware.discover() == ()
    assert await hardware.samples() == ()
    assert hardware.pids == ()


async def test_where_there_is_nothing_the_stream_of_events_waits_until_the_end(tmp_path: Path) -> None:
    hardware = NvidiaHardware(root=tmp_path)
    events = asyncio.create_task(anext(hardware.events(), None))
    await asyncio.sleep(0)
    await hardware.close()
    async with asyncio.timeout(30):
        assert await events is None


async def test_a_driver_without_its_library_is_a_clear_error(tmp_path: Path) -> None:
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Release Build\n")
    with pytest.raises(Unavailable, match=r"580\.159\.04 is loaded, but its library libnvidia-ml\.so\.1 is not found") as caught:
        await NvidiaHardware(root=tmp_path).discover()
    assert "same version" in str(caught.value.mend)


async def test_a_library_without_its_driver_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.cache").write_bytes(b"libnvidia-ml.so.1\0")
    assert await NvidiaHardware(root=tmp_path).discover() == (), "no device on the bus: nothing is missing"
    device = tmp_path / "sys/bus/pci/devices/0000:3b:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    with pytest.raises(Unavailable, match="kernel driver is not loaded") as caught:
        await NvidiaHardware(root=tmp_path).discover()
    assert "modprobe nvidia" in str(caught.value.mend)


async def test_a_library_of_another_version_is_a_clear_error_and_the_next_call_looks_anew(
    driver: FakeDriver, hardware: NvidiaHardware
) -> None:
    driver.fail("nvmlInit", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    for _ in range(3):
        with pytest.raises(Unavailable, match=r"kernel driver is 580\.159\.04, but its library .* must be the same") as caught:
            await hardware.discover()
        assert "restart the node" in str(caught.value.mend)
    driver.heal()
    assert len(await hardware.discover()) == 3


async def test_devices_on_the_bus_that_the_driver_does_not_know_are_a_clear_error(tmp_path: Path) -> None:
    driver = FakeDriver(tmp_path / "driver", [fake_device(0)])
    bound = driver.root / "sys/bus/pci/devices/0000:1b:00.0/driver"
    (driver.root / "sys/bus/pci/drivers/nvidia").mkdir(parents=True)
    bound.symlink_to("../../drivers/nvidia")
    with driver.change() as state:
        state["devices"] = []
    async with opened(driver, Deadlines()) as hardware:
        with pytest.raises(Unavailable, match="knows none of the 1 devices on the bus"):
            await hardware.discover()
    driver.close()


async def test_a_worker_that_hangs_gives_unavailable_within_its_deadline_and_the_next_call_works(driver: FakeDriver) -> None:
    driver.hang("nvmlDeviceGetPowerUsage")
    async with opened(driver, Deadlines(samples_s=SHORT_S)) as hardware:
        await hardware.discover()
        (hung,) = hardware.pids
        with pytest.raises(Unavailable, match="did not answer"):
            await hardware.samples()
        assert len(await hardware.discover()) == 3
        assert hung not in hardware.pids[-1:]


async def test_a_worker_that_hangs_at_its_start_gives_unavailable_and_the_next_call_works(driver: FakeDriver) -> None:
    driver.hang("nvmlInit")
    async with opened(driver, Deadlines(start_s=2 * SHORT_S)) as hardware:
        with pytest.raises(Unavailable, match="initialise"):
            await hardware.discover()
    driver.heal()  # where the first worker was given up before it came so far
    async with opened(driver, Deadlines()) as hardware:
        assert len(await hardware.discover()) == 3


async def test_a_worker_that_crashes_during_a_call_gives_unavailable_and_the_next_call_works(
    driver: FakeDriver, hardware: NvidiaHardware
) -> None:
    driver.crash("nvmlDeviceGetName")
    with pytest.raises(Unavailable, match="failed"):
        await hardware.discover()
    assert len(await hardware.discover()) == 3


async def test_others_go_on_while_one_call_hangs(driver: FakeDriver) -> None:
    driver.hang("nvmlDeviceGetCount")
    async with opened(driver, Deadlines(discover_s=SHORT_S, samples_s=30.0)) as hardware:
        hung, waiting = asyncio.create_task(hardware.discover()), asyncio.create_task(hardware.samples())
        with pytest.raises(Unavailable):
            await hung
        assert len(await waiting) == 3


async def test_failures_in_a_row_are_followed_by_growing_pauses_without_a_process(driver: FakeDriver) -> None:
    driver.crash("nvmlDeviceGetCount", times=-1)
    clock = Hand()
    channel = Channel(lambda: start_of(driver), clock=clock, start_s=30.0)
    pauses = []
    for _ in range(4):
        with pytest.raises(Unavailable):
            await channel.call("discover", 30.0)
        pauses.append(pause_of(channel, clock))
    assert pauses == [0.0, 0.5, 1.0, 2.0]
    await channel.close(2.0)


def pause_of(channel: Channel, clock: Hand) -> float:
    """Move the clock to the moment from which on a new worker may be started."""
    before = clock.time
    while True:
        try:
            channel.check_pause()
        except Unavailable:
            clock.time += 0.25
        else:
            return clock.time - before


class Hand:
    """A clock that is set by hand."""

    time = 100.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time


def start_of(driver: FakeDriver) -> tuple[list[str], dict[str, str]]:
    return command("atoll.devices.nvidia.fake_nvml", "calls"), environment_of(
        {**os.environ, "ATOLL_FAKE_NVML": str(driver.directory)}, ""
    )


async def test_a_process_that_cannot_be_started_is_unavailable() -> None:
    channel = Channel(lambda: (["/nowhere/python"], {}), clock=SystemClock(), start_s=30.0)
    with pytest.raises(Unavailable, match="cannot be started"):
        await channel.call("discover", 30.0)
    await channel.close(2.0)


async def test_a_caller_that_gives_up_leaves_the_worker_usable(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    await hardware.discover()
    pids = hardware.pids
    task = asyncio.create_task(hardware.samples())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(await hardware.discover()) == 3
    assert hardware.pids == pids


async def test_nothing_of_the_workers_is_left_after_close(driver: FakeDriver) -> None:
    hardware = driver.hardware(uevents=Bus())
    await hardware.discover()
    events = await followed(driver, hardware)
    pids = children()
    assert len(pids) == 2
    await hardware.close()
    assert not any(alive(pid) for pid in pids)
    assert await anext(events, None) is None


async def test_a_worker_that_hangs_is_gone_after_close(driver: FakeDriver) -> None:
    driver.hang("nvmlDeviceGetPowerUsage")
    hardware = driver.hardware(deadlines=Deadlines(samples_s=SHORT_S), uevents=Bus())
    await hardware.discover()
    pids = hardware.pids
    with pytest.raises(Unavailable):
        await hardware.samples()
    await hardware.close()
    assert pids
    assert not any(alive(pid) for pid in pids)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    pids = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return [pid for pid in pids if "atoll.devices.nvidia.worker" in command_of(pid)]


_AGENT = """
import asyncio, os, signal, sys
from pathlib import Path
from atoll.devices.nvidia.hardware import NvidiaHardware

async def main():
    fake = {"library": "atoll.devices.nvidia.fake_nvml", "environment": {"ATOLL_FAKE_NVML": sys.argv[1]}}
    hardware = NvidiaHardware(root=Path(sys.argv[2]), **fake)
    await hardware.discover()
    task = asyncio.create_task(hardware.samples())
    await asyncio.sleep(0)
    print(hardware.pids[0], flush=True)
    await task

asyncio.run(main())
"""


def test_a_worker_dies_with_its_agent_even_while_it_hangs(driver: FakeDriver) -> None:
    driver.hang("nvmlDeviceGetPowerUsage")
    with subprocess.Popen(
        [sys.executable, "-c", _AGENT, driver.directory, driver.root], stdout=subprocess.PIPE, text=True
    ) as agent:
        assert agent.stdout is not None
        pidfd = os.pidfd_open(int(agent.stdout.readline()))
        agent.kill()
    assert select.select([pidfd], [], [], 30.0)[0], "it still runs"
    os.close(pidfd)


def test_a_worker_loads_nothing_of_atoll_but_its_own_modules() -> None:
    code = "import sys; sys.argv = ['']; import atoll.devices.nvidia.worker; print(*sys.modules)"
    argv = [sys.executable, "-S", "-P", "-c", code]
    shown = subprocess.run(argv, env=environment_of({}, ""), capture_output=True, check=True, text=True)
    loaded = set(shown.stdout.split())
    ours = {name.removeprefix("atoll.devices.nvidia.") for name in loaded if name.startswith("atoll.devices.nvidia.")}
    assert ours == {"worker", "reading", "partitioning", "waiting"}
    assert {name for name in loaded if name.startswith("atoll.")} - {f"atoll.devices.nvidia.{name}" for name in ours} == {
        "atoll.devices",
        "atoll.devices.nvidia",
    }
    assert not loaded & {"msgspec", "asyncio", "socket", "site"}


# Events.


async def test_an_application_fault_arrives_as_one(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    driver.xid(FIRST, 31, part=3)
    event = await next_event(hardware.events())
    assert (event.trouble, event.device, event.code) == (Trouble.FAULT, FIRST, 31)
    assert "partition 3" in event.message
    assert event.at > 0


async def test_a_fault_in_a_partition_says_where_that_begins(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    await hardware.make_partition(THIRD, "1g.10gb", 0)
    await hardware.make_partition(THIRD, "3g.40gb", 4)
    await hardware.remove_partition(THIRD, 0)
    await hardware.partitions(THIRD)
    for part in (2, 1, None):
        driver.xid(THIRD, 31, part=part)
    events = hardware.events()
    assert [(await next_event(events)).start for _ in range(3)] == [4, None, None]


async def test_a_driver_that_is_loaded_after_the_watch_began_is_watched_too(driver: FakeDriver) -> None:
    version = driver.root / "proc/driver/nvidia/version"
    words = version.read_text()
    version.unlink()
    async with opened(driver, Deadlines(again_s=0.05)) as hardware:
        events = hardware.events()
        silent = await next_event(events)
        assert (silent.trouble, "kernel driver is not loaded" in silent.message) == (Trouble.SILENT, True)
        following = asyncio.ensure_future(next_event(events))
        await asyncio.sleep(0.2)
        assert not following.done(), "the same is not said again"
        version.write_text(words)
        driver.xid(FIRST, 119)
        event = await following
        assert (event.trouble, event.device, event.code) == (Trouble.BROKEN, FIRST, 119)
        await events.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "trouble"),
    [
        (pynvml.nvmlEventTypeDoubleBitEccError, Trouble.BROKEN),
        (pynvml.nvmlEventTypeDramRetirementFailure, Trouble.BROKEN),
        (pynvml.nvmlEventTypeFatalPoisonError, Trouble.BROKEN),
        (pynvml.nvmlEventTypeSingleBitEccErrorStorm, Trouble.SUSPECT),
        (pynvml.nvmlEventTypeGpuUnavailableError, Trouble.VANISHED),
    ],
)
async def test_other_events_of_the_driver_mean_what_their_xid_means(
    driver: FakeDriver, hardware: NvidiaHardware, kind: int, trouble: Trouble
) -> None:
    driver.event(SECOND, kind)
    event = await next_event(hardware.events())
    assert (event.trouble, event.device, event.code) == (trouble, SECOND, 0)
    assert event.mend


async def test_a_device_that_falls_off_the_bus_has_vanished_and_the_others_are_watched_on(
    driver: FakeDriver, hardware: NvidiaHardware
) -> None:
    await hardware.discover()
    events = await followed(driver, hardware)
    driver.xid(FIRST, 79)
    driver.lose(FIRST)
    gone = await next_event(events)
    assert (gone.trouble, gone.device, gone.code) == (Trouble.VANISHED, FIRST, 79)
    driver.xid(SECOND, 13)
    fault = await next_event(events)
    assert (fault.trouble, fault.device) == (Trouble.FAULT, SECOND), "once is enough"


async def test_a_device_that_vanishes_without_a_word_is_found(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    events = await followed(driver, hardware)
    driver.lose(SECOND)
    gone = await next_event(events)
    assert (gone.trouble, gone.device) == (Trouble.VANISHED, SECOND)


async def test_a_device_that_was_there_at_discovery_and_not_when_the_watch_begins_has_vanished(
    driver: FakeDriver, hardware: NvidiaHardware
) -> None:
    await hardware.discover()
    driver.lose(THIRD)
    gone = await next_event(hardware.events())
    assert (gone.trouble, gone.device) == (Trouble.VANISHED, THIRD)


@pytest.mark.parametrize("function", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID", "nvmlDeviceRegisterEvents"])
@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_RESET_REQUIRED])
async def test_a_bad_device_is_told_and_takes_no_other_s_events_away(
    driver: FakeDriver, hardware: NvidiaHardware, function: str, code: int
) -> None:
    await hardware.discover()
    driver.fail(function, code, device=SECOND)
    driver.xid(FIRST, 31)
    events = hardware.events()
    deaf, fault = await next_event(events), await next_event(events)
    assert (deaf.trouble, deaf.device) == (Trouble.SUSPECT, SECOND)
    assert "cannot be waited for" in deaf.message
    assert (fault.trouble, fault.device, fault.code) == (Trouble.FAULT, FIRST, 31)


@pytest.mark.parametrize("function", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceRegisterEvents"])
async def test_where_no_device_s_events_can_be_had_that_is_silence(
    driver: FakeDriver, hardware: NvidiaHardware, function: str
) -> None:
    driver.fail(function, pynvml.NVML_ERROR_UNKNOWN)
    assert (await next_event(hardware.events())).trouble is Trouble.SILENT


async def test_a_device_that_is_removed_from_the_bus_has_vanished(driver: FakeDriver) -> None:
    bus = Bus()
    async with opened(driver, Deadlines(), bus) as hardware:
        await hardware.discover()
        bus.say(Uevent("remove", "/devices/pci0000:00/0000:1c:00.0", {"SUBSYSTEM": "pci", "PCI_SLOT_NAME": "0000:1c:00.0"}))
        gone = await next_event(hardware.events())
    assert (gone.trouble, gone.device) == (Trouble.VANISHED, SECOND)
    assert "removed from the bus" in gone.message


async def test_a_driver_that_is_replaced_is_told(driver: FakeDriver) -> None:
    bus = Bus()
    async with opened(driver, Deadlines(), bus) as hardware:
        events = await followed(driver, hardware)
        driver.install("590.48.01")
        bus.say(Uevent("add", "/module/nvidia", {"SUBSYSTEM": "module"}))
        changed = await next_event(events)
    assert (changed.trouble, changed.device) == (Trouble.DRIVER_CHANGED, "")
    assert DRIVER in changed.message
    assert "590.48.01" in changed.message


async def test_a_driver_that_is_silent_is_told_once_and_again_when_it_answers(driver: FakeDriver) -> None:
    driver.crash("nvmlEventSetCreate", times=2)
    async with opened(driver, Deadlines()) as hardware:
        events = hardware.events()
        assert (await next_event(events)).trouble is Trouble.SILENT
        assert (await next_event(events)).trouble is Trouble.RECOVERED


async def test_a_watch_that_hangs_in_the_driver_is_told(driver: FakeDriver) -> None:
    driver.hang("nvmlInit")
    async with opened(driver, Deadlines(start_s=SHORT_S)) as hardware:
        silent = await next_event(hardware.events())
    assert silent.trouble is Trouble.SILENT
    assert "has not answered" in silent.message


async def test_a_mismatch_under_the_watch_is_a_changed_driver(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    driver.fail("nvmlInit", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    changed = await next_event(hardware.events())
    assert changed.trouble is Trouble.DRIVER_CHANGED
    assert "must be the same" in changed.message


# Partitions.


async def test_a_partition_is_made_shown_and_removed(hardware: NvidiaHardware) -> None:
    made = await hardware.make_partition(THIRD, "3g.40gb", 4)
    assert (made.profile, made.start, made.size) == ("3g.40gb", 4, 4)
    assert made.id.startswith("MIG-")
    assert await hardware.partitions(THIRD) == (made,)
    await hardware.remove_partition(THIRD, 4)
    assert await hardware.partitions(THIRD) == ()
    await hardware.remove_partition(THIRD, 4)


async def test_a_driver_that_knows_no_profile_by_its_number_makes_partitions_all_the_same(
    driver: FakeDriver, hardware: NvidiaHardware
) -> None:
    driver.lack("nvmlDeviceGetGpuInstanceProfileInfoById")  # before 580
    made = await hardware.make_partition(THIRD, "3g.40gb", 4)
    assert await hardware.partitions(THIRD) == (made,)


async def test_making_a_partition_again_returns_it(hardware: NvidiaHardware) -> None:
    made = await hardware.make_partition(THIRD, "1g.10gb", 6)
    assert await hardware.make_partition(THIRD, "1g.10gb", 6) == made
    assert len(await hardware.partitions(THIRD)) == 1


async def test_partitions_outlive_the_worker_and_are_in_order(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    late = await hardware.make_partition(THIRD, "2g.20gb", 4)
    early = await hardware.make_partition(THIRD, "3g.40gb", 0)
    await hardware.close()
    assert await hardware.partitions(THIRD) == (early, late)


async def test_what_cannot_be_made_is_refused_with_what_can(hardware: NvidiaHardware) -> None:
    with pytest.raises(Invalid, match=r"no profile 5g\.50gb") as caught:
        await hardware.make_partition(THIRD, "5g.50gb", 0)
    assert "7g.80gb" in str(caught.value.mend)
    with pytest.raises(Invalid, match="cannot begin at 2") as caught:
        await hardware.make_partition(THIRD, "3g.40gb", 2)
    assert "0, 4" in str(caught.value.mend)
    with pytest.raises(Invalid, match="not in MIG mode") as caught:
        await hardware.make_partition(FIRST, "1g.10gb", 0)
    assert str(caught.value.mend).startswith("stop the node's agent")
    with pytest.raises(NotFound):
        await hardware.make_partition("GPU-0", "1g.10gb", 0)
    assert await hardware.partitions(FIRST) == ()


async def test_slices_that_are_taken_are_a_conflict_that_names_who_has_them(hardware: NvidiaHardware) -> None:
    await hardware.make_partition(THIRD, "3g.40gb", 4)
    with pytest.raises(Conflict, match=r"3g\.40gb is at 4"):
        await hardware.make_partition(THIRD, "1g.20gb", 6)


async def test_a_driver_that_has_no_room_is_a_conflict(hardware: NvidiaHardware) -> None:
    await hardware.make_partition(THIRD, "1g.10gb+me", 0)
    with pytest.raises(Conflict, match="no room"):
        await hardware.make_partition(THIRD, "1g.10gb+me", 1)


async def test_a_partition_in_use_is_not_removed(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    made = await hardware.make_partition(THIRD, "1g.10gb", 0)
    with driver.change() as state:
        state["devices"][2]["instances"][0]["used"] = True
    with pytest.raises(Conflict, match="in use"):
        await hardware.remove_partition(THIRD, 0)
    assert await hardware.partitions(THIRD) == (made,)


async def test_nothing_half_made_is_left_when_the_second_half_is_refused(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    driver.fail("nvmlGpuInstanceCreateComputeInstance", pynvml.NVML_ERROR_UNKNOWN, times=1)
    with pytest.raises(Unavailable, match="nvmlGpuInstanceCreateComputeInstance"):
        await hardware.make_partition(THIRD, "1g.10gb", 0)
    assert await hardware.partitions(THIRD) == ()


async def test_a_half_made_partition_is_shown_and_completed_or_removed(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    driver.crash("nvmlGpuInstanceCreateComputeInstance")
    with pytest.raises(Unavailable):
        await hardware.make_partition(THIRD, "3g.40gb", 0)
    (half,) = await hardware.partitions(THIRD)
    assert (half.id, half.profile, half.start, half.size) == ("", "3g.40gb", 0, 4)
    whole = await hardware.make_partition(THIRD, "3g.40gb", 0)
    assert whole.id
    await hardware.remove_partition(THIRD, 0)
    driver.crash("nvmlGpuInstanceCreateComputeInstance")
    with pytest.raises(Unavailable):
        await hardware.make_partition(THIRD, "1g.10gb", 0)
    await hardware.remove_partition(THIRD, 0)
    assert await hardware.partitions(THIRD) == ()


# Samples, edits, and letting go.


async def test_samples_tell_what_every_device_and_partition_does(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    made = await hardware.make_partition(THIRD, "1g.10gb", 0)
    with driver.change() as state:
        state["devices"][0] |= {"busy_percent": 42, "processes": {"100": 2 * GIB}, "mps_processes": {"101": GIB, "100": 0}}
        state["devices"][0]["graphics_processes"] = {"100": 0, "103": GIB}
        state["devices"][2]["instances"][0]["processes"] = {"102": GIB}
    samples = {sample.device: sample for sample in await hardware.samples()}
    assert set(samples) == {FIRST, SECOND, THIRD, made.id}
    first = samples[FIRST]
    assert (first.busy_milli, first.memory_bytes, first.power_milliwatts, first.temperature_c) == (420, 2 * GIB, 70_000, 40)
    assert first.processes == {100: 2 * GIB, 101: GIB}
    assert first.graphics == (103,), "100 computes, too"
    assert samples[made.id].processes == {102: GIB}
    assert samples[THIRD].busy_milli == 0, "the driver does not say it of a device in MIG mode"


async def test_a_bad_device_takes_no_other_s_sample_away(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    driver.fail("nvmlDeviceGetHandleByIndex", pynvml.NVML_ERROR_UNKNOWN, device=SECOND)
    assert {sample.device for sample in await hardware.samples()} == {FIRST, THIRD}
    driver.fail("nvmlDeviceGetHandleByIndex", pynvml.NVML_ERROR_UNKNOWN)
    with pytest.raises(Unavailable, match="nvmlDeviceGetHandleByIndex"):
        await hardware.samples()


async def test_a_driver_that_tells_no_graphics_processes_tells_the_others(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    driver.lack("nvmlDeviceGetGraphicsRunningProcesses_v3")
    with driver.change() as state:
        state["devices"][0]["processes"] = {"100": GIB}
    assert next(sample.processes for sample in await hardware.samples() if sample.device == FIRST) == {100: GIB}


async def test_edits_are_asked_with_what_was_found_and_the_partitions_instances(driver: FakeDriver) -> None:
    asked: list[object] = []

    def edits(*arguments: object, **named: object) -> Edits:
        asked.extend([arguments, named])
        return Edits(gvisor_driver=DRIVER)

    template = driver.hardware()
    hardware = NvidiaHardware(
        root=driver.root,
        library="atoll.devices.nvidia.fake_nvml",
        environment={"ATOLL_FAKE_NVML": str(driver.directory)},
        edits=edits,
    )
    devices = {device.id: device for device in await hardware.discover()}
    made = await hardware.make_partition(THIRD, "1g.10gb", 0)
    grant = GpuGrant(device=THIRD, sharing=GpuSharing.MIG, profile="1g.10gb", size=1)
    assert hardware.edits([grant], [GpuCapability.COMPUTE], [made.id]).gvisor_driver == DRIVER
    assert asked == [([grant], [GpuCapability.COMPUTE], [made.id], devices), {"instances": {made.id: (1, 0)}, "root": driver.root}]
    await hardware.close()
    assert template.pids == ()


async def test_nothing_holds_the_devices_while_they_are_let_go(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    await hardware.discover()
    events = await followed(driver, hardware)
    async with hardware.let_go():
        assert children() == []
        with pytest.raises(Unavailable, match="set aside"):
            await hardware.samples()
    assert len(await hardware.discover()) == 3
    driver.xid(FIRST, 13)
    event = await next_event(events)
    assert (event.trouble, event.code) == (Trouble.FAULT, 13)


async def test_a_call_that_waits_for_its_turn_starts_no_worker_while_the_devices_are_let_go(
    driver: FakeDriver, hardware: NvidiaHardware
) -> None:
    driver.hang("nvmlDeviceGetCount")
    calls = [asyncio.ensure_future(call()) for call in (hardware.discover, hardware.samples, hardware.samples)]
    while not hardware.pids:  # noqa: ASYNC110 (until the first of them has its worker)
        await asyncio.sleep(0.01)
    async with hardware.let_go():
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
        assert children() == []


async def test_a_worker_that_is_being_started_when_all_are_ended_is_ended_too(driver: FakeDriver) -> None:
    closing: list[asyncio.Future[None]] = []

    def start() -> tuple[list[str], dict[str, str]]:
        closing.append(asyncio.ensure_future(channel.close(2.0)))
        return start_of(driver)

    channel = Channel(start, clock=SystemClock(), start_s=30.0)
    with pytest.raises(Unavailable, match="let go"):
        await channel.call("discover", 30.0)
    await closing[0]
    assert children() == []


async def test_a_worker_that_is_being_started_when_its_watch_pauses_is_ended_too(driver: FakeDriver) -> None:
    paused: list[asyncio.Future[None]] = []

    async def pause() -> None:
        watch.pause()
        await watch.close(2.0)
        assert children() == []

    def start() -> tuple[list[str], dict[str, str]]:
        paused.append(asyncio.ensure_future(pause()))
        return start_of(driver)

    watch = Watch(
        start,
        stream=Stream(),
        known={},
        root=driver.root,
        clock=SystemClock(),
        start_s=30.0,
        quiet_s=30.0,
        uevents=Bus(),
        start_of=lambda device, part: None,
    )
    running = asyncio.ensure_future(watch.run())
    while not paused:  # noqa: ASYNC110 (until it begins)
        await asyncio.sleep(0)
    await paused[0]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert len(paused) == 1


@pytest.mark.parametrize("status", [0, 1])
async def test_the_memory_s_module_is_loaded_once_where_its_file_is_missing(
    driver: FakeDriver, hardware: NvidiaHardware, status: int
) -> None:
    said = tool(driver, "", status, name="nvidia-modprobe")
    assert len(await hardware.discover()) == 3
    assert said.read_text().splitlines()[0] == "-u -c=0"
    said.unlink()
    assert len(await hardware.discover()) == 3
    assert not said.exists()


async def test_the_memory_s_module_is_left_alone_where_its_file_is_there(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    said = tool(driver, "", name="nvidia-modprobe")
    (driver.root / "dev").mkdir()
    (driver.root / "dev/nvidia-uvm").touch()
    await hardware.discover()
    assert not said.exists()


async def test_a_module_that_does_not_load_in_time_is_given_up(driver: FakeDriver) -> None:
    async with opened(driver, Deadlines(load_s=SHORT_S)) as hardware:
        said = tool(driver, "", name="nvidia-modprobe")
        (driver.root / "usr/bin/nvidia-modprobe").write_text(f"#!/bin/sh\necho $$ > {said}\nexec sleep 600\n")
        assert len(await hardware.discover()) == 3
        async with asyncio.timeout(10):
            while alive(int(said.read_text())):  # noqa: ASYNC110 (a process that is not ours to wait for)
                await asyncio.sleep(0.01)


def tool(driver: FakeDriver, words: str, status: int = 0, *, name: str = "nvidia-smi") -> Path:
    """Put a program in the place of the driver's tool, which notes how it was called and which workers there were then."""
    place = driver.root / "usr/bin" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    said = driver.root / "said"
    place.write_text(
        f"#!/bin/sh\necho \"$@\" > {said}\ncat /proc/{os.getpid()}/task/*/children >> {said}\necho '{words}'\nexit {status}\n"
    )
    place.chmod(0o755)
    return said


async def test_a_reset_finds_nobody_who_has_the_device_open(driver: FakeDriver, hardware: NvidiaHardware) -> None:
    await hardware.discover()
    events = await followed(driver, hardware)
    before = set(children())
    said = tool(driver, "GPU 00000000:1B:00.0 was successfully reset. All done.")
    await hardware.reset(FIRST)
    options, *others = said.read_text().splitlines()
    assert options == f"--gpu-reset -i {FIRST}"
    assert before
    assert not before & {int(pid) for line in others for pid in line.split()}
    assert len(await hardware.discover()) == 3
    driver.xid(FIRST, 13)
    assert (await next_event(events)).code == 13


@pytest.mark.parametrize(
    ("words", "status", "kind"),
    [
        ("GPU 00000000:1B:00.0 is currently in use by another process.", 19, Conflict),
        ("Resetting this GPU is Not Supported", 3, Unsupported),
        ("Unable to reset GPU: the bus did not come back", 1, Unavailable),
        ("nothing was done", 0, Unavailable),
    ],
)
async def test_a_refused_reset_says_why_in_the_tools_words(
    driver: FakeDriver, hardware: NvidiaHardware, words: str, status: int, kind: type[Exception]
) -> None:
    tool(driver, words, status)
    with pytest.raises(kind, match=words):
        await hardware.reset(FIRST)
    assert len(await hardware.discover()) == 3


async def test_a_reset_that_hangs_is_given_up(driver: FakeDriver) -> None:
    async with opened(driver, Deadlines(reset_s=SHORT_S)) as hardware:
        said = tool(driver, "")
        (driver.root / "usr/bin/nvidia-smi").write_text(f"#!/bin/sh\necho $$ > {said}\nexec sleep 600\n")
        with pytest.raises(Unavailable, match="not reset within"):
            await hardware.reset(FIRST)
        assert len(await hardware.discover()) == 3


async def test_without_the_drivers_tool_nothing_can_be_reset(hardware: NvidiaHardware) -> None:
    with pytest.raises(Unsupported, match="no nvidia-smi"):
        await hardware.reset(FIRST)
