"""The node's GPUs as its agent keeps them: claimed for instances and given back, looked at, and what befalls them told.

A driver may hang for ever. So every call has a deadline here, what was known last stands in for what cannot be found out, and it
is kept on disk: an agent that starts while the driver is silent does not tell the control plane that the devices are gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path

import structlog

from atoll.model import codec
from atoll.model.devices import GpuDevice, GpuGrant, GpuSample
from atoll.model.errors import AtollError, Conflict, DeadlineExceeded, Invalid, NotFound, Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.ports.devices import DeviceEvent, Devices, Edits, Trouble
from atoll.model.records import CELL_PROJECT, Instance, Severity
from atoll.model.spec import Gpu, RuntimeName
from atoll.model.units import format_seconds
from atoll.node.report import Reporter

LOOK_S = 60.0
"""How often the devices are looked at though nothing was heard of them."""
PAUSE_S = 1.0
"""Between two looks at least: of a thousand events a second each is not looked after. Also before another try at registering."""
INVENTORY_S = 5.0
CLAIM_S = 120.0
SETTLE_S = 10.0
"""How long a claim waits for what has ended here and is giving its device back."""
SETTLE_POLL_S = 0.2
RELEASE_S = 60.0
RECOVER_S = 10.0
RECOVER_PAUSE_S = 5.0
SAMPLES_S = 2.0
REINSTATE_S = 100.0
"""Of reinstating a device, with a reset of it."""
SUSPEND_S = 300.0
"""Of taking an instance's processes off their devices, or putting them back: all of their memory is copied."""
ENDED_LOOK_S = 3.0
"""How long the word on an end waits for a look at the devices."""
REPEAT_S = 10.0
"""The same trouble of the same device is told at most so often."""
TOLD_MAX = 1_000

CODES: dict[Trouble, tuple[str, Severity]] = {
    Trouble.FAULT: ("gpu-fault", Severity.WARNING),
    Trouble.BROKEN: ("gpu-broken", Severity.ERROR),
    Trouble.SUSPECT: ("gpu-suspect", Severity.WARNING),
    Trouble.VANISHED: ("gpu-vanished", Severity.ERROR),
    Trouble.RECOVERED: ("gpu-recovered", Severity.INFO),
    Trouble.DRIVER_CHANGED: ("driver-changed", Severity.WARNING),
    Trouble.SILENT: ("gpu-silent", Severity.ERROR),
}

Holders = Callable[[str], Sequence[Instance]]
"""Device (empty: any) → the instances here that hold it and have not ended."""
log = structlog.get_logger()


class Gpus:
    """Claims, releases and looks of one agent. `announce` (register the node anew) is set before `watch` runs; `groups` gives the
    names of the control groups that a process is in, an instance's being its id; `runtimes` those that this node offers."""

    def __init__(
        self,
        devices: Devices,
        *,
        node: str,
        reporter: Reporter,
        clock: Clock,
        holders: Holders,
        file: Path,
        groups: Callable[[int], Sequence[str]] = lambda pid: (),
        runtimes: Callable[[], Collection[RuntimeName]] = lambda: (),
    ) -> None:
        self._devices = devices
        self._groups = groups
        self._runtimes = runtimes
        self._node = node
        self._reporter = reporter
        self._clock = clock
        self._holders = holders
        self._file = file
        self._looking = asyncio.Lock()
        self._heard = asyncio.Event()
        self._told: dict[tuple[Trouble, str, int, int | None], float] = {}
        self._recovered = asyncio.Event()
        self.known: tuple[GpuDevice, ...] = _read(file)
        """As it was last found out."""
        self.refusals: dict[RuntimeName, str] = {}
        """Which of the node's runtimes cannot hand its devices on, and why; as of the last look that the driver answered."""
        self.announced: tuple[tuple[GpuDevice, ...], dict[RuntimeName, str]] | None = None
        """What the control plane was told last: `known` and `refusals`."""
        self.announce: Callable[[], Awaitable[None]] | None = None

    async def claim(self, instance: Instance, gpu: Gpu, runtime: RuntimeName) -> Edits:
        """Make the instance's grants ready. Safe to repeat.

        Raises Unavailable (sick, gone, or not ready in time), Unsupported. What is in the way of a claim may be on its way out:
        the scheduler gives a device away as soon as its holder has ended, and cleaning up comes after that.
        """
        if not self._recovered.is_set():
            raise Unavailable("the GPU driver has not answered since the agent started", mend="run `atoll doctor` on the node")
        try:
            async with asyncio.timeout(CLAIM_S):
                return await self._claim(instance, gpu, runtime)
        except TimeoutError:
            raise Unavailable(f"the GPU was not made ready within {format_seconds(CLAIM_S)}: its driver hangs") from None

    async def _claim(self, instance: Instance, gpu: Gpu, runtime: RuntimeName) -> Edits:
        until = self._clock.monotonic() + SETTLE_S
        while True:
            try:
                return (await self._devices.claim(instance.id, instance.gpus, gpu, runtime)).edits
            except Conflict as error:
                if self._clock.monotonic() >= until:
                    raise Unavailable(str(error), mend=error.mend, field=error.field) from None
            await asyncio.sleep(SETTLE_POLL_S)

    async def release(self, id: str) -> None:
        """Give back what the instance holds. Safe to repeat. Raises TimeoutError and what the devices raise."""
        async with asyncio.timeout(RELEASE_S):
            await self._devices.release(id)

    async def recover(self, held: Callable[[], Mapping[str, Sequence[GpuGrant]]]) -> bool:
        """Adopt what a former agent made for what is `held`, which is asked when it is needed; False where the driver does not let
        it: then try again, and nothing is claimed until it has succeeded."""
        try:
            async with asyncio.timeout(RECOVER_S):
                await self._devices.recover(held)
        except (AtollError, TimeoutError, OSError) as error:
            log.error("GPUs not recovered", node=self._node, error=str(error) or "timed out")
            return False
        self._recovered.set()
        return True

    async def recover_later(self, held: Callable[[], Mapping[str, Sequence[GpuGrant]]]) -> None:
        """Try until it succeeds."""
        while not self._recovered.is_set():
            await asyncio.sleep(RECOVER_PAUSE_S)
            try:
                await self.recover(held)
            except Exception:  # the outer edge: a surprise must not end the agent
                log.exception("GPUs not recovered", node=self._node)

    async def samples(self) -> tuple[GpuSample, ...]:
        """Return what every device does now; none where that cannot be told in time."""
        try:
            async with asyncio.timeout(SAMPLES_S):
                return await self._devices.samples()
        except (AtollError, TimeoutError) as error:
            log.debug("no samples of GPUs", node=self._node, error=str(error) or "timed out")
            return ()

    async def processes_of(self, instance: Instance) -> dict[int, int]:
        """Return the instance's processes that hold memory on any device → how many bytes of it.

        Raises Unavailable where that cannot be told.
        """
        samples = await self.samples()
        if not {grant.device for grant in instance.gpus} <= {sample.device for sample in samples}:
            raise Unavailable("the GPU driver does not say who uses its devices")
        found: dict[int, int] = {}
        for sample in samples:
            for pid, used in sample.processes.items():
                if instance.id in self._groups(pid):
                    found[pid] = max(used, found.get(pid, 0))  # a partition's are its device's, too
        return found

    async def suspend(self, id: str, pids: Sequence[int]) -> None:
        """Take processes of the instance off their devices. Safe to repeat.

        Raises Unsupported (not this vendor, or driver), Unavailable (they run on), TimeoutError.
        """
        async with asyncio.timeout(SUSPEND_S):
            await self._devices.suspend(id, pids)

    async def resume(self, id: str, pids: Sequence[int]) -> None:
        """Put back what `suspend` took; what has ended meanwhile is left out. Safe to repeat. Raises Unavailable, TimeoutError."""
        async with asyncio.timeout(SUSPEND_S):
            await self._devices.resume(id, [pid for pid in pids if id in self._groups(pid)])

    async def reinstate(self, device: str, *, reset: bool, by: str) -> GpuDevice:
        """Offer a device again, on the word of `by`, and return how it then stands. Safe to repeat.

        Raises what the port does, and DeadlineExceeded.
        """
        try:
            async with asyncio.timeout(REINSTATE_S):
                await self._devices.reinstate(device, reset=reset)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{device} was not {'reset' if reset else 'reinstated'} within {format_seconds(REINSTATE_S)}",
                mend="see how it stands: atoll nodes show",
            ) from None
        words = f"GPU {device} was {'reset and ' if reset else ''}reinstated by {by or 'an operator'}"
        log.warning("GPU reinstated", node=self._node, device=device, reset=reset, by=by)
        self._reporter.event(CELL_PROJECT, f"node/{self._node}", "gpu-reinstated", words)
        self._heard.set()
        found = next((one for one in await self.look() if one.id == device), None)
        if found is None:
            raise NotFound(f"{device} was reinstated, but its driver does not know it any more", field="gpu")
        return found

    async def look(self) -> tuple[GpuDevice, ...]:
        """Return the devices as they are now, or as they were last known."""
        async with self._looking:
            try:
                async with asyncio.timeout(INVENTORY_S):
                    found = await self._devices.inventory()
            except (AtollError, TimeoutError) as error:
                log.warning("GPUs not found out", node=self._node, error=str(error) or "timed out")
                return self.known
            reasons = {runtime: self._devices.offers(runtime) for runtime in self._runtimes()} if found else {}
            self.refusals = {runtime: why for runtime, why in reasons.items() if why}
            if found != self.known:
                self.known = found
                _write(self._file, found)
            return found

    async def examine(self) -> None:
        """Look, and tell the control plane what has changed. Raises what registering raises."""
        await self.look()
        if self.announce is not None and self.announced is not None and (self.known, self.refusals) != self.announced:
            await self.announce()

    async def examine_for(self, id: str) -> None:
        """Look before the end of an instance that holds devices is told, so that whoever counts it knows if they were to blame."""
        try:
            async with asyncio.timeout(ENDED_LOOK_S):
                await self.examine()
        except (AtollError, TimeoutError) as error:
            log.debug("an end is told without a look at the devices", instance=id, error=str(error) or "timed out")

    async def watch(self) -> None:
        """Look when something was heard, and at times though nothing was, for ever."""
        while True:
            pause_s = LOOK_S
            self._heard.clear()
            try:
                await self.examine()
            except (AtollError, TimeoutError) as error:
                log.debug("changed GPUs not registered", node=self._node, error=str(error) or "timed out")
                pause_s = PAUSE_S
            except Exception:  # the outer edge, as above
                log.exception("GPUs not looked at", node=self._node)
            await asyncio.sleep(PAUSE_S)
            try:
                async with asyncio.timeout(pause_s):
                    await self._heard.wait()
            except TimeoutError:
                pass

    async def listen(self) -> None:
        """Tell what befalls the devices, for ever."""
        while True:
            try:
                async for event in self._devices.events():  # as long as nothing happens: no deadline
                    self._tell(event)
                    self._heard.set()
            except AtollError as error:
                log.warning("events of GPUs are not heard", node=self._node, error=str(error))
            except Exception:  # the outer edge, as above
                log.exception("events of GPUs are not heard", node=self._node)
            self._heard.set()
            await asyncio.sleep(RECOVER_PAUSE_S)

    def _tell(self, event: DeviceEvent) -> None:
        now = self._clock.monotonic()
        which = (event.trouble, event.device, event.code, event.start)
        if now - self._told.get(which, float("-inf")) < REPEAT_S:
            return
        self._told = {key: at for key, at in self._told.items() if now - at < REPEAT_S}
        if len(self._told) >= TOLD_MAX:
            return
        self._told[which] = now
        code, severity = CODES[event.trouble]
        words = f"{event.message} ({event.mend})" if event.mend else event.message
        log.warning("GPU", node=self._node, device=event.device, trouble=event.trouble.value, xid=event.code, message=event.message)
        self._reporter.event(CELL_PROJECT, f"node/{self._node}", code, words, severity)
        meant = _meant(event, self._holders(event.device))
        if event.trouble is Trouble.FAULT and len(meant) > 1:
            words = f"{words}; the driver does not say which of those that share the GPU it was"
        for instance in meant:
            self._reporter.event(instance.project, f"instance/{instance.id}", code, words, severity)

    async def close(self) -> None:
        await self._devices.close()


def _meant(event: DeviceEvent, holders: Sequence[Instance]) -> Sequence[Instance]:
    """Return whom an event concerns: what a program did in a partition is the affair of its holder alone."""
    if event.trouble is not Trouble.FAULT or event.start is None:
        return holders
    place = event.device, event.start
    return [each for each in holders if place in {(grant.device, grant.start) for grant in each.gpus}]


def _read(file: Path) -> tuple[GpuDevice, ...]:
    try:
        return codec.decode(file.read_bytes(), tuple[GpuDevice, ...])
    except (OSError, Invalid):
        return ()  # none was there, or it is damaged: the first look finds out


def _write(file: Path, devices: tuple[GpuDevice, ...]) -> None:
    new = file.with_suffix(".new")
    try:
        new.write_bytes(codec.encode(devices))
        new.replace(file)
    except OSError as error:
        log.error("GPUs not recorded", file=str(file), error=str(error))
