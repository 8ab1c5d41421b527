"""Waiting for the driver's events. Runs in a worker of its own, for as long as that lives, and imports nothing of Atoll.

It writes lines: `{"ready": {uuid: pci}, "unreadable": [words]}` once it waits, `{"event": {device, kind, code, part}}` for each
event, `{"lost": [uuids]}` for devices that fell off the bus, `{"deaf": {uuid: words}}` for those whose events cannot be had,
`{"alive": true}` after a round without news, `{"error": …}` before it ends. One bad device takes no other's events away.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from atoll.devices.nvidia.reading import GPU_IS_LOST, NOT_SUPPORTED, pci_address

ROUND_MS = 10_000
"""A wait's own bound: after it, one cheap call to each device finds those that vanished without a word."""
_TIMEOUT = 10
_NO_PART = 0xFFFFFFFF
_KINDS = (
    ("xid", "nvmlEventTypeXidCriticalError"),
    ("double-bit", "nvmlEventTypeDoubleBitEccError"),
    ("single-bit-storm", "nvmlEventTypeSingleBitEccErrorStorm"),
    ("retirement", "nvmlEventTypeDramRetirementEvent"),
    ("retirement-failure", "nvmlEventTypeDramRetirementFailure"),
    ("poison-contained", "nvmlEventTypeNonFatalPoisonError"),
    ("poison", "nvmlEventTypeFatalPoisonError"),
    ("unavailable", "nvmlEventTypeGpuUnavailableError"),
    ("recovery-action", "nvmlEventTypeGpuRecoveryAction"),
)


def wait(nvml: Any, say: Callable[[dict[str, Any]], None], failure: Callable[[Any, BaseException], dict[str, Any]]) -> None:
    """Say what happens until there is no device left to wait for, or something fails."""
    try:
        nvml.nvmlInit()
        devices, shown, failures = _devices(nvml)
        say({"ready": shown, "unreadable": [str(error) for error in failures]})
        while devices:
            for uuid in _follow(nvml, devices, say):
                del devices[uuid]
    except Exception as error:  # noqa: BLE001 (the outer edge: whatever it was, the other side gets to know it)
        say({"error": failure(nvml, error)})


def _devices(nvml: Any) -> tuple[dict[str, Any], dict[str, str], list[Exception]]:
    """Return the handles of the devices that can be read, their PCI addresses, and what was wrong with others that are not lost.

    Raises NVMLError where none can be read.
    """
    found: dict[str, Any] = {}
    shown: dict[str, str] = {}
    failures: list[Exception] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            if _is_lost(nvml, handle):
                continue
            uuid = nvml.nvmlDeviceGetUUID(handle)
            shown[uuid] = pci_address(nvml.nvmlDeviceGetPciInfo(handle).busId)
            found[uuid] = handle
        except nvml.NVMLError as error:
            if error.value != GPU_IS_LOST:
                failures.append(error)
    if failures and not found:
        raise failures[0]
    return found, shown, failures


def _follow(nvml: Any, devices: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> list[str]:
    """Pass events on until devices are lost, and return those."""
    kinds = {getattr(nvml, name): kind for kind, name in _KINDS if hasattr(nvml, name)}
    wanted = 0
    for bit in kinds:
        wanted |= bit
    events = nvml.nvmlEventSetCreate()
    try:
        deaf = {uuid: error for uuid, handle in devices.items() if (error := _register(nvml, handle, wanted, events)) is not None}
        if len(deaf) == len(devices):
            raise next(iter(deaf.values()))
        if deaf:
            say({"deaf": {uuid: str(error) for uuid, error in deaf.items()}})
        while True:
            try:
                event = nvml.nvmlEventSetWait(events, ROUND_MS)
            except nvml.NVMLError as error:
                if error.value not in (_TIMEOUT, GPU_IS_LOST):
                    raise
                lost = _lost(nvml, devices)
                if lost:
                    say({"lost": lost})
                    return lost
                if error.value == GPU_IS_LOST:
                    raise  # it will not say which: begin anew, with growing delay
                say({"alive": True})
                continue
            uuid = next((uuid for uuid, handle in devices.items() if _address(handle) == _address(event.device)), "")
            part = event.gpuInstanceId if event.gpuInstanceId != _NO_PART else None
            say({"event": {"device": uuid, "kind": kinds.get(event.eventType, "other"), "code": event.eventData, "part": part}})
    finally:
        nvml.nvmlEventSetFree(events)


def _register(nvml: Any, handle: Any, wanted: int, events: Any) -> Exception | None:
    """Have a device's events come; return why they cannot. One that is lost is found by the next round, one that has
    none is watched by the rounds alone."""
    try:
        supported = wanted & nvml.nvmlDeviceGetSupportedEventTypes(handle)
        if supported:
            nvml.nvmlDeviceRegisterEvents(handle, supported, events)
    except nvml.NVMLError as error:
        if error.value not in (GPU_IS_LOST, NOT_SUPPORTED):
            return error  # type: ignore[no-any-return]
    return None


def _lost(nvml: Any, devices: dict[str, Any]) -> list[str]:
    return [uuid for uuid, handle in devices.items() if _is_lost(nvml, handle)]


def _is_lost(nvml: Any, handle: Any) -> bool:
    """Ask something for which the device itself must answer."""
    try:
        nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
    except nvml.NVMLError as error:
        return bool(error.value == GPU_IS_LOST)
    return False


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0
