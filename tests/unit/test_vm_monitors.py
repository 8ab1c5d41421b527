"""The drivers' requests on monitors with their states: what may be asked before the boot, after it, and of a paused machine."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
sys.path.insert(0, str(Path(__file__).parent))

from test_vm_requests import plan
from vmm_stand_ins import CloudHypervisor, Firecracker, StandIn

from atoll.runtimes.vm import cloud_hypervisor_api as hypervisor
from atoll.runtimes.vm import firecracker_api as fire
from atoll.runtimes.vm.http_api import Call, HttpApi, Refused
from atoll.runtimes.vm.rates import Rates


class Kept:
    """A monitor in this process, of which a broken answer is an error of the test."""

    def __init__(self, stand_in: StandIn, socket: Path, base: str = "") -> None:
        self.stand_in = stand_in
        self.faults: list[str] = []
        stand_in.broken = self.faults.append  # type: ignore[method-assign] - the stand-in is the test's own
        self.api = HttpApi(socket, name="the monitor", base=base, deadline_s=10)
        self.task = asyncio.ensure_future(stand_in.run(str(socket)))

    async def __aenter__(self) -> Kept:
        await self.stand_in.listens.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stand_in.end()
        await self.task
        assert self.faults == []

    async def refuses(self, call: Call, status: int, match: str) -> None:
        with pytest.raises(Refused, match=match) as raised:
            await self.api.send(call)
        assert raised.value.http_status == status


def firecracker(directory: Path, name: str = "fc") -> Kept:
    return Kept(Firecracker(server=Path("/nowhere")), directory / name)


@pytest.fixture
async def hyper(tmp_path: Path) -> AsyncIterator[Kept]:
    async with Kept(CloudHypervisor(server=Path("/nowhere")), tmp_path / "ch", hypervisor.BASE) as kept:
        yield kept


BOOT_SOURCE = fire.put("/boot-source", {"kernel_image_path": "/etc/hostname", "boot_args": "a"})
BALLOON = fire.put("/balloon", {"amount_mib": 0, "deflate_on_oom": True, "stats_polling_interval_s": 1})


async def test_firecracker_before_the_boot_is_made_and_not_asked_to_do_anything(tmp_path: Path) -> None:
    async with firecracker(tmp_path) as kept:
        info = await kept.api.ask(fire.DESCRIBE, fire.InstanceInfo)
        assert info.state == "Not started"
        assert (await kept.api.ask(fire.VERSION, fire.Version)).firecracker_version
        for call in (fire.PAUSE, fire.RESUME, fire.CTRL_ALT_DEL, fire.FLUSH_METRICS, fire.snapshot("/s", "/m"), fire.balloon(1)):
            await kept.refuses(call, 400, "not supported before starting")
        await kept.refuses(fire.START, 400, "without kernel configuration")
        await kept.refuses(fire.put("/machine-config", {"vcpu_count": 3, "mem_size_mib": 64}), 400, "vCPU number is invalid")
        await kept.refuses(fire.put("/drives/x", fire.drive("x", "no/such/file", read_only=True)), 400, "Unable to open")
        await kept.refuses(fire.put("/mmds/config", {"network_interfaces": ["eth0"]}), 400, "invalid ID")
        await kept.refuses(fire.put("/nothing", {}), 400, "Invalid request method and/or path")
        await kept.refuses(fire.put("/vsock", {"guest_cid": 1, "uds_path": "v"}), 400, "deserializing the json body")


async def test_firecracker_after_the_boot_is_asked_to_do_things_and_not_made(tmp_path: Path) -> None:
    async with firecracker(tmp_path) as kept:
        for call in (BOOT_SOURCE, BALLOON, fire.metadata({"a": {"b": 1}}), fire.START):
            await kept.api.send(call)
        assert (await kept.api.ask(fire.DESCRIBE, fire.InstanceInfo)).state == "Running"
        for call in (BOOT_SOURCE, BALLOON, fire.START, fire.restore("/s", "/m"), *fire.observing()):
            await kept.refuses(call, 400, "not supported after starting")
        for call in (fire.FLUSH_METRICS, fire.balloon(64), fire.balloon_polling(2), fire.metadata({"a": {"b": None}}, merge=True)):
            await kept.api.send(call)
        assert await kept.api.send(fire.METADATA) == b'{"a": {}}'
        assert b'"target_mib": 64' in await kept.api.send(fire.BALLOON_STATISTICS)
        assert b"amount_mib" in await kept.api.send(fire.BALLOON)
        assert b"boot-source" in await kept.api.send(fire.FULL_CONFIG)
        assert b"vcpu_count" in await kept.api.send(fire.MACHINE_CONFIG)
        for call in fire.rate(Rates(disk_bytes=1), network=False):
            await kept.refuses(call, 400, "Unknown device")


async def test_a_paused_machine_is_written_whole_or_in_part_and_another_monitor_becomes_it(tmp_path: Path) -> None:
    state, memory = str(tmp_path / "state"), str(tmp_path / "memory")
    async with firecracker(tmp_path) as kept:
        await kept.api.send(BOOT_SOURCE)
        await kept.api.send(fire.START)
        await kept.refuses(fire.snapshot(state, memory), 400, "while the microVM is running")
        await kept.api.send(fire.PAUSE)
        for changes_only in (False, True):
            await kept.api.send(fire.snapshot(state, memory, changes_only=changes_only))
        await kept.api.send(fire.RESUME)
        assert (await kept.api.ask(fire.DESCRIBE, fire.InstanceInfo)).state == "Running"
    for resume, faults, expected in ((False, False, "Paused"), (True, True, "Running")):
        async with firecracker(tmp_path, f"restored-{resume}") as other:
            await other.api.send(fire.restore(state, memory, faults=faults, resume=resume, taps=[("eth0", "tap0")], vsock="/v"))
            assert (await other.api.ask(fire.DESCRIBE, fire.InstanceInfo)).state == expected


async def test_a_monitor_that_was_told_something_or_gets_no_snapshot_becomes_none(tmp_path: Path) -> None:
    async with firecracker(tmp_path) as kept:
        await kept.api.send(BOOT_SOURCE)
        await kept.refuses(fire.restore("/s", "/m"), 400, "not allowed after configuring boot-specific")
    async with firecracker(tmp_path, "other") as kept:
        await kept.refuses(fire.restore(str(tmp_path / "none"), str(tmp_path / "none")), 400, "Failed to restore from snapshot")
        await kept.task  # it ends: it is too dirty to go on


async def test_cloud_hypervisor_without_a_machine_has_nothing_to_do_it_to(hyper: Kept) -> None:
    assert (await hyper.api.ask(hypervisor.PING, hypervisor.Ping)).version
    calls = (hypervisor.INFO, hypervisor.BOOT, hypervisor.PAUSE, hypervisor.RESUME, hypervisor.SHUTDOWN, hypervisor.POWER_BUTTON)
    more = (
        hypervisor.resize(vcpus=1),
        hypervisor.snapshot("/s"),
        hypervisor.add_device("0000:00:01.0"),
        hypervisor.remove_device("x"),
    )
    for call in (*calls, *more):
        await hyper.refuses(call, 404, "VM is not created")


def small(directory: Path) -> Call:
    """A machine without disks, card and vsock."""
    call = hypervisor.create(plan(link=None, directory=str(directory)), hypervisor.MachineOptions())
    body = {key: value for key, value in call.body.items() if key not in {"disks", "vsock"}}
    return Call(method="PUT", path=call.path, body=body | {"payload": {"kernel": "/etc/hostname"}})


async def test_cloud_hypervisor_goes_through_its_states(hyper: Kept, tmp_path: Path) -> None:
    async def state() -> str:
        return (await hyper.api.ask(hypervisor.INFO, hypervisor.Info)).state

    await hyper.refuses(hypervisor.create(plan(link=None), hypervisor.MachineOptions()), 500, "Error opening disk")
    await hyper.api.send(small(tmp_path))
    assert await state() == "Created"
    await hyper.refuses(small(tmp_path), 500, "already created")
    for call in (hypervisor.PAUSE, hypervisor.SHUTDOWN, hypervisor.snapshot("/s"), hypervisor.REBOOT):
        await hyper.refuses(call, 405, "not running")
    await hyper.api.send(hypervisor.BOOT)
    assert await state() == "Running"
    await hyper.refuses(hypervisor.RESUME, 405, "Invalid VM state")
    await hyper.api.send(hypervisor.resize(balloon_bytes=1 << 20))
    await hyper.refuses(hypervisor.resize(vcpus=200), 429, "exceed")
    assert await hyper.api.send(hypervisor.COUNTERS)
    await hyper.api.send(hypervisor.PAUSE)
    assert await state() == "Paused"
    await hyper.api.send(hypervisor.snapshot(str(tmp_path)))
    await hyper.refuses(hypervisor.restore(str(tmp_path)), 404, "already created")
    await hyper.api.send(hypervisor.RESUME)
    await hyper.api.send(hypervisor.SHUTDOWN)
    assert await state() == "Shutdown"
    await hyper.api.send(hypervisor.DELETE)
    await hyper.refuses(hypervisor.restore(str(tmp_path / "none")), 400, "snapshot")
    await hyper.api.send(hypervisor.restore(str(tmp_path), resume=True))
    assert await state() == "Running"
    await hyper.api.send(hypervisor.END)
    await hyper.task


async def test_devices_are_added_before_the_boot_and_while_it_runs(hyper: Kept, tmp_path: Path) -> None:
    address, other = "0000:00:01.0", "0000:00:02.0"
    if not all(Path(hypervisor.DEVICES, one).exists() for one in (address, other)):
        pytest.skip("this machine has no PCI devices")
    await hyper.api.send(small(tmp_path))
    assert await hyper.api.send(hypervisor.add_device(address)) == b""
    await hyper.refuses(hypervisor.add_device(address), 409, "not unique")
    await hyper.api.send(hypervisor.BOOT)
    assert (await hyper.api.ask(hypervisor.add_device(other), hypervisor.PciDevice)).bdf
    await hyper.refuses(hypervisor.add_device("0000:ff:1f.7"), 404, "No such device")
    await hyper.api.send(hypervisor.remove_device(hypervisor.device_id(other)))
    await hyper.refuses(hypervisor.remove_device(hypervisor.device_id(other)), 404, "Missing device")
