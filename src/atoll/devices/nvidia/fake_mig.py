# ruff: noqa: N802 (the names are NVML's)
"""Partitions of the fake of NVML. They are the driver's: they outlive every process."""

from __future__ import annotations

import uuid
from typing import Any

import pynvml  # type: ignore[import-untyped]

from atoll.devices.nvidia.fake_state import COMPUTE, INSTANCE, PART, absent, call, change, look, number_of, part_of, pointer


@call
def nvmlDeviceGetMigMode(handle: Any) -> list[int]:
    device = look(handle)
    if not device["profiles"]:
        raise absent()
    return [int(device["mig"]), int(device["mig"])]


def _profile(device: Any, id: int) -> Any:
    if not device["mig"]:
        raise absent()
    for profile in device["profiles"]:
        if profile["id"] == id:
            return profile
    raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)


def _profile_info(profile: Any) -> Any:
    info = pynvml.c_nvmlGpuInstanceProfileInfo_v2_t()
    info.id, info.sliceCount, info.instanceCount = profile["id"], profile["compute_slices"], profile["most"]
    info.memorySizeMB, info.name = profile["memory_bytes"] >> 20, f"MIG {profile['name']}"
    return info


@call
def nvmlDeviceGetGpuInstanceProfileInfo(handle: Any, kind: int, version: int = 2) -> Any:
    for profile in look(handle)["profiles"]:
        if profile["kind"] == kind:
            return _profile_info(profile)
    raise absent()


@call
def nvmlDeviceGetGpuInstanceProfileInfoById(handle: Any, id: int) -> Any:
    return _profile_info(_profile(look(handle), id))


def _fill(count: Any, room: Any, values: list[Any]) -> None:
    """As NVML fills a caller's array: without one it says how much room it takes, with too small a one it refuses."""
    counted = count._obj
    if room is not None:
        if counted.value < len(values):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
        for index, value in enumerate(values):
            room[index] = value
    counted.value = len(values)


@call
def nvmlDeviceGetGpuInstancePossiblePlacements(handle: Any, id: int, room: Any, count: Any) -> None:
    profile = _profile(look(handle), id)
    size = profile["memory_slices"]
    _fill(count, room, [pynvml.c_nvmlGpuInstancePlacement_t(start, size) for start in profile["starts"]])


@call
def nvmlDeviceGetGpuInstances(handle: Any, id: int, room: Any, count: Any) -> None:
    instances = [instance for instance in look(handle)["instances"] if instance["profile"] == id]
    _fill(count, room, [pointer(pynvml.c_nvmlGpuInstance_t, number_of(handle) + INSTANCE * each["id"]) for each in instances])


@call
def nvmlGpuInstanceGetInfo(handle: Any) -> Any:
    instance = part_of(look(handle), handle)
    info = pynvml.c_nvmlGpuInstanceInfo_t()
    info.id, info.profileId = instance["id"], instance["profile"]
    info.placement.start, info.placement.size = instance["start"], instance["size"]
    return info


@call
def nvmlDeviceCreateGpuInstanceWithPlacement(handle: Any, id: int, placement: Any) -> Any:
    wanted = placement._obj
    with change() as state:
        device = look(handle, state)
        profile = _profile(device, id)
        if wanted.start not in profile["starts"] or wanted.size != profile["memory_slices"]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        taken = [each for each in device["instances"] if each["start"] < wanted.start + wanted.size]
        if any(each["start"] + each["size"] > wanted.start for each in taken) or not _has_room(device, profile):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
        new = next(number for number in range(1, 15) if all(each["id"] != number for each in device["instances"]))
        place = {"start": wanted.start, "size": wanted.size, "memory_bytes": profile["memory_bytes"]}
        device["instances"].append({"id": new, "profile": id, "compute": [], "used": False, **place})
    return pointer(pynvml.c_nvmlGpuInstance_t, number_of(handle) + INSTANCE * new)


def _has_room(device: Any, profile: Any) -> bool:
    slices = {each["id"]: each["compute_slices"] for each in device["profiles"]}
    same = sum(each["profile"] == profile["id"] for each in device["instances"])
    used = sum(slices[each["profile"]] for each in device["instances"])
    return bool(same < profile["most"] and used + profile["compute_slices"] <= 7)


@call
def nvmlGpuInstanceDestroy(handle: Any) -> None:
    with change() as state:
        device = look(handle, state)
        instance = part_of(device, handle)
        if instance["compute"] or instance["used"]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_IN_USE)
        device["instances"].remove(instance)


@call
def nvmlGpuInstanceGetComputeInstanceProfileInfo(handle: Any, kind: int, engines: int, version: int = 2) -> Any:
    device = look(handle)
    slices = next(each["compute_slices"] for each in device["profiles"] if each["id"] == part_of(device, handle)["profile"])
    offered = {0: 1, 1: 2, 2: 3, 3: 4, 4: 7}  # NVML_COMPUTE_INSTANCE_PROFILE_N_SLICE → slices
    if offered.get(kind, 8) > slices:
        raise absent()
    info = pynvml.c_nvmlComputeInstanceProfileInfo_v2_t()
    info.id, info.sliceCount, info.instanceCount = kind, offered[kind], slices // offered[kind]
    return info


@call
def nvmlGpuInstanceCreateComputeInstance(handle: Any, profile: int) -> Any:
    with change() as state:
        instance = part_of(look(handle, state), handle)
        if instance["compute"]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
        instance["compute"].append({"id": 0, "profile": profile, "uuid": f"MIG-{uuid.uuid4()}"})
    return pointer(pynvml.c_nvmlComputeInstance_t, number_of(handle) + COMPUTE)


@call
def nvmlGpuInstanceGetComputeInstances(handle: Any, profile: int, room: Any, count: Any) -> None:
    found = [each for each in part_of(look(handle), handle)["compute"] if each["profile"] == profile]
    _fill(count, room, [pointer(pynvml.c_nvmlComputeInstance_t, number_of(handle) + COMPUTE) for _ in found])


@call
def nvmlComputeInstanceDestroy(handle: Any) -> None:
    with change() as state:
        instance = part_of(look(handle, state), handle)
        if instance["used"]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_IN_USE)
        instance["compute"].clear()


@call
def nvmlDeviceGetMaxMigDeviceCount(handle: Any) -> int:
    return 7 if look(handle)["profiles"] else 0


@call
def nvmlDeviceGetMigDeviceHandleByIndex(handle: Any, index: int) -> Any:
    whole = [each for each in look(handle)["instances"] if each["compute"]]
    if index >= len(whole):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    return pointer(pynvml.c_nvmlDevice_t, number_of(handle) + PART * whole[index]["id"])


@call
def nvmlDeviceGetGpuInstanceId(handle: Any) -> int:
    return int(part_of(look(handle), handle)["id"])


@call
def nvmlDeviceGetComputeInstanceId(handle: Any) -> int:
    return int(part_of(look(handle), handle)["compute"][0]["id"])
