"""Partitions of devices (MIG) made and removed for instances, so that a crash at any point leaves none behind and touches no one's.

What is to be made is written down first. What could not be removed stays written down, without an instance, and is tried again.
Everything here is called while `Watch.turn` is held.
"""

from __future__ import annotations

import structlog
from msgspec.structs import replace

from atoll.devices.health import Cause
from atoll.devices.ledger import LedgerFile, Made
from atoll.devices.watch import Patience, Watch
from atoll.model.devices import GpuGrant, GpuPartition
from atoll.model.errors import AtollError, Conflict, Invalid, NotFound, Unavailable

ATTEMPTS = 2
"""At making a partition: the second one after a half-made one was cleared away."""

log = structlog.get_logger()


class Slices:
    def __init__(self, file: LedgerFile, patience: Patience) -> None:
        self._file, self._patience = file, patience

    async def make(self, watch: Watch, instance: str, grant: GpuGrant) -> GpuPartition:
        """Make the partition of a grant; one that was made for the instance before is returned as it is.

        Raises Conflict (another's is there, or a former instance still uses it), Unavailable. What is half-made is written down.
        """
        if any(made.device == grant.device and not made.instance for made in self._file.now.made):
            await self.sweep(watch)
        for attempt in range(ATTEMPTS):
            await self._clear(watch, instance, grant)
            try:
                return await self._make(watch, instance, grant)
            except (Invalid, NotFound) as error:
                raise Unavailable(error.message, mend=error.mend or "place it elsewhere") from None
            except Unavailable as error:
                if attempt + 1 == ATTEMPTS or not await self._is_half_made(watch, grant):
                    raise
                log.warning("a partition was half made", device=grant.device, start=grant.start, error=str(error))
        raise AssertionError("every attempt returns or raises")

    async def _clear(self, watch: Watch, instance: str, grant: GpuGrant) -> None:
        """See to it that nothing but the instance's own is where its partition will be."""
        there = await self._at(watch, grant)
        if there is None:
            return
        mine = self._file.now.made_at(grant.device, grant.start)
        if mine is None or not mine.is_of(there):
            raise Conflict(f"{grant.device}: someone else made {there.profile} at {there.start}")
        if mine.instance != instance:
            raise Conflict(f"{grant.device}: {there.profile} at {there.start} is still used by what ran there before")
        if not there.id:
            await watch.call(watch.hardware.remove_partition(grant.device, grant.start), self._patience.change_s)

    async def _make(self, watch: Watch, instance: str, grant: GpuGrant) -> GpuPartition:
        wanted = Made(device=grant.device, profile=grant.profile, start=grant.start, instance=instance)
        if self._file.now.made_at(grant.device, grant.start) is None:
            self._file.write(self._file.now.with_made(wanted))
        call = watch.hardware.make_partition(grant.device, grant.profile, grant.start)
        made = await watch.call(call, self._patience.change_s)
        self._file.write(self._file.now.with_made(replace(wanted, id=made.id)))
        return made

    async def _at(self, watch: Watch, grant: GpuGrant) -> GpuPartition | None:
        try:
            found = await watch.call(watch.hardware.partitions(grant.device))
        except NotFound as error:
            raise Unavailable(error.message, mend="place it elsewhere") from None
        watch.note_partitions(grant.device, found)
        return next((partition for partition in found if partition.start == grant.start), None)

    async def _is_half_made(self, watch: Watch, grant: GpuGrant) -> bool:
        there = await self._at(watch, grant)
        return there is not None and not there.id

    def disown(self, instance: str) -> bool:
        """Note that nothing of `instance` is wanted any more; `sweep` removes it. Returns whether there was something."""
        mine = [made for made in self._file.now.made if made.instance == instance]
        if mine:
            left = tuple(replace(made, instance="") if made in mine else made for made in self._file.now.made)
            self._file.write(replace(self._file.now, made=left))
        return bool(mine)

    async def sweep(self, watch: Watch) -> tuple[Made, ...]:
        """Remove what is wanted by no instance any more, and return what is gone. Raises nothing: the rest is tried again."""
        swept = []
        for made in self._file.now.made:
            if made.instance or made.device not in watch.states:
                continue
            try:
                gone = await self._remove(watch, made)
            except Conflict as error:
                log.info("a partition is still used", device=made.device, start=made.start, error=str(error))
                continue
            except AtollError as error:  # the others would wait for the same driver
                log.warning("a partition could not be removed", device=made.device, start=made.start, error=str(error))
                break
            if gone:
                swept.append(made)
            self._file.write(self._file.now.without_made(made.device, made.start))
        return tuple(swept)

    async def _remove(self, watch: Watch, made: Made) -> bool:
        """Remove a partition that is ours; False where it was gone, or is another's by now."""
        if watch.states[made.device].ill(Cause.GONE) is not None:
            return False
        try:
            found = await watch.call(watch.hardware.partitions(made.device))
            if not any(made.is_of(partition) for partition in found):
                return False
            await watch.call(watch.hardware.remove_partition(made.device, made.start), self._patience.change_s)
            watch.note_partitions(made.device, tuple(partition for partition in found if not made.is_of(partition)))
        except NotFound:
            return False
        return True
