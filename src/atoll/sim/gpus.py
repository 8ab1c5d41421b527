"""GPUs of the simulator's machines: a fake driver that outlives the agents, and what one life of an agent can do with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path

from msgspec import Struct

from atoll.devices.fake import FakeHardware
from atoll.devices.ledger import LedgerFile
from atoll.devices.node import NodeDevices
from atoll.model.devices import MILLI, GpuDevice, GpuGrant, GpuPartition, GpuSample, GpuSharing
from atoll.model.errors import Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.ports.devices import DeviceEvent, Edits
from atoll.model.spec import Gpu, GpuCapability
from atoll.sim.faults import Faults, Life
from atoll.sim.story import Story

MODEL = "H100-80GB"
WISHES = (Gpu(count=0.25), Gpu(profile="1g.10gb"))
"""What users ask for; the first of them may ask for a whole device too."""
XIDS = (31, 31, 48, 79, 94)
"""An application's fault, twice as often; and a device's."""


class Bays(Struct, frozen=True):
    """How many devices a machine has, and how many of them, the last, are in MIG mode."""

    whole: int
    mig: int = 0


SPARES = {"spare": Bays(8), "spare-of-parts": Bays(4, 4)}
"""Room for all that users ask for, whatever of the others has failed: the machines that join when everything is healed."""


def make_hardware(name: str, bays: Bays, clock: Clock) -> FakeHardware | None:
    count = bays.whole + bays.mig
    return FakeHardware(MODEL, count, mig=range(bays.whole, count), name=name, clock=clock) if count else None


class SimHardware:
    """The driver as one agent's life reaches it. Implements `Hardware`."""

    def __init__(self, hardware: FakeHardware, life: Life, faults: Faults, story: Story) -> None:
        self.vendor = hardware.vendor
        self._hardware = hardware
        self._life = life
        self._faults = faults
        self._story = story

    async def _before(self, call: str) -> None:
        self._life.check()
        await self._faults.pause()
        self._life.check()
        if self._faults.hit(self._faults.profile.runtime_fails):
            self._story.mark(f"driver: {call} fails")
            raise Unavailable(f"{call} was told to fail")

    async def discover(self) -> tuple[GpuDevice, ...]:
        self._life.check()
        return await self._hardware.discover()

    async def events(self) -> AsyncIterator[DeviceEvent]:
        async for event in self._hardware.events():
            self._life.check()
            yield event

    async def partitions(self, device: str) -> tuple[GpuPartition, ...]:
        self._life.check()
        return await self._hardware.partitions(device)

    async def make_partition(self, device: str, profile: str, start: int) -> GpuPartition:
        await self._before("make a partition")
        made = await self._hardware.make_partition(device, profile, start)
        self._life.check()
        return made

    async def remove_partition(self, device: str, start: int) -> None:
        await self._before("remove a partition")
        await self._hardware.remove_partition(device, start)
        self._life.check()

    async def samples(self) -> tuple[GpuSample, ...]:
        self._life.check()
        return await self._hardware.samples()

    async def suspend(self, pid: int) -> None:
        await self._before("suspend")
        await self._hardware.suspend(pid)
        self._life.check()

    async def resume(self, pid: int) -> None:
        await self._before("resume")
        await self._hardware.resume(pid)
        self._life.check()

    async def reset(self, device: str) -> None:
        await self._before("reset")
        await self._hardware.reset(device)
        self._life.check()

    def edits(self, grants: Sequence[GpuGrant], capabilities: Collection[GpuCapability], partitions: Sequence[str]) -> Edits:
        return self._hardware.edits(grants, capabilities, partitions)

    async def close(self) -> None: ...


class Rack:
    """A machine's devices, from one boot to the next. `directory` is on its disk."""

    kind: type[NodeDevices] = NodeDevices

    def __init__(self, hardware: FakeHardware, directory: Path, clock: Clock) -> None:
        self.hardware = hardware
        self._directory = directory
        self._clock = clock
        self._boots = 1
        self.lost: set[str] = set()
        """Devices that have vanished, or are broken, and are not back."""

    def devices(self, life: Life, faults: Faults, story: Story) -> NodeDevices:
        """Return them as an agent that starts now sees them."""
        hardware = SimHardware(self.hardware, life, faults, story)
        return self.kind([hardware], directory=self._directory, clock=self._clock, boot=str(self._boots))

    def lose_power(self) -> None:
        """What had fallen off the bus is there again, and no partition is left."""
        self._boots += 1
        self.lost.clear()
        self.hardware.answer()
        for id in self.hardware.ids:
            self.hardware.come_back(id)

    def held(self) -> dict[str, tuple[GpuGrant, ...]]:
        """Return instance → what is held for it, as the next agent would read it."""
        return dict(LedgerFile(self._directory, str(self._boots)).now.holdings)


def overcommitted(grants: Sequence[GpuGrant]) -> str:
    """Return which device more is given of than it has; nothing where none is."""
    for device in dict.fromkeys(grant.device for grant in grants):
        here = [grant for grant in grants if grant.device == device]
        if len(here) > 1 and any(grant.sharing is GpuSharing.EXCLUSIVE for grant in here):
            return f"{device} is given whole, and {len(here)} times"
        if len({grant.sharing for grant in here}) > 1:
            return f"{device} is shared in two ways at once"
        slices = [at for grant in here if grant.sharing is GpuSharing.MIG for at in range(grant.start, grant.start + grant.size)]
        if len(slices) != len(set(slices)):
            return f"slices of {device} are given twice: {sorted(slices)}"
        if sum(grant.milli for grant in here if grant.sharing is not GpuSharing.MIG) > MILLI:
            return f"of {device} more than the whole is given"
    return ""
