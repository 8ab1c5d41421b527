"""A driver and its devices in memory: faithful to the port, deterministic, and broken on demand. For tests and the simulator.

Time is the event loop's, so that on a loop with virtual time nothing here waits for real. What a fault does is what the real thing
does: an error is an event, a lost device is not discovered any more, a hung driver does not answer.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Collection, Sequence

from msgspec import Struct
from msgspec.structs import replace

from atoll.devices.fake_mig import MigBoard
from atoll.devices.fake_models import MODELS, FakeModel, device_nodes, make_devices
from atoll.devices.xid import classify_xid
from atoll.model.devices import (
    GpuDevice,
    GpuGrant,
    GpuHealth,
    GpuPartition,
    GpuSample,
    GpuSharing,
    GpuVendor,
)
from atoll.model.errors import Conflict, Invalid, NotFound, Unavailable, Unsupported
from atoll.model.ports.clock import Clock, SystemClock
from atoll.model.ports.devices import DeviceEvent, DeviceNode, Edits, FileMount, Trouble
from atoll.model.spec import GpuCapability

__all__ = ["CALL_S", "DEVICES_MAX", "MODELS", "FakeHardware", "FakeModel"]

DEVICES_MAX = 8
CALL_S = 5.0
"""A driver that hangs honestly is given up after this long, as the port demands; `call_s` sets another bound."""


class _Process(Struct, kw_only=True):
    device: str
    memory_bytes: int
    start: int | None
    """The partition that it is in."""


class FakeHardware:
    """`count` devices of one model. `mig` names those in MIG mode (by number); `nvlink` joins every two by so many links."""

    def __init__(
        self,
        model: str = "H100-80GB",
        count: int = 1,
        *,
        mig: bool | Collection[int] = False,
        nvlink: int = 0,
        driver: str = "580.159.04",
        cuda: str = "13.0",
        libraries: tuple[FileMount, ...] = (),
        name: str = "fake",
        clock: Clock | None = None,
        call_s: float = CALL_S,
    ) -> None:
        if not 1 <= count <= DEVICES_MAX:
            raise Invalid(f"count: {count} is not within 1 to {DEVICES_MAX}", field="count")
        self._model = MODELS[model]
        self.vendor = self._model.vendor
        self._clock = clock or SystemClock()
        self._driver = driver
        self._libraries = libraries
        in_mig = set(range(count)) if mig is True else set(mig or ())
        if in_mig and not self._model.mig:
            raise Invalid(f"{model} has no MIG mode", field="mig")
        made = make_devices(model, count, in_mig=in_mig, nvlink=nvlink, driver=driver, cuda=cuda, name=name)
        self._devices: dict[str, GpuDevice] = {device.id: device for device in made}
        self._boards = {device.id: MigBoard(device.id, device.profiles) for device in made}
        self._lost: set[str] = set()
        self._mismatch = ""
        self._half_makes = 0
        self._hangs_until: float | None = None
        self._honest = True
        self._call_s = call_s
        self._unhung = asyncio.Event()
        self._processes: dict[int, _Process] = {}
        self._off: dict[int, _Process] = {}
        """Processes that were taken off their devices."""
        self.stubborn: set[int] = set()
        """Processes that do not let themselves be taken off their device."""
        self.half_off: set[int] = set()
        """Processes that are stopped to be taken off, and then do not leave: they wait until they are put back."""
        self.failed: set[int] = set()
        """Processes that can be neither taken off nor put back any more."""
        self.suspends = self.vendor is GpuVendor.NVIDIA
        """The driver can take processes off their devices."""
        self._suspending: asyncio.Event | None = None
        self.resets: list[str] = []
        """Devices that were reset through the port."""
        self.refuses_reset = ""
        """Why no device can be reset."""
        self._busy: dict[str, int] = {}
        self._told: collections.deque[DeviceEvent] = collections.deque()
        self._news = asyncio.Event()
        self.closed = False

    # the port

    async def discover(self) -> tuple[GpuDevice, ...]:
        await self._enter()
        return tuple(device for id, device in self._devices.items() if id not in self._lost)

    async def events(self) -> AsyncIterator[DeviceEvent]:
        while True:
            while self._told:
                yield self._told.popleft()
            self._news.clear()
            await self._news.wait()  # for ever, as the port says

    async def partitions(self, device: str) -> tuple[GpuPartition, ...]:
        await self._enter()
        return self._board(device).partitions()

    async def make_partition(self, device: str, profile: str, start: int) -> GpuPartition:
        await self._enter()
        board = self._board(device)
        if not board.profiles:
            raise Invalid(f"{device} is not in MIG mode", field="device")
        if self._half_makes:
            self._half_makes -= 1
            board.make(profile, start, half=True)
            raise Unavailable(f"{profile} at {start} of {device}: its compute instance could not be made")
        return board.make(profile, start)

    async def remove_partition(self, device: str, start: int) -> None:
        await self._enter()
        board = self._board(device)
        users = [pid for pid, process in self._processes.items() if process.device == device and process.start == start]
        if users:
            raise Conflict(f"the partition at {start} of {device} is used by process {users[0]}")
        board.remove(start)

    async def samples(self) -> tuple[GpuSample, ...]:
        await self._enter()
        return tuple(self._sample(id) for id in self._devices if id not in self._lost)

    async def suspend(self, pid: int) -> None:
        await self._enter()
        if not self.suspends:
            raise Unsupported("this driver cannot take a program off its device")
        if pid in self._off:
            return
        if pid not in self._processes or pid in self.stubborn:
            raise Unavailable(f"cannot stop it (process {pid}): it {'does not stop' if pid in self.stubborn else 'uses no device'}")
        if pid in self.failed:
            raise Unavailable(f"cannot suspend it (process {pid}): it has failed")
        process = self._processes.pop(pid)
        self._off[pid] = process
        self._busy[process.device] = 0
        if pid in self.half_off:
            raise Unavailable(f"cannot take it off its device (process {pid})")
        if self._suspending is not None:
            self._suspending.set()
            await asyncio.Event().wait()  # for ever, as told

    async def resume(self, pid: int) -> None:
        await self._enter()
        if not self.suspends:
            raise Unsupported("this driver cannot take a program off its device")
        if pid in self.failed:
            raise Unavailable(f"cannot resume it (process {pid}): it has failed")
        process = self._off.get(pid)
        if process is None:
            return
        if process.device in self._lost:
            raise Unavailable(f"cannot put process {pid} back: {process.device} is not there")
        if self._sample(process.device).memory_bytes + process.memory_bytes > self._devices[process.device].memory_bytes:
            raise Unavailable(f"cannot put process {pid} back: out of memory")
        self._processes[pid] = self._off.pop(pid)

    async def reset(self, device: str) -> None:
        await self._enter()
        self._board(device)
        users = [pid for pid, process in self._processes.items() if process.device == device]
        if users:
            raise Conflict(f"{device} is in use by process {users[0]}")
        if self.refuses_reset:
            raise Unavailable(self.refuses_reset)
        self.resets.append(device)
        self.begin_anew(device)

    def edits(self, grants: Sequence[GpuGrant], capabilities: Collection[GpuCapability], partitions: Sequence[str]) -> Edits:
        nodes: dict[str, DeviceNode] = {}
        names, visible, pci = [], [], []
        ids = iter(partitions)
        for grant in grants:
            device = self._devices.get(grant.device)
            if device is None or device.id in self._lost:
                raise Unsupported(f"{grant.device}: its device file is not there")
            partition = next(ids, "") if grant.sharing is GpuSharing.MIG else ""
            for node in device_nodes(device, grant, partition):
                nodes[node.path] = node
            visible.append(partition or device.id)
            names.append(f"{self.vendor}.com/gpu={partition or device.id}")
            if grant.sharing is GpuSharing.EXCLUSIVE:
                pci.append(device.pci)
        nvidia = self.vendor is GpuVendor.NVIDIA
        return Edits(
            nodes=tuple(nodes.values()),
            mounts=self._libraries if GpuCapability.COMPUTE in capabilities else (),
            env=(("NVIDIA_VISIBLE_DEVICES", ",".join(visible)), ("CUDA_VISIBLE_DEVICES", ",".join(visible))) if nvidia else (),
            devices=tuple(names),
            pci=tuple(dict.fromkeys(pci)),
            gvisor_driver=self._driver if nvidia and not partitions else "",
        )

    async def close(self) -> None:
        self.closed = True

    # what a test does to it

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._devices)

    def xid(self, device: str, code: int, *, start: int | None = None) -> None:
        """The driver reports an error number, of the partition that begins at `start` where it says so."""
        meaning = classify_xid(code)
        self.tell(meaning.trouble, device, f"XID {code}: {meaning.words}", code=code, mend=meaning.mend, start=start)

    def storm(self, device: str, n: int, code: int = 31) -> None:
        """The same error `n` times at once."""
        for _ in range(n):
            self.xid(device, code)

    def tell(self, trouble: Trouble, device: str, message: str, *, code: int = 0, mend: str = "", start: int | None = None) -> None:
        """The driver reports anything."""
        at = self._clock.now()
        self._told.append(DeviceEvent(trouble=trouble, device=device, start=start, code=code, message=message, mend=mend, at=at))
        self._news.set()

    def vanish(self, device: str, *, told: bool = True) -> None:
        """It falls off the bus: its processes end, its partitions are lost. `told`: the driver reports that (XID 79)."""
        self._lost.add(device)
        self._boards[device].clear()
        for pid in [pid for pid, process in self._processes.items() if process.device == device]:
            del self._processes[pid]
        if told:
            meaning = classify_xid(79)
            self.tell(Trouble.VANISHED, device, f"XID 79: {meaning.words}", code=79, mend=meaning.mend)

    def come_back(self, device: str) -> None:
        """It is there again, as after a reset."""
        self._lost.discard(device)
        self.begin_anew(device)

    def begin_anew(self, device: str) -> None:
        """It is reset: no partitions, no errors counted, rows remapped."""
        self._boards[device].clear()
        self.change(device, ecc_errors=0, remap_pending=False, health=GpuHealth.OK, reason="")

    def change(self, device: str, **fields: object) -> None:
        """Its driver says something else of it from now on (`ecc_errors`, `remap_pending`, `health` …)."""
        self._devices[device] = replace(self._devices[device], **fields)

    def driver_mismatch(self) -> None:
        """The driver's library was updated and its kernel module was not: nothing can be asked any more."""
        self._mismatch = f"driver and library differ: the kernel has {self._driver}, the library is of another version"

    def driver_change(self, driver: str) -> None:
        """Another driver is loaded, and answers; what ran on the devices has ended."""
        self._mismatch, self._driver = "", driver
        self._processes.clear()
        self._off.clear()
        for id in self._devices:
            self.change(id, driver=driver)
            self._boards[id].clear()

    def half_make_next_partition(self, times: int = 1) -> None:
        """The next partition fails half-way, and leaves its half behind; so do the `times - 1` after it."""
        self._half_makes = times

    def hang(self, seconds: float | None = None, *, honest: bool = False) -> None:
        """Nothing answers for so long (None: until `answer`). `honest`: each call is given up, as the port says."""
        self._hangs_until = float("inf") if seconds is None else self._now() + seconds
        self._honest = honest
        self._unhung.clear()

    def answer(self) -> None:
        """A hang is over."""
        self._hangs_until = None
        self._unhung.set()

    def use(self, device: str, pid: int, memory_bytes: int, *, start: int | None = None, busy_milli: int = 0) -> None:
        """A process uses the device, or its partition that begins at `start`."""
        self._processes[pid] = _Process(device=device, memory_bytes=memory_bytes, start=start)
        self._busy[device] = busy_milli

    def leave(self, pid: int) -> None:
        """The process has ended."""
        self._off.pop(pid, None)
        process = self._processes.pop(pid, None)
        if process is not None:
            self._busy[process.device] = 0

    def hang_suspends(self, reached: asyncio.Event | None) -> None:
        """Taking a process off its device does not come back though it is done, and sets `reached`; None: no more."""
        self._suspending = reached

    def partition_by_hand(self, device: str, profile: str, start: int) -> GpuPartition:
        """An operator makes a partition beside the node."""
        return self._board(device).make(profile, start)

    # inside

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _enter(self) -> None:
        if self._hangs_until is not None:
            left = self._hangs_until - self._now()
            bound = min(left, self._call_s) if self._honest else left
            try:
                async with asyncio.timeout(None if bound == float("inf") else max(0.0, bound)):
                    await self._unhung.wait()
            except TimeoutError:
                if left > bound:
                    raise Unavailable(f"the driver does not answer within {self._call_s:g} s") from None
                self._hangs_until = None
        else:
            await asyncio.sleep(0)
        if self._mismatch:
            raise Unavailable(self._mismatch, mend="restart the node, so that the kernel loads the driver of the library's version")

    def _board(self, device: str) -> MigBoard:
        if device not in self._boards or device in self._lost:
            raise NotFound(f"there is no device {device}")
        return self._boards[device]

    def _sample(self, id: str) -> GpuSample:
        mine = {pid: process.memory_bytes for pid, process in self._processes.items() if process.device == id}
        busy = self._busy.get(id, 0)
        return GpuSample(
            device=id,
            busy_milli=busy,
            memory_bytes=sum(mine.values()),
            power_milliwatts=70_000 + 600 * busy,
            temperature_c=30 + busy // 25,
            processes=mine,
            mig=self._devices[id].mig,
            driver=self._devices[id].driver,
        )
