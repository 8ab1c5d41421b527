"""MIG partitions through NVML. Runs in the worker, and imports nothing of Atoll.

A partition is a GPU instance (its memory) with one compute instance over all of it. One without a compute instance is half-made:
nothing can use it, it holds its slices, and only `remove` or another `make` at its place ends that.
"""

from __future__ import annotations

from ctypes import byref, c_uint
from typing import Any

from atoll.devices.nvidia import reading

_NOT_FOUND, _IN_USE, _INSUFFICIENT = 6, 19, 23
_GPU_NOT_FOUND = 28
_MODE = "stop the node's agent, which has every GPU open, and whatever else uses this one; then: nvidia-smi -i {} -mig 1"


class Refusal(Exception):
    """`kind` is the code of the Atoll error that the caller gets."""

    def __init__(self, kind: str, message: str, mend: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.mend = mend


def partitions(nvml: Any, device: str) -> list[dict[str, Any]]:
    """Return the partitions in order of `start`, those half-made with an empty `id`."""
    handle = _device(nvml, device)
    if not _mig(nvml, handle):
        return []
    return [_shown(item) for item in _existing(nvml, handle)]


def make(nvml: Any, device: str, profile: str, start: int) -> dict[str, Any]:
    """Make the partition, or complete it, or return the one that is there."""
    handle = _device(nvml, device)
    if not _mig(nvml, handle):
        raise Refusal("invalid", f"{device} is not in MIG mode", _MODE.format(device))
    offered = {item["name"]: item for item in reading.profiles(nvml, handle)}
    kind = offered.get(profile)
    if kind is None:
        raise Refusal("invalid", f"{device} has no profile {profile}", f"it has {', '.join(offered)}")
    if start not in kind["starts"]:
        raise Refusal("invalid", f"{profile} cannot begin at {start}", f"it can begin at {', '.join(map(str, kind['starts']))}")
    end = start + kind["memory_slices"]
    for item in _existing(nvml, handle):
        if item["start"] == start and item["profile"] == profile:
            return _shown(item) if item["id"] else _complete(nvml, handle, item["handle"], start, kind["compute_slices"])
        if item["start"] < end and start < item["start"] + item["size"]:
            raise _taken(device, profile, start, f"{item['profile']} is at {item['start']}")
    placement = nvml.c_nvmlGpuInstancePlacement_t(start, kind["memory_slices"])
    try:
        instance = nvml.nvmlDeviceCreateGpuInstanceWithPlacement(handle, kind["id"], byref(placement))
    except nvml.NVMLError as error:
        if error.value == _INSUFFICIENT:
            raise _taken(device, profile, start, "the driver has no room for it there") from None
        raise
    return _complete(nvml, handle, instance, start, kind["compute_slices"])


def remove(nvml: Any, device: str, start: int) -> None:
    """Remove the partition that begins at `start`, if there is one."""
    handle = _device(nvml, device)
    if not _mig(nvml, handle):
        return
    for item in _existing(nvml, handle):
        if item["start"] != start:
            continue
        try:
            for compute in _compute_instances(nvml, item["handle"]):
                nvml.nvmlComputeInstanceDestroy(compute)
            nvml.nvmlGpuInstanceDestroy(item["handle"])
        except nvml.NVMLError as error:
            if error.value == _IN_USE:
                raise Refusal(
                    "conflict", f"the partition {item['profile']} at {start} of {device} is in use", "end what uses it"
                ) from None
            raise


def _complete(nvml: Any, handle: Any, instance: Any, start: int, slices: int) -> dict[str, Any]:
    try:
        nvml.nvmlGpuInstanceCreateComputeInstance(instance, _whole(nvml, instance, slices))
    except (nvml.NVMLError, Refusal):
        nvml.nvmlGpuInstanceDestroy(instance)
        raise
    return next(_shown(item) for item in _existing(nvml, handle) if item["start"] == start)


def _whole(nvml: Any, instance: Any, wanted: int) -> int:
    """Return the compute profile that covers all of a GPU instance, which has `wanted` slices."""
    for info in _compute_profiles(nvml, instance):
        if info.sliceCount == wanted:
            return int(info.id)
    raise Refusal("unavailable", f"the driver offers no compute instance of {wanted} slices for this partition")


def _compute_profiles(nvml: Any, instance: Any) -> list[Any]:
    found = []
    for kind in range(nvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        try:
            found.append(nvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, kind, 0, version=2))
        except nvml.NVMLError as error:
            if error.value not in (reading.NOT_SUPPORTED, reading.INVALID_ARGUMENT):
                raise
    return found


def _compute_instances(nvml: Any, instance: Any) -> list[Any]:
    found = []
    for info in _compute_profiles(nvml, instance):
        if info.instanceCount:
            count = c_uint(info.instanceCount)
            handles = (nvml.c_nvmlComputeInstance_t * info.instanceCount)()
            nvml.nvmlGpuInstanceGetComputeInstances(instance, info.id, handles, byref(count))
            found.extend(handles[: count.value])
    return found


def _existing(nvml: Any, handle: Any) -> list[dict[str, Any]]:
    """Return every GPU instance in order of `start`, with its handle and the UUID of its (first) compute instance."""
    whole: dict[int, tuple[str, int]] = {}
    for part in reading.mig_devices(nvml, handle):
        compute = nvml.nvmlDeviceGetComputeInstanceId(part)
        whole.setdefault(nvml.nvmlDeviceGetGpuInstanceId(part), (nvml.nvmlDeviceGetUUID(part), compute))
    found = []
    for profile in reading.profiles(nvml, handle):
        count = c_uint(profile["most"])
        handles = (nvml.c_nvmlGpuInstance_t * profile["most"])()
        nvml.nvmlDeviceGetGpuInstances(handle, profile["id"], handles, byref(count))
        for instance in handles[: count.value]:
            info = nvml.nvmlGpuInstanceGetInfo(instance)
            uuid, compute = whole.get(info.id, ("", -1))
            place = {"start": info.placement.start, "size": info.placement.size, "instances": [info.id, compute]}
            found.append({"id": uuid, "profile": profile["name"], "handle": instance, **place})
    return sorted(found, key=lambda item: item["start"])


def _shown(item: dict[str, Any]) -> dict[str, Any]:
    return {name: item[name] for name in ("id", "profile", "start", "size", "instances")}


def _device(nvml: Any, device: str) -> Any:
    try:
        return nvml.nvmlDeviceGetHandleByUUID(device)
    except nvml.NVMLError as error:
        if error.value in (_NOT_FOUND, reading.INVALID_ARGUMENT, _GPU_NOT_FOUND):
            raise Refusal("not-found", f"there is no device {device}") from None
        raise


def _mig(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError as error:
        if error.value == reading.NOT_SUPPORTED:
            return False
        raise


def _taken(device: str, profile: str, start: int, why: str) -> Refusal:
    return Refusal(
        "conflict", f"{profile} does not fit at {start} of {device}: {why}", "choose another start, or remove what is there"
    )
