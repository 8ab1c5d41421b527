"""The devices of a node, whatever their vendors: what there is and how it fares, and what instances hold of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from pathlib import Path

import structlog
from msgspec.structs import replace

from atoll.devices.admission import refuse_grant, refuse_runtime, ways_to_share
from atoll.devices.edits import merge_edits
from atoll.devices.handed import HandedOver
from atoll.devices.ledger import LedgerFile, Made, boot_id
from atoll.devices.mps import Mps
from atoll.devices.news import News
from atoll.devices.passthrough import MACHINES, Passthrough
from atoll.devices.slices import Slices
from atoll.devices.watch import Patience, Watch, turns
from atoll.model.devices import GpuDevice, GpuGrant, GpuSample, GpuSharing
from atoll.model.errors import AtollError, Conflict, NotFound, Unavailable, Unsupported
from atoll.model.ports.clock import Clock
from atoll.model.ports.devices import Claim, DeviceEvent, Edits, Hardware, Trouble
from atoll.model.spec import Gpu, RuntimeName

TICK_S = 30.0
"""Between two moments at which storms are summed up, at most."""

log = structlog.get_logger()


class NodeDevices:
    """The port `Devices` over the drivers of a node.

    `directory` keeps what was made, over restarts. `mps` is None where that way of sharing is not wanted. `gvisor_drivers` are the
    driver versions that gVisor's proxy knows (None: unknown), `refusals` reasons why a runtime cannot hand on devices, found by
    whoever knows the runtime. `passthrough` takes whole devices from their drivers for QEMU and Cloud Hypervisor, which get none
    without it. `boot` tells one start of the machine from the next.
    """

    def __init__(
        self,
        hardware: Sequence[Hardware],
        *,
        directory: Path,
        clock: Clock,
        mps: Mps | None = None,
        gvisor_drivers: Callable[[], frozenset[str] | None] = lambda: None,
        refusals: Mapping[RuntimeName, str] | None = None,
        passthrough: Passthrough | None = None,
        patience: Patience | None = None,
        boot: str | None = None,
    ) -> None:
        self._clock = clock
        self._mps = mps
        self._gvisor_drivers = gvisor_drivers
        self._refusals = dict(refusals or {})
        self._patience = patience or Patience()
        self._file = LedgerFile(directory, boot_id() if boot is None else boot)
        self._slices = Slices(self._file, self._patience)
        self._passthrough = passthrough
        self._handed = HandedOver(passthrough, self._file, clock) if passthrough is not None else None
        self._news = News()
        self._tasks: list[asyncio.Task[None]] = []
        self._offered: dict[str, GpuDevice] = {}
        """As `inventory` returned them last: what the scheduler chooses from."""
        self._watches = tuple(Watch(one, clock, self._patience, tell=self._news.tell, changed=self._remember) for one in hardware)
        for known in self._file.now.known:
            watch = next((watch for watch in self._watches if watch.vendor is known.device.vendor), None)
            if watch is not None:
                id = known.device.id
                watch.remember(known, held=self._file.now.holds(id), away=self._file.now.is_handed(id))

    # what there is

    async def inventory(self) -> tuple[GpuDevice, ...]:
        self._begin()
        await self._look_at_all()
        self._miss()
        devices = tuple(self._offer(watch, state.device()) for watch in self._watches for state in watch.states.values())
        self._offered = {device.id: device for device in devices}
        return tuple(sorted(devices, key=lambda device: (device.pci, device.id)))

    async def samples(self) -> tuple[GpuSample, ...]:
        self._begin()

        async def ask(watch: Watch) -> tuple[GpuSample, ...]:
            try:
                return () if watch.silent else await watch.call(watch.hardware.samples(), self._patience.samples_s)
            except AtollError:
                return ()

        found = await asyncio.gather(*(ask(watch) for watch in self._watches))
        return tuple(sample for samples in found for sample in samples)

    async def events(self) -> AsyncIterator[DeviceEvent]:
        """Yield news for ever. There is one reader: two of them would share the news between them."""
        self._begin()
        async for event in self._news.read():
            yield event

    def offers(self, runtime: RuntimeName) -> str:
        devices = [state.seen for watch in self._watches for state in watch.states.values()]
        refusals = self._refusals
        if self._passthrough is not None and runtime in MACHINES:
            refusals = {runtime: self._passthrough.refusal(), **refusals}
        return refuse_runtime(runtime, devices, gvisor_drivers=self._gvisor_drivers(), refusals=refusals)

    async def reinstate(self, device: str, *, reset: bool = False) -> None:
        self._begin()
        watch = self._watch_of(device)
        if watch is None:
            raise NotFound(f"this node has no GPU {device}", field="gpu")
        if reset:
            async with watch.turn:
                await self._give_back([watch])
                await self._must_be_idle(device)
                await watch.reset(device)
        words = f"{device} was {'reset and ' if reset else ''}reinstated by an operator"
        watch.take(DeviceEvent(trouble=Trouble.RECOVERED, device=device, message=words, at=self._clock.now()))

    # what instances hold

    async def claim(self, instance: str, grants: Sequence[GpuGrant], gpu: Gpu, runtime: RuntimeName) -> Claim:
        self._begin()
        reason = self.offers(runtime) if any(watch.states for watch in self._watches) else ""
        if reason:
            raise Unsupported(reason)
        grants = tuple(grants)
        before = self._file.now.holdings.get(instance)
        if before is not None and before != grants:
            raise Conflict(f"{instance} holds other devices already", mend="release it first")
        watches = self._watches_of({grant.device for grant in grants})
        await asyncio.gather(*(watch.look() for watch in watches))
        async with turns(watches):
            await self._give_back(watches, () if runtime in MACHINES else (instance,))
            await self._admit(instance, grants, gpu, runtime)
            self._file.write(replace(self._file.now, holdings={**self._file.now.holdings, instance: grants}))
            self._hold(grants)
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
        watches = self._watches_of({grant.device for grant in grants} | made)
        async with turns(watches):
            await self._let_go(instance, watches)

    async def suspend(self, instance: str, pids: Sequence[int]) -> None:
        done: list[int] = []
        try:
            for pid in pids:
                for watch in self._holding(instance):
                    await watch.call(watch.hardware.suspend(pid), self._patience.suspend_s)
                done.append(pid)
        except AtollError:
            try:
                await self.resume(instance, done)
            except AtollError as error:
                log.error("a process stays off its device", instance=instance, error=str(error))
            raise

    async def resume(self, instance: str, pids: Sequence[int]) -> None:
        for pid in pids:
            for watch in self._holding(instance):
                await watch.call(watch.hardware.resume(pid), self._patience.suspend_s)

    async def recover(self, held: Mapping[str, Sequence[GpuGrant]]) -> None:
        self._begin()
        await self._look_at_all(wait_s=self._patience.silent_s)
        owners = {made.instance for made in self._file.now.made} | {handed.instance for handed in self._file.now.handed}
        for instance in owners - {"", *held}:
            self._disown(instance)
        ledger = replace(self._file.now, holdings={instance: tuple(grants) for instance, grants in held.items()})
        self._file.write(ledger)
        for instance, grants in held.items():
            self._adopt(instance, grants)
        for watch in self._watches:
            watch.hold(list(watch.states), ledger.holds)
        self._miss()
        if self._handed is not None:
            await self._handed.recover(self._watches)
        await asyncio.gather(*(self._sweep(watch) for watch in self._watches))
        await self._look_at_all(wait_s=self._patience.silent_s)
        if self._mps is not None:
            wanted = {grant.device for grants in held.values() for grant in grants if grant.sharing is GpuSharing.MPS}
            await self._mps.keep(wanted)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await asyncio.gather(*(watch.close() for watch in self._watches))

    # inside: claims

    async def _must_be_idle(self, device: str) -> None:
        """Raise Conflict where an instance, or a process of anyone's as far as the driver tells, has the device."""
        holdings = self._file.now.holdings
        holders = sorted(id for id, grants in holdings.items() if any(grant.device == device for grant in grants))
        if holders:
            raise Conflict(f"{device} is still held by {', '.join(holders)}", mend="stop what holds it first: atoll stop")
        pids = sorted({pid for sample in await self.samples() if sample.device == device for pid in sample.processes})
        if pids:
            raise Conflict(f"{device} is still used by process {', '.join(map(str, pids))} of the node", mend="end it first")

    async def _admit(self, instance: str, grants: Sequence[GpuGrant], gpu: Gpu, runtime: RuntimeName) -> None:
        """Raise what stands in the way of any grant."""
        samples = {} if instance in self._file.now.holdings else {sample.device: sample for sample in await self.samples()}
        for grant in grants:
            watch = self._watch_of(grant.device)
            device = self._offer(watch, watch.states[grant.device].device()) if watch is not None else None
            error = refuse_grant(
                grant,
                device,
                gpu=gpu,
                others=self._file.now.others_on(grant.device, instance),
                foreign=device.foreign if device is not None else (),
                sample=samples.get(grant.device),
            )
            offered = self._offered.get(grant.device)
            if error is None and device is not None and offered is not None and offered.driver != device.driver:
                error = Unavailable(f"{device.id}: the driver was changed from {offered.driver} to {device.driver}")
            if error is not None:
                raise error
        reason = self.offers(runtime)
        if reason:
            raise Unsupported(reason)

    async def _carry_out(self, instance: str, grants: Sequence[GpuGrant], gpu: Gpu, runtime: RuntimeName) -> Claim:
        if self._handed is not None and runtime in MACHINES:
            watches = self._watches_of({grant.device for grant in grants})
            return Claim(edits=await self._handed.hand(watches, instance, grants))
        edits = Edits()
        partitions = []
        for watch in self._watches_of({grant.device for grant in grants}):
            mine = [grant for grant in grants if self._watch_of(grant.device) is watch]
            made = [await self._slices.make(watch, instance, grant) for grant in mine if grant.sharing is GpuSharing.MIG]
            partitions += made
            edits = merge_edits(edits, watch.hardware.edits(mine, gpu.capabilities, [partition.id for partition in made]))
            for grant in mine:
                if grant.sharing is GpuSharing.MPS:
                    edits = merge_edits(edits, await self._join(watch.states[grant.device].seen, grant))
        if runtime is RuntimeName.GVISOR and not edits.gvisor_driver:
            raise Unsupported("gVisor's proxy cannot hand on what was granted", mend="use runc or crun")
        return Claim(edits=edits, partitions=tuple(partitions))

    async def _join(self, device: GpuDevice, grant: GpuGrant) -> Edits:
        if self._mps is None:
            raise Unsupported("this node does not share by MPS", mend="use sharing = 'time-slice'")
        await self._mps.start(device)
        return self._mps.edits(device, grant)

    async def _let_go(self, instance: str, watches: Sequence[Watch]) -> None:
        """Forget what an instance holds, and remove what was made for it. What cannot be removed now is removed later."""
        grants = self._file.now.holdings.get(instance, ())
        self._disown(instance)
        self._file.write(replace(self._file.now, holdings={k: v for k, v in self._file.now.holdings.items() if k != instance}))
        for watch in watches:
            await self._slices.sweep(watch)
        await self._give_back(watches)
        for grant in grants:
            if grant.sharing is GpuSharing.MPS and self._mps is not None and not self._file.now.holds(grant.device):
                await self._mps.stop(grant.device)
        self._hold(grants)

    def _disown(self, instance: str) -> None:
        self._slices.disown(instance)
        if self._handed is not None:
            self._handed.disown(instance)

    async def _give_back(self, watches: Sequence[Watch], instances: Sequence[str] = ()) -> None:
        """Give devices that no machine has any more, and those of `instances`, back to their drivers."""
        if self._handed is None:
            return
        for instance in instances:
            self._handed.disown(instance)
        for watch in watches:
            await self._handed.sweep(watch)

    def _adopt(self, instance: str, grants: Sequence[GpuGrant]) -> None:
        """Take as made for an instance what is found where its grants say, should the file have been lost."""
        for grant in grants:
            if grant.sharing is not GpuSharing.MIG:
                continue
            wanted = Made(device=grant.device, profile=grant.profile, start=grant.start, instance=instance)
            mine = any(replace(made, id="") == wanted for made in self._file.now.made)
            if not mine:
                self._file.write(self._file.now.with_made(wanted))

    def _hold(self, grants: Sequence[GpuGrant]) -> None:
        for watch in self._watches:
            mine = {grant.device for grant in grants if grant.device in watch.states}
            watch.hold(mine, self._file.now.holds)

    def _miss(self) -> None:
        """Show devices that instances hold and no driver knows, once all drivers were heard."""
        if not self._watches or any(watch.silent or not watch.looked for watch in self._watches):
            return
        held = {grant.device for grants in self._file.now.holdings.values() for grant in grants}
        for device in sorted(device for device in held if self._watch_of(device) is None):
            self._watches[0].miss(device)

    def _holding(self, instance: str) -> tuple[Watch, ...]:
        return self._watches_of({grant.device for grant in self._file.now.holdings.get(instance, ())})

    def _watch_of(self, device: str) -> Watch | None:
        return next((watch for watch in self._watches if device in watch.states), None)

    def _watches_of(self, devices: Collection[str]) -> tuple[Watch, ...]:
        return tuple(watch for watch in self._watches if any(device in watch.states for device in devices))

    # inside: watching

    def _begin(self) -> None:
        """Start watching, once there is a loop to do it on."""
        if not self._tasks:
            for watch in self._watches:
                self._tasks += [asyncio.ensure_future(watch.follow()), asyncio.ensure_future(self._beat(watch))]

    async def _beat(self, watch: Watch) -> None:
        """Look now and then, sum up storms, and try again what could not be removed."""
        while True:
            try:
                await watch.look()
                await self._sweep(watch)
            except Exception:  # the outer edge of this loop: health must go on being watched
                log.exception("looking at the devices failed", vendor=watch.vendor)
            ends = self._clock.monotonic() + self._patience.look_s
            while (left := ends - self._clock.monotonic()) > 0:
                await asyncio.sleep(min(left, TICK_S))
                watch.tick()

    async def _sweep(self, watch: Watch) -> None:
        async with watch.turn:
            swept = () if watch.silent or not watch.looked else await self._slices.sweep(watch)
            await self._give_back([watch])
        for made in swept:
            words = f"{made.device}: the slices of {made.profile} at {made.start} are free again"
            self._news.tell(DeviceEvent(trouble=Trouble.RECOVERED, device=made.device, message=words, at=self._clock.now()))

    async def _look_at_all(self, *, wait_s: float | None = None) -> None:
        await asyncio.gather(*(watch.look(wait_s=wait_s) for watch in self._watches))

    def _offer(self, watch: Watch, device: GpuDevice) -> GpuDevice:
        """Return the device with what this node can do with it, and with the partitions that are no instance's."""
        mine = [made for made in self._file.now.made if made.device == device.id and made.instance]
        foreign = tuple(
            partition for partition in watch.partitions.get(device.id, ()) if not any(made.is_of(partition) for made in mine)
        )
        return replace(
            device, foreign=foreign, sharing=ways_to_share(device, mps=self._mps is not None and not self._mps.missing())
        )

    def _remember(self) -> None:
        known = tuple(known for watch in self._watches for known in watch.known())
        try:
            self._file.write(replace(self._file.now, known=known))
        except OSError as error:
            log.error("the devices' health is not on the disk", error=str(error))
