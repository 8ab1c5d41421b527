"""Devices that virtual machines have as a whole: taken from their drivers for an instance, and given back whatever dies in between.

A device is written down before it is taken. From then on its driver's silence about it means nothing: it is where it should be, and
shows as it was, held. What could not be given back stays written down, without an instance, and is taken out until that succeeds.
Everything here is called while `Watch.turn` is held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import structlog
from msgspec.structs import replace

from atoll.devices.ledger import Handed, LedgerFile
from atoll.devices.passthrough import Passthrough
from atoll.devices.watch import Watch
from atoll.model.devices import GpuGrant, GpuSharing
from atoll.model.errors import Unavailable, Unsupported
from atoll.model.ports.clock import Clock
from atoll.model.ports.devices import DeviceEvent, Edits, Trouble

log = structlog.get_logger()


class HandedOver:
    def __init__(self, passthrough: Passthrough, file: LedgerFile, clock: Clock) -> None:
        self._passthrough, self._file, self._clock = passthrough, file, clock

    async def hand(self, watches: Sequence[Watch], instance: str, grants: Sequence[GpuGrant]) -> Edits:
        """Take the granted devices from their drivers and return how a machine gets them. Safe to repeat.

        Raises Unsupported (not a whole device, or a group that cannot go), Unavailable (its driver does not let go).
        """
        for grant in grants:
            if grant.sharing is not GpuSharing.EXCLUSIVE:
                raise Unsupported(
                    f"{grant.device}: a virtual machine is handed whole devices, and never a part of one ({grant.sharing})",
                    mend="ask for whole devices (count = 1), or use runc, crun or gvisor",
                    field="resources.gpu",
                )
        wanted = [self._wanted(watches, grant, instance) for grant in grants]
        addresses = [handed.pci for handed in wanted]
        await self._passthrough.check(addresses)
        mine = {handed.device for handed in wanted}
        kept = tuple(handed for handed in self._file.now.handed if handed.device not in mine)
        self._file.write(replace(self._file.now, handed=(*kept, *wanted)))
        for watch in watches:
            watch.send_away(mine, True)
        if await self._passthrough.bound(addresses):
            return await self._passthrough.bind(addresses)
        async with contextlib.AsyncExitStack() as stack:
            for watch in watches:
                await stack.enter_async_context(watch.aside())
            return await self._passthrough.bind(addresses)

    def _wanted(self, watches: Sequence[Watch], grant: GpuGrant, instance: str) -> Handed:
        seen = next(watch.states[grant.device].seen for watch in watches if grant.device in watch.states)
        if not seen.pci:
            raise Unavailable(f"{grant.device}: it is not known where on the bus it is", mend="place it elsewhere")
        return Handed(device=grant.device, pci=seen.pci, instance=instance)

    def disown(self, instance: str) -> None:
        """Note that nothing of `instance` is wanted any more; `sweep` gives it back."""
        left = tuple(replace(handed, instance="") if handed.instance == instance else handed for handed in self._file.now.handed)
        self._file.write(replace(self._file.now, handed=left))

    async def sweep(self, watch: Watch) -> None:
        """Give back the devices that no instance has any more. Raises nothing: one that stays is taken out, and tried again."""
        mine = [handed for handed in self._file.now.handed if not handed.instance and handed.device in watch.states]
        if not mine:
            return
        async with watch.aside():
            failed = await self._passthrough.release([handed.pci for handed in mine])
        for handed in mine:
            why = failed.get(handed.pci, "")
            left = [other for other in self._file.now.handed if other.device != handed.device]
            if why:
                left.append(replace(handed, stuck=True))
            self._file.write(replace(self._file.now, handed=tuple(left)))
            if why:
                log.warning("a device does not go back to its driver", device=handed.device, pci=handed.pci, error=why)
                words = f"{handed.device} does not go back to its driver: {why}"
                mend = "it is tried again; a restart of the node gives it back"
                watch.take(
                    DeviceEvent(trouble=Trouble.BROKEN, device=handed.device, message=words, mend=mend, at=self._clock.now())
                )
                continue
            watch.send_away([handed.device], False)
            if handed.stuck:
                words = f"{handed.device} went back to its driver"
                watch.take(DeviceEvent(trouble=Trouble.RECOVERED, device=handed.device, message=words, at=self._clock.now()))

    async def recover(self, watches: Sequence[Watch]) -> None:
        """Give back what was taken and is not written down here. What is written down without an instance is `sweep`'s."""
        known = [handed for handed in self._file.now.handed if any(handed.device in watch.states for watch in watches)]
        self._file.write(replace(self._file.now, handed=tuple(known)))
        try:
            left = await self._passthrough.recover([handed.pci for handed in known])
        except Unavailable as error:
            log.warning("devices of a former agent could not be given back", error=str(error))
            return
        if left:
            log.warning("devices of a former agent could not be given back", devices=list(left))
