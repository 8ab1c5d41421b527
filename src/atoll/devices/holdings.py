"""What instances hold of a node's devices: claimed with all that must be made for it, moved off and back, and given back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import structlog
from msgspec.structs import replace

from atoll.devices.admission import refuse_grant
from atoll.devices.drivers import Drivers
from atoll.devices.edits import merge_edits
from atoll.devices.handed import HandedOver
from atoll.devices.ledger import LedgerFile, Made
from atoll.devices.libraries_directory import LibraryDirectories
from atoll.devices.mps import Mps
from atoll.devices.passthrough import MACHINES
from atoll.devices.slices import Slices
from atoll.devices.watch import Patience, Watch, turns
from atoll.model.devices import GpuDevice, GpuGrant, GpuSample, GpuSharing, GpuVendor
from atoll.model.errors import AtollError, Conflict, Unavailable, Unsupported
from atoll.model.ports.devices import Claim, Edits
from atoll.model.spec import Gpu, RuntimeName

log = structlog.get_logger()


class Holdings:
    """`offers` says why a runtime cannot hand on this node's devices. Its public calls are those of the port `Devices`."""

    def __init__(
        self,
        drivers: Drivers,
        file: LedgerFile,
        slices: Slices,
        handed: HandedOver | None,
        mps: Mps | None,
        patience: Patience,
        libraries: LibraryDirectories,
        offers: Callable[[RuntimeName], str],
    ) -> None:
        self._libraries = libraries
        self._drivers = drivers
        self._file = file
        self._slices = slices
        self._handed = handed
        self._mps = mps
        self._patience = patience
        self._offers = offers

    async def claim(self, instance: str, grants: Sequence[GpuGrant], gpu: Gpu, runtime: RuntimeName) -> Claim:
        reason = self._offers(runtime) if any(watch.states for watch in self._drivers.watches) else ""
        if reason:
            raise Unsupported(reason)
        grants = tuple(grants)
        before = self._file.now.holdings.get(instance)
        if before is not None and before != grants:
            raise Conflict(f"{instance} holds other devices already", mend="release it first")
        watches = self._drivers.of_all({grant.device for grant in grants})
        # Looking takes milliseconds of a start: what was looked at a moment ago is not again, if its samples are as it was then.
        hurried = before is None and runtime not in MACHINES and not any(grant.sharing is GpuSharing.MIG for grant in grants)
        await asyncio.gather(*(watch.look() for watch in watches if not hurried or not watch.is_fresh))
        async with turns(watches):
            await self.give_back(watches, () if runtime in MACHINES else (instance,))
            await self._admit(instance, grants, gpu, runtime)
            try:
                with self._file.at_once():
                    self._file.write(replace(self._file.now, holdings={**self._file.now.holdings, instance: grants}))
                    self._drivers.hold(grants)
            except OSError:
                self._drivers.hold(grants)  # as the file says: not by this one
                raise
            try:
                return await self._carry_out(instance, grants, gpu, runtime)
            except (AtollError, OSError):
                await self._let_go(instance, watches)
                raise

    async def release(self, instance: str) -> None:
        ledger = self._file.now
        grants = ledger.holdings.get(instance, ())
        made = {one.device for one in ledger.made if one.instance == instance}
        made |= {one.device for one in ledger.handed if one.instance == instance}
        if instance not in ledger.holdings and not made:
            return
        watches = self._drivers.of_all({grant.device for grant in grants} | made)
        async with turns(watches):
            await self._let_go(instance, watches)

    async def suspend(self, instance: str, pids: Sequence[int]) -> None:
        tried: list[int] = []
        try:
            for pid in pids:
                tried.append(pid)
                for watch in self._holding(instance):
                    await watch.call(watch.hardware.suspend(pid), self._patience.suspend_s)
        except Unsupported:
            await self._put_back(instance, tried[:-1])  # the last was not touched
            raise
        except (AtollError, asyncio.CancelledError):
            # The last of them too: its calls to the driver may wait though it never left its device.
            await self._put_back(instance, tried)
            raise

    async def _put_back(self, instance: str, pids: Sequence[int]) -> None:
        try:
            async with asyncio.timeout(self._patience.suspend_s):
                await self.resume(instance, pids)
        except Unsupported:
            pass  # then none of them was ever taken off
        except (AtollError, TimeoutError) as error:
            log.error("a process stays off its device", instance=instance, error=str(error) or "timed out")

    async def resume(self, instance: str, pids: Sequence[int]) -> None:
        failures: list[AtollError] = []
        for pid in pids:
            for watch in self._holding(instance):
                try:
                    await watch.call(watch.hardware.resume(pid), self._patience.suspend_s)
                except AtollError as error:  # the others are put back all the same
                    failures.append(error)
        if failures:
            raise next((error for error in failures if not isinstance(error, Unsupported)), failures[0])

    async def must_be_idle(self, device: str) -> None:
        """Raise Conflict where an instance, or a process of anyone's as far as the driver tells, has the device."""
        holdings = self._file.now.holdings
        holders = sorted(id for id, grants in holdings.items() if any(grant.device == device for grant in grants))
        if holders:
            mend = "end what holds it first: atoll scale APP 0, or atoll jobs cancel JOB"
            raise Conflict(f"{device} is still held by {', '.join(holders)}", mend=mend)
        samples = [sample for sample in await self._drivers.samples() if sample.device == device]
        pids = sorted({pid for sample in samples for pid in (*sample.processes, *sample.graphics)})
        if pids:
            raise Conflict(f"{device} is still used by process {', '.join(map(str, pids))} of the node", mend="end it first")

    async def _admit(self, instance: str, grants: Sequence[GpuGrant], gpu: Gpu, runtime: RuntimeName) -> None:
        """Raise what stands in the way of any grant."""
        samples: dict[str, GpuSample] = {}
        new = instance not in self._file.now.holdings
        if new:
            samples = {sample.device: sample for sample in await self._drivers.samples()}
            strange = {grant.device for grant in grants if self._differs(grant, samples)}
            await asyncio.gather(*(watch.look() for watch in self._drivers.of_all(strange)))
            if any(self._is_untold(grant, samples) for grant in grants):
                # a worker that had to begin anew may have taken longer than samples may: after the look it is there
                samples = {sample.device: sample for sample in await self._drivers.samples()}
        for grant in grants:
            watch = self._drivers.of(grant.device)
            device = self._drivers.offer(watch, watch.states[grant.device].device()) if watch is not None else None
            error = refuse_grant(
                grant,
                device,
                gpu=gpu,
                others=self._file.now.others_on(grant.device, instance),
                foreign=device.foreign if device is not None else (),
                sample=samples.get(grant.device),
            )
            if error is None and new and self._is_untold(grant, samples):
                error = Unavailable(f"{grant.device}: its driver does not say who uses it", mend="place it elsewhere")
            offered = self._drivers.offered.get(grant.device)
            if error is None and device is not None and offered is not None and offered.driver != device.driver:
                error = Unavailable(f"{device.id}: the driver was changed from {offered.driver} to {device.driver}")
            if error is not None:
                raise error
        reason = self._offers(runtime)
        if reason:
            raise Unsupported(reason)

    def _differs(self, grant: GpuGrant, samples: Mapping[str, GpuSample]) -> bool:
        """Whether a device is not as it was when it was looked at: it may be gone, or its driver or MIG mode be another."""
        sample, watch = samples.get(grant.device), self._drivers.of(grant.device)
        if sample is None or watch is None:
            return True
        seen = watch.states[grant.device].seen
        return (sample.driver, sample.mig) != (seen.driver, seen.mig) or not sample.driver

    def _is_untold(self, grant: GpuGrant, samples: Mapping[str, GpuSample]) -> bool:
        """Whether it is not known who uses a device of which its driver can tell: NVIDIA's always can, others not everywhere."""
        watch = self._drivers.of(grant.device)
        return grant.device not in samples and watch is not None and watch.vendor is GpuVendor.NVIDIA

    async def _carry_out(self, instance: str, grants: Sequence[GpuGrant], gpu: Gpu, runtime: RuntimeName) -> Claim:
        if self._handed is not None and runtime in MACHINES:
            watches = self._drivers.of_all({grant.device for grant in grants})
            return Claim(edits=await self._handed.hand(watches, instance, grants))
        edits = Edits()
        partitions = []
        for watch in self._drivers.of_all({grant.device for grant in grants}):
            mine = [grant for grant in grants if self._drivers.of(grant.device) is watch]
            made = [await self._slices.make(watch, instance, grant) for grant in mine if grant.sharing is GpuSharing.MIG]
            partitions += made
            edits = merge_edits(edits, watch.hardware.edits(mine, gpu.capabilities, [partition.id for partition in made]))
            for grant in mine:
                if grant.sharing is GpuSharing.MPS:
                    edits = merge_edits(edits, await self._join(watch.states[grant.device].seen, grant))
        if runtime is RuntimeName.GVISOR and not edits.gvisor_driver:
            raise Unsupported("gVisor's proxy cannot hand on what was granted", mend="use runc or crun")
        return Claim(edits=self._libraries.gather(edits), partitions=tuple(partitions))

    async def _join(self, device: GpuDevice, grant: GpuGrant) -> Edits:
        if self._mps is None:
            raise Unsupported("this node does not share by MPS", mend="use sharing = 'time-slice'")
        await self._mps.start(device)
        await self._mps.limit(device.id, self._file.now.sharers_of(device.id))
        return self._mps.edits(device, grant)

    async def _let_go(self, instance: str, watches: Sequence[Watch]) -> None:
        """Forget what an instance holds, and remove what was made for it. What cannot be removed now is removed later."""
        grants = self._file.now.holdings.get(instance, ())
        self.disown(instance)
        self._file.write(replace(self._file.now, holdings={k: v for k, v in self._file.now.holdings.items() if k != instance}))
        for watch in watches:
            await self._slices.sweep(watch)
        await self.give_back(watches)
        for grant in grants:
            if grant.sharing is not GpuSharing.MPS or self._mps is None:
                continue
            if sharers := self._file.now.sharers_of(grant.device):
                await self._mps.limit(grant.device, sharers)
            else:
                await self._mps.stop(grant.device)
        self._drivers.hold(grants)

    def disown(self, instance: str) -> None:
        self._slices.disown(instance)
        if self._handed is not None:
            self._handed.disown(instance)

    async def give_back(self, watches: Sequence[Watch], instances: Sequence[str] = ()) -> None:
        """Give devices that no machine has any more, and those of `instances`, back to their drivers."""
        if self._handed is None:
            return
        for instance in instances:
            self._handed.disown(instance)
        for watch in watches:
            await self._handed.sweep(watch)

    def adopt(self, instance: str, grants: Sequence[GpuGrant]) -> None:
        """Take as made for an instance what is found where its grants say, should the file have been lost; what the file says of
        that place holds."""
        for grant in grants:
            if grant.sharing is GpuSharing.MIG and self._file.now.made_at(grant.device, grant.start) is None:
                made = Made(device=grant.device, profile=grant.profile, start=grant.start, instance=instance)
                self._file.write(self._file.now.with_made(made))

    def _holding(self, instance: str) -> tuple[Watch, ...]:
        return self._drivers.of_all({grant.device for grant in self._file.now.holdings.get(instance, ())})
