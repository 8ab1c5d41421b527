"""What makes granted NVIDIA devices, and no others, appear in an instance: device files, partitions' capabilities, libraries.

`/dev/nvidiactl` and `/dev/nvidia-uvm` are every instance's: the driver gives a client of theirs only the devices whose own file
it can open. A partition (MIG) is guarded by two more files, of its GPU instance and its compute instance, whose minor numbers
the driver tells in /proc (MIG User Guide, "Device Nodes and Capabilities").
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from atoll.devices.libraries import LIBRARY_DIRECTORY, DriverFiles, driver_files
from atoll.model.devices import GpuDevice, GpuGrant, GpuSharing
from atoll.model.errors import Unsupported
from atoll.model.ports.devices import DeviceNode, Edits
from atoll.model.spec import GpuCapability

CDI_KIND = "nvidia.com/gpu"
_PROC = "proc/driver/nvidia"
_MINORS = "proc/driver/nvidia-caps/mig-minors"
_FILE_BYTES_MAX = 1 << 20
_DEVICE_FILE_MINOR = re.compile(r"DeviceFileMinor:\s*(\d+)")
_OLD_ID = re.compile(r"MIG-(?:GPU-)?[^/]+/(\d+)/(\d+)")
"""Ids of drivers before 470 name the two instances themselves."""
_READ_ONLY_MODE = 0o444


def nvidia_edits(
    grants: Sequence[GpuGrant],
    capabilities: Collection[GpuCapability],
    partitions: Sequence[str],
    devices: Mapping[str, GpuDevice],
    *,
    instances: Mapping[str, tuple[int, int]] | None = None,
    root: Path = Path("/"),
    find: Callable[[Collection[GpuCapability], Path], DriverFiles] = driver_files,
) -> Edits:
    """Return the edits for `grants`. Looks up files only, and changes nothing.

    `partitions` are the ids of the grants that are partitions, in their order; `instances` gives each id's (GPU instance,
    compute instance) as the management library tells them. `root` is where the node's file system is seen, `find` looks for the
    driver's files there.
    Raises Unsupported, naming the file or library that is missing and how to get it.
    """
    granted = list(dict.fromkeys(grant.device for grant in grants))
    for id in granted:
        if id not in devices or devices[id].minor < 0:
            raise Unsupported(f"the driver names no device file of {id}", mend="is it still there? nvidia-smi -L shows what is")
    files = find(capabilities, root)
    named = dict(zip((at for at, grant in enumerate(grants) if _is_partition(grant)), partitions, strict=True))
    nodes = [_node(root, f"/dev/nvidia{devices[id].minor}") for id in granted]
    nodes += _control_nodes(root, capabilities)
    mine: set[tuple[int, int, int]] = set()
    for at, partition in named.items():
        gpu, (gi, ci) = devices[grants[at].device].minor, _instances_of(partition, instances or {})
        mine.add((gpu, gi, ci))
        nodes += [_capability_node(root, f"gpu{gpu}/gi{gi}/access"), _capability_node(root, f"gpu{gpu}/gi{gi}/ci{ci}/access")]
    if GpuCapability.GRAPHICS in capabilities:
        for id in granted:
            nodes += _render_nodes(root, devices[id].pci)
    whole = [grant.device for grant in grants if not _is_partition(grant)]
    return Edits(
        nodes=tuple({node.path: node for node in nodes}.values()),
        mounts=files.mounts,
        env=_environment(capabilities, list(named.values()), whole),
        library_directories=(LIBRARY_DIRECTORY,) if files.mounts else (),
        links=files.links,
        masked=tuple(_masked(root, {devices[id].pci.lower() for id in granted}, {devices[id].minor for id in granted}, mine)),
        devices=tuple(f"{CDI_KIND}={name}" for name in [*dict.fromkeys(whole), *named.values()]),
        pci=tuple(devices[grant.device].pci for grant in grants if grant.sharing is GpuSharing.EXCLUSIVE),
        gvisor_driver="" if named else files.version,
    )


def _is_partition(grant: GpuGrant) -> bool:
    return grant.sharing is GpuSharing.MIG


def _environment(capabilities: Collection[GpuCapability], partitions: list[str], whole: list[str]) -> tuple[tuple[str, str], ...]:
    env = [
        # Else a hook of the vendor's toolkit, where a node has one too, would add what an image asks for: mostly all devices.
        ("NVIDIA_VISIBLE_DEVICES", "void"),
        ("NVIDIA_DRIVER_CAPABILITIES", ",".join(each for each in GpuCapability if each in capabilities)),
    ]
    if partitions:
        # A program finds whole devices by itself; a partition beside others only by its name.
        env.append(("CUDA_VISIBLE_DEVICES", ",".join([*partitions, *whole])))
    return tuple(env)


def _node(root: Path, path: str, mode: int = 0o666) -> DeviceNode:
    found = _look(root, path)
    if found is None:
        raise Unsupported(f"there is no device file {path} on this node", mend=_mend(path))
    return DeviceNode(path=path, host_path=path, major=found[0], minor=found[1], mode=mode)


def _look(root: Path, path: str) -> tuple[int, int] | None:
    """Return major and minor of a character device, None where there is none."""
    try:
        found = (root / path.lstrip("/")).stat()
    except OSError:
        return None
    if not stat.S_ISCHR(found.st_mode):
        return None
    return os.major(found.st_rdev), os.minor(found.st_rdev)


def _mend(path: str) -> str:
    if path.startswith("/dev/nvidia-uvm"):
        return "modprobe nvidia-uvm && nvidia-modprobe -u -c=0"
    if "/nvidia-caps/" in path:
        return f"nvidia-modprobe -f /proc/driver/nvidia/capabilities/… makes it; cat /{_MINORS} shows which there can be"
    return "nvidia-modprobe makes it; nvidia-smi does so too"


def _control_nodes(root: Path, capabilities: Collection[GpuCapability]) -> list[DeviceNode]:
    nodes = [_node(root, "/dev/nvidiactl")]
    if GpuCapability.COMPUTE in capabilities:
        nodes.append(_node(root, "/dev/nvidia-uvm"))
    wanted = ["/dev/nvidia-uvm-tools"] if GpuCapability.COMPUTE in capabilities else []
    wanted += ["/dev/nvidia-modeset"] if GpuCapability.GRAPHICS in capabilities else []
    return nodes + [_node(root, path) for path in wanted if _look(root, path) is not None]


def _render_nodes(root: Path, pci: str) -> list[DeviceNode]:
    directory = root / "sys/bus/pci/devices" / pci / "drm"
    names = (
        sorted(path.name for path in directory.iterdir() if path.name.startswith(("card", "renderD"))) if directory.is_dir() else []
    )
    return [_node(root, f"/dev/dri/{name}") for name in names if _look(root, f"/dev/dri/{name}") is not None]


def _instances_of(partition: str, instances: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    if partition in instances:
        return instances[partition]
    if match := _OLD_ID.fullmatch(partition):
        return int(match[1]), int(match[2])
    raise Unsupported(f"nothing tells which GPU instance the partition {partition} is", mend="nvidia-smi -L shows those that exist")


def _capability_node(root: Path, name: str) -> DeviceNode:
    """Return the file that guards what `name` (`gpu0/gi3/access`) is of."""
    gpu, _, rest = name.partition("/")
    found = _DEVICE_FILE_MINOR.search(_read(root / _PROC / "capabilities" / gpu / "mig" / rest))
    minor = int(found[1]) if found else _listed_minor(root, name)
    if minor is None:
        raise Unsupported(
            f"the driver knows no capability {name}", mend="the partition is gone: nvidia-smi -L shows those that exist"
        )
    return _node(root, f"/dev/nvidia-caps/nvidia-cap{minor}", _READ_ONLY_MODE)


def _listed_minor(root: Path, name: str) -> int | None:
    for line in _read(root / _MINORS).splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None


def _masked(root: Path, pci: set[str], minors: set[int], mine: set[tuple[int, int, int]]) -> Iterable[str]:
    """Yield what in the driver's part of /proc speaks of other devices and partitions than the instance's own."""
    for path in _below(root / _PROC / "gpus"):
        if all(pci) and path.name.lower() not in pci:
            yield f"/{_PROC}/gpus/{path.name}"
    for gpu in _below(root / _PROC / "capabilities"):
        number = gpu.name.removeprefix("gpu")
        if not number.isdecimal():
            continue
        if int(number) not in minors:
            yield f"/{_PROC}/capabilities/{gpu.name}"
            continue
        for gi in _below(gpu / "mig"):
            shown = f"/{_PROC}/capabilities/{gpu.name}/mig/{gi.name}"
            own = {f"ci{ci}" for of, its, ci in mine if of == int(number) and gi.name == f"gi{its}"}
            if not own:
                yield shown
                continue
            yield from (f"{shown}/{ci.name}" for ci in _below(gi) if ci.name.startswith("ci") and ci.name not in own)


def _below(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_FILE_BYTES_MAX).decode(errors="replace")
    except OSError:
        return ""
