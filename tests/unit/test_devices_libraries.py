"""What of NVIDIA's driver appears inside: libraries of exactly its version, device files of exactly what was granted."""

from __future__ import annotations

import os
import platform
import random
import re
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from atoll.devices.ld_cache import cached_libraries
from atoll.devices.libraries import LIBRARY_DIRECTORY, driver_files, kernel_driver_version, resolve
from atoll.devices.nvidia_files import nvidia_edits
from atoll.model.devices import GpuDevice, GpuGrant, GpuSharing
from atoll.model.errors import Unsupported
from atoll.model.ports.devices import Edits
from atoll.model.spec import GpuCapability

VERSION = "580.159.04"
COMPUTE, UTILITY, GRAPHICS, VIDEO = GpuCapability
MACHINE = {"x86_64": 62, "aarch64": 183}[platform.machine()]
CACHE_FLAGS = {62: 0x0303, 183: 0x0A03}[MACHINE]
NODES = {"nvidia0": (195, 0), "nvidia1": (195, 1), "nvidiactl": (195, 255), "nvidia-uvm": (238, 0), "nvidia-uvm-tools": (238, 1)}
GPUS = {
    "GPU-a": GpuDevice(id="GPU-a", model="H200", memory_bytes=1 << 37, pci="0000:3b:00.0", minor=0),
    "GPU-b": GpuDevice(id="GPU-b", model="H200", memory_bytes=1 << 37, pci="0000:af:00.0", minor=1),
}


def elf(path: Path, *, bits: int = 64, machine: int = MACHINE) -> None:
    """Write the head of an ELF file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9) + (3).to_bytes(2, "little") + machine.to_bytes(2, "little"))


def install(root: Path, directory: str, *names: str, version: str = VERSION) -> None:
    for name in names:
        elf(root / directory / f"{name}.{version}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A node with the driver in its usual place, and nothing else."""
    proc = tmp_path / "proc/driver/nvidia"
    proc.mkdir(parents=True)
    (proc / "version").write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {VERSION}  Release Build\nGCC version: gcc 15.3.0\n"
    )
    install(
        tmp_path,
        "usr/lib64",
        "libcuda.so",
        "libnvidia-ptxjitcompiler.so",
        "libnvidia-gpucomp.so",
        "libnvidia-ml.so",
        "libnvidia-cfg.so",
    )
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/nvidia-smi").write_text("")
    return tmp_path


def targets(root: Path, *capabilities: GpuCapability) -> set[str]:
    return {Path(mount.target).name for mount in driver_files(capabilities, root).mounts}


def test_the_version_is_the_kernel_s_wherever_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="not loaded") as raised:
        kernel_driver_version(tmp_path)
    assert "modprobe" in (raised.value.mend or "")
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "sys/module/nvidia/version").write_text("535.104.05\n")
    assert kernel_driver_version(tmp_path) == "535.104.05"


def test_each_class_gets_its_own_libraries_and_no_more(root: Path) -> None:
    assert targets(root, COMPUTE) == {
        f"{name}.so.{VERSION}" for name in ("libcuda", "libnvidia-ptxjitcompiler", "libnvidia-gpucomp")
    }
    assert targets(root, UTILITY) == {f"libnvidia-ml.so.{VERSION}", f"libnvidia-cfg.so.{VERSION}", "nvidia-smi"}
    assert targets(root) == set()


def test_libraries_have_the_names_that_programs_ask_for(root: Path) -> None:
    links = dict(driver_files([COMPUTE], root).links)
    assert links[f"{LIBRARY_DIRECTORY}/libcuda.so.1"] == f"libcuda.so.{VERSION}"
    assert links[f"{LIBRARY_DIRECTORY}/libcuda.so"] == "libcuda.so.1"
    assert links[f"{LIBRARY_DIRECTORY}/libnvidia-gpucomp.so"] == f"libnvidia-gpucomp.so.{VERSION}"


def test_a_library_of_another_version_is_not_taken_and_both_versions_are_named(root: Path) -> None:
    (root / f"usr/lib64/libcuda.so.{VERSION}").unlink()
    install(root, "usr/lib64", "libcuda.so", version="570.86.10")
    (root / "usr/lib64/libcuda.so.1").symlink_to("libcuda.so.570.86.10")
    with pytest.raises(Unsupported, match=r"libcuda\.so on this node is of version 570\.86\.10.*580\.159\.04") as raised:
        driver_files([COMPUTE], root)
    assert "580.159.04" in (raised.value.mend or "")


def test_a_library_that_is_missing_is_named_with_its_class(root: Path) -> None:
    with pytest.raises(Unsupported, match=r"libnvidia-encode\.so\.580\.159\.04, which 'video' needs") as raised:
        driver_files([VIDEO], root)
    assert raised.value.field == "resources.gpu.capabilities"


def test_libraries_of_32_bits_and_of_other_machines_are_left_out(root: Path) -> None:
    elf(root / f"usr/lib64/libcuda.so.{VERSION}", bits=32, machine=3)
    with pytest.raises(Unsupported):
        driver_files([COMPUTE], root)
    elf(root / f"usr/lib/x86_64-linux-gnu/libcuda.so.{VERSION}", machine=40)
    with pytest.raises(Unsupported):
        driver_files([COMPUTE], root)
    install(root, "usr/lib", "libcuda.so")
    assert driver_files([COMPUTE], root).mounts[0].source == f"/usr/lib/libcuda.so.{VERSION}"


def test_a_file_of_a_matching_name_that_is_no_library_is_left_out(root: Path) -> None:
    (root / f"usr/lib64/libcuda.so.{VERSION}").write_text("INPUT(libother.so)\n")
    with pytest.raises(Unsupported, match="libcuda"):
        driver_files([COMPUTE], root)


def write_cache(root: Path, entries: list[tuple[str, str, int]], *, before: bytes = b"") -> None:
    strings, table = b"", b""
    start = 48 + 24 * len(entries)
    for name, path, flags in entries:
        at = start + len(strings)
        table += struct.pack("<iIIIQ", flags, at, at + len(name) + 1, 0, 0)
        strings += name.encode() + b"\0" + path.encode() + b"\0"
    (root / "etc").mkdir(exist_ok=True)
    header = struct.pack("<20sII", b"glibc-ld.so.cache1.1", len(entries), len(strings)) + bytes(20)
    (root / "etc/ld.so.cache").write_bytes(before + header + table + strings)


@pytest.mark.parametrize("before", [b"", b"ld.so-1.7.0\0" + bytes(20)])
def test_a_driver_in_an_unusual_place_is_found_through_the_linker_s_cache(root: Path, before: bytes) -> None:
    (root / "usr/lib64").rename(root / "vendor")
    (root / "vendor/libcuda.so.1").symlink_to(f"/vendor/libcuda.so.{VERSION}")
    write_cache(
        root, [("libcuda.so.1", "/old/libcuda.so.1", 3), ("libcuda.so.1", "/vendor/libcuda.so.1", CACHE_FLAGS)], before=before
    )
    assert driver_files([COMPUTE], root).mounts[0].source == f"/vendor/libcuda.so.{VERSION}"


@pytest.mark.parametrize(
    "damage", [b"", b"glibc-ld.so.cache1.1", b"glibc-ld.so.cache1.1" + b"\xff" * 28, random.Random(1).randbytes(64)]
)
def test_a_damaged_cache_counts_as_none(root: Path, damage: bytes) -> None:
    (root / "etc").mkdir()
    (root / "etc/ld.so.cache").write_bytes(damage)
    assert list(cached_libraries(root)) == []
    assert driver_files([COMPUTE], root).mounts


def test_the_cache_is_read_as_the_linker_s_own_tool_does() -> None:
    try:
        listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs ldconfig")
    kind = {62: "libc6,x86-64", 183: "libc6,AArch64"}[MACHINE]
    expected = re.findall(rf"^\t(\S+) \({kind}[^)]*\) => (\S+)$", listed, re.MULTILINE)
    assert [entry for entry in cached_libraries() if entry in set(expected)] == expected
    assert expected


def test_links_are_followed_as_if_the_root_were_the_machine_s(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("")
    (tmp_path / "link").symlink_to("/real")
    (tmp_path / "up").symlink_to("../../../real/file")
    (tmp_path / "loop").symlink_to("loop")
    assert resolve(tmp_path, "/link/file") == "/real/file"
    assert resolve(tmp_path, "/up") == "/real/file"
    assert resolve(tmp_path, "/loop") is None
    assert resolve(tmp_path, "/nothing") is None


@pytest.fixture
def node(root: Path) -> Path:
    """The same with the device files of two GPUs."""
    (root / "dev/nvidia-caps").mkdir(parents=True)
    for name, number in NODES.items():
        make_node(root / "dev" / name, *number)
    for device in GPUS.values():
        (root / "proc/driver/nvidia/gpus" / device.pci).mkdir(parents=True)
    return root


def make_node(path: Path, major: int, minor: int) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
    except PermissionError:
        pytest.skip("making device files needs root")


def grant(device: str, **changes: object) -> GpuGrant:
    return GpuGrant(device=device, **changes)  # type: ignore[arg-type]


def paths(edits: Edits) -> list[str]:
    return [entry.path for entry in edits.nodes]


def test_only_the_granted_device_s_file_appears(node: Path) -> None:
    edits = nvidia_edits([grant("GPU-b")], [COMPUTE, UTILITY], [], GPUS, root=node)
    assert paths(edits) == ["/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"]
    assert [(entry.major, entry.minor) for entry in edits.nodes] == [(195, 1), (195, 255), (238, 0), (238, 1)]
    assert edits.masked == ("/proc/driver/nvidia/gpus/0000:3b:00.0",)
    assert edits.devices == ("nvidia.com/gpu=GPU-b",)
    assert edits.pci == ("0000:af:00.0",)
    assert edits.gvisor_driver == VERSION
    env = dict(edits.env)
    assert env["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert env["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "CUDA_VISIBLE_DEVICES" not in env


def test_least_is_given_without_compute(node: Path) -> None:
    edits = nvidia_edits([grant("GPU-a")], [UTILITY], [], GPUS, root=node)
    assert paths(edits) == ["/dev/nvidia0", "/dev/nvidiactl"]
    assert not any("libcuda" in mount.target for mount in edits.mounts)


def test_a_share_is_no_device_for_a_virtual_machine(node: Path) -> None:
    edits = nvidia_edits([grant("GPU-a", sharing=GpuSharing.TIME_SLICE, milli=500)], [COMPUTE], [], GPUS, root=node)
    assert edits.pci == ()
    assert "/dev/nvidia0" in paths(edits)


def test_modesetting_and_render_files_come_with_graphics_only(node: Path) -> None:
    make_node(node / "dev/nvidia-modeset", 195, 254)
    (node / "dev/dri").mkdir()
    make_node(node / "dev/dri/renderD128", 226, 128)
    make_node(node / "dev/dri/renderD129", 226, 129)
    for pci, name in (("0000:3b:00.0", "renderD128"), ("0000:af:00.0", "renderD129")):
        (node / "sys/bus/pci/devices" / pci / "drm" / name).mkdir(parents=True)
    install(node, "usr/lib64", "libGLX_nvidia.so")
    assert {"/dev/nvidia-modeset", "/dev/dri/renderD128"}.isdisjoint(
        paths(nvidia_edits([grant("GPU-a")], [COMPUTE], [], GPUS, root=node))
    )
    shown = paths(nvidia_edits([grant("GPU-a")], [GRAPHICS], [], GPUS, root=node))
    assert {"/dev/nvidia-modeset", "/dev/dri/renderD128"} <= set(shown)
    assert "/dev/dri/renderD129" not in shown


def make_partitions(node: Path) -> None:
    """Two GPU instances on the first device, the second with two compute instances; their files too."""
    minors = {"gi1/access": 12, "gi1/ci0/access": 13, "gi2/access": 21, "gi2/ci0/access": 22, "gi2/ci1/access": 23}
    for name, minor in minors.items():
        path = node / "proc/driver/nvidia/capabilities/gpu0/mig" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"DeviceFileMinor: {minor}\nDeviceFileMode: 292\nDeviceFileModify: 1\n")
        make_node(node / f"dev/nvidia-caps/nvidia-cap{minor}", 241, minor)


MIG = {"sharing": GpuSharing.MIG, "profile": "1g.18gb", "start": 0, "size": 1}


def test_a_partition_brings_the_files_of_its_two_instances_and_hides_the_others(node: Path) -> None:
    make_partitions(node)
    edits = nvidia_edits([grant("GPU-a", **MIG)], [COMPUTE], ["MIG-x"], GPUS, instances={"MIG-x": (2, 0)}, root=node)
    caps = [(entry.path, entry.major, entry.minor, entry.mode) for entry in edits.nodes if "caps" in entry.path]
    assert caps == [("/dev/nvidia-caps/nvidia-cap21", 241, 21, 0o444), ("/dev/nvidia-caps/nvidia-cap22", 241, 22, 0o444)]
    assert dict(edits.env)["CUDA_VISIBLE_DEVICES"] == "MIG-x"
    hidden = "/proc/driver/nvidia/capabilities/gpu0/mig"
    assert set(edits.masked) == {f"{hidden}/gi1", f"{hidden}/gi2/ci1", "/proc/driver/nvidia/gpus/0000:af:00.0"}
    assert edits.devices == ("nvidia.com/gpu=MIG-x",)
    assert (edits.pci, edits.gvisor_driver) == ((), "")


def test_the_minors_of_a_partition_are_found_in_the_driver_s_list_too(node: Path) -> None:
    (node / "proc/driver/nvidia-caps").mkdir()
    (node / "proc/driver/nvidia-caps/mig-minors").write_text("config 1\nmonitor 2\ngpu0/gi3/access 30\ngpu0/gi3/ci0/access 31\n")
    for minor in (30, 31):
        make_node(node / f"dev/nvidia-caps/nvidia-cap{minor}", 241, minor)
    edits = nvidia_edits([grant("GPU-a", **MIG)], [COMPUTE], ["MIG-GPU-a/3/0"], GPUS, root=node)
    assert {"/dev/nvidia-caps/nvidia-cap30", "/dev/nvidia-caps/nvidia-cap31"} <= set(paths(edits))


def test_two_partitions_of_one_device_share_its_file(node: Path) -> None:
    make_partitions(node)
    grants = [grant("GPU-a", **MIG), grant("GPU-a", **(MIG | {"start": 1}))]
    edits = nvidia_edits(grants, [COMPUTE], ["MIG-x", "MIG-y"], GPUS, instances={"MIG-x": (1, 0), "MIG-y": (2, 1)}, root=node)
    assert paths(edits).count("/dev/nvidia0") == 1
    assert sorted(path for path in paths(edits) if "caps" in path) == [
        f"/dev/nvidia-caps/nvidia-cap{minor}" for minor in (12, 13, 21, 23)
    ]


@pytest.mark.parametrize(
    ("gone", "named"),
    [("dev/nvidia0", "/dev/nvidia0"), ("dev/nvidiactl", "/dev/nvidiactl"), ("dev/nvidia-uvm", "modprobe nvidia-uvm")],
)
def test_a_device_file_that_is_missing_is_named_with_what_makes_it(node: Path, gone: str, named: str) -> None:
    (node / gone).unlink()
    with pytest.raises(Unsupported) as raised:
        nvidia_edits([grant("GPU-a")], [COMPUTE], [], GPUS, root=node)
    assert named in f"{raised.value} {raised.value.mend}"


def test_a_plain_file_is_no_device(node: Path) -> None:
    (node / "dev/nvidia0").unlink()
    (node / "dev/nvidia0").write_text("")
    with pytest.raises(Unsupported, match="/dev/nvidia0"):
        nvidia_edits([grant("GPU-a")], [COMPUTE], [], GPUS, root=node)


def test_a_partition_that_is_gone_and_an_unknown_device_are_refused(node: Path) -> None:
    make_partitions(node)
    with pytest.raises(Unsupported, match="gpu0/gi9/access"):
        nvidia_edits([grant("GPU-a", **MIG)], [COMPUTE], ["MIG-x"], GPUS, instances={"MIG-x": (9, 0)}, root=node)
    with pytest.raises(Unsupported, match="MIG-unknown"):
        nvidia_edits([grant("GPU-a", **MIG)], [COMPUTE], ["MIG-unknown"], GPUS, root=node)
    with pytest.raises(Unsupported, match="GPU-z"):
        nvidia_edits([grant("GPU-z")], [COMPUTE], [], GPUS, root=node)
