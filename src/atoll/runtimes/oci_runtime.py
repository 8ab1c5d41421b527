"""What the runtimes with an OCI command line (runc, crun, runsc) have in common; each is a small class over this one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog
from msgspec import structs

from atoll.model.copying import Copier
from atoll.model.errors import AtollError, Conflict, Exhausted, Invalid, NotFound, RuntimeFailed, Unsupported
from atoll.model.ports.runtime import Box, Execution, Feature, Found, Snapshot, Started
from atoll.model.records import Exit, Usage
from atoll.model.spec import RuntimeName
from atoll.runtimes.box_record import BoxRecord, check_id
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.entering import Entering
from atoll.runtimes.exec_tool import ExecTool, Inner, OciExecTool
from atoll.runtimes.moving import foretell
from atoll.runtimes.oci_box import ATTENDED, NETNS, OPTIONS, STDERR, STDOUT, OciBoxes, load_config
from atoll.runtimes.oci_container import Container, ending_of, failure
from atoll.runtimes.oci_exec import OciExecution, start_execution
from atoll.runtimes.oci_filter import BUNDLE, PRESERVE, handed, has_bundle
from atoll.runtimes.oci_launch import Place, process_of
from atoll.runtimes.shim import Launch, end_all
from atoll.runtimes.signals import signal_number
from atoll.runtimes.snapshots import refuse, why_no_checkpoints
from atoll.runtimes.usher import Attendance, Usher, bring_usher
from atoll.runtimes.vm.config import process_words
from atoll.runtimes.vm.execution import GuestExecution

T = TypeVar("T")

STARTS_MAX = 8
"""Starts and execs that run at once; more wait."""
EXECUTIONS_MAX = 256
THREADS_MAX = 8
START_S_MAX = 60.0
END_S_MAX = 10.0
SETTLE_S_MAX = START_S_MAX
SETTLE_STEP_S = 0.01
ADOPT_PAUSES_S = (1.0, 1.0, 0.0)
"""After each try to adopt a box: what is in the way may pass."""
TIDY_DELAY_S = 0.05
TOOL_LOG = "tool.log"
"""In the box's directory: what the tool says of a start."""

log = structlog.get_logger()


class OciRuntime:
    """`directory` is this runtime's own on the node; one agent at a time may use it.

    A subclass gives `name`, `slots` and `probe`, and `tool` where its command differs.
    With `userns=None`, user namespaces are used where the kernel and the file system of `directory` can shift ids.
    """

    name: RuntimeName
    slots: range
    """Its ranges of user ids: no two runtimes of a node share one."""
    own_tmp = False
    """Whether the tool would cover an empty /tmp of the image with one in memory."""
    places_mounts = True
    """Whether the tool takes along what is mounted below an instance's root before its start."""
    boxes_kind: type[OciBoxes] = OciBoxes
    container_kind: type[Container] = Container
    settle_s = SETTLE_S_MAX
    """How long a new agent waits for a start that an earlier one began."""
    threads_beside = 0
    """What runs in an instance's control group beside its processes; their limit is raised by as many."""
    features = frozenset({Feature.EXEC, Feature.TTY, Feature.PAUSE, Feature.RESIZE, Feature.FILES, Feature.GPU})

    def __init__(self, directory: Path, *, binary: str, cgroup: str = "/atoll", userns: bool | None = None) -> None:
        self._directory = directory
        self._binary = binary
        self._path: str | None = None
        self._cgroup = cgroup
        self._userns = userns
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix=binary)
        self._starts = asyncio.Semaphore(STARTS_MAX)
        self._containers: dict[str, Container] = {}
        self._executions: set[OciExecution | GuestExecution] = set()
        self._made: OciBoxes | None = None
        self._making = asyncio.Lock()
        self._tidying: asyncio.Task[None] | None = None

    def tool(self, boxes: OciBoxes, log_path: Path) -> list[str]:
        """Return the runtime's command with its global options; it logs JSON to `log_path`."""
        return self.command(boxes.state, log_path)

    def options(self, box: Box) -> list[str]:
        """Return the options of the tool that this box alone is started with; none of them has a space in it."""
        return []

    def inherited(self, id: str) -> Sequence[int]:
        """Return descriptors that the tool is started with, from 4 on; a box without a filter of ours may have some."""
        return ()

    def inner(self, boxes: OciBoxes, id: str) -> Inner | None:
        """Return how commands in the instance get signals, where not by the node's kernel."""
        return None

    def run_command(self, boxes: OciBoxes, container: Container, extra: Sequence[str]) -> list[str]:
        """Return what starts the instance, detached: it ends once the process runs and its id is in `container.files.pid`.

        `extra` is what the method `options` gave for its box.
        """
        record, files = container.record, container.files
        tool = [*self.tool(boxes, files.directory / TOOL_LOG), *extra]
        given = ["--bundle", str(files.directory / BUNDLE), *PRESERVE] if has_bundle(files.directory) else ["--bundle", record.path]
        return [*tool, "run", "--detach", *given, "--pid-file", str(files.pid), record.id]

    def exec_tool(self, boxes: OciBoxes, container: Container) -> ExecTool:
        """Return what starts commands beside the running instance."""
        id = container.record.id
        if has_bundle(container.files.directory):
            return Entering(container)
        return OciExecTool(lambda log_path: self.tool(boxes, log_path), id, self.inner(boxes, id))

    def failure(self, container: Container, command: str) -> RuntimeFailed:
        """Return why the tool, which has ended, could not start the instance."""
        return failure(container.files.directory / TOOL_LOG, command)

    def command(self, state: Path, log_path: Path) -> list[str]:
        """As `tool`, for any state directory."""
        self._path = self._path or shutil.which(self._binary)
        if self._path is None:
            raise Unsupported(f"{self._binary} is not installed", mend=f"apt-get install {self._binary}")
        return [self._path, "--root", str(state), "--log", str(log_path), "--log-format", "json"]

    async def create(self, box: Box) -> None:
        boxes = await self._boxes()
        await self._create(boxes, box, boxes.make)

    async def _create(self, boxes: OciBoxes, box: Box, make: Callable[[Box], BoxRecord]) -> None:
        check_id(box.id)
        making = asyncio.ensure_future(self._in_thread(make, box))
        try:
            record = await asyncio.shield(making)
        except asyncio.CancelledError:
            with contextlib.suppress(AtollError):
                await self._in_thread(boxes.remove, await making)
            raise
        self._containers[box.id] = self.container_kind(record, boxes.group(box.id))
        self._tidy_soon(boxes)

    async def start(self, id: str) -> Started:
        boxes, container = await self._find(id)
        if container.started:
            raise Conflict(f"instance {id} was started already", mend="delete it and create it again")
        async with self._starts:
            return await self._start(boxes, container)

    async def _start(self, boxes: OciBoxes, container: Container) -> Started:
        files, record = container.files, container.record
        config = load_config(files.directory)
        tool = self.run_command(boxes, container, config.annotations.get(OPTIONS, "").split())
        given = [config.annotations[name] for name in (NETNS, STDOUT, STDERR)]
        shim = ["run", *given, str(files.pid), str(files.exit), str(files.lock), "--", *tool]
        with handed(files.directory, boxes.filter, config.process) as descriptors:
            if descriptors:
                shim = ["filtered", str(files.directory / TOOL_LOG), *shim]
            launch = Launch(shim, stdio=None, output=files.directory / "shim.log", handed=descriptors or self.inherited(record.id))
        try:
            news = await launch.news(START_S_MAX)
            if news is None or news[0] != "pid":
                raise self.failure(container, config.process["args"][0])
            self._settle(container)
        except (AtollError, OSError, asyncio.CancelledError) as error:
            await asyncio.shield(self._abandon(boxes, record, launch))
            if isinstance(error, OSError):
                raise RuntimeFailed(f"cannot start the instance: {error}") from None
            raise
        finally:
            launch.close()
        container.watch(launch.ending, news[1])
        return Started(pid=news[1], at=time.time())

    def _settle(self, container: Container) -> None:
        limits = container.record.limits
        container.group.settle(structs.replace(limits, pids=limits.pids + self.threads_beside))

    async def _abandon(self, boxes: OciBoxes, record: BoxRecord, launch: Launch) -> None:
        await launch.abandon()
        await self._in_thread(boxes.clean, record)

    async def wait(self, id: str) -> Exit:
        _, container = await self._find(id)
        if not container.started:
            raise Conflict(f"instance {id} was not started")
        await container.ended()
        if container.exit is None:
            container.exit = await self._in_thread(container.read_exit)
        return container.exit

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
        boxes, container = await self._find(id)
        if not argv or any("\0" in part for part in argv):
            raise Invalid("no command to run, or a NUL character in it", field="command")
        if not container.running:
            raise Conflict(f"instance {id} does not run")
        self._executions = {execution for execution in self._executions if not execution.closed}
        if len(self._executions) >= EXECUTIONS_MAX:
            raise Exhausted(f"{EXECUTIONS_MAX} commands run beside instances on this node")
        size = (rows, columns) if tty else None
        place = self._place(boxes, container)
        execution: OciExecution | GuestExecution | None = None
        if user is None:  # an usher is of the instance's own user, and of no other
            execution = await self._ask_usher(boxes, container, place, (argv, env, workdir), size)
        if execution is None:
            async with self._starts:
                self._foretell(boxes, place)
                execution = await start_execution(place, argv=argv, env=env, workdir=workdir, user=user, size=size)
        self._executions.add(execution)
        return execution

    def _place(self, boxes: OciBoxes, container: Container) -> Place:
        record = container.record
        base_id = None if record.slot is None else boxes.idmaps.base(record.slot)
        return Place(record.directory, self.exec_tool(boxes, container), base_id, self.inner(boxes, record.id))

    def _foretell(self, boxes: OciBoxes, place: Place) -> None:
        if place.inner is None:  # else another kernel runs it
            asyncio.get_running_loop().run_in_executor(self._threads, foretell, boxes.cgroups)

    async def _ask_usher(
        self,
        boxes: OciBoxes,
        container: Container,
        place: Place,
        command: tuple[Sequence[str], Sequence[tuple[str, str]], str | None],
        size: tuple[int, int] | None,
    ) -> GuestExecution | None:
        """Have the instance's usher start the command; None where it has none, or the tool must do it."""
        where = load_config(place.directory).annotations.get(ATTENDED)
        if where is None or not (where or place.tool.hands_on):
            return None

        async def bring() -> Usher:
            async with self._starts:
                self._foretell(boxes, place)
                usher = await bring_usher(place, where or await self._in_thread(boxes.usher_program))
                usher.channel.stands_still = lambda: container.paused
                return usher

        container.attendance = container.attendance or Attendance()
        argv, env, workdir = command
        body, _ = process_of(place, argv, env, workdir, None, size)
        return await container.attendance.run(bring, process_words(body, make_directory=False), argv[0], size)

    async def signal(self, id: str, name: str) -> None:
        _, container = await self._find(id)
        number = signal_number(name)
        if not container.started:
            raise Conflict(f"instance {id} was not started")
        if container.first is not None:
            container.first.signal(number)

    async def kill(self, id: str) -> None:
        _, container = await self._find(id)
        if container.first is not None:
            container.first.signal(signal.SIGKILL)
        await self._in_thread(container.group.kill)

    async def pause(self, id: str) -> None:
        container = await self._running(id)
        await self._in_thread(container.group.freeze)
        container.paused = True

    async def resume(self, id: str) -> None:
        container = await self._running(id)
        await self._in_thread(container.group.thaw)
        container.paused = False

    async def snapshot(self, id: str, directory: Path) -> Snapshot:
        await self._find(id)
        raise refuse(self.name, await asyncio.to_thread(why_no_checkpoints))

    async def restore(self, box: Box, directory: Path) -> Started:
        raise refuse(self.name, await asyncio.to_thread(why_no_checkpoints))

    async def usage(self, id: str) -> Usage:
        boxes, container = await self._find(id)
        return await self._in_thread(container.usage, boxes.directory / "scratch" / container.record.disk)

    async def copier(self, id: str) -> Copier | None:
        return None

    async def root(self, id: str) -> int:
        boxes, container = await self._find(id)
        path = boxes.root(id)
        if container.running and container.first is not None:
            path = Path(f"/proc/{container.first.pid}/root")  # as the instance sees it, volumes included
        try:
            return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeFailed(f"cannot open the root of instance {id}: {error}") from None

    async def delete(self, id: str) -> None:
        boxes = await self._boxes()
        container = self._containers.get(id)
        record = container.record if container else await self._in_thread(boxes.records.read, id)
        if record is None:
            return
        if container is not None and container.running:
            await self.kill(id)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(container.ended(), END_S_MAX)
        if container is not None and container.started and container.exit is None:
            container.exit = await self._in_thread(container.read_exit)  # for those who wait: its files go now
        await self._in_thread(boxes.remove, record)
        if container is not None:
            container.close()
            self._containers.pop(id, None)

    async def recover(self) -> Sequence[Found]:
        boxes = await self._boxes()
        records = []
        for id in await self._in_thread(lambda: list(boxes.records.ids())):
            try:
                record = await self._in_thread(boxes.records.read, id)
            except Invalid as error:
                log.error("box.record.damaged", instance=id, error=str(error))
                boxes.records.remove(id)
                continue
            if record is not None:
                records.append(record)
        async with asyncio.TaskGroup() as group:  # side by side, since many starts may hang, of one cause
            adopting = [group.create_task(self._take_over(boxes, record)) for record in records]
        await self._in_thread(boxes.recover, [container.record for container in self._containers.values()])
        self._tidy_soon(boxes)
        return [task.result() for task in adopting]

    async def _take_over(self, boxes: OciBoxes, record: BoxRecord) -> Found:
        """Adopt one box. What cannot be adopted is told as one in which nothing runs, which its owner then deletes."""
        for pause_s in ADOPT_PAUSES_S:
            try:
                return await self._adopt(boxes, record)
            except (AtollError, OSError) as error:
                log.error("box.not-adopted", instance=record.id, error=str(error))
            await asyncio.sleep(pause_s)
        return Found(id=record.id, pid=None, exit=None)

    async def _adopt(self, boxes: OciBoxes, record: BoxRecord) -> Found:
        """Take one box over. A start that the earlier agent began is waited for, since its shim goes on alone, but not for ever."""
        container = self._containers.setdefault(record.id, self.container_kind(record, boxes.group(record.id)))
        if container.started:
            return Found(id=record.id, pid=container.first.pid if container.first else None, exit=container.exit)
        files, deadline = container.files, time.monotonic() + self.settle_s
        while (shim := files.holder()) is not None and files.read_pid() is None:
            if time.monotonic() > deadline:
                await self._end_start(boxes, record, shim)
                return Found(id=record.id, pid=None, exit=None)
            await asyncio.sleep(SETTLE_STEP_S)
        pid = files.read_pid()
        if record.boot_id != boxes.boot_id:
            container.exit = Exit(code=137, at=time.time(), signal="SIGKILL") if pid else None
        elif shim is not None and pid is not None and files.read_exit() is None:
            container.watch(ending_of(shim), pid)
            if container.running:
                self._settle(container)  # the agent may have died between the start and this
                return Found(id=record.id, pid=pid, exit=None)
            await container.ended()
        if container.exit is None and (files.read_exit() is not None or pid is not None):
            container.exit = await self._in_thread(container.read_exit)  # without its shim nobody knows how it ended
        if files.read_exit() is None:
            await self._in_thread(boxes.clean, record)
        return Found(id=record.id, pid=None, exit=container.exit)

    async def _end_start(self, boxes: OciBoxes, record: BoxRecord, shim: int) -> None:
        """End an earlier agent's start that hangs, so that the box is as `make` left it."""
        log.warning("box.start-hangs", instance=record.id, shim=shim)
        ending = ending_of(shim)
        if ending is not None:
            try:
                async with asyncio.timeout(END_S_MAX):
                    await end_all(ending)
            finally:
                ending.close()
        await self._in_thread(boxes.clean, record)

    async def close(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
            await asyncio.wait({self._tidying})
        for execution in self._executions:
            await execution.close()
        for container in self._containers.values():
            container.close()
        self._containers.clear()
        # What a thread is still making must be there before it can be taken away.
        await asyncio.to_thread(self._threads.shutdown)
        made, self._made = self._made, None
        if made is not None:
            await asyncio.to_thread(made.close)

    async def _running(self, id: str) -> Container:
        _, container = await self._find(id)
        if not container.running:
            raise Conflict(f"instance {id} does not run")
        return container

    async def _find(self, id: str) -> tuple[OciBoxes, Container]:
        boxes = await self._boxes()
        try:
            return boxes, self._containers[id]
        except KeyError:
            raise NotFound(f"no instance {id} is known to this runtime") from None

    async def _boxes(self) -> OciBoxes:
        if self._made is None:
            async with self._making:
                if self._made is None:
                    self._made = await self._in_thread(self._make_boxes)
        return self._made

    def _make_boxes(self) -> OciBoxes:
        return self.boxes_kind(
            self._directory,
            cgroup=self._cgroup,
            cgroups=Cgroups.detect(),
            userns=self._userns,
            slots=self.slots,
            threads_beside=self.threads_beside,
            own_tmp=self.own_tmp,
            places_mounts=self.places_mounts,
            tool_options=self.options,
        )

    def _tidy_soon(self, boxes: OciBoxes) -> None:
        if self._tidying is None or self._tidying.done():
            self._tidying = asyncio.create_task(self._tidy(boxes))

    async def _tidy(self, boxes: OciBoxes) -> None:
        """Drop mounts that are not needed and make spare disks, while nobody waits for it."""
        try:
            more = True
            while more:
                await asyncio.sleep(TIDY_DELAY_S)
                more = await self._in_thread(boxes.tidy)
        except (AtollError, OSError) as error:
            log.warning("runtime.tidy.failed", error=str(error))

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
