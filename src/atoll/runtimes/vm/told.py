"""What machines have in common whose monitor is told everything over an HTTP API, and whose guest speaks over vsock.

A kind gives the requests. A monitor runs before its machine does: an agent that dies in between leaves one that nobody told
anything, which the next agent ends, so that the instance can be started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import tempfile
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import ClassVar

import structlog

from atoll.model.errors import AtollError, DeadlineExceeded, RuntimeFailed, Unavailable, Unsupported
from atoll.model.ports.runtime import Compatibility, Feature, Found, Started
from atoll.runtimes.box_record import BoxRecord
from atoll.runtimes.oci_box import OciBoxes
from atoll.runtimes.oci_container import Container
from atoll.runtimes.signals import signal_number
from atoll.runtimes.snapshots import processor
from atoll.runtimes.vm.boxes import VmPlan, load_plan
from atoll.runtimes.vm.http_api import ANSWER_S_MAX, HttpApi
from atoll.runtimes.vm.hybrid_vsock import AGENT_PORT, SOCKET, LogCarriers, connect_to_guest
from atoll.runtimes.vm.kernel import PLACES
from atoll.runtimes.vm.runtime import VmContainer, VmRuntime, last_words
from atoll.runtimes.vm.written import Checked, clear, take_in

API_S_MAX = 10.0
"""From the monitor's start until it listens."""
BOOT_CALL_S_MAX = 30.0
SAVE_CALL_S_MAX = 60.0
LOGS_S_MAX = 5.0
"""How long the end of an instance waits for its output to be taken by the agent."""
SNAPSHOT_SLACK_BYTES = 16 << 20
"""What a snapshot's file has beside the guest's memory."""
_STEP_S = 0.002
_BOOTED = "booted"
"""In the box's directory, out of the monitor's reach."""

log = structlog.get_logger()


class ToldContainer(VmContainer):
    logs: LogCarriers | None = None

    async def ended(self) -> None:
        await super().ended()
        if self.logs is not None:
            await self.logs.finish(LOGS_S_MAX)

    def close(self) -> None:
        super().close()
        if self.logs is not None:
            self.logs.close()
            self.logs = None


class ToldRuntime(VmRuntime):
    container_kind = ToldContainer
    features = VmRuntime.features | {Feature.SNAPSHOT, Feature.FORK}
    answer_s = ANSWER_S_MAX
    """How long a monitor's answer is waited for."""
    written: ClassVar[tuple[str, ...]]
    """The files that its machine is written down in."""
    _version = ""

    def __init__(
        self,
        directory: Path,
        *,
        binary: str,
        cgroup: str = "/atoll",
        userns: bool | None = None,
        kernels: Sequence[Path] = PLACES,
        cache: Path | None = None,
    ) -> None:
        super().__init__(directory, binary=binary, cgroup=cgroup, userns=userns, kernels=kernels, cache=cache)
        self._checked = Checked()

    @abstractmethod
    def own(self, directory: Path) -> Path:
        """Return the directory that the monitor of the box in `directory` may write to, as the node sees it."""

    @abstractmethod
    def api(self, directory: Path) -> HttpApi: ...

    @abstractmethod
    async def answers(self, api: HttpApi) -> None:
        """Return when the monitor has answered a question. Raises as HttpApi.send."""

    @abstractmethod
    async def tell(self, api: HttpApi, plan: VmPlan) -> None:
        """Tell the monitor what its machine is. Raises as HttpApi.send."""

    @abstractmethod
    async def boot(self, api: HttpApi) -> None: ...

    @abstractmethod
    async def is_paused(self, api: HttpApi) -> bool: ...

    @abstractmethod
    async def press_power(self, api: HttpApi) -> None:
        """Ask the guest's kernel to end, where its init does not answer."""

    def begin(self, plan: VmPlan, pid: int) -> None:
        """Do what must be done to the monitor's process before the machine runs. Blocking. Raises OSError."""

    @abstractmethod
    async def write_down(self, api: HttpApi, plan: VmPlan) -> None:
        """Have the monitor write its paused machine into `written` below `written_in`. Raises as HttpApi.send."""

    @abstractmethod
    async def load(self, api: HttpApi, plan: VmPlan) -> None:
        """Have a monitor that was told nothing become the machine of the snapshot that it is shown, and go on. Raises likewise."""

    def base_of(self, plan: VmPlan, name: str) -> Path | None:
        """Return the file to which what the monitor writes under `name` are only the changes. Blocking."""
        return None

    def written_down(self, plan: VmPlan, directory: Path) -> None:
        """The machine is in `directory` now. Blocking."""

    def written_in(self, directory: Path) -> Path:
        """Return where the monitor of the box in `directory` writes its machine down, and finds that of which it is a copy."""
        return self.own(directory)

    async def configure(self, plan: VmPlan) -> None:
        async def make(api: HttpApi) -> None:
            await self.tell(api, plan)
            await self.boot(api)

        await self._bring_up(plan, make)

    async def load_machine(self, container: VmContainer, plan: VmPlan) -> None:
        await self._bring_up(plan, lambda api: self.load(api, plan))

    def compatibility(self) -> Compatibility:
        if not self._version:
            self._version = self.version()
        return Compatibility(self.name, self._version, processor(), os.uname().release)

    @abstractmethod
    def version(self) -> str:
        """Return the monitor's version. Blocking. Raises Unsupported."""

    async def save_machine(self, plan: VmPlan, directory: Path) -> Sequence[str]:
        place, bytes_max = self.written_in(Path(plan.directory)), plan.ram_bytes + SNAPSHOT_SLACK_BYTES
        await self._in_thread(clear, place, self.written)
        try:
            await self.write_down(self.api(Path(plan.directory)), plan)
            for name in self.written:
                base = self.base_of(plan, name)
                taking = functools.partial(take_in, place, name, directory / name, bytes_max=bytes_max, base=base)
                await self._in_thread(taking)
            await self._in_thread(self.written_down, plan, directory)
        finally:
            await asyncio.shield(self._in_thread(clear, place, self.written))
        return self.written

    async def _bring_up(self, plan: VmPlan, make: Callable[[HttpApi], Awaitable[None]]) -> None:
        """Have the monitor, which has just been started, run the machine that `make` tells it of. Raises RuntimeFailed."""
        directory = Path(plan.directory)
        container = self._told(plan.id)
        api = self.api(directory)
        try:
            if container.first is not None:
                await self._in_thread(self.begin, plan, container.first.pid)
            container.logs = self._carriers(plan)
            await self._await_api(api, container)
            await make(api)
        except (Unavailable, DeadlineExceeded) as error:
            words = await self._in_thread(last_words, directory)
            raise RuntimeFailed(f"{error}. {words}".strip(), mend="see vmm.log in the instance's directory") from None
        await self._in_thread((directory / _BOOTED).touch)

    async def _start(self, boxes: OciBoxes, container: Container) -> Started:
        plan = await self._in_thread(load_plan, container.record.directory)
        if plan.snapshot:
            await self._in_thread(self._checked.check, Path(plan.snapshot))
        await self._in_thread(lambda: (container.record.directory / _BOOTED).unlink(missing_ok=True))
        return await super()._start(boxes, container)

    async def _await_api(self, api: HttpApi, container: Container) -> None:
        step_s, loop = _STEP_S, asyncio.get_running_loop()
        deadline = loop.time() + API_S_MAX
        while True:
            try:
                await self.answers(api)
                return
            except Unavailable:
                if loop.time() > deadline or not container.running:
                    raise
            await asyncio.sleep(step_s)
            step_s = min(step_s * 1.5, 0.05)

    def _carriers(self, plan: VmPlan) -> LogCarriers:
        return LogCarriers(self.own(Path(plan.directory)), stdout=Path(plan.stdout), stderr=Path(plan.stderr), uid=plan.uid)

    async def reach(self, directory: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await connect_to_guest(self.own(directory) / SOCKET, AGENT_PORT)

    async def _adopt(self, boxes: OciBoxes, record: BoxRecord) -> Found:
        found = await super()._adopt(boxes, record)
        container = self._told(record.id)
        if found.pid is None or container.logs is not None:
            return found
        if not (record.directory / _BOOTED).exists():
            await self._give_up(boxes, container)
            return Found(id=record.id, pid=None, exit=None)
        plan = await self._in_thread(load_plan, record.directory)
        try:
            container.logs = self._carriers(plan)
            container.paused = await self.is_paused(self.api(record.directory))
        except AtollError as error:
            log.warning("vm.adopted-in-part", instance=record.id, error=str(error))
        return found

    async def _give_up(self, boxes: OciBoxes, container: ToldContainer) -> None:
        if container.first is not None:
            container.first.signal(signal.SIGKILL)
        await self._in_thread(container.group.kill)
        await container.ended()
        container.close()
        await self._in_thread(boxes.clean, container.record)

    async def signal(self, id: str, name: str) -> None:
        try:
            await super().signal(id, name)
        except DeadlineExceeded:
            container = self._told(id)
            if signal_number(name) not in {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}:
                raise
            log.warning("vm.guest-is-silent", instance=id)
            with contextlib.suppress(Unavailable):  # it has just ended
                await self.press_power(self.api(container.record.directory))

    def _told(self, id: str) -> ToldContainer:
        container = self._containers[id]
        assert isinstance(container, ToldContainer)  # noqa: S101 - `container_kind` says so
        return container


def file_bytes(plan: VmPlan) -> int:
    """Return the size that no file of the monitor's may grow over: its disk's, or that of its memory in a snapshot. Blocking."""
    return max(plan.disk.stat().st_size, plan.ram_bytes + SNAPSHOT_SLACK_BYTES)


def check_kvm() -> None:
    """Raises Unsupported where there is no KVM to open: a monitor of this family emulates no processor."""
    try:
        with open("/dev/kvm", "r+b", buffering=0):
            return
    except OSError as error:
        raise Unsupported(
            f"/dev/kvm cannot be opened: {error.strerror}",
            mend="modprobe kvm_intel or kvm_amd, or allow nested virtualization of this machine; qemu does without",
        ) from None


def boots(run: Callable[[Path], str], name: str) -> None:
    """Raises Unsupported with what `run`, which boots a machine in a directory, returns as the reason why that failed."""
    check_kvm()
    with tempfile.TemporaryDirectory(prefix="atoll-probe-") as directory:
        why = run(Path(directory))
    if why:
        raise Unsupported(
            f"{name} boots no guest with this machine's KVM: {why}", mend="use qemu, which emulates, or gvisor or runc"
        )


def program(name: str, mend: str) -> Path:
    """Return where the program is. Raises Unsupported."""
    found = shutil.which(name)
    if found is None:
        raise Unsupported(f"{name} is not installed", mend=mend)
    return Path(found).resolve()
