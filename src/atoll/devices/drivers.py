"""The drivers of a node side by side: which one has a device, what all of them say, and what of it is offered."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from msgspec.structs import replace

from atoll.devices.admission import ways_to_share
from atoll.devices.ledger import LedgerFile
from atoll.devices.mps import Mps
from atoll.devices.watch import Patience, Watch
from atoll.model.devices import GpuDevice, GpuGrant, GpuSample
from atoll.model.errors import AtollError


class Drivers:
    """`watches`, and the file that says what instances hold of their devices."""

    def __init__(self, watches: Sequence[Watch], file: LedgerFile, patience: Patience, mps: Mps | None) -> None:
        self.watches = tuple(watches)
        self._file = file
        self._patience = patience
        self._mps = mps
        self.offered: dict[str, GpuDevice] = {}
        """As the node's inventory had them last: what the scheduler chooses from."""

    def of(self, device: str) -> Watch | None:
        return next((watch for watch in self.watches if device in watch.states), None)

    def of_all(self, devices: Collection[str]) -> tuple[Watch, ...]:
        return tuple(watch for watch in self.watches if any(device in watch.states for device in devices))

    async def look(self, *, wait_s: float | None = None) -> None:
        await asyncio.gather(*(watch.look(wait_s=wait_s) for watch in self.watches))

    async def samples(self) -> tuple[GpuSample, ...]:
        async def ask(watch: Watch) -> tuple[GpuSample, ...]:
            try:
                return () if watch.silent else await watch.call(watch.hardware.samples(), self._patience.samples_s)
            except AtollError:
                return ()

        found = await asyncio.gather(*(ask(watch) for watch in self.watches))
        return tuple(sample for samples in found for sample in samples)

    def offer(self, watch: Watch, device: GpuDevice) -> GpuDevice:
        """Return the device with what this node can do with it, and with the partitions that are no instance's."""
        mine = [made for made in self._file.now.made if made.device == device.id and made.instance]
        foreign = tuple(
            partition for partition in watch.partitions.get(device.id, ()) if not any(made.is_of(partition) for made in mine)
        )
        return replace(
            device, foreign=foreign, sharing=ways_to_share(device, mps=self._mps is not None and not self._mps.missing())
        )

    def hold(self, grants: Sequence[GpuGrant]) -> None:
        """Note of each device of the grants whether something holds it now."""
        for watch in self.watches:
            mine = {grant.device for grant in grants if grant.device in watch.states}
            watch.hold(mine, self._file.now.holds)

    def miss(self) -> None:
        """Show devices that instances hold and no driver knows, once all drivers were heard."""
        if not self.watches or any(watch.silent or not watch.looked for watch in self.watches):
            return
        held = {grant.device for grants in self._file.now.holdings.values() for grant in grants}
        for device in sorted(device for device in held if self.of(device) is None):
            self.watches[0].miss(device)
