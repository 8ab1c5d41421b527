"""What the fake's devices are: models, topology, device files."""

from __future__ import annotations

import uuid
from collections.abc import Collection

from msgspec import Struct

from atoll.devices.fake_mig import profiles_of
from atoll.model.devices import GpuDevice, GpuGrant, GpuLink, GpuSharing, GpuVendor, LinkKind
from atoll.model.ports.devices import DeviceNode

_NAMESPACE = uuid.UUID("b6d4ce53-0f0b-4c65-8d0e-5b2f9f5c7e21")
_NVIDIA_MAJOR, _UVM_MAJOR, _CAPS_MAJOR, _DRM_MAJOR, _KFD_MAJOR = 195, 238, 241, 226, 235


class FakeModel(Struct, frozen=True, kw_only=True):
    name: str
    memory_bytes: int
    capability: str
    vendor: GpuVendor = GpuVendor.NVIDIA
    mig: bool = True
    ecc: bool | None = True


MODELS: dict[str, FakeModel] = {
    "A100-40GB": FakeModel(name="NVIDIA A100-SXM4-40GB", memory_bytes=40_960 << 20, capability="8.0"),
    "A100-80GB": FakeModel(name="NVIDIA A100-SXM4-80GB", memory_bytes=81_920 << 20, capability="8.0"),
    "H100-80GB": FakeModel(name="NVIDIA H100 80GB HBM3", memory_bytes=81_559 << 20, capability="9.0"),
    "H100-94GB": FakeModel(name="NVIDIA H100 NVL", memory_bytes=95_830 << 20, capability="9.0"),
    "H200-141GB": FakeModel(name="NVIDIA H200", memory_bytes=143_771 << 20, capability="9.0"),
    "L4": FakeModel(name="NVIDIA L4", memory_bytes=23_034 << 20, capability="8.9", mig=False),
    "T4": FakeModel(name="Tesla T4", memory_bytes=15_360 << 20, capability="7.5", mig=False),
    "RTX-4090": FakeModel(name="NVIDIA GeForce RTX 4090", memory_bytes=24_564 << 20, capability="8.9", mig=False, ecc=None),
    "MI300X": FakeModel(
        name="AMD Instinct MI300X", memory_bytes=196_592 << 20, capability="gfx942", vendor=GpuVendor.AMD, mig=False
    ),
    "MAX-1550": FakeModel(
        name="Intel Data Center GPU Max 1550", memory_bytes=131_072 << 20, capability="", vendor=GpuVendor.INTEL, mig=False
    ),
}


def make_devices(
    model: str, count: int, *, in_mig: Collection[int], nvlink: int, driver: str, cuda: str, name: str
) -> tuple[GpuDevice, ...]:
    """Return `count` devices of one model as their driver describes them; the same for the same `name`."""
    kind = MODELS[model]
    ids = [f"GPU-{uuid.uuid5(_NAMESPACE, f'{name}/{model}/{index}')}" for index in range(count)]
    # two sockets, each with half of the devices
    socket = [index * 2 // count if count > 1 else -1 for index in range(count)]
    return tuple(
        GpuDevice(
            id=id,
            model=kind.name,
            memory_bytes=kind.memory_bytes,
            vendor=kind.vendor,
            compute_capability=kind.capability,
            driver=driver,
            cuda=cuda if kind.vendor is GpuVendor.NVIDIA else "",
            pci=f"0000:{0x10 + 0x10 * index:02x}:00.0",
            minor=index if kind.vendor is GpuVendor.NVIDIA else 128 + index,
            numa=socket[index],
            cpus=f"{32 * max(0, socket[index])}-{32 * max(0, socket[index]) + 31}",
            links=tuple(
                _link(peer, nvlink, same_socket=socket[other] == socket[index]) for other, peer in enumerate(ids) if other != index
            ),
            mig=index in in_mig,
            profiles=profiles_of(model, kind.memory_bytes) if index in in_mig else (),
            sharing=(GpuSharing.MIG,) if index in in_mig else (GpuSharing.EXCLUSIVE, GpuSharing.TIME_SLICE),
            ecc=kind.ecc,
        )
        for index, id in enumerate(ids)
    )


def device_nodes(device: GpuDevice, grant: GpuGrant, partition: str) -> list[DeviceNode]:
    """Return the device files that a grant needs, with the numbers that they have on a real machine."""
    if device.vendor is not GpuVendor.NVIDIA:
        path = f"/dev/dri/renderD{device.minor}"
        nodes = [DeviceNode(path, path, _DRM_MAJOR, device.minor)]
        return [DeviceNode("/dev/kfd", "/dev/kfd", _KFD_MAJOR, 0), *nodes] if device.vendor is GpuVendor.AMD else nodes
    path = f"/dev/nvidia{device.minor}"
    nodes = [
        DeviceNode("/dev/nvidiactl", "/dev/nvidiactl", _NVIDIA_MAJOR, 255),
        DeviceNode("/dev/nvidia-uvm", "/dev/nvidia-uvm", _UVM_MAJOR, 0),
        DeviceNode("/dev/nvidia-uvm-tools", "/dev/nvidia-uvm-tools", _UVM_MAJOR, 1),
        DeviceNode(path, path, _NVIDIA_MAJOR, device.minor),
    ]
    if partition:
        for offset in (0, 1):  # the partition and its compute instance
            minor = 3 + 64 * device.minor + 2 * grant.start + offset
            cap = f"/dev/nvidia-caps/nvidia-cap{minor}"
            nodes.append(DeviceNode(cap, cap, _CAPS_MAJOR, minor, permissions="r", mode=0o444))
    return nodes


def _link(peer: str, width: int, *, same_socket: bool) -> GpuLink:
    if width:
        return GpuLink(peer=peer, kind=LinkKind.NVLINK, width=width)
    return GpuLink(peer=peer, kind=LinkKind.NODE if same_socket else LinkKind.SYS)
