"""The gVisor runtime: an instance's calls are answered by a kernel of its own, in user space, with a network stack of its own.

What runs inside is unknown to the node's kernel: signals and pauses go by way of gVisor's tool. The sandbox is a process of
nobody under gVisor's own seccomp filter; its files are served by a second process in a root of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

from msgspec import structs

from atoll.model.errors import Conflict, DeadlineExceeded, Exhausted, Invalid, RuntimeFailed, Unsupported
from atoll.model.ports.runtime import Box, Compatibility, Execution, Feature, Snapshot, Started
from atoll.model.spec import RuntimeName
from atoll.runtimes.exec_tool import Inner
from atoll.runtimes.native import shim_path
from atoll.runtimes.netns_link import keep_link
from atoll.runtimes.nvproxy import check_edits, gvisor_drivers, options, proxied
from atoll.runtimes.oci import USHER
from atoll.runtimes.oci_box import OciBoxes
from atoll.runtimes.oci_container import Container, used_bytes
from atoll.runtimes.oci_exec import OciExecution
from atoll.runtimes.oci_probe import check_machine, once_per_boot, run_once, version_of
from atoll.runtimes.oci_runtime import END_S_MAX, START_S_MAX, OciRuntime
from atoll.runtimes.signals import signal_number
from atoll.runtimes.snapshots import (
    SNAPSHOT_DISK,
    abandon,
    begin,
    check_content,
    check_fit,
    failure,
    give_machine_id,
    load,
    processor,
    seal,
)
from atoll.runtimes.vm.execution import GuestExecution

MEMORY_BYTES_MIN = 48 << 20
"""The sandbox's own memory, some 20 to 30 MiB, counts against an instance's limit."""
THREADS_BESIDE = 192
"""Threads of gVisor's kernel and file server, and a process of theirs for each address space inside."""
TOOL_S_MAX, CHECKPOINT_S_MAX = 10.0, 60.0
CHECKPOINT_BYTES_PER_S_MIN = 16 << 20
"""A checkpoint may take longer than `CHECKPOINT_S_MAX` by as much as its bytes take at this rate."""
SNAPSHOT_SLACK_BYTES = 16 << 20
"""Of a snapshot, beside the instance's memory and disk: what gVisor's kernel says of itself, and the manifest."""
_WORDS_MAX = 300
_END_S = 1.0
_NETNS_FILE, _IMAGE_FILE, _RESTORE_FILE = "netns", "image", "restore"
"""In the box's directory: its namespace, the digest of its image, the snapshot that its next start goes on from."""
_COVERED = Path("/proc/sys/net")
"""Since Linux 6.11 every network namespace shows files here by which runsc knows the node's own, where it will not run."""


class Sandbox(Container):
    """A sandbox that is written down ends with that, and another goes on in its place: for its users there was no end."""

    between: asyncio.Event | None = None
    """Set when the one that goes on runs, or does not."""

    @property
    def running(self) -> bool:
        return self.between is not None or super().running

    async def ended(self) -> None:
        await super().ended()
        while self.between is not None:
            await self.between.wait()
            await super().ended()


class GvisorBoxes(OciBoxes):
    """All boxes of gVisor on this node."""

    usher = USHER


class GvisorRuntime(OciRuntime):
    """Runs instances with runsc, as root, on the platform that runsc prefers.

    There is no user namespace of ours: runsc makes its own, and cannot where a part of /proc is covered.
    """

    name = RuntimeName.GVISOR
    features = OciRuntime.features - {Feature.RESIZE} | {Feature.SNAPSHOT, Feature.FORK}
    """runsc of 2022 does not tell the size of a terminal inside; and after a probe, one without nvproxy hands on no GPU."""
    boxes_kind: type[OciBoxes] = GvisorBoxes
    container_kind = Sandbox
    slots = range(2560, 3072)
    threads_beside = THREADS_BESIDE
    own_tmp = True
    places_mounts = False

    def __init__(
        self,
        directory: Path,
        *,
        binary: str = "runsc",
        cgroup: str = "/atoll",
        userns: bool | None = None,
        nvproxy_driver: str = "",
    ) -> None:
        """`nvproxy_driver` is what an operator wants runsc to take the node's driver for, at his own risk."""
        if userns:
            raise Unsupported("gVisor has no user namespaces beside its own", mend="use runc, crun or lxc")
        super().__init__(directory, binary=binary, cgroup=cgroup, userns=False)
        self._nvproxy_driver = nvproxy_driver
        self._beside: dict[str, set[OciExecution | GuestExecution]] = {}
        self._held_back: dict[str, list[int]] = {}  # signals to what is paused, which runsc refuses

    async def probe(self) -> str:
        return await asyncio.to_thread(self._probe)

    def _probe(self) -> str:
        check_machine((self._binary, "runsc"))
        version = once_per_boot(self._directory, self._binary, self._try)
        if not gvisor_drivers(self._binary, self._directory):
            self.features = type(self).features - {Feature.GPU}
        return version

    def _try(self) -> str:
        version = version_of(self._binary, package="runsc", oldest=(0, 0))
        why = run_once(self._started_command, self._cgroup)
        if why:
            raise Unsupported(f"gVisor runs nothing on this machine: {why}", mend="install a newer runsc")
        return version

    async def create(self, box: Box) -> None:
        if box.limits.memory_bytes < MEMORY_BYTES_MIN:
            raise Invalid(
                f"a sandbox of gVisor needs {MEMORY_BYTES_MIN >> 20} MiB of memory, its own kernel included",
                mend=f"give it {MEMORY_BYTES_MIN >> 20} MiB or more",
                field="resources.memory",
            )
        if box.netns is not None and not box.netns.exists():
            raise RuntimeFailed(f"there is no network namespace {box.netns}", mend="the node's network made none, or lost it")
        if box.devices:
            drivers = await self._in_thread(gvisor_drivers, self._binary, self._directory)
            check_edits(box.devices, drivers, self._nvproxy_driver)
            box = structs.replace(box, devices=proxied(box.devices))
        await super().create(box)
        await self._note(box)

    async def start(self, id: str) -> Started:
        _, container = await self._find(id)
        file = container.record.directory / _NETNS_FILE
        if not container.started and file.exists():
            await self._in_thread(keep_link, Path(file.read_text()), self._directory / "links")
        return await super().start(id)

    def tool(self, boxes: OciBoxes, log_path: Path) -> list[str]:
        return self._started_command(boxes.state, log_path)

    def options(self, box: Box) -> list[str]:
        return options(box.devices, self._nvproxy_driver)

    def command(self, state: Path, log_path: Path) -> list[str]:
        # Files are copied in and out from the node's side, and their space is bounded there: no cache, no layer of its own.
        return [*super().command(state, log_path), "--file-access=shared", "--overlay2=none"]

    def _started_command(self, state: Path, log_path: Path) -> list[str]:
        covered = [f"+{_COVERED}"] if _COVERED.is_dir() else []
        return [str(shim_path()), "private", *covered, "--", *self.command(state, log_path)]

    def inner(self, boxes: OciBoxes, id: str) -> Inner | None:
        return _Signals(self, boxes, id)

    async def ends(self, id: str) -> bool:
        """Return whether the instance has ended, or does so in this moment."""
        container = self._containers.get(id)
        if container is not None and container.running:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(container.ended(), _END_S)
        return container is None or not container.running

    async def signal(self, id: str, name: str) -> None:
        boxes, container = await self._find(id)
        number = signal_number(name)
        if not container.started:
            raise Conflict(f"instance {id} was not started")
        if number == 9:
            await self.kill(id)  # at once, and even where the sandbox does not answer
        elif container.running:
            try:
                await self.ask(boxes, id, "kill", id, str(number))
            except RuntimeFailed as error:
                if "state paused" not in str(error):
                    raise
                self._held_back.setdefault(id, []).append(number)

    async def pause(self, id: str) -> None:
        container = await self._running(id)
        boxes, _ = await self._find(id)
        await self.ask(boxes, id, "pause", id)
        container.paused = True

    async def _is_paused(self, boxes: OciBoxes, id: str) -> bool:
        """Return what runsc's own record says: who had it stand still may have been an earlier agent."""
        said = await self.ask(boxes, id, "state", id)
        return bool(said) and json.loads(said)["status"] == "paused"

    async def resume(self, id: str) -> None:
        container = await self._running(id)
        boxes, _ = await self._find(id)
        await self.ask(boxes, id, "resume", id)
        container.paused = False
        for number in self._held_back.pop(id, ()):
            await self.ask(boxes, id, "kill", id, str(number))

    async def exec(self, id: str, argv: Sequence[str], **options: Any) -> Execution:
        _, container = await self._find(id)
        between = container.between if isinstance(container, Sandbox) else None
        if between is not None:
            await asyncio.wait_for(between.wait(), START_S_MAX)
        execution = await super().exec(id, argv, **options)
        assert isinstance(execution, OciExecution | GuestExecution)  # noqa: S101 - the base makes no other
        self._beside[id] = {execution, *(other for other in self._beside.get(id, ()) if not other.closed)}
        return execution

    def run_command(self, boxes: OciBoxes, container: Container, extra: Sequence[str]) -> list[str]:
        line = super().run_command(boxes, container, extra)
        file = container.record.directory / _RESTORE_FILE
        if file.exists():
            at = line.index("run")
            line[at : at + 1] = ["restore", f"--image-path={file.read_text()}"]
        return line

    def _compatibility(self) -> Compatibility:
        version = version_of(self._binary, package="runsc", oldest=(0, 0))
        return Compatibility(self.name, version, processor(), os.uname().release)

    async def snapshot(self, id: str, directory: Path) -> Snapshot:
        boxes, container = await self._find(id)
        await self._running(id)
        assert isinstance(container, Sandbox)  # noqa: S101 - `container_kind` says so
        if any(not execution.closed for execution in self._beside.get(id, ())):
            raise Conflict(
                "commands run beside the instance, which gVisor cannot write down", mend="end them first, then try again"
            )
        box = container.record.directory
        compatibility = await self._in_thread(self._compatibility)
        await self._in_thread(begin, directory)
        try:
            size_bytes = await self._in_thread(check_room, boxes, container, directory)
            await self._write_down(boxes, container, directory, size_bytes)
            sealing = functools.partial(
                seal,
                directory,
                sorted(path.name for path in directory.iterdir()),
                compatibility=compatibility,
                image=(box / _IMAGE_FILE).read_text(),
                limits=container.record.limits,
                networked=(box / _NETNS_FILE).exists(),
            )
            return await self._in_thread(sealing)
        except BaseException as error:
            await asyncio.shield(self._in_thread(abandon, directory))
            if isinstance(error, OSError):
                raise failure(error) from None
            raise

    async def _write_down(self, boxes: OciBoxes, container: Sandbox, directory: Path, size_bytes: int) -> None:
        """Checkpoint, which ends the sandbox, take its disk, and have another go on in its place.

        runsc ends it where the checkpoint fails too (`--leave-running` starts another from what was written), so that all that can
        be known to be in the way is looked for first, and it is given the time that it takes.
        """
        id = container.record.id
        paused = await self._is_paused(boxes, id)
        container.between = between = asyncio.Event()
        try:
            if container.attendance is not None:
                await container.attendance.end()
            deadline_s = CHECKPOINT_S_MAX + size_bytes / CHECKPOINT_BYTES_PER_S_MIN
            await self.ask(boxes, id, "checkpoint", f"--image-path={directory}", id, deadline_s=deadline_s)
            if paused:  # what stands still does not take in that it was ended
                await self._in_thread(container.group.kill)
            await asyncio.wait_for(Container.ended(container), END_S_MAX)
            try:
                await self._in_thread(boxes.scratch.write_down, container.record.disk, directory / SNAPSHOT_DISK)
            finally:
                await asyncio.shield(self._go_on(boxes, container, directory, paused=paused))
        finally:
            container.between = None
            between.set()

    async def _go_on(self, boxes: OciBoxes, container: Sandbox, directory: Path, *, paused: bool) -> None:
        box = container.record.directory
        container.close()
        await self._in_thread(boxes.clean, container.record)
        (box / _RESTORE_FILE).write_text(str(directory))
        if (box / _NETNS_FILE).exists():
            await self._in_thread(keep_link, Path((box / _NETNS_FILE).read_text()), self._directory / "links")
        try:
            async with self._starts:
                await self._start(boxes, container)
        finally:
            (box / _RESTORE_FILE).unlink(missing_ok=True)
        if paused:
            await self.ask(boxes, container.record.id, "pause", container.record.id)

    async def restore(self, box: Box, directory: Path) -> Started:
        snapshot = await self._in_thread(load, directory)
        check_fit(snapshot, await self._in_thread(self._compatibility), box)
        await self._in_thread(check_content, directory, snapshot)
        boxes = await self._boxes()
        await self._create(boxes, box, functools.partial(boxes.make, snapshot=directory))
        try:
            await self._note(box)
            await self._in_thread(give_machine_id, boxes.root(box.id), box.id)
            (box.directory / _RESTORE_FILE).write_text(str(directory))
            started = await self.start(box.id)
            (box.directory / _RESTORE_FILE).unlink(missing_ok=True)
            return started
        except BaseException:
            await asyncio.shield(self.delete(box.id))
            raise

    async def _note(self, box: Box) -> None:
        """Write down what a later start or snapshot needs to know of a box."""
        (box.directory / _IMAGE_FILE).write_text(box.image.digest)
        if box.netns is not None:
            (box.directory / _NETNS_FILE).write_text(str(box.netns))

    async def delete(self, id: str) -> None:
        self._held_back.pop(id, None)
        self._beside.pop(id, None)
        await super().delete(id)

    async def root(self, id: str) -> int:
        boxes, _ = await self._find(id)
        try:
            return os.open(boxes.root(id), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeFailed(f"cannot open the root of instance {id}: {error}") from None

    async def ask(self, boxes: OciBoxes, id: str, *arguments: str, deadline_s: float = TOOL_S_MAX) -> bytes:
        """Have the tool do something with the running instance; return what it says. One that has ended meanwhile is no error."""
        command = [*self.command(boxes.state, Path("/dev/null")), *arguments]
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
        try:
            async with asyncio.timeout(deadline_s):
                said, words = await process.communicate()
        except TimeoutError:
            raise DeadlineExceeded(f"the sandbox of instance {id} did not answer within {deadline_s:.0f} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        _, container = await self._find(id)
        if process.returncode != 0 and container.running:
            raise RuntimeFailed(f"runsc {arguments[0]} failed: {words.decode(errors='replace').strip()[-_WORDS_MAX:]}")
        return said


def check_room(boxes: OciBoxes, container: Container, directory: Path) -> int:
    """Return how many bytes a snapshot of the instance in `directory` may take. Raises Exhausted without the room. Blocking."""
    disk_bytes = used_bytes(boxes.directory / "scratch" / container.record.disk)
    size_bytes = SNAPSHOT_SLACK_BYTES + container.group.memory_bytes() + disk_bytes
    space = os.statvfs(directory)
    free_bytes = space.f_bavail * space.f_frsize
    if size_bytes > free_bytes:
        raise Exhausted(
            f"a snapshot of instance {container.record.id} may take {size_bytes >> 20} MiB, and the node's disk has"
            f" {free_bytes >> 20} MiB left",
            mend="remove snapshots, or free space on the node",
        )
    return size_bytes


class _Signals:
    """How commands in one sandbox get signals."""

    def __init__(self, runtime: GvisorRuntime, boxes: OciBoxes, id: str) -> None:
        self._runtime = runtime
        self._boxes = boxes
        self._id = id

    def command(self, process: str, number: int) -> list[str]:
        return [*self._runtime.command(self._boxes.state, Path("/dev/null")), "kill", "--pid", process, self._id, str(number)]

    async def gone(self) -> bool:
        return await self._runtime.ends(self._id)

    async def send(self, process: int, number: int) -> None:
        try:
            await self._runtime.ask(self._boxes, self._id, "kill", "--pid", str(process), self._id, str(number))
        except RuntimeFailed as error:
            if "no such process" not in str(error).lower():
                raise
