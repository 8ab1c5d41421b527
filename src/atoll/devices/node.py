"""The devices of a node, whatever their vendors: what there is and how it fares, and what instances hold of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import structlog
from msgspec.structs import replace

from atoll.devices.admission import refuse_runtime
from atoll.devices.drivers import Drivers
from atoll.devices.handed import HandedOver
from atoll.devices.holdings import Holdings
from atoll.devices.ledger import LedgerFile, boot_id
from atoll.devices.libraries_directory import LibraryDirectories
from atoll.devices.mps import Mps
from atoll.devices.news import News
from atoll.devices.passthrough import MACHINES, Passthrough
from atoll.devices.slices import Slices
from atoll.devices.watch import Patience, Watch
from atoll.model.devices import GpuDevice, GpuGrant, GpuSample, GpuSharing
from atoll.model.errors import NotFound
from atoll.model.ports.clock import Clock
from atoll.model.ports.devices import Claim, DeviceEvent, Hardware, Trouble
from atoll.model.spec import Gpu, RuntimeName

TICK_S = 30.0
"""Between two moments at which storms are summed up, at most."""
LIBRARIES = "gpu-libraries"
"""Below the directory of what was made."""

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
        self._watches = tuple(Watch(one, clock, self._patience, tell=self._news.tell, changed=self._remember) for one in hardware)
        self._libraries = LibraryDirectories(directory / LIBRARIES)
        self._drivers = Drivers(self._watches, self._file, self._patience, mps)
        self._holdings = Holdings(
            self._drivers, self._file, self._slices, self._handed, mps, self._patience, self._libraries, self.offers
        )
        for known in self._file.now.known:
            watch = next((watch for watch in self._watches if watch.vendor is known.device.vendor), None)
            if watch is not None:
                id = known.device.id
                watch.remember(known, held=self._file.now.holds(id), away=self._file.now.is_handed(id))

    # what there is

    async def inventory(self) -> tuple[GpuDevice, ...]:
        self._begin()
        await self._drivers.look()
        self._drivers.miss()
        devices = tuple(self._drivers.offer(watch, state.device()) for watch in self._watches for state in watch.states.values())
        self._drivers.offered = {device.id: device for device in devices}
        return tuple(sorted(devices, key=lambda device: (device.pci, device.id)))

    async def samples(self) -> tuple[GpuSample, ...]:
        self._begin()
        return await self._drivers.samples()

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
        watch = self._drivers.of(device)
        if watch is None:
            raise NotFound(f"this node has no GPU {device}", field="gpu")
        if reset:
            async with watch.turn:
                await self._holdings.give_back([watch])
                await self._holdings.must_be_idle(device)
                await watch.reset(device)
        words = f"{device} was {'reset and ' if reset else ''}reinstated by an operator"
        watch.take(DeviceEvent(trouble=Trouble.RECOVERED, device=device, message=words, at=self._clock.now()))

    # what instances hold

    async def claim(self, instance: str, grants: Sequence[GpuGrant], gpu: Gpu, runtime: RuntimeName) -> Claim:
        self._begin()
        return await self._holdings.claim(instance, grants, gpu, runtime)

    async def release(self, instance: str) -> None:
        await self._holdings.release(instance)

    async def suspend(self, instance: str, pids: Sequence[int]) -> None:
        await self._holdings.suspend(instance, pids)

    async def resume(self, instance: str, pids: Sequence[int]) -> None:
        await self._holdings.resume(instance, pids)

    async def recover(self, held: Callable[[], Mapping[str, Sequence[GpuGrant]]]) -> None:
        self._begin()
        await self._drivers.look(wait_s=self._patience.silent_s)
        self._adopt(held())
        self._drivers.miss()
        if self._handed is not None:
            await self._handed.recover(self._watches)
        await asyncio.gather(*(self._sweep(watch) for watch in self._watches))
        await self._drivers.look(wait_s=self._patience.silent_s)
        if self._mps is not None:
            grants = [grant for grants in self._file.now.holdings.values() for grant in grants]
            await self._mps.keep({grant.device for grant in grants if grant.sharing is GpuSharing.MPS})

    def _adopt(self, held: Mapping[str, Sequence[GpuGrant]]) -> None:
        """Write down that these instances hold what they do, and no others. Nothing is awaited: a release comes before or after."""
        owners = {made.instance for made in self._file.now.made} | {handed.instance for handed in self._file.now.handed}
        for instance in owners - {"", *held}:
            self._holdings.disown(instance)
        ledger = replace(self._file.now, holdings={instance: tuple(grants) for instance, grants in held.items()})
        self._file.write(ledger)
        if not held:
            self._libraries.clear()
        for instance, grants in held.items():
            self._holdings.adopt(instance, grants)
        for watch in self._watches:
            watch.hold(list(watch.states), ledger.holds)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await asyncio.gather(*(watch.close() for watch in self._watches))

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
            await self._holdings.give_back([watch])
        for made in swept:
            words = f"{made.device}: the slices of {made.profile} at {made.start} are free again"
            self._news.tell(DeviceEvent(trouble=Trouble.RECOVERED, device=made.device, message=words, at=self._clock.now()))

    async def _look_at_all(self, *, wait_s: float | None = None) -> None:
        await asyncio.gather(*(watch.look(wait_s=wait_s) for watch in self._watches))

    def _remember(self) -> None:
        known = tuple(known for watch in self._watches for known in watch.known())
        try:
            self._file.write(replace(self._file.now, known=known))
        except OSError as error:
            log.error("the devices' health is not on the disk", error=str(error))
