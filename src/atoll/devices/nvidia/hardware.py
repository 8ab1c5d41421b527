"""`Hardware` for NVIDIA: every question to the driver is asked by a worker process, so that a driver that hangs, a library that
crashes and versions that differ end in an error and never in an agent that stands still."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog
from msgspec import Struct

from atoll.devices.known_files import KnownFiles
from atoll.devices.nvidia import checkpoint, memory_module, presence, records, resetting
from atoll.devices.nvidia.channel import Channel, Refused, command, environment_of
from atoll.devices.nvidia.watch import Stream, Watch
from atoll.devices.nvidia_files import nvidia_edits
from atoll.devices.uevents import Uevents, kernel_uevents
from atoll.model.devices import GpuDevice, GpuGrant, GpuPartition, GpuSample, GpuVendor
from atoll.model.errors import Unavailable, Unsupported
from atoll.model.ports.clock import Clock, SystemClock
from atoll.model.ports.devices import DeviceEvent, Edits, Trouble
from atoll.model.spec import GpuCapability


class EditsOf(Protocol):
    """`nvidia_files.nvidia_edits`, or what stands for it."""

    def __call__(
        self,
        grants: Sequence[GpuGrant],
        capabilities: Collection[GpuCapability],
        partitions: Sequence[str],
        devices: Mapping[str, GpuDevice],
        *,
        instances: Mapping[str, tuple[int, int]] | None = None,
        root: Path = Path("/"),
    ) -> Edits: ...


log = structlog.get_logger()
_CHANGES = frozenset({Trouble.VANISHED, Trouble.RECOVERED, Trouble.DRIVER_CHANGED})


class Deadlines(Struct, frozen=True, kw_only=True):
    """How long the driver may take, in seconds."""

    start_s: float = 30.0
    """To load and initialise: without persistence mode the driver wakes each device for it."""
    discover_s: float = 10.0
    samples_s: float = 3.0
    partitions_s: float = 5.0
    change_s: float = 30.0
    """To make or remove a partition."""
    quiet_s: float = 30.0
    """Of the worker that waits for events: it says every 10 s that it lives."""
    reset_s: float = 60.0
    load_s: float = 10.0
    """To load the kernel's module for CUDA's memory."""
    close_s: float = 2.0
    again_s: float = 30.0
    """Between two looks for a driver that was not there when its events were to be waited for."""


class NvidiaHardware:
    """NVIDIA's devices on this machine; none, at no cost, where there is no trace of its driver.

    `library` is the module that stands for NVML in the workers, `environment` is added to theirs, `root` is below which /proc, /sys
    and the driver's files are read. To be used from one event loop, that of the process's main thread.
    """

    vendor = GpuVendor.NVIDIA

    def __init__(
        self,
        *,
        root: Path = Path("/"),
        library: str = "pynvml",
        environment: Mapping[str, str] | None = None,
        deadlines: Deadlines = Deadlines(),
        clock: Clock | None = None,
        uevents: Uevents = kernel_uevents,
        edits: EditsOf | None = None,
    ) -> None:
        self._root, self._library, self._deadlines, self._uevents = root, library, deadlines, uevents
        self._edits: EditsOf = edits or functools.partial(nvidia_edits, find=KnownFiles().find)
        self._added = dict(environment or {})
        self._clock = clock or SystemClock()
        self._channel: Channel | None = None
        self._watches: set[Watch] = set()
        self._streams: set[Stream] = set()
        self._devices: dict[str, GpuDevice] = {}
        self._instances: dict[str, tuple[int, int]] = {}
        """Partition → its GPU instance and compute instance, which its device files are named by."""
        self._starts: dict[tuple[str, int], int] = {}
        """Device and GPU instance → its first memory slice: the driver's events name it so."""
        self._let_go = 0
        self._asked_to_load = False
        """For the kernel's module for CUDA's memory, which is asked once."""

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the processes that ask the driver, or hang in it."""
        return self._channel.pids if self._channel is not None else ()

    async def discover(self) -> tuple[GpuDevice, ...]:
        if not self._is_here():
            self._devices = {}
            return ()
        if not self._asked_to_load:
            self._asked_to_load = True
            await memory_module.load(self._environment(), root=self._root, deadline_s=self._deadlines.load_s)
        answer = await self._call("discover", self._deadlines.discover_s)
        devices = records.devices_of(answer, self._root)
        if answer["lost"]:
            self._retire()
        for words in answer["unreadable"]:
            log.warning("a GPU does not answer its driver and is left out", error=words)
        if not devices and not answer["lost"] and (count := list(presence.pci_devices(self._root).values()).count("nvidia")):
            raise Unavailable(
                f"NVIDIA's driver knows none of the {count} devices on the bus",
                mend="see the kernel's log for NVRM: as a rule the driver does not support them, or they failed to start",
            )
        self._devices = {device.id: device for device in devices}
        return devices

    async def partitions(self, device: str) -> tuple[GpuPartition, ...]:
        answer = await self._call("partitions", self._deadlines.partitions_s, device=device)
        self._instances |= {each["id"]: tuple(each["instances"]) for each in answer if each["id"]}
        self._starts = {key: start for key, start in self._starts.items() if key[0] != device}
        self._starts |= {(device, each["instances"][0]): each["start"] for each in answer}
        return msgspec.convert(answer, tuple[GpuPartition, ...])

    async def make_partition(self, device: str, profile: str, start: int) -> GpuPartition:
        answer = await self._call("make_partition", self._deadlines.change_s, device=device, profile=profile, start=start)
        self._instances[answer["id"]] = tuple(answer["instances"])
        self._starts[device, answer["instances"][0]] = start
        return msgspec.convert(answer, GpuPartition)

    async def remove_partition(self, device: str, start: int) -> None:
        await self._call("remove_partition", self._deadlines.change_s, device=device, start=start)

    async def samples(self) -> tuple[GpuSample, ...]:
        """Return what every device does now, and every MIG partition under its own id."""
        if not self._is_here():
            return ()
        answer = await self._call("samples", self._deadlines.samples_s)
        return msgspec.convert(answer, tuple[GpuSample, ...], strict=False)  # the keys of JSON's objects are text

    async def suspend(self, pid: int) -> None:
        await self._move(checkpoint.suspend, pid)

    async def resume(self, pid: int) -> None:
        await self._move(checkpoint.resume, pid)

    async def _move(self, move: Callable[[int, Mapping[str, str]], Awaitable[None]], pid: int) -> None:
        try:
            await move(pid, self._environment())
        except checkpoint.CheckpointUnsupported as error:
            raise Unsupported(str(error)) from None
        except checkpoint.CheckpointError as error:
            raise Unavailable(str(error)) from None

    async def reset(self, device: str) -> None:
        async with self.let_go():
            await resetting.reset(device, self._environment(), root=self._root, deadline_s=self._deadlines.reset_s)
        self._retire()

    def edits(self, grants: Sequence[GpuGrant], capabilities: Collection[GpuCapability], partitions: Sequence[str]) -> Edits:
        return self._edits(grants, capabilities, partitions, self._devices, instances=self._instances, root=self._root)

    async def events(self) -> AsyncIterator[DeviceEvent]:
        stream, task, watch, said = Stream(), None, None, ""
        self._streams.add(stream)
        try:
            while True:
                try:
                    if task is None and self._is_here():
                        watch = self._watch(stream)
                        task = asyncio.create_task(watch.run())
                        task.add_done_callback(lambda _: stream.put(None))
                except Unavailable as error:
                    if str(error) != said:
                        said = str(error)
                        yield DeviceEvent(trouble=Trouble.SILENT, message=said, mend=error.mend or "", at=self._clock.now())
                try:
                    async with asyncio.timeout(self._deadlines.again_s if task is None else None):
                        event = await stream.next()
                except TimeoutError:
                    continue  # the driver may have been loaded meanwhile
                if event is None:
                    break
                if event.trouble in _CHANGES:
                    self._retire()
                yield event
            if task is not None and task.done():
                task.result()
        finally:
            self._streams.discard(stream)
            if task is not None and watch is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                self._watches.discard(watch)
                await watch.close(self._deadlines.close_s)

    @contextlib.asynccontextmanager
    async def let_go(self) -> AsyncIterator[None]:
        """Hold no device open while inside: a device can be reset, or given to another kernel driver, only then.

        Calls raise Unavailable meanwhile; events go on afterwards, and what came in between is seen by the next `discover`.
        """
        self._let_go += 1
        try:
            for watch in tuple(self._watches):
                watch.pause()
            if self._channel is not None:
                await self._channel.close(self._deadlines.close_s)
            for watch in tuple(self._watches):
                await watch.close(self._deadlines.close_s)
            yield
        finally:
            self._let_go -= 1
            if not self._let_go:
                for watch in tuple(self._watches):
                    watch.go_on()

    async def close(self) -> None:
        """End the workers and the streams of events. Of a worker that hangs in the driver nothing can be done but to let it go."""
        for stream in tuple(self._streams):
            stream.put(None)
        for watch in tuple(self._watches):
            watch.pause()
            await watch.close(self._deadlines.close_s)
        if self._channel is not None:
            await self._channel.close(self._deadlines.close_s)

    def _watch(self, stream: Stream) -> Watch:
        watch = Watch(
            lambda: self._start("events"),
            stream=stream,
            known={device.id: device.pci for device in self._devices.values()},
            root=self._root,
            clock=self._clock,
            start_s=self._deadlines.start_s,
            quiet_s=self._deadlines.quiet_s,
            uevents=self._uevents,
            start_of=lambda device, instance: self._starts.get((device, instance)),
        )
        self._watches.add(watch)
        if self._let_go:
            watch.pause()
        return watch

    def _is_here(self) -> bool:
        """Say whether there is anything to ask. Raises Unavailable where there are devices, and not all that it takes."""
        kernel = presence.driver_version(self._root)
        library = presence.library_directory(self._root, os.environ) if self._library == "pynvml" else ""
        if kernel and library is None:
            raise records.library_missing(kernel)
        if not kernel and library is not None and any(name != "vfio-pci" for name in presence.pci_devices(self._root).values()):
            raise records.driver_not_loaded()
        return bool(kernel)

    def _start(self, mode: str) -> tuple[list[str], dict[str, str]]:
        self._must_hold()
        return command(self._library, mode), self._environment()

    def _must_hold(self) -> None:
        if self._let_go:
            raise Unavailable("NVIDIA's devices are set aside for a moment: one is being reset, or given to another driver")

    def _environment(self) -> dict[str, str]:
        """Return what a process that speaks to the driver runs with."""
        return environment_of({**os.environ, **self._added}, presence.library_directory(self._root, os.environ) or "")

    async def _call(self, call: str, deadline_s: float, **arguments: Any) -> Any:
        self._must_hold()
        if self._channel is None:
            self._channel = Channel(lambda: self._start("calls"), clock=self._clock, start_s=self._deadlines.start_s)
        try:
            return await self._channel.call(call, deadline_s, **arguments)
        except Refused as refused:
            raise records.error_of(refused.error, self._root) from None

    def _retire(self) -> None:
        # What NVML knows in a running worker is what it saw at its start: the next one sees what is there by then.
        if self._channel is not None:
            self._channel.retire()
