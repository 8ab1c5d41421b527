"""A process that several workers of one project share: made as a box of the runtime's, watched from outside, and removed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import structlog
from msgspec import Struct

from atoll.model.codec import decode, encode
from atoll.model.errors import AtollError, NotFound
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Box, Limits, Mount, Started, WorkerCode
from atoll.model.records import Exit, Usage
from atoll.model.worker import MODULES
from atoll.runtimes.oci_box import SPARE_DISK_BYTES, write_private
from atoll.runtimes.readiness import ready
from atoll.runtimes.workerd_config import (
    CONFIG,
    HEAP_BESIDE_BYTES,
    SERVICES,
    WORKERS,
    experimental,
    part_of,
    shared_configuration,
    variables,
)
from atoll.runtimes.workerd_modules import list_modules, read_rules
from atoll.runtimes.workerd_output import Output, Pipes
from atoll.runtimes.workerd_root import PROGRAM
from atoll.runtimes.workerd_sharing import Member, Unready
from atoll.runtimes.workerd_sockets import FIRST, Activity, Listening, activities, listen, name_of, watch_socket

READY_S_MAX = 30.0
"""Until a process serves; all modules of its workers are compiled in that time."""
WATCH_S = 1.0
"""How often a process is asked whether it answers, and how long it may take to."""
MISSES_MAX = 3
BUSY_US = 20_000
"""A silent process that had less processor time than this meanwhile waits for the node, and is not at fault."""
REMOVE_S = 0.5
REMOVE_TRIES_MAX = 10
_PIDS = 64
_NAME = "shared"

log = structlog.get_logger()


class WorkerRecord(Struct, frozen=True, kw_only=True):
    """What the next agent must know of a worker that shares; it holds secrets, and is root's alone."""

    id: str
    serial: str
    """Another for each making: an instance that is made again is another worker."""
    path: str
    code: WorkerCode
    env: tuple[tuple[str, str], ...]
    limits: Limits
    netns: str
    resolv_conf: str | None
    stdout: str
    stderr: str
    exit: Exit | None = None

    @property
    def root(self) -> Path:
        """The directory that stands for its root: its modules, and nothing else."""
        return Path(self.path) / "root"


class ProcessRecord(Struct, frozen=True, kw_only=True):
    """Which workers a process has, and how many sockets each."""

    id: str
    workers: tuple[tuple[str, str, int], ...]
    """Id, serial, sockets; in the order of the descriptors, which begin with the one by which it is watched."""
    ready: bool = False


class Sharer(Member):
    """A worker that was started, with what is its own."""

    def __init__(self, record: WorkerRecord, order: Path) -> None:
        """`order` is a file of its own. Raises OSError where its pipes cannot be opened."""
        self.record = record
        self.pipes = Pipes(Path(record.stdout), Path(record.stderr))
        self.sockets: Listening | None = None
        """To which those who come are led."""
        self._holder = ""
        self._order = order
        self._group: dict[str, Listening] = {}
        """All that there are, by process, in the kernel's order."""
        super().__init__(record.id, lambda text: self.pipes.write(text, error=True))

    def offer(self, holder: str) -> Listening:
        """Return sockets for one more process: those that are left of one that has ended, or new ones. Blocking.

        Raises RuntimeFailed.
        """
        if self.sockets is not None and not self._holder:
            (last,) = [id for id, sockets in self._group.items() if sockets is self.sockets]
            self._group = {holder if id == last else id: sockets for id, sockets in self._group.items()}
            self._keep()
            return self.sockets
        sockets = listen(Path(self.record.netns), self.record.code.port, self.record.code.alive_port)
        self._group[holder] = sockets
        self._keep()
        if len(self._group) == 1:
            sockets.steer(0)
        return sockets

    def lead(self, holder: str) -> None:
        """From now on all are led to that process."""
        if holder in self._group:  # else the worker has ended meanwhile
            self.sockets, self._holder = self._group[holder], holder
            self._steer()

    def take_back(self, holder: str) -> None:
        """A process has ended, or never served. Who comes meanwhile waits, if it was the last."""
        sockets = self._group.get(holder)
        if sockets is None:
            return
        if sockets is self.sockets:
            self._holder = ""
            return
        self._group = without(self._group, holder)
        sockets.let_go()
        self._keep()
        self._steer()

    def restore(self, found: Mapping[str, Listening], leading: str) -> None:
        """Take over what an earlier agent had, of the processes that still run."""
        try:
            known = decode(self._order.read_bytes(), tuple[str, ...])
        except (OSError, AtollError):
            known = tuple(found)
        group = {id: found.get(id) for id in known} | dict(found)
        for id in [id for id in group if id not in found]:
            group = without(group, id)
        self._group = {id: sockets for id, sockets in group.items() if sockets is not None}
        self._keep()
        self.lead(leading)

    def has(self, holder: str) -> bool:
        """Return whether the sockets that a process has of it are open."""
        return holder in self._group

    def _steer(self) -> None:
        if self.sockets is not None:
            self.sockets.steer([*self._group.values()].index(self.sockets))

    def _keep(self) -> None:
        with contextlib.suppress(OSError):  # without it the next agent takes the order of the processes
            write_private(self._order, encode(tuple(self._group)))

    def let_go(self) -> None:
        """Close what this agent has of it; processes and the next agent go on."""
        for sockets in self._group.values():
            sockets.let_go()
        self._group.clear()
        self.sockets = None
        self.pipes.close()


T = TypeVar("T")


def without(group: Mapping[str, T], id: str) -> dict[str, T]:
    """Return the group as the kernel has it when one of it has closed: the last is in its place."""
    items = list(group.items())
    at = [key for key, _ in items].index(id)
    items[at] = items[-1]
    return dict(items[:-1])


class Boxes(Protocol):
    """What is needed of the runtime."""

    async def begin_process(self, box: Box, configuration: str, handed: Sequence[int]) -> Started:
        """Make and start a box of workerd's with this configuration, in which `handed` are descriptors from `FIRST` on.

        Raises AtollError; nothing is left then.
        """
        ...

    async def wait(self, id: str) -> Exit: ...

    async def signal(self, id: str, name: str) -> None: ...

    async def kill(self, id: str) -> None: ...

    async def delete(self, id: str) -> None: ...

    async def usage(self, id: str) -> Usage: ...

    async def parent(self, id: str) -> int:
        """Return the process that waits for its end, and has the descriptors that it was begun with. Raises NotFound."""
        ...

    async def cpu_us(self, id: str) -> int:
        """Return the processor time that it has used."""
        ...


class WorkerProcess:
    """Implements `workerd_sharing.Process`."""

    def __init__(
        self,
        boxes: Boxes,
        record: ProcessRecord,
        pid: int,
        members: Mapping[Member, Listening],
        output: Output,
        watch: bytes,
        path: Path,
    ) -> None:
        """`members` have their sockets in it; `watch` is the name of the socket by which it is asked, `path` its record's."""
        self.id = record.id
        self.pid = pid
        self.members = frozenset(members)
        self.output = output
        self.sockets = members
        self.usage: tuple[float, Usage] | None = None
        self._boxes = boxes
        self._watch = watch
        self._path = path
        self._removing = asyncio.Lock()
        self._exit: Exit | None = None

    async def ended(self) -> Exit:
        exit = await self._boxes.wait(self.id)
        self.output.drain()
        return exit

    async def hung(self) -> frozenset[str]:
        misses = 0
        while misses < MISSES_MAX:
            if not misses:
                await asyncio.sleep(WATCH_S)
            before = await self._boxes.cpu_us(self.id)
            try:
                async with asyncio.timeout(WATCH_S):
                    await self._ask()
                misses = 0
            except TimeoutError:
                worked_us = await self._boxes.cpu_us(self.id) - before
                misses += worked_us >= BUSY_US
            except OSError as error:  # it ends just now, which `ended` says, or this agent has no descriptor left
                log.info("workers.watch.failed", process=self.id, error=str(error))
                await asyncio.sleep(WATCH_S)
        owing = await asyncio.to_thread(activities, self.pid)
        return frozenset(
            member.id for member, sockets in self.sockets.items() if sockets.cookie in owing and owing[sockets.cookie].owes
        )

    async def activity(self) -> Mapping[Member, Activity]:
        found = await asyncio.to_thread(activities, self.pid)
        active = {member: found[sockets.cookie] for member, sockets in self.sockets.items() if sockets.cookie in found}
        for member, sockets in self.sockets.items():
            if isinstance(member, Sharer) and member.has(self.id) and sockets.waiting():
                active[member] = Activity(0.0, True)
        return active

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            client.connect(self._watch)  # at once, or not at all; a loop of its own kind may know no names without a path
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: watch\r\nConnection: close\r\n\r\n")
            await loop.sock_recv(client, 4096)

    async def terminate(self) -> None:
        await self._boxes.signal(self.id, "SIGTERM")

    async def remove(self) -> Exit | None:
        async with self._removing:
            if self._exit is None:
                self._exit = await self._remove()
            return self._exit

    async def _remove(self) -> Exit | None:
        exit = None
        for attempt in range(REMOVE_TRIES_MAX):
            try:
                await self._boxes.kill(self.id)
                exit = await self._boxes.wait(self.id)
                break
            except NotFound:
                break
            except AtollError:
                await asyncio.sleep(REMOVE_S * 2**attempt)
        self.output.close()
        await remove_box(self._boxes, self.id)
        for member in self.sockets:
            if isinstance(member, Sharer):
                member.take_back(self.id)
        self._path.unlink(missing_ok=True)
        return exit


async def remove_box(boxes: Boxes, id: str) -> None:
    """Remove all of a process but its record. Raises AtollError after many tries."""
    for attempt in range(REMOVE_TRIES_MAX):
        try:
            await boxes.delete(id)
            return
        except AtollError:
            if attempt == REMOVE_TRIES_MAX - 1:
                raise
            await asyncio.sleep(REMOVE_S * 2**attempt)


class Processes:
    """Implements `workerd_sharing.Making` for one project: no process that it makes has a worker of another."""

    def __init__(self, boxes: Boxes, directory: Path, project: str, first: int, services: Path | None) -> None:
        """`directory` is for the records of all projects' processes; numbers of new ones begin with `first`."""
        self._boxes = boxes
        self._directory = directory
        self._project = project
        self._next = first
        self._services = services

    async def make(self, members: Sequence[Member]) -> WorkerProcess | Unready:
        sharers = [member for member in members if isinstance(member, Sharer)]
        if any(sharer.record.code.project != self._project for sharer in sharers):
            raise AssertionError(f"a worker of another project than {self._project} was about to share its process")
        id = f"{_NAME}.{self._project}.{self._next}"
        self._next += 1
        offers: dict[Member, Listening] = {}
        try:
            for sharer in sharers:
                offers[sharer] = await asyncio.to_thread(sharer.offer, id)
        except BaseException:
            for sharer in sharers:
                sharer.take_back(id)
            raise
        workers = tuple((sharer.id, sharer.record.serial, len(offers[sharer].descriptors)) for sharer in sharers)
        record = ProcessRecord(id=id, workers=workers)
        path = self._directory / f"{id}.json"
        write_private(path, encode(record))
        output = Output(self._directory / f"{id}.out", {sharer.id: sharer.pipes for sharer in sharers})
        watch = watch_socket()
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        process = WorkerProcess(self._boxes, record, 0, offers, output, name_of(watch), path)
        try:
            sockets = [watch, *(fd for sharer in sharers for fd in offers[sharer].descriptors)]
            box, text = await asyncio.to_thread(self._box, id, sharers, len(sockets))
            started = await self._boxes.begin_process(box, text, [*sockets, writer])
            process.pid = started.pid
            os.close(writer)
            writer = -1
            if not await self._serves(process, reader, len(sockets)):
                exit = await process.remove()
                blamed = frozenset(output.blamed)
                return Unready(started.pid, exit or Exit(code=1, at=time.time()), blamed)
            write_private(path, encode(ProcessRecord(id=id, workers=workers, ready=True)))
            for sharer in sharers:
                sharer.lead(id)
            return process
        except BaseException:
            await asyncio.shield(process.remove())
            raise
        finally:
            for fd in (watch, reader, writer):
                if fd >= 0:
                    os.close(fd)

    async def _serves(self, process: WorkerProcess, reader: int, sockets: int) -> bool:
        """Wait until workerd has said of each socket that it listens, which it does when all modules have run."""
        ended = asyncio.ensure_future(process.ended())
        heard = asyncio.ensure_future(_lines(reader, sockets))
        try:
            await asyncio.wait({ended, heard}, timeout=READY_S_MAX, return_when=asyncio.FIRST_COMPLETED)
            return heard.done() and heard.result() and not ended.done()
        finally:
            ended.cancel()
            heard.cancel()
            await asyncio.gather(ended, heard, return_exceptions=True)

    def _box(self, id: str, sharers: Sequence[Sharer], sockets: int) -> tuple[Box, str]:
        """Return the box and workerd's configuration. Blocking."""
        parts, env, named = [], [], [("watch", FIRST)]
        for number, sharer in enumerate(sharers):
            record = sharer.record
            rules = read_rules(record.root, record.code.worker)
            part = part_of(record.code, list_modules(record.root), name=record.id, number=number, files=rules)
            parts.append(part)
            env += variables(record.code, record.env, part)
            for what in ("http",) if record.code.alive_port is None else ("http", "alive"):
                named.append((part.own(what), FIRST + len(named)))
        mounts = [Mount(sharer.record.root / MODULES[1:], f"{WORKERS}/{sharer.id}", read_only=True) for sharer in sharers]
        if self._services is not None and any(sharer.record.code.worker.services for sharer in sharers):
            mounts.append(Mount(self._services, SERVICES, read_only=True))
        eldest = sharers[0].record
        allowed = ["--experimental"] if any(experimental(sharer.record.code) for sharer in sharers) else []
        options = [word for name, fd in named for word in ("-S", f"{name}={fd}")]
        memory_bytes = [sharer.record.limits.memory_bytes for sharer in sharers]
        output = self._directory / f"{id}.out"
        box = Box(
            id=id,
            directory=self._directory / id,
            image=Image(reference="", digest="", config=ImageConfig(), layers=()),
            argv=(PROGRAM, "serve", *allowed, *options, "--control-fd", str(FIRST + sockets), f"/{CONFIG}"),
            env=tuple(env),
            workdir="/",
            user="",
            hostname=_NAME,
            limits=Limits(
                cpu_milli=sum(sharer.record.limits.cpu_milli for sharer in sharers),
                memory_bytes=sum(memory_bytes) + HEAP_BESIDE_BYTES,
                disk_bytes=SPARE_DISK_BYTES,
                pids=_PIDS,
            ),
            mounts=tuple(mounts),
            netns=Path(eldest.netns),
            resolv_conf=Path(eldest.resolv_conf) if eldest.resolv_conf else None,
            stdout=output,
            stderr=output,
        )
        return box, shared_configuration(parts, heap_mib=max(memory_bytes) >> 20)


def is_process(id: str) -> bool:
    """Return whether a box of the runtime's is a process that workers share, and no instance."""
    return id.startswith(f"{_NAME}.")


def number_of(id: str) -> int:
    """Return how many processes its project had before it."""
    return int(id.rpartition(".")[2])


def read_record(path: Path) -> ProcessRecord | None:
    """Return None where there is none, or a damaged one."""
    try:
        return decode(path.read_bytes(), ProcessRecord)
    except (OSError, AtollError):
        return None


async def _lines(fd: int, count: int) -> bool:
    """Return whether so many lines came before the end."""
    while count > 0:
        await ready(fd)
        data = os.read(fd, 65_536)
        if not data:
            return False
        count -= data.count(b"\n")
    return True
