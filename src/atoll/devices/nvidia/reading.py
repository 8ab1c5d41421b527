"""What NVML says of the devices, as plain values. Runs in the worker, and imports nothing of Atoll.

Source of names and meanings: NVIDIA's NVML API reference; memory is what `nvidia-smi -q` shows as FB memory (version 2 of the
call, which counts what the driver keeps for itself apart from what is used).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NOT_SUPPORTED, NOT_FOUND, FUNCTION_NOT_FOUND, GPU_IS_LOST = 3, 6, 13, 15
"""NVML's errors that mean: this device has no such thing (the first three), and: it has fallen off the bus."""
INVALID_ARGUMENT = 2
_ABSENT = (NOT_SUPPORTED, FUNCTION_NOT_FOUND)
_ANCESTORS = {0: "pix", 10: "pix", 20: "pxb", 30: "phb", 40: "node", 50: "sys"}
"""nvmlGpuTopologyLevel_t → the words of `nvidia-smi topo`. 0 is two devices of one board."""


class Asking:
    """Asks one device many things. What it does not have is the default; a failure is kept as words, and the default too."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self.failure = ""

    def __call__(self, default: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """Raises NVMLError only where the device is lost."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            if error.value == GPU_IS_LOST:
                raise
            if error.value not in _ABSENT and not self.failure:
                self.failure = f"{function.__name__}: {error}"
            return default


def discover(nvml: Any) -> dict[str, Any]:
    """Return driver, CUDA version, devices in order of PCI address, and how many did not answer because they are lost."""
    handles, devices, lost, failures = [], [], 0, []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            devices.append(_device(nvml, handle))
            handles.append(handle)
        except nvml.NVMLError as error:
            if error.value == GPU_IS_LOST:
                lost += 1
            else:
                failures.append(error)
    if failures and not devices:
        raise failures[0]
    _add_links(nvml, handles, devices)
    cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
    return {
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "devices": sorted(devices, key=lambda device: str(device["pci"])),
        "lost": lost,
        "unreadable": [str(error) for error in failures],
    }


def _device(nvml: Any, handle: Any) -> dict[str, Any]:
    ask = Asking(nvml)
    major, minor = ask((0, 0), nvml.nvmlDeviceGetCudaComputeCapability, handle)
    memory = ask(None, nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
    memory = memory or ask(None, nvml.nvmlDeviceGetMemoryInfo, handle)
    ecc = ask(None, nvml.nvmlDeviceGetEccMode, handle)
    uncorrected = (handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    mig = bool(ask([0, 0], nvml.nvmlDeviceGetMigMode, handle)[0])
    return {
        "id": nvml.nvmlDeviceGetUUID(handle),
        "model": nvml.nvmlDeviceGetName(handle),
        "pci": pci_address(nvml.nvmlDeviceGetPciInfo(handle).busId),
        "memory_bytes": memory.total if memory else 0,
        "compute_capability": f"{major}.{minor}" if major else "",
        "minor": ask(-1, nvml.nvmlDeviceGetMinorNumber, handle),
        "mig": mig,
        "profiles": profiles(nvml, handle) if mig else [],
        "ecc": None if ecc is None else bool(ecc[0]),
        "ecc_errors": ask(0, nvml.nvmlDeviceGetTotalEccErrors, *uncorrected) if ecc and ecc[0] else 0,
        "remapped": list(ask((0, 0, 0, 0), nvml.nvmlDeviceGetRemappedRows, handle)),
        "recovery": recovery_action(nvml, handle),
        "fabric": fabric(nvml, handle),
        "failure": ask.failure,
    }


def recovery_action(nvml: Any, handle: Any) -> int:
    """Return what the driver wants done to the device (nvmlDeviceGpuRecoveryAction_t); 0 nothing, or it cannot say."""
    try:
        (value,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
        return int(value.value.uiVal) if value.nvmlReturn == 0 else 0
    except nvml.NVMLError as error:
        if error.value == GPU_IS_LOST:
            raise
        return 0


def fabric(nvml: Any, handle: Any) -> str:
    """Return which NVLink domain of several machines the device has joined, as cluster and clique; empty where none, or not yet.

    A domain of one machine has a cluster of zeros (NVML API reference, "nvmlGpuFabricInfo_v2_t").
    """
    from ctypes import byref

    info = nvml.c_nvmlGpuFabricInfo_v2_t()
    try:
        nvml.nvmlDeviceGetGpuFabricInfoV(handle, byref(info))
    except nvml.NVMLError as error:
        if error.value == GPU_IS_LOST:
            raise
        return ""
    cluster = bytes(info.clusterUuid)
    if info.state != nvml.NVML_GPU_FABRIC_STATE_COMPLETED or info.status != 0 or not any(cluster):
        return ""
    return f"{cluster.hex()}.{info.cliqueId}"


def pci_address(bus_id: str) -> str:
    """`00000000:3B:00.0` → `0000:3b:00.0`, as sysfs has it."""
    domain, rest = bus_id.lower().split(":", 1)
    return f"{domain[-4:] if len(domain) > 4 and domain[:-4].strip('0') == '' else domain}:{rest}"


def profiles(nvml: Any, handle: Any) -> list[dict[str, Any]]:
    """Return the partitions that the device offers, as the driver tells them (never from a table), the largest first."""
    from ctypes import byref, c_uint

    found: dict[str, dict[str, Any]] = {}
    for kind in range(nvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        try:
            info = nvml.nvmlDeviceGetGpuInstanceProfileInfo(handle, kind, version=2)
            count = c_uint(0)
            nvml.nvmlDeviceGetGpuInstancePossiblePlacements(handle, info.id, None, byref(count))
            placements = (nvml.c_nvmlGpuInstancePlacement_t * count.value)()
            nvml.nvmlDeviceGetGpuInstancePossiblePlacements(handle, info.id, placements, byref(count))
        except nvml.NVMLError as error:
            if error.value not in (*_ABSENT, INVALID_ARGUMENT):
                raise
            continue  # not of this device, or unknown to this driver
        if not count.value:
            continue
        name = info.name.removeprefix("MIG ")
        found.setdefault(
            name,
            {
                "name": name,
                "id": info.id,
                "compute_slices": info.sliceCount,
                "memory_slices": placements[0].size,
                "memory_bytes": info.memorySizeMB << 20,
                "starts": sorted(placement.start for placement in placements[: count.value]),
                "most": info.instanceCount,
            },
        )
    return sorted(found.values(), key=lambda profile: (-profile["memory_slices"], -profile["compute_slices"], profile["name"]))


def _add_links(nvml: Any, handles: list[Any], devices: list[dict[str, Any]]) -> None:
    if len(devices) < 2:
        for device in devices:
            device["links"] = []
        return
    wires = [_nvlinks(nvml, handle) for handle in handles]
    for one, (handle, device) in enumerate(zip(handles, devices, strict=True)):
        device["links"] = links = []
        for other, (peer_handle, peer) in enumerate(zip(handles, devices, strict=True)):
            if one == other:
                continue
            direct, switched = wires[one]
            width = direct.get(peer["pci"], 0) or min(switched, wires[other][1])
            if width:
                links.append({"peer": peer["id"], "kind": "nvlink", "width": width})
                continue
            level = Asking(nvml)(50, nvml.nvmlDeviceGetTopologyCommonAncestor, handle, peer_handle)
            links.append({"peer": peer["id"], "kind": _ANCESTORS.get(level, "sys"), "width": 0})


def _nvlinks(nvml: Any, handle: Any) -> tuple[dict[str, int], int]:
    """Return active NVLinks by the PCI address of what they lead to, and how many of them lead to switches."""
    direct: dict[str, int] = {}
    switched = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if nvml.nvmlDeviceGetNvLinkState(handle, link) != 1:
                continue
            if nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link) == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                switched += 1
                continue
            address = pci_address(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId)
            direct[address] = direct.get(address, 0) + 1
        except nvml.NVMLError as error:
            if error.value == INVALID_ARGUMENT:
                break  # the device has no such link, and none after it
    return direct, switched


def samples(nvml: Any) -> list[dict[str, Any]]:
    """Return what every device and every partition does now; what is lost or does not say is left out, or zero.

    Raises NVMLError where none says anything.
    """
    found, failures = [], []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            found.append(_sample(nvml, handle) | {"driver": nvml.nvmlSystemGetDriverVersion()})
            if nvml.nvmlDeviceGetMigMode(handle)[0]:
                found[-1]["mig"] = True
                found.extend(_sample(nvml, part) for part in mig_devices(nvml, handle))
        except nvml.NVMLError as error:
            if error.value not in (GPU_IS_LOST, *_ABSENT):
                failures.append(error)
    if failures and not found:
        raise failures[0]
    return found


def _sample(nvml: Any, handle: Any) -> dict[str, Any]:
    ask = Asking(nvml)
    busy = ask(None, nvml.nvmlDeviceGetUtilizationRates, handle)
    memory = ask(None, nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2) or ask(None, nvml.nvmlDeviceGetMemoryInfo, handle)
    processes: dict[str, int] = {}
    for function in (nvml.nvmlDeviceGetComputeRunningProcesses_v3, nvml.nvmlDeviceGetMPSComputeRunningProcesses_v3):
        for process in ask([], function, handle):
            processes[str(process.pid)] = max(processes.get(str(process.pid), 0), process.usedGpuMemory or 0)
    drawing = {process.pid for process in ask([], nvml.nvmlDeviceGetGraphicsRunningProcesses_v3, handle)}
    return {
        "device": nvml.nvmlDeviceGetUUID(handle),
        "busy_milli": busy.gpu * 10 if busy else 0,
        "memory_bytes": memory.used if memory else 0,
        "power_milliwatts": ask(0, nvml.nvmlDeviceGetPowerUsage, handle),
        "temperature_c": ask(0, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        "processes": processes,
        "graphics": sorted(pid for pid in drawing if str(pid) not in processes),
    }


def mig_devices(nvml: Any, handle: Any) -> list[Any]:
    """Return the handles of a device's partitions that are whole."""
    found = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
        except nvml.NVMLError as error:
            if error.value not in (NOT_FOUND, INVALID_ARGUMENT):
                raise
    return found
