"""Whole PCI devices in machines: the arguments of QEMU's q35, what its monitor is shown, and memory that must be locked."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from atoll.model.errors import Unsupported
from atoll.model.ports.devices import DeviceNode, Edits, FileMount
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Box, Feature, Limits
from atoll.model.spec import RuntimeName
from atoll.runtimes.qemu import QemuRuntime, machine, pci_devices
from atoll.runtimes.vm.boxes import VmPlan
from atoll.runtimes.vm.jail import Jail, jail_command
from atoll.runtimes.vm.pci import LOCKED_BESIDE_BYTES, check_devices, locked_bytes, shown_of
from atoll.runtimes.vm.tap import GuestLink

GPU, OTHER = "0000:3b:00.0", "0000:5e:00.0"
GROUP = DeviceNode(path="/dev/vfio/7", host_path="/dev/vfio/7", major=239, minor=0)
LIMITS = Limits(cpu_milli=2000, memory_bytes=256 << 20, disk_bytes=64 << 20, pids=64)


def plan(**changes: Any) -> VmPlan:
    fields: dict[str, Any] = {
        "id": "a",
        "directory": "/var/lib/box",
        "uid": 0x7FFF0000,
        "vcpus": 2,
        "ram_bytes": 320 << 20,
        "limits": LIMITS,
        "disk_bytes": 64 << 20,
        "image": "/images/x",
        "stdout": "/o",
        "stderr": "/e",
        "hostname": "a",
        "process": {},
    }
    return VmPlan(**(fields | changes))


def box(devices: Edits) -> Box:
    return Box(
        id="a",
        directory=Path("/nowhere"),
        image=Image(reference="", digest="", config=ImageConfig(), layers=()),
        argv=("/run",),
        env=(),
        workdir="/",
        user="",
        hostname="a",
        limits=LIMITS,
        stdout=Path("/o"),
        stderr=Path("/e"),
        devices=devices,
    )


def pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(itertools.pairwise(words))


def test_a_machine_with_a_device_is_a_q35_with_everything_on_pci_and_one_without_is_a_microvm() -> None:
    link = GuestLink(address="10.0.0.2/24", mac="02:00:00:00:00:01", mtu=1500)
    without, with_one = machine(plan(link=link), "kvm"), machine(plan(link=link, pci=(GPU,)), "kvm")
    assert without[1].startswith("microvm,")
    assert not any("pci" in word for word in without)
    assert with_one[1].startswith("q35,")
    devices = [value for name, value in pairs(with_one) if name == "-device"]
    assert [device.partition(",")[0] for device in devices] == [
        "virtio-serial-pci",
        *["virtserialport"] * 3,
        "virtio-blk-pci",
        "virtio-blk-pci",
        "virtio-net-pci",
        "pcie-root-port",
        "vfio-pci",
    ]
    assert all("disable-legacy=on" in device for device in devices if device.startswith("virtio-"))
    assert "romfile=" in devices[6].split(",")  # the jail holds no ROM to boot from


def test_each_device_is_behind_a_port_of_its_own() -> None:
    assert pci_devices((GPU, OTHER)) == [
        *("-device", "pcie-root-port,id=port0,bus=pcie.0,chassis=1"),
        *("-device", f"vfio-pci,host={GPU},bus=port0"),
        *("-device", "pcie-root-port,id=port1,bus=pcie.0,chassis=2"),
        *("-device", f"vfio-pci,host={OTHER},bus=port1"),
    ]
    assert pci_devices(()) == []


def test_windows_that_q35_has_no_room_for_are_given_it_and_smaller_ones_are_not_spoken_of() -> None:
    assert pci_devices((GPU,), 32 << 30) == pci_devices((GPU,))
    large = machine(plan(pci=(GPU,), pci_window_bytes=1 << 40), "kvm")
    assert ("-global", f"q35-pcihost.pci-hole64-size={1 << 40}") in pairs(large)


def test_the_monitor_sees_its_own_devices_and_may_lock_the_whole_machine_s_memory() -> None:
    directory = Path("/sys/bus/pci/devices", GPU)
    assert shown_of(plan(pci=(GPU,))) == ((directory, directory),)
    assert locked_bytes(plan(pci=(GPU,))) == (320 << 20) + LOCKED_BESIDE_BYTES
    assert (shown_of(plan()), locked_bytes(plan())) == ((), 0)
    jail = Jail(directory=Path("/b"), uid=1, shown=(), nodes=(GROUP,), locked_bytes=384 << 20)
    line = jail_command(jail, Path("/b/pid"), ["/qemu"])
    assert ("-m", str(384 << 20)) in pairs(line)
    assert ("-d", "/dev/vfio/7=239,0") in pairs(line)
    assert "-m" not in jail_command(Jail(directory=Path("/b"), uid=1, shown=()), Path("/b/pid"), ["/qemu"])


def test_qemu_hands_on_whole_pci_devices_and_nothing_else_of_a_gpu() -> None:
    assert Feature.GPU in QemuRuntime.features
    check_devices(box(Edits()), RuntimeName.QEMU)
    check_devices(box(Edits(pci=(GPU,), nodes=(GROUP,), env=(("A", "1"),), pci_window_bytes=1 << 36)), RuntimeName.QEMU)
    nvidia = DeviceNode(path="/dev/nvidia0", host_path="/dev/nvidia0", major=195, minor=0)
    for edits in (
        Edits(nodes=(nvidia,)),
        Edits(nodes=(GROUP,)),
        Edits(pci=(GPU,), nodes=(GROUP, nvidia)),
        Edits(pci=(GPU,), mounts=(FileMount("/a", "/b"),)),
    ):
        with pytest.raises(Unsupported, match="qemu hands on whole PCI devices only") as raised:
            check_devices(box(edits), RuntimeName.QEMU)
        assert raised.value.field == "resources.gpu"


_CHECK = """
    import os, resource
    from atoll.model.errors import RuntimeFailed
    from atoll.runtimes.vm.pci import check_locking
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
    if os.geteuid() == 0:
        os.setuid(65534)  # and with it all capabilities are gone
    check_locking(0)
    check_locking(1 << 20)
    try:
        check_locking(384 << 20)
    except RuntimeFailed as error:
        print(error.message, error.mend, sep="|")
"""


def test_an_agent_that_cannot_allow_so_much_locked_memory_says_what_it_takes() -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_CHECK)], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert done.stdout == (
        "a machine with a device needs 384 MiB of locked memory, and this agent may allow 1 MiB"
        "|run the agent with CAP_SYS_RESOURCE, or with LimitMEMLOCK=infinity\n"
    )
