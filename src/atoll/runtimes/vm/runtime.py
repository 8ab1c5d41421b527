"""What all virtual machines have in common; each kind is a small class over this one.

A kind gives the monitor's command, says how its socket leads to the guest's init, and how it pauses. The rest is here: jail,
limits, disks, start and end, commands, adoption by the next agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import struct
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import structlog

from atoll.model.copying import Copier
from atoll.model.errors import (
    AtollError,
    Conflict,
    DeadlineExceeded,
    Exhausted,
    Invalid,
    RuntimeFailed,
    Unavailable,
    Unsupported,
)
from atoll.model.ports.runtime import Box, Compatibility, Execution, Feature, Snapshot, Started
from atoll.model.records import Exit, Usage
from atoll.runtimes.box_record import BoxRecord
from atoll.runtimes.cgroup import Cgroups, Group
from atoll.runtimes.loop_disk import copy_written
from atoll.runtimes.oci import process as oci_process
from atoll.runtimes.oci_box import OciBoxes
from atoll.runtimes.oci_container import UNKNOWN_CODE, Container, cannot_run, failure
from atoll.runtimes.oci_runtime import EXECUTIONS_MAX, START_S_MAX, OciRuntime
from atoll.runtimes.shim import Launch
from atoll.runtimes.signals import signal_name, signal_number
from atoll.runtimes.snapshots import SNAPSHOT_DISK, abandon, begin, check_fit, load, refuse, seal
from atoll.runtimes.snapshots import failure as failure_to_write
from atoll.runtimes.users import User
from atoll.runtimes.vm.boxes import VmBoxes, VmPlan, load_plan, user_of
from atoll.runtimes.vm.channel import GuestChannel, Kind
from atoll.runtimes.vm.config import process_words, read_ending, refreshing
from atoll.runtimes.vm.execution import GuestExecution, start_beside
from atoll.runtimes.vm.files import GuestFiles
from atoll.runtimes.vm.jail import LOG, Jail, jail_command
from atoll.runtimes.vm.kernel import PLACES, GuestKernel, find_kernel, prepare_kernel
from atoll.runtimes.vm.volumes import start_server

BOOT_S_MAX = 60.0
"""From the monitor's start to the guest's first word, and as long again to the instance's process."""
CHANNEL_S_MAX = 10.0
STATS_S_MAX = 2.0
ASKED_MAX = 4
"""Commands that one guest is asked to start at once; more wait. Its silence keeps nobody but its own users waiting."""
MONITOR_PIDS_MAX = 128
_STATISTICS = struct.Struct("<5Q")
_WORDS_MAX = 300

log = structlog.get_logger()


class VmContainer(Container):
    """One machine, as this agent knows it."""

    channel: GuestChannel | None = None
    opening: asyncio.Lock | None = None
    asking: asyncio.Semaphore | None = None

    def read_exit(self) -> Exit:
        found = self.files.read_exit()
        if found is None:
            return Exit(code=UNKNOWN_CODE, at=time.time())
        status, at = found
        ending = read_ending(self.record.directory / "vm" / "disk.img")
        if ending is not None:
            oom = ending.killed_for_memory > 0
            if os.WIFSIGNALED(ending.status):
                number = os.WTERMSIG(ending.status)
                return Exit(code=128 + number, at=ending.at, signal=signal_name(number), oom=oom and number == 9)
            code = os.WEXITSTATUS(ending.status)
            return Exit(code=code, at=ending.at, oom=oom and code == 137)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return Exit(code=128 + number, at=at, signal=signal_name(number), oom=number == 9 and self.group.oom_kills() > 0)
        log.warning("vm.ended-without-a-word", instance=self.record.id, status=status, said=last_words(self.record.directory))
        return Exit(code=UNKNOWN_CODE, at=at)

    def close(self) -> None:
        super().close()
        self.channel = None


def last_words(directory: Path) -> str:
    """Return the end of what the monitor said."""
    try:
        return (directory / LOG).read_text(errors="replace").strip()[-_WORDS_MAX:]
    except OSError:
        return ""


class VmRuntime(OciRuntime):
    """A kind gives `name`, `slots`, `modules`, `probe`, what is abstract here, and `configure` where its monitor has an API."""

    features = frozenset({Feature.EXEC, Feature.TTY, Feature.PAUSE, Feature.RESIZE, Feature.FILES})
    container_kind = VmContainer
    monitor_pids: ClassVar[int] = MONITOR_PIDS_MAX
    takes_volumes: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]]
    """The kernel's modules that a guest of this kind needs."""

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
        """`kernels` are directories like `/`, with a kernel in `boot` and its modules in `lib/modules`.

        `cache` is where what depends on the node alone is kept, in `directory` if nothing else is said.
        """
        super().__init__(directory, binary=binary, cgroup=cgroup, userns=userns)
        self._kernels = tuple(kernels)
        self._cache = cache or directory
        self._kernel: GuestKernel | None = None
        self.boot_s_max = BOOT_S_MAX
        self._beside: set[GuestExecution] = set()

    @abstractmethod
    def overhead_bytes(self) -> int:
        """Return the memory that the monitor may have beyond its guest's."""

    @abstractmethod
    def jail(self, plan: VmPlan, kernel: GuestKernel, group: Group) -> Jail:
        """Return what the monitor is shown. Blocking."""

    @abstractmethod
    def monitor(self, plan: VmPlan) -> list[str]:
        """Return the monitor's command, with the paths of its jail."""

    async def configure(self, plan: VmPlan) -> None:
        """Tell the monitor, which has just been started, what its command did not. Raises RuntimeFailed."""

    @abstractmethod
    async def reach(self, directory: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a stream to the guest's init. Raises OSError while there is nobody."""

    @abstractmethod
    async def pause_machine(self, directory: Path) -> None: ...

    @abstractmethod
    async def resume_machine(self, directory: Path) -> None: ...

    def compatibility(self) -> Compatibility:
        """Return what this node's snapshots depend on. Blocking."""
        raise refuse(self.name)

    async def save_machine(self, plan: VmPlan, directory: Path) -> Sequence[str]:
        """Write the paused machine without its disk into files of `directory`, and return their names. Raises RuntimeFailed."""
        raise refuse(self.name)

    async def load_machine(self, container: VmContainer, plan: VmPlan) -> None:
        """Have the monitor, which has just been started, go on from `plan.snapshot`. Raises RuntimeFailed."""
        raise refuse(self.name)

    def check(self, box: Box) -> None:
        """Raises Unsupported for what this kind of machine cannot give."""
        if box.devices:
            raise Unsupported(f"{self.name} hands on no devices", mend="use isolation 'container'", field="resources.gpu")

    async def create(self, box: Box) -> None:
        self.check(box)
        if box.mounts and not self.takes_volumes:
            raise Unsupported(f"{self.name} takes no volumes", mend="use qemu, runc, crun, lxc or gvisor", field="volumes")
        await super().create(box)

    def kernel(self) -> GuestKernel:
        """Return the kernel that guests boot. Blocking. Raises Unsupported."""
        if self._kernel is None:
            self._kernel = prepare_kernel(self._cache / "kernels", find_kernel(self._kernels), self.modules)
        return self._kernel

    async def _start(self, boxes: OciBoxes, container: Container) -> Started:
        assert isinstance(boxes, VmBoxes)  # noqa: S101 - `_make_boxes` says so
        assert isinstance(container, VmContainer)  # noqa: S101 - `container_kind` says so
        record = container.record
        plan = await self._in_thread(load_plan, record.directory)
        launch = None
        try:
            command = await self._in_thread(self._command, boxes, plan)
            launch = Launch(command, stdio=None, output=record.directory / "shim.log")
            news = await launch.news(START_S_MAX)
            if news is None or news[0] != "pid":
                raise failure(record.directory / LOG, self._binary)
            container.watch(launch.ending, news[1])
            if plan.snapshot:
                await self.load_machine(container, plan)
            else:
                await self.configure(plan)
            await self._await_process(container, plan)
            if plan.snapshot:
                await self._refresh(container, plan)
            self._settle(container)
        except (AtollError, OSError, asyncio.CancelledError) as error:
            await asyncio.shield(self._undo(boxes, container, launch))
            if isinstance(error, OSError):
                raise RuntimeFailed(f"cannot start the instance: {error}") from None
            raise
        finally:
            if launch is not None:
                launch.close()
        return Started(pid=news[1], at=time.time())

    def _command(self, boxes: VmBoxes, plan: VmPlan) -> list[str]:
        group = boxes.open_group(plan.id, plan.limits)
        files = Path(plan.directory)
        groups = tuple(path for path in group.directories if (path / "cgroup.procs").exists())
        for volume in plan.volumes:
            start_server(volume, files, owner=plan.uid, groups=groups)
        jail = jail_command(self.jail(plan, self.kernel(), group), files / "pid", self.monitor(plan))
        shim = [
            "run",
            plan.netns or "-",
            plan.stdout,
            plan.stderr,
            str(files / "pid"),
            str(files / "exit"),
            str(files / "shim.lock"),
        ]
        return [*shim, "--", *jail]

    async def _await_process(self, container: VmContainer, plan: VmPlan) -> None:
        """Return when the instance's process runs, or has run. Raises RuntimeFailed with the reason why it does not."""
        name = plan.process["args"][0]
        assert container.shim is not None  # noqa: S101 - it has just been started
        try:
            channel = await self._open_channel(container, self.boot_s_max)
            async with asyncio.timeout(self.boot_s_max):
                why = await asyncio.shield(channel.first.started)
        except (DeadlineExceeded, TimeoutError):
            words = await self._in_thread(last_words, container.record.directory)
            raise RuntimeFailed(
                f"the guest did not answer within {self.boot_s_max:g} s. {words}", mend="see vmm.log; is the node overloaded?"
            ) from None
        except Unavailable:
            why = "the machine has ended"
        if why:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(container.shim.event.wait(), CHANNEL_S_MAX)
            ending = await self._in_thread(read_ending, plan.disk)
            if ending is None:
                words = await self._in_thread(last_words, container.record.directory)
                mend = "raise the memory limit" if container.group.oom_kills() else None
                raise RuntimeFailed(f"cannot run {name!r}: the machine ended before it ran. {words}", mend=mend)
            if not ending.started:
                raise cannot_run(name, ending.text or why)

    async def _refresh(self, container: VmContainer, plan: VmPlan) -> None:
        """Make a copy one of its own: it woke with its origin's randomness, clock, names and addresses. Raises RuntimeFailed."""
        try:
            channel = await self._open_channel(container, self.boot_s_max)
            told = refreshing(plan.id, plan.hostname, plan.link, entropy=os.urandom(64), now_ns=time.time_ns())
            await channel.ask(Kind.REFRESH, Kind.REFRESHED, told, deadline_s=self.boot_s_max)
        except (Unavailable, DeadlineExceeded) as error:
            raise RuntimeFailed(f"the copy could not be made one of its own: {error}", mend="see vmm.log") from None

    async def _undo(self, boxes: VmBoxes, container: VmContainer, launch: Launch | None) -> None:
        if launch is not None:
            await launch.abandon()
        await self._close_channel(container)
        container.close()
        await self._in_thread(boxes.clean, container.record)

    def _settle(self, container: Container) -> None:
        boxes = self._made
        assert isinstance(boxes, VmBoxes)  # noqa: S101 - an instance was found in it
        container.group.settle(boxes.limits_of(container.record.limits, booting=False))

    async def _open_channel(self, container: VmContainer, deadline_s: float) -> GuestChannel:
        container.opening = container.opening or asyncio.Lock()
        async with container.opening:
            if container.channel is None or container.channel.lost.is_set():
                directory, shim = container.record.directory, container.shim
                container.channel = await GuestChannel.open(
                    lambda: self.reach(directory), deadline_s=deadline_s, given_up=shim.event if shim else None
                )
                container.channel.stands_still = lambda: container.paused
            return container.channel

    async def _close_channel(self, container: VmContainer) -> None:
        channel, container.channel = container.channel, None
        if channel is not None:
            await channel.close()

    async def exec(
        self,
        id: str,
        argv: Sequence[str],
        *,
        env: Sequence[tuple[str, str]] = (),
        workdir: str | None = None,
        user: str | None = None,
        tty: bool = False,
        rows: int = 24,
        columns: int = 80,
    ) -> Execution:
        container = await self._machine(id)
        if not argv or any("\0" in part for part in argv):
            raise Invalid("no command to run, or a NUL character in it", field="command")
        if not container.running:
            raise Conflict(f"instance {id} does not run")
        self._beside = {execution for execution in self._beside if not execution.closed}
        if len(self._beside) >= EXECUTIONS_MAX:
            raise Exhausted(f"{EXECUTIONS_MAX} commands run beside instances on this node")
        plan = await self._in_thread(load_plan, container.record.directory)
        words = await self._in_thread(command_words, plan, argv, env, workdir, user, tty)
        container.asking = container.asking or asyncio.Semaphore(ASKED_MAX)
        async with container.asking:
            channel = await self._open_channel(container, CHANNEL_S_MAX)
            execution = await start_beside(channel, words, argv[0], (rows, columns) if tty else None)
        self._beside.add(execution)
        return execution

    async def signal(self, id: str, name: str) -> None:
        container = await self._machine(id)
        number = signal_number(name)
        if not container.started:
            raise Conflict(f"instance {id} was not started")
        if number == 9:
            await self.kill(id)  # at once, and even where the guest does not answer
        elif container.running:
            try:
                channel = await self._open_channel(container, CHANNEL_S_MAX)
            except Unavailable:
                return  # it has just ended
            await channel.send(Kind.SIGNAL, 0, number.to_bytes(4, "little"))

    async def pause(self, id: str) -> None:
        container = await self._machine(id)
        await self._running(id)
        await self.pause_machine(container.record.directory)
        container.paused = True

    async def resume(self, id: str) -> None:
        container = await self._machine(id)
        await self._running(id)
        await self.resume_machine(container.record.directory)
        container.paused = False
        if container.channel is not None:
            # Frames that came meanwhile are there, but the interrupt that tells of them was lost with the machine standing.
            await container.channel.send(Kind.NOTHING)

    async def snapshot(self, id: str, directory: Path) -> Snapshot:
        container = await self._machine(id)
        await self._running(id)
        plan = await self._in_thread(load_plan, container.record.directory)
        compatibility = await self._in_thread(self.compatibility)
        if plan.pci:
            raise Unsupported("a machine with a device of the node cannot be written down", mend="take it without the device")
        if plan.volumes:
            raise Unsupported(
                "a machine with volumes cannot be written down: their files are the node's", mend="take it without them"
            )
        await self._in_thread(begin, directory)
        try:
            names = await self._save(container, plan, directory)
            sealing = functools.partial(
                seal,
                directory,
                names,
                compatibility=compatibility,
                image=plan.image_digest,
                limits=plan.limits,
                networked=plan.link is not None,
            )
            return await self._in_thread(sealing)
        except BaseException as error:
            await asyncio.shield(self._in_thread(abandon, directory))
            if isinstance(error, OSError):
                raise failure_to_write(error) from None
            if isinstance(error, Unavailable | DeadlineExceeded):
                raise RuntimeFailed(f"the machine could not be written down: {error}", mend="see vmm.log") from None
            raise

    async def _save(self, container: VmContainer, plan: VmPlan, directory: Path) -> Sequence[str]:
        """Write machine and disk while it stands still, which it does no longer than that takes."""
        was_paused = container.paused
        if not was_paused:
            await self.pause_machine(container.record.directory)
            container.paused = True
        try:
            names = await self.save_machine(plan, directory)
            await self._in_thread(copy_written, plan.disk, directory / SNAPSHOT_DISK)
        finally:
            if not was_paused:
                await asyncio.shield(self.resume(plan.id))
        return (*names, SNAPSHOT_DISK)

    async def restore(self, box: Box, directory: Path) -> Started:
        self.check(box)
        if box.mounts:
            raise Unsupported("a copy of a snapshot takes no volumes", mend="make it without them", field="volumes")
        snapshot = await self._in_thread(load, directory)
        check_fit(snapshot, await self._in_thread(self.compatibility), box)
        boxes = await self._boxes()
        assert isinstance(boxes, VmBoxes)  # noqa: S101 - `_make_boxes` says so
        await self._create(boxes, box, functools.partial(boxes.make, snapshot=directory))
        try:
            return await self.start(box.id)
        except BaseException:
            await asyncio.shield(self.delete(box.id))
            raise

    async def usage(self, id: str) -> Usage:
        container = await self._machine(id)
        usage = await self._in_thread(container.usage, container.record.directory)
        pids, disk_bytes = (1 if container.running else 0), await self._in_thread(_written_bytes, container.record)
        if container.running and not container.paused:
            try:
                channel = await self._open_channel(container, STATS_S_MAX)
                told = await channel.ask(Kind.STATS, Kind.STATISTICS, deadline_s=STATS_S_MAX)
                if len(told) == _STATISTICS.size:
                    _, _, pids, disk_bytes, _ = _STATISTICS.unpack(told)
            except (Unavailable, DeadlineExceeded):
                pass  # what the node knows is told all the same
        limits = container.record.limits
        return Usage(
            instance=id,
            cpu_milli=usage.cpu_milli,
            memory_bytes=usage.memory_bytes,
            pids=min(pids, limits.pids),
            disk_bytes=min(disk_bytes, limits.disk_bytes),
        )

    async def root(self, id: str) -> int:
        await self._machine(id)
        raise Unsupported(
            f"the files of a virtual machine ({self.name}) cannot be reached from its node", mend="copy them, or use exec"
        )

    async def copier(self, id: str) -> Copier | None:
        container = await self._machine(id)
        if not container.running:
            raise Conflict(f"instance {id} does not run")

        async def start(way: str, path: str) -> GuestExecution:
            channel = await self._open_channel(container, CHANNEL_S_MAX)
            words = process_words(oci_process((way, path), (), "/", User(0, 0, ())), make_directory=False)
            return await start_beside(channel, words, f"a copy of {path}", None, kind=Kind.COPY)

        return GuestFiles(start, asyncio.get_running_loop())

    async def delete(self, id: str) -> None:
        container = self._containers.get(id)
        channel = container.channel if isinstance(container, VmContainer) else None
        await super().delete(id)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        for execution in self._beside:
            await execution.close()
        for container in self._containers.values():
            assert isinstance(container, VmContainer)  # noqa: S101 - `container_kind` says so
            await self._close_channel(container)
        await super().close()

    async def _machine(self, id: str) -> VmContainer:
        _, container = await self._find(id)
        assert isinstance(container, VmContainer)  # noqa: S101 - `container_kind` says so
        return container

    def _make_boxes(self) -> OciBoxes:
        return VmBoxes(
            self._directory,
            cgroup=self._cgroup,
            cgroups=Cgroups.detect(),
            slots=self.slots,
            overhead_bytes=self.overhead_bytes,
            monitor_pids=self.monitor_pids,
        )


def _written_bytes(record: BoxRecord) -> int:
    try:
        return (record.directory / "vm" / "disk.img").stat().st_blocks * 512
    except OSError:
        return 0


def command_words(
    plan: VmPlan, argv: Sequence[str], env: Sequence[tuple[str, str]], workdir: str | None, user: str | None, tty: bool
) -> bytes:
    """Return a command beside the instance's process, as the guest reads it. Raises ImageError for an unknown user."""
    own = plan.process
    who = own["user"]
    variables = [(name, value) for name, _, value in (entry.partition("=") for entry in own["env"])]
    if user is None:
        account = User(who["uid"], who["gid"], tuple(who.get("additionalGids", ())))
    else:
        account = user_of(Path(plan.image), user)
        variables = [*((name, value) for name, value in variables if name != "HOME"), ("HOME", account.home)]
    return process_words(oci_process(argv, [*variables, *env], workdir or own["cwd"], account, tty=tty), make_directory=False)
