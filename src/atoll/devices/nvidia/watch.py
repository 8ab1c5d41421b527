"""The stream of what befalls NVIDIA's devices: the driver's events out of a worker, and the kernel's messages of the bus."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from atoll.devices.health import classify_xid
from atoll.devices.nvidia import presence
from atoll.devices.nvidia.channel import RETRY_MAX_S, RETRY_S, Start, Worker, WorkerEnded, ended
from atoll.devices.nvidia.records import Code, error_of
from atoll.devices.uevents import Uevents
from atoll.model.errors import Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.ports.devices import DeviceEvent, Trouble

EVENTS_MAX = 1024
"""Events that nobody has taken yet; the oldest goes when there is one more."""
_OFF_THE_BUS = 79
_AS_XID = {
    "double-bit": 48,
    "single-bit-storm": 92,
    "retirement": 63,
    "retirement-failure": 64,
    "poison-contained": 94,
    "poison": 95,
    "recovery-action": 154,
}
"""NVML's other events, by the XID that means the same."""


class Stream:
    """Events that are made in the background and taken by one reader."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[DeviceEvent | None] = asyncio.Queue(EVENTS_MAX)

    def put(self, event: DeviceEvent | None) -> None:
        if self._queue.full():
            self._queue.get_nowait()
        self._queue.put_nowait(event)

    async def next(self) -> DeviceEvent | None:
        """Return the next event; None where there will be none."""
        return await self._queue.get()


class Watch:
    """Follows the driver and the bus, for as long as `run` runs. `known` is id → PCI address of the devices found so far,
    `start_of` gives the first memory slice of a device's GPU instance, None where it is not known."""

    def __init__(
        self,
        start: Start,
        *,
        stream: Stream,
        known: Mapping[str, str],
        root: Path,
        clock: Clock,
        start_s: float,
        quiet_s: float,
        uevents: Uevents,
        start_of: Callable[[str, int], int | None],
    ) -> None:
        self._start, self._stream, self._start_of = start, stream, start_of
        self._known, self._root, self._clock, self._uevents = dict(known), root, clock, uevents
        self._start_s, self._quiet_s = start_s, quiet_s
        self._vanished: set[str] = set()
        self._silent = False
        self._driver = presence.driver_version(root)
        self._again = asyncio.Event()
        """Something came up on the bus: look without delay."""
        self._left: list[Worker] = []
        self._starting = asyncio.Lock()
        self._wanted = asyncio.Event()
        self._wanted.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_driver())
            tasks.create_task(self._follow_bus())

    async def _follow_driver(self) -> None:
        failures = 0
        while True:
            await self._wanted.wait()
            before = self._clock.monotonic()
            try:
                await self._follow_worker()
            except (Unavailable, OSError) as error:
                if not self._wanted.is_set():
                    continue
                self._tell_silent(str(error), getattr(error, "mend", None) or "")
            if self._clock.monotonic() - before > RETRY_MAX_S:
                failures = 0
            delay = min(RETRY_S * 2**failures, RETRY_MAX_S)
            failures += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._again.wait()
            self._again.clear()

    async def _follow_worker(self) -> None:
        """Pass on what one worker says. Returns when it waits for no device any more. Raises Unavailable when it fails."""
        self._left = [worker for worker in self._left if not worker.gone.is_set()]
        if len(self._left) >= 2:
            raise Unavailable("NVIDIA's driver does not answer; processes that wait for its events hang in it")
        async with self._starting:
            worker = await Worker.start(*self._start())
            self._left.append(worker)
        try:
            if not self._wanted.is_set():
                raise Unavailable("NVIDIA's devices were let go of meanwhile")
            line = await self._line(worker, self._start_s)
            self._on_ready(line["ready"], line["unreadable"])
            devices = set(line["ready"])
            while devices - self._vanished:
                self._on_line(await self._line(worker, self._quiet_s))
        except WorkerEnded as error:
            raise Unavailable(f"the process that waits for NVIDIA's events failed: {error}") from None
        finally:
            worker.kill()

    async def _line(self, worker: Worker, deadline_s: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(deadline_s):
                line = await worker.read()
        except TimeoutError:
            raise Unavailable(f"NVIDIA's driver has not answered for {deadline_s:g} s") from None
        if "error" in line:
            error = error_of(line["error"], self._root)
            if line["error"].get("code") == Code.LIB_RM_VERSION_MISMATCH:
                self._tell(Trouble.DRIVER_CHANGED, message=str(error), mend=error.mend or "")
            raise Unavailable(str(error), mend=error.mend)
        return line

    def _on_ready(self, devices: dict[str, str], unreadable: list[str]) -> None:
        if self._silent:
            self._silent = False
            self._tell(Trouble.RECOVERED, message="NVIDIA's driver answers again")
        self._check_driver()
        for device in self._vanished & set(devices):
            self._vanished.discard(device)
            self._tell(Trouble.RECOVERED, device, message=f"the GPU {device} is there again")
        for device in set(self._known) - set(devices):
            if unreadable:  # which of them it is, and whether it is there, the next look at the devices finds out
                self._tell_deaf(device, "; ".join(unreadable))
            else:
                self._vanish(device, "the driver does not know it any more")
        self._known.update(devices)

    def _on_line(self, line: dict[str, Any]) -> None:
        self._check_driver()
        for device in line.get("lost", ()):
            self._vanish(device, "it has fallen off the bus")
        for device, why in line.get("deaf", {}).items():
            self._tell_deaf(device, why)
        if "event" in line:
            self._on_event(**line["event"])

    def _on_event(self, device: str, kind: str, code: int, part: int | None) -> None:
        if kind == "xid" and code == _OFF_THE_BUS:
            self._vanish(device, "it has fallen off the bus", code)
            return
        if kind == "unavailable":
            self._vanish(device, "the driver says that it is not available any more")
            return
        if kind == "recovery-action" and code == 0:
            self._tell(Trouble.RECOVERED, device, message=f"the driver has nothing against the GPU {device} any more")
            return
        number = code if kind == "xid" else _AS_XID.get(kind, -1)
        if number < 0:
            return
        meaning = classify_xid(number)
        where = f" (partition {part})" if part is not None else ""
        text = f"XID {code} on {device}{where}: {meaning.words}" if kind == "xid" else f"{kind} on {device}{where}: {meaning.words}"
        start = self._start_of(device, part) if part is not None else None
        self._tell(meaning.trouble, device, start=start, code=code if kind == "xid" else 0, message=text, mend=meaning.mend)

    async def _follow_bus(self) -> None:
        try:
            async for event in self._uevents():
                if event.action == "lost":
                    self._again.set()
                elif event.subsystem == "module" and event.path == "/module/nvidia":
                    self._check_driver()
                    self._again.set()
                elif event.subsystem == "pci" and event.action == "remove":
                    for device in [device for device, pci in self._known.items() if pci == event.pci]:
                        self._vanish(device, "it was removed from the bus")
                elif event.subsystem == "pci" and event.action == "bind" and event.properties.get("DRIVER") == "nvidia":
                    self._again.set()
        except OSError:
            return  # no such socket in this sandbox: what the driver says is left

    def _check_driver(self) -> None:
        now = presence.driver_version(self._root)
        if now and self._driver and now != self._driver:
            message = f"NVIDIA's kernel driver was {self._driver} and is {now} now"
            self._tell(Trouble.DRIVER_CHANGED, message=message, mend="start anew what runs on the GPUs of this node")
        self._driver = now or self._driver

    def _vanish(self, device: str, why: str, code: int = 0) -> None:
        if device in self._vanished:
            return
        self._vanished.add(device)
        mend = "see the kernel's log; restart the node if it does not come back"
        self._tell(Trouble.VANISHED, device, code=code, message=f"the GPU {device} has vanished: {why}", mend=mend)

    def _tell_deaf(self, device: str, why: str) -> None:
        mend = "see the kernel's log for NVRM; reset the GPU or restart the node if it stays so"
        self._tell(Trouble.SUSPECT, device, message=f"the events of the GPU {device} cannot be waited for: {why}", mend=mend)

    def _tell_silent(self, message: str, mend: str) -> None:
        if not self._silent:
            self._silent = True
            self._tell(Trouble.SILENT, message=message, mend=mend)

    def _tell(
        self, trouble: Trouble, device: str = "", *, start: int | None = None, code: int = 0, message: str, mend: str = ""
    ) -> None:
        now = self._clock.now()
        self._stream.put(DeviceEvent(trouble=trouble, device=device, start=start, code=code, message=message, mend=mend, at=now))

    def pause(self) -> None:
        """Have no process that holds the devices, until `go_on`."""
        self._wanted.clear()
        for worker in self._left:
            worker.kill()

    def go_on(self) -> None:
        self._wanted.set()
        self._again.set()

    async def close(self, deadline_s: float) -> None:
        for worker in self._left:
            worker.kill()
        await ended(self._left, deadline_s, self._starting)
