"""QEMU's q35, which instances with a PCI device get: one real boot (5 to 10 s where the processor is emulated) without such a
device, in the jail of a monitor that has one."""

from __future__ import annotations

import asyncio
import os
import stat
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs
from runtime_world import SharingQemu, World, make_layer, why_not

from atoll.model.errors import RuntimeFailed
from atoll.model.ports.devices import DeviceNode, Edits
from atoll.network.links import LinkNetwork
from atoll.runtimes.cgroup import Group
from atoll.runtimes.vm.boxes import VmPlan
from atoll.runtimes.vm.jail import Jail
from atoll.runtimes.vm.kernel import GuestKernel
from atoll.runtimes.vm.pci import PCI, check_locking

pytestmark = [pytest.mark.system, pytest.mark.asyncio]
LOCKED_BYTES = 1 << 20
GROUP = DeviceNode(path="/dev/vfio/7", host_path="/dev/vfio/7", major=1, minor=3)


def some_device() -> str:
    """Return the address of a PCI device of this machine, which nothing is done to."""
    found = sorted(path.name for path in PCI.iterdir()) if PCI.is_dir() else []
    if not found:
        pytest.skip("this machine has no PCI devices")
    return found[-1]


class AsWithDevice(SharingQemu):
    """Its monitors are jailed as those with a device are, and are given none."""

    def jail(self, plan: VmPlan, kernel: GuestKernel, group: Group) -> Jail:
        jail = super().jail(structs.replace(plan, pci=(some_device(),), nodes=(GROUP,)), kernel, group)
        assert jail.locked_bytes > plan.ram_bytes
        return structs.replace(jail, locked_bytes=LOCKED_BYTES)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    if why := why_not("qemu"):
        pytest.skip(why)
    (tmp_path / "image").mkdir()
    cgroup = f"/atoll-test-qemu-{uuid.uuid4().hex[:8]}"

    def make() -> AsWithDevice:
        return AsWithDevice(tmp_path / "runtime", cgroup=cgroup, machine="q35")

    world = World(tmp_path, make, (make_layer(tmp_path / "image"),), cgroup=cgroup)
    yield world
    await world.close()


async def test_a_q35_boots_the_same_guest_over_pci_and_its_monitor_sees_one_device(world: World, tmp_path: Path) -> None:
    network = LinkNetwork(f"10.94.{os.getpid() % 256}.0/24", tmp_path / "network", prepared=1, resolver_sources=())
    try:
        link = await network.attach("a", project="p", ports=[])
        pid = await world.launch("a", "graceful", netns=link.netns)
        code, out = await world.shell("a", "ls -l /sys/bus/virtio/devices | grep -c /pci; cat /proc/net/fib_trie")
        assert (code, out.split()[0]) == (0, "4")  # the channel, two disks, the card
        assert link.address in out

        root = Path(f"/proc/{pid}/root")
        assert [path.name for path in (root / "sys/bus/pci/devices").iterdir()] == [some_device()]
        assert [path.name for path in (root / "dev/vfio").iterdir()] == ["7"]
        assert stat.S_ISCHR((root / "dev/vfio/7").stat().st_mode)
        assert f"Max locked memory         {LOCKED_BYTES}" in Path(f"/proc/{pid}/limits").read_text()
        status = Path(f"/proc/{pid}/status").read_text()
        assert "CapBnd:\t0000000000000000" in status

        await world.runtime.pause("a")
        await world.runtime.resume("a")
        await world.runtime.signal("a", "SIGTERM")
        assert (await asyncio.wait_for(world.runtime.wait("a"), 20)).code == 0
        said = (world.directory / "instances/a/vmm.log").read_text()
        assert "SeaBIOS" not in said  # the log is the monitor's and the kernel's
    finally:
        await network.detach("a")
        await network.close()


async def test_a_device_for_which_no_memory_can_be_locked_is_said_and_leaves_nothing_running(world: World) -> None:
    try:
        check_locking(64 << 20)
        pytest.skip("this agent can let a monitor lock memory")
    except RuntimeFailed:
        pass
    await world.runtime.create(world.box("a", "run", devices=Edits(pci=(some_device(),), nodes=(GROUP,))))
    with pytest.raises(RuntimeFailed, match="locked memory") as raised:
        await world.runtime.start("a")
    assert "LimitMEMLOCK" in str(raised.value.mend)
    assert not (world.directory / "instances/a/pid").exists()
