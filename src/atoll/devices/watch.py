"""One driver under watch: every call to it is bounded, what it says is folded into its devices' health, and what is news is told.

A driver that hangs costs a caller its deadline and nothing more. What was known stays known, as quarantined, until it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import structlog
from msgspec import Struct
from msgspec.structs import replace

from atoll.devices.health import Away, Cause, DeviceState, Gone, Happening, Held, Seen, Silent, Tick, Told, count, decide
from atoll.devices.ledger import Known
from atoll.model.devices import GpuDevice, GpuPartition, GpuVendor
from atoll.model.errors import AtollError, Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.ports.devices import DeviceEvent, Hardware, LetsGo, Trouble

T = TypeVar("T")
STUCK_MAX = 4
"""Calls that were given up and have not ended; while there are so many, no other is begun."""
EARLY_MAX = 64
"""Events that are kept for devices which the look under way, or the first one, may find."""
EVENTS_AT_ONCE = 64
"""Events after which a storm lets others run."""
RETRY_S_MAX = 60.0

log = structlog.get_logger()


class Patience(Struct, frozen=True, kw_only=True):
    """How long a driver is waited for, and how often it is looked at."""

    silent_s: float = 4.0
    """A driver that has not said by then what there is counts as silent. The first time it is given more: it may be waking up."""
    slow_s: float = 75.0
    """After this long that call is given up. Above a driver's own deadlines, so that it can replace what hangs by itself."""
    call_s: float = 45.0
    """Of any other call."""
    change_s: float = 100.0
    """Of a call that makes or removes a partition."""
    samples_s: float = 3.0
    suspend_s: float = 130.0
    """Of a call that takes a process off its device, or puts it back: above the driver's own deadline, as above."""
    reset_s: float = 80.0
    """Of a reset: above the driver's own deadline."""
    look_s: float = 30.0
    """Between two looks at what there is, for what vanishes without a word."""
    again_s: float = 5.0
    """A driver that did not answer is not asked anew before so long."""


class Watch:
    """`tell` gets every piece of news, `changed` is called when what must not be forgotten changed."""

    def __init__(
        self,
        hardware: Hardware,
        clock: Clock,
        patience: Patience,
        *,
        tell: Callable[[DeviceEvent], None],
        changed: Callable[[], None],
    ) -> None:
        self.hardware = hardware
        self.vendor: GpuVendor = hardware.vendor
        self.turn = asyncio.Lock()
        """Held while partitions change, so that one claim at a time decides about slices."""
        self.states: dict[str, DeviceState] = {}
        self.partitions: dict[str, tuple[GpuPartition, ...]] = {}
        """Of devices in MIG mode, as last seen."""
        self.silent = ""
        """Why the driver does not answer."""
        self._clock, self._patience, self._tell, self._changed = clock, patience, tell, changed
        # what concerns no one device is counted here
        self._all = DeviceState(seen=GpuDevice(id="", model=f"every {self.vendor} GPU", memory_bytes=0, vendor=self.vendor))
        self.looked = False
        """It was found out what there is, or that the driver is silent."""
        self._silent_at = float("-inf")
        self._seen_at = float("-inf")
        """When the last look that was answered began."""
        self._looking: asyncio.Task[None] | None = None
        self._looking_since = 0.0
        self._touched: set[str] = set()
        self._noted: set[str] = set()
        """Devices of which something newer is known than what the look under way will say: health, partitions."""
        self._early: deque[DeviceEvent] = deque(maxlen=EARLY_MAX)
        """What was reported of devices that no look had found."""
        self._stuck: set[asyncio.Task[Any]] = set()
        self._set_aside = 0

    def remember(self, known: Known, *, held: bool, away: bool = False) -> None:
        """Begin with what a former agent knew."""
        self.states[known.device.id] = DeviceState(seen=known.device, ills=known.ills, held=held, away=away)

    async def call(self, coroutine: Coroutine[Any, Any, T], deadline_s: float | None = None) -> T:
        """Await a call to the driver. Raises what it raises, and Unavailable when it has not ended in time (or others have not)."""
        if len(self._stuck) >= STUCK_MAX:
            coroutine.close()
            raise Unavailable(f"the {self.vendor} driver hangs: {len(self._stuck)} calls have not come back")
        deadline_s = self._patience.call_s if deadline_s is None else deadline_s
        task = asyncio.ensure_future(coroutine)
        try:
            done, _ = await asyncio.wait({task}, timeout=deadline_s)
        except asyncio.CancelledError:
            self._abandon(task)
            raise
        if done:
            return task.result()
        self._abandon(task)
        raise Unavailable(f"the {self.vendor} driver does not answer within {deadline_s:g} s")

    def _abandon(self, task: asyncio.Task[Any]) -> None:
        """Give up a call, whether or not it lets itself be cancelled."""
        self._stuck.add(task)

        def ended(task: asyncio.Task[Any]) -> None:
            self._stuck.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.debug("a call that was given up failed", vendor=self.vendor, error=str(error))

        task.add_done_callback(ended)
        task.cancel()

    @property
    def is_fresh(self) -> bool:
        """It was looked at within `look_s`, and answers: what changed since without a word is found by the next look."""
        return not self.silent and self._clock.monotonic() - self._seen_at < self._patience.look_s

    async def look(self, *, wait_s: float | None = None) -> None:
        """Ask what there is, and fold it in. Raises nothing: a driver that does not answer makes its devices `silent`.

        Looks that are asked for at the same time are one, which goes on when its callers have gone. Returns after `wait_s` at the
        latest, and else when there is an answer or the driver counts as silent.
        """
        if self._set_aside:
            return
        running = self._looking is not None and not self._looking.done()
        if self.silent and (running or self._clock.monotonic() - self._silent_at < self._patience.again_s):
            return
        if self._looking is None or not running:
            self._looking, self._looking_since = asyncio.ensure_future(self._look()), self._clock.monotonic()
        # what is remembered of a former agent was awake then
        hurried = self.looked or bool(self.states)
        left = self._looking_since + self._patience.silent_s - self._clock.monotonic() if hurried else None
        bounds = [bound for bound in (wait_s, left) if bound is not None]
        done, _ = await asyncio.wait({self._looking}, timeout=max(0.0, min(bounds)) if bounds else None)
        if not done and left is not None and (wait_s is None or left <= wait_s) and not self.silent:
            self._fall_silent(Unavailable(f"the {self.vendor} driver does not answer within {self._patience.silent_s:g} s"))

    async def reset(self, id: str) -> None:
        """Reset a device, with nobody asking the driver meanwhile. Raises what the driver does, and Unavailable."""
        async with self.aside():
            await self.call(self.hardware.reset(id), self._patience.reset_s)

    async def _look(self) -> None:
        self._touched.clear()
        self._noted.clear()
        try:
            found = await self.call(self.hardware.discover(), self._patience.slow_s)
            partitions = {device.id: await self._partitions_of(device) for device in found if device.mig}
        except AtollError as error:
            self._fall_silent(error)
            return
        self.silent, self._seen_at = "", self._looking_since
        self.partitions = {id: self.partitions.get(id, ()) if id in self._noted else there for id, there in partitions.items()}
        for device in found:
            if device.id not in self.states:
                self.states[device.id] = DeviceState(seen=device)
                for event in self._early:
                    if event.device in ("", device.id):
                        self._befall(device.id, event)
                if self.looked:
                    words = f"{device.model} {device.id} is there"
                    self._tell(DeviceEvent(trouble=Trouble.RECOVERED, device=device.id, message=words, at=self._clock.now()))
            if device.id not in self._touched:  # else the answer may be older than the event
                self.apply(device.id, Seen(device))
        there = {device.id for device in found}
        for id in [id for id in self.states if id not in there]:
            self.apply(id, Gone())
        self._early.clear()
        self.looked = True

    def _befall(self, id: str, event: DeviceEvent) -> None:
        """Let happen to a device what befell all of its driver's: one word for them together is told by whoever calls this."""
        state = self.states[id]
        after, _ = decide(state, Told(event), self._clock.now())
        if after is not None and after.ills != state.ills:
            self.states[id] = replace(after, repeats=state.repeats)
            self._changed()

    async def _partitions_of(self, device: GpuDevice) -> tuple[GpuPartition, ...]:
        try:
            return await self.call(self.hardware.partitions(device.id))
        except AtollError as error:  # one device's trouble is no other's; whoever claims of it asks again
            log.warning("partitions not found out", device=device.id, error=str(error))
            return self.partitions.get(device.id, ())

    def note_partitions(self, id: str, partitions: tuple[GpuPartition, ...]) -> None:
        """Keep what was found out beside the looks."""
        self.partitions[id] = partitions
        self._noted.add(id)

    def _fall_silent(self, error: AtollError) -> None:
        news = not self.silent
        self.looked = True
        self.silent, self._silent_at = error.message, self._clock.monotonic()
        for id in list(self.states):
            self.apply(id, Silent(error.message))
        if news:
            words = f"{self.vendor}: {error.message}"
            mend = error.mend or "see the kernel's log; a driver that hangs is ended by a restart of the node only"
            self._count(DeviceEvent(trouble=Trouble.SILENT, message=words, mend=mend, at=self._clock.now()))

    def apply(self, id: str, event: Happening) -> None:
        """Let something happen to a device, and tell what comes of it."""
        state = self.states.get(id)
        if state is None:
            return
        after, told = decide(state, event, self._clock.now())
        if after is None:
            del self.states[id]
            self.partitions.pop(id, None)
        else:
            self.states[id] = after
        if after != state:
            self._changed()
        for news in told:
            self._tell(news)

    def hold(self, ids: Iterable[str], holds: Callable[[str], bool]) -> None:
        """Note of each device whether something holds it now."""
        for id in ids:
            self.apply(id, Held(holds(id)))

    def send_away(self, ids: Iterable[str], away: bool) -> None:
        """Note of each device whether a virtual machine has it."""
        for id in ids:
            self.apply(id, Away(away))

    @contextlib.asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """Ask the driver nothing while inside, and keep none of its devices open: one of them is given to another driver."""
        self._set_aside += 1
        try:
            if self._looking is not None and not self._looking.done():
                await asyncio.wait({self._looking}, timeout=self._patience.silent_s)
            async with self.hardware.let_go() if isinstance(self.hardware, LetsGo) else contextlib.nullcontext():
                yield
        finally:
            self._set_aside -= 1

    def miss(self, id: str) -> None:
        """Note that something holds a device that the driver, which answers, does not know."""
        seen = GpuDevice(id=id, model="GPU", memory_bytes=0, vendor=self.vendor)
        self.states[id] = DeviceState(seen=seen, held=True)
        self.apply(id, Gone())

    def take(self, event: DeviceEvent) -> None:
        """Fold in what the driver reports."""
        if event.device in self.states:
            self._touched.add(event.device)
            self.apply(event.device, Told(event))
            return
        if not event.device:
            for id in list(self.states):
                self._befall(id, event)
        if event.trouble is not Trouble.FAULT:  # a program's own, of which there may be many
            self._early.append(event)
        self._count(event)

    def _count(self, event: DeviceEvent) -> None:
        self._all, told = count(self._all, event, self._clock.now())
        for news in told:
            self._tell(news)

    def tick(self) -> None:
        """Sum up what is due."""
        now = self._clock.now()
        for id, state in list(self.states.items()):
            if state.due is not None and state.due <= now:
                self.apply(id, Tick())
        if self._all.due is not None and self._all.due <= now:
            after, told = decide(self._all, Tick(), now)
            self._all = after or self._all
            for news in told:
                self._tell(news)

    def known(self) -> tuple[Known, ...]:
        """Return what must not be forgotten."""
        lasting = (Cause.ERROR, Cause.DRIVER)
        return tuple(
            Known(device=_steady(state.seen), ills=tuple(ill for ill in state.ills if ill.cause in lasting))
            for state in self.states.values()
            if state.held or state.away or state.ill(Cause.ERROR) is not None
        )

    async def follow(self) -> None:
        """Take what the driver reports, for ever."""
        delay_s = 1.0
        while True:
            try:
                taken = 0
                async for event in self.hardware.events():
                    self.take(event)
                    delay_s, taken = 1.0, taken + 1
                    if taken % EVENTS_AT_ONCE == 0:
                        await asyncio.sleep(0)
            except AtollError as error:
                log.warning("the driver's events cannot be waited for", vendor=self.vendor, error=str(error))
            except Exception:  # the outer edge of this loop: health must go on being watched
                log.exception("waiting for the driver's events failed", vendor=self.vendor)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RETRY_S_MAX)

    async def close(self) -> None:
        for task in (self._looking, *self._stuck):
            if task is not None:
                task.cancel()
        try:
            await self.call(self.hardware.close())
        except AtollError as error:
            log.warning("the driver could not be let go of", vendor=self.vendor, error=str(error))


def _steady(device: GpuDevice) -> GpuDevice:
    """Leave out what changes often and need not be kept."""
    return replace(device, foreign=(), links=(), profiles=())


@contextlib.asynccontextmanager
async def turns(watches: Sequence[Watch]) -> AsyncIterator[None]:
    """Have all these drivers to oneself; always taken in one order, so that no two wait for each other."""
    async with contextlib.AsyncExitStack() as stack:
        for watch in watches:
            await stack.enter_async_context(watch.turn)
        yield
