"""What is asked of a node's devices: which of them will do at all, and which have room now."""

from __future__ import annotations

import enum
import re
from functools import lru_cache

from msgspec import Struct

from atoll.model.devices import COMPUTE_SLICES, MILLI, GpuSharing
from atoll.model.spec import Gpu
from atoll.scheduling.gpu.devices import Device, Load, Shape
from atoll.scheduling.gpu.mig import compute_of


class Step(enum.IntEnum):
    """What a device is asked, in this order: the first that it fails says why it will not do."""

    VENDOR = 0
    MODEL = 1
    HEALTH = 2
    DRIVER = 3
    MODE = 4
    """In MIG mode or not."""
    PROFILE = 5
    MEMORY = 6
    SHARING = 7
    DOES = 8


class Ask(Struct, frozen=True):
    """A demand for GPUs in the words of devices."""

    gpu: Gpu
    words: frozenset[str]
    driver: tuple[int, ...]
    sharing: GpuSharing
    """How it would hold a device."""
    milli: int
    """Of each device."""
    count: int
    """Devices or partitions."""

    def step(self, device: Device) -> Step:
        """Return how far the device comes, whatever is taken of it."""
        gpu = self.gpu
        if gpu.vendor not in (None, device.vendor):
            return Step.VENDOR
        if gpu.model is not None and not (self.words and self.words <= words_of(device.model)):
            return Step.MODEL
        if not device.offered:
            return Step.HEALTH
        if self.driver and not (device.driver and version_of(device.driver) >= self.driver):
            return Step.DRIVER
        if device.mig != (gpu.profile is not None):
            return Step.MODE
        if gpu.profile is not None:
            profile = device.table.by_name.get(gpu.profile)
            if profile is None:
                return Step.PROFILE
            return Step.DOES if (gpu.memory or 0) <= profile.memory_bytes else Step.MEMORY
        if (gpu.memory or 0) > device.memory_bytes:
            return Step.MEMORY
        return Step.DOES if self.sharing in device.sharing else Step.SHARING

    def matching(self, shape: Shape) -> tuple[int, ...]:
        """Return the places of the devices that will do, whatever is taken of them."""
        return tuple(index for index, device in enumerate(shape.devices) if self.step(device) is Step.DOES)

    def memory_bytes(self, device: Device) -> int:
        """Return what is set aside of a device's memory for a whole one or a share."""
        if self.sharing is GpuSharing.EXCLUSIVE:
            return device.memory_bytes
        return int(self.gpu.memory) if self.gpu.memory is not None else device.memory_bytes * self.milli // MILLI

    def times(self, device: Device, load: Load) -> int:
        """Return how many whole ones, or shares, a device that will do still has."""
        if self.sharing is GpuSharing.EXCLUSIVE:
            return int(load.idle)
        if load.sharing not in (None, self.sharing):
            return 0
        times = (MILLI - load.milli) // self.milli
        memory = self.memory_bytes(device)
        if memory > 0:
            times = min(times, (device.memory_bytes - load.memory_bytes) // memory)
        return max(times, 0)


def partitionable(load: Load) -> bool:
    return load.sharing in (None, GpuSharing.MIG)


@lru_cache(maxsize=4096)
def ask_of(gpu: Gpu) -> Ask:
    if gpu.profile is not None:
        sharing = GpuSharing.MIG
    else:
        sharing = GpuSharing.EXCLUSIVE if gpu.count >= 1 else gpu.sharing or GpuSharing.TIME_SLICE
    return Ask(
        gpu=gpu,
        words=words_of(gpu.model or ""),
        driver=version_of(gpu.driver) if gpu.driver else (),
        sharing=sharing,
        milli=milli_of_one(gpu),
        count=max(1, int(gpu.count)),
    )


def milli_of_one(gpu: Gpu) -> int:
    """Return the thousandths of a device that each of `count` is: a partition counts its compute slices, a share its part."""
    if gpu.profile is not None:
        return MILLI * compute_of(gpu.profile) // COMPUTE_SLICES
    # A little more than the part, so that 0.29 is 290 and not 289.
    return MILLI if gpu.count >= 1 else max(1, int(gpu.count * MILLI + 1e-6))


def milli_of(gpu: Gpu) -> int:
    """Return the thousandths of devices that an instance holds in all."""
    return milli_of_one(gpu) * max(1, int(gpu.count))


@lru_cache(maxsize=4096)
def words_of(name: str) -> frozenset[str]:
    """Return the words of a device's name, whatever their case: what is joined by `-` is several."""
    return frozenset(re.findall(r"[a-z0-9.]+", name.casefold()))


@lru_cache(maxsize=4096)
def version_of(driver: str) -> tuple[int, ...]:
    """Return a driver's version in a form that compares: numbers only, without zeros at its end."""
    parts = [int(part[:9]) for part in re.findall(r"[0-9]+", driver)[:6]]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)
