# ruff: noqa: N802 (the names are NVML's)
"""A stand-in for the bindings of NVML, for a worker: the same names, structures and errors, over a directory in place of a driver.

`fake_driver.FakeDriver` makes the directory and says what happens in it; the environment variable names it. As with the library
itself, what is there at `nvmlInit` is what a process counts from then on, a device that is lost answers GPU_IS_LOST, and partitions
outlive every process. A fault that is set for a function makes it fail, crash the process or hang.
"""

from __future__ import annotations

import os
import select
from typing import Any

import pynvml  # type: ignore[import-untyped]
from pynvml import *  # noqa: F403 (its constants and structures)

from atoll.devices.nvidia.fake_mig import *  # noqa: F403 (a part of the same library)
from atoll.devices.nvidia.fake_state import (
    DEVICE,
    EVENTS,
    PART,
    absent,
    call,
    directory,
    load,
    look,
    number_of,
    part_of,
    pointer,
    started,
)


@call
def nvmlInit() -> None:
    started[:] = [len(load()["devices"])]


@call
def nvmlShutdown() -> None:
    started.clear()


@call
def nvmlSystemGetDriverVersion() -> str:
    return str(load()["driver"])


@call
def nvmlSystemGetCudaDriverVersion_v2() -> int:
    return int(load()["cuda"])


@call
def nvmlDeviceGetCount() -> int:
    return started[0]


@call
def nvmlDeviceGetHandleByIndex(index: int) -> Any:
    if index >= started[0]:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    handle = pointer(pynvml.c_nvmlDevice_t, DEVICE * (index + 1))
    look(handle)
    return handle


@call
def nvmlDeviceGetHandleByUUID(name: str) -> Any:
    for index, device in enumerate(load()["devices"][: started[0]]):
        if device["id"] == name:
            return nvmlDeviceGetHandleByIndex(index)
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)


@call
def nvmlDeviceGetUUID(handle: Any) -> str:
    device = look(handle)
    if number_of(handle) >= PART:
        return str(part_of(device, handle)["compute"][0]["uuid"])
    return str(device["id"])


@call
def nvmlDeviceGetName(handle: Any) -> str:
    return str(look(handle)["model"])


@call
def nvmlDeviceGetPciInfo(handle: Any) -> Any:
    info = pynvml.nvmlPciInfo_t()
    info.busId = f"0000{look(handle)['pci'].upper()}"
    return info


@call
def nvmlDeviceGetMinorNumber(handle: Any) -> int:
    return int(look(handle)["minor"])


@call
def nvmlDeviceGetCudaComputeCapability(handle: Any) -> tuple[int, int]:
    major, minor = look(handle)["capability"]
    return major, minor


@call
def nvmlDeviceGetMemoryInfo(handle: Any, version: int | None = None) -> Any:
    device = look(handle)
    memory = pynvml.c_nvmlMemory_v2_t() if version else pynvml.c_nvmlMemory_t()
    memory.total, memory.used = device["memory_bytes"], sum(device["processes"].values())
    if number_of(handle) >= PART:
        memory.total, memory.used = part_of(device, handle)["memory_bytes"], 0
    memory.free = memory.total - memory.used
    return memory


@call
def nvmlDeviceGetEccMode(handle: Any) -> list[int]:
    ecc = look(handle)["ecc"]
    if ecc is None:
        raise absent()
    return [int(ecc), int(ecc)]


@call
def nvmlDeviceGetTotalEccErrors(handle: Any, kind: int, counter: int) -> int:
    return int(look(handle)["ecc_errors"])


@call
def nvmlDeviceGetRemappedRows(handle: Any) -> tuple[int, ...]:
    return tuple(look(handle)["remapped"])


@call
def nvmlDeviceGetFieldValues(handle: Any, fields: list[int]) -> Any:
    values = (pynvml.c_nvmlFieldValue_t * len(fields))()
    device = look(handle)
    for value, field in zip(values, fields, strict=True):
        value.fieldId, value.nvmlReturn = field, pynvml.NVML_SUCCESS
        if field == pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION:
            value.value.uiVal = device["recovery"]
        else:
            value.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED
    return values


@call
def nvmlDeviceGetGpuFabricInfoV(handle: Any, shown: Any) -> int:
    joined, info = look(handle)["fabric"], shown._obj
    if joined is None:
        raise absent()
    info.state, info.status, info.cliqueId = joined["state"], 0, joined["clique"]
    info.clusterUuid[:] = bytes.fromhex(joined["cluster"])
    return int(pynvml.NVML_SUCCESS)


@call
def nvmlDeviceGetTopologyCommonAncestor(one: Any, other: Any) -> int:
    return int(look(one)["ancestors"].get(look(other)["id"], pynvml.NVML_TOPOLOGY_SYSTEM))


def _link(handle: Any, link: int) -> str:
    links = look(handle)["nvlinks"]
    if link >= len(links):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    return str(links[link])


@call
def nvmlDeviceGetNvLinkState(handle: Any, link: int) -> int:
    return int(bool(_link(handle, link)))


@call
def nvmlDeviceGetNvLinkRemoteDeviceType(handle: Any, link: int) -> int:
    switch = _link(handle, link) == "switch"
    return int(pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH if switch else pynvml.NVML_NVLINK_DEVICE_TYPE_GPU)


@call
def nvmlDeviceGetNvLinkRemotePciInfo(handle: Any, link: int) -> Any:
    info = pynvml.nvmlPciInfo_t()
    info.busId = f"0000{_link(handle, link).upper()}"
    return info


@call
def nvmlDeviceGetUtilizationRates(handle: Any) -> Any:
    device = look(handle)
    if device["mig"]:
        raise absent()
    rates = pynvml.c_nvmlUtilization_t()
    rates.gpu = device["busy_percent"]
    return rates


@call
def nvmlDeviceGetPowerUsage(handle: Any) -> int:
    return int(look(handle)["power_milliwatts"])


@call
def nvmlDeviceGetTemperature(handle: Any, sensor: int) -> int:
    return int(look(handle)["temperature_c"])


def _processes(handle: Any, key: str) -> list[Any]:
    device = look(handle)
    processes = part_of(device, handle).get(key, {}) if number_of(handle) >= PART else device[key]
    shown = []
    for pid, used in processes.items():
        process = pynvml.c_nvmlProcessInfo_v3_t()
        process.pid, process.usedGpuMemory = int(pid), used
        shown.append(process)
    return shown


@call
def nvmlDeviceGetComputeRunningProcesses_v3(handle: Any) -> list[Any]:
    return _processes(handle, "processes")


@call
def nvmlDeviceGetGraphicsRunningProcesses_v3(handle: Any) -> list[Any]:
    return _processes(handle, "graphics_processes")


@call
def nvmlDeviceGetMPSComputeRunningProcesses_v3(handle: Any) -> list[Any]:
    return _processes(handle, "mps_processes")


# Events: a line `UUID TYPE DATA PART` each in a pipe with a name.


@call
def nvmlEventSetCreate() -> Any:
    return {"pipe": os.open(directory() / EVENTS, os.O_RDWR | os.O_CLOEXEC), "devices": {}}


@call
def nvmlEventSetFree(events: Any) -> None:
    os.close(events["pipe"])


@call
def nvmlDeviceGetSupportedEventTypes(handle: Any) -> int:
    return int(pynvml.nvmlEventTypeAll) if look(handle)["events"] else 0


@call
def nvmlDeviceRegisterEvents(handle: Any, kinds: int, events: Any) -> None:
    events["devices"][look(handle)["id"]] = (handle, kinds)


@call
def nvmlEventSetWait(events: Any, timeout_ms: int) -> Any:
    while True:
        if not select.select([events["pipe"]], [], [], timeout_ms / 1000)[0]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        # Whole lines are written, and one is taken: what nobody has asked for yet stays for the next set of events.
        line = b"".join(iter(lambda: os.read(events["pipe"], 1), b"\n"))
        name, kind, data, part = line.decode().split()
        if name not in events["devices"]:
            continue
        handle, kinds = events["devices"][name]
        if kind == "lost":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        if int(kind) & kinds:
            break
    event = pynvml.c_nvmlEventData_t()
    event.device, event.eventType, event.eventData = handle, int(kind), int(data)
    event.gpuInstanceId = int(part) if part != "-" else 0xFFFFFFFF
    return event
