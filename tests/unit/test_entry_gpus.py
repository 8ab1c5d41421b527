"""What an agent is given for GPUs: nothing on a machine without any, and with some a CDI spec that follows them."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run

from atoll.devices.cdi import read_spec
from atoll.devices.fake import FakeHardware
from atoll.entry.described import DescribedDevices
from atoll.entry.gpus import node_devices
from atoll.entry.process import parse
from atoll.model.ports.clock import SystemClock
from atoll.model.spec import RuntimeName


async def test_a_machine_without_a_gpu_has_no_devices(tmp_path: Path) -> None:
    assert await node_devices(tmp_path / "data", SystemClock(), tmp_path) is None
    assert not (tmp_path / "data").exists()


def test_such_a_machine_loads_nothing_of_what_gpus_need() -> None:
    code = "import sys, atoll.entry.agent; print([name for name in sys.modules if name.startswith(('atoll.devices.', 'pynvml'))])"
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def described(directory: Path, *hardware: FakeHardware, known: frozenset[str] = frozenset()) -> DescribedDevices:
    return DescribedDevices(hardware, directory=directory, clock=SystemClock(), known_to_gvisor=lambda: known)


async def test_a_cdi_spec_of_each_vendor_names_the_whole_devices_and_follows_them(tmp_path: Path) -> None:
    hardware = FakeHardware(count=3, mig=[2])
    devices = described(tmp_path, hardware)
    await devices.inventory()
    file = tmp_path / "cdi" / "nvidia.com-gpu.json"
    spec = read_spec(file.read_bytes(), str(file))
    assert sorted(spec.devices) == sorted(f"nvidia.com/gpu={id}" for id in hardware.ids[:2])
    hardware.vanish(hardware.ids[0])
    await devices.inventory()
    assert read_spec(file.read_bytes(), str(file)).devices == (f"nvidia.com/gpu={hardware.ids[1]}",)
    hardware.vanish(hardware.ids[1])
    await devices.inventory()
    assert not file.exists()
    await devices.close()


async def test_gvisor_is_offered_devices_only_where_its_proxy_knows_the_driver(tmp_path: Path) -> None:
    hardware = FakeHardware(driver="580.159.04")
    for known, offered in ((frozenset({"580.159.04"}), True), (frozenset({"580.126.20"}), False)):
        devices = described(tmp_path, hardware, known=known)
        await devices.inventory()
        assert (devices.offers(RuntimeName.GVISOR) == "") is offered
        assert devices.offers(RuntimeName.RUNC) == ""
        await devices.close()


async def test_machines_are_offered_devices_only_where_there_is_an_iommu(tmp_path: Path) -> None:
    clock = SystemClock()
    devices = DescribedDevices([FakeHardware()], directory=tmp_path / "a", clock=clock, known_to_gvisor=frozenset, root=tmp_path)
    await devices.inventory()
    assert "no IOMMU at work" in devices.offers(RuntimeName.QEMU)
    (tmp_path / "sys/kernel/iommu_groups/7").mkdir(parents=True)
    assert "modprobe vfio-pci" in devices.offers(RuntimeName.CLOUD_HYPERVISOR)
    (tmp_path / "sys/bus/pci/drivers/vfio-pci").mkdir(parents=True)
    assert devices.offers(RuntimeName.QEMU) == devices.offers(RuntimeName.CLOUD_HYPERVISOR) == ""
    await devices.close()


async def test_the_nodes_driver_that_counts_as_known_to_gvisor_is_the_one_that_runs_now(tmp_path: Path) -> None:
    runsc = tmp_path / "bin/runsc"
    runsc.parent.mkdir()
    runsc.write_text("#!/bin/sh\necho 580.126.20\n")
    runsc.chmod(0o755)
    version = tmp_path / "root/proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.100.01  x\n")
    named = {"nvproxy_driver": "580.126.20", "runsc": str(runsc)}
    devices = await node_devices(tmp_path / "data", SystemClock(), tmp_path / "root", **named)
    assert devices is not None
    assert devices.known_to_gvisor() == {"580.126.20", "580.100.01"}
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  x\n")
    assert devices.known_to_gvisor() == {"580.126.20", "580.159.04"}
    await devices.close()


def test_a_driver_for_gvisor_reaches_the_agent() -> None:
    config = parse("agent", ["--nvproxy-driver", "580.126.20"])
    assert parse("agent", config.arguments()).nvproxy_driver == "580.126.20"
    assert "--nvproxy-driver" not in " ".join(parse("agent", []).arguments())
