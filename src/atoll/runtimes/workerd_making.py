"""Processes that several workers of one project share, as they are made: records, sockets, box and configuration."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct, structs

from atoll.model.codec import decode
from atoll.model.errors import AtollError
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Box, Limits, Mount
from atoll.model.records import Exit
from atoll.model.worker import MODULES
from atoll.runtimes.oci_box import SPARE_DISK_BYTES, explain
from atoll.runtimes.readiness import ready
from atoll.runtimes.workerd_config import (
    CONFIG,
    HEAP_BESIDE_BYTES,
    SERVICES,
    WORKERS,
    Part,
    experimental,
    part_of,
    shared_configuration,
    variables,
)
from atoll.runtimes.workerd_members import Member, Unready
from atoll.runtimes.workerd_modules import list_modules, read_rules
from atoll.runtimes.workerd_output import Output
from atoll.runtimes.workerd_process import Boxes, WorkerProcess
from atoll.runtimes.workerd_root import PROGRAM
from atoll.runtimes.workerd_sharer import Sharer, write_record
from atoll.runtimes.workerd_sockets import FIRST, Listening, name_of, watch_socket

READY_S_MAX = 30.0
"""Until a process serves; all modules of its workers are compiled in that time."""
_PIDS = 64
_NAME = "shared"


class ProcessRecord(Struct, frozen=True, kw_only=True):
    """Which workers a process has, and how many sockets each."""

    id: str
    workers: tuple[tuple[str, str, int], ...]
    """Id, serial, sockets; in the order of the descriptors, which begin with the one by which it is watched."""
    ready: bool = False


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
        try:
            return await self._make(id, sharers)
        except OSError as error:
            raise explain(error) from None

    async def _make(self, id: str, sharers: Sequence[Sharer]) -> WorkerProcess | Unready:
        path, pipe = self._directory / f"{id}.json", self._directory / f"{id}.out"
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as undone:
            offers: dict[Member, Listening] = {}
            for sharer in sharers:
                undone.callback(sharer.take_back, id)
                offers[sharer] = await asyncio.to_thread(sharer.offer, id)
            workers = tuple((sharer.id, sharer.record.serial, len(offers[sharer].descriptors)) for sharer in sharers)
            record = ProcessRecord(id=id, workers=workers)
            undone.callback(path.unlink, missing_ok=True)
            write_record(path, record)
            undone.callback(pipe.unlink, missing_ok=True)
            output = Output(pipe, {sharer.id: sharer.pipes for sharer in sharers})
            undone.callback(output.close)
            watch = watch_socket()
            ours.callback(os.close, watch)
            reader, told = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            ours.callback(os.close, reader)
            writer = ours.enter_context(open(told, "wb", buffering=0))
            process = WorkerProcess(self._boxes, id, 0, offers, output, name_of(watch), path)
            undone.pop_all()  # from here on `remove` does it
            try:
                sockets = [watch, *(fd for sharer in sharers for fd in offers[sharer].descriptors)]
                box, text = await asyncio.to_thread(self._box, id, sharers, len(sockets))
                started = await self._boxes.begin_process(box, text, [*sockets, told])
                process.pid = started.pid
                writer.close()
                serves = await self._serves(process, reader, len(sockets))
                if not serves:
                    exit, late = await process.remove() or Exit(code=1, at=time.time()), serves is None
                    if late:
                        exit = structs.replace(exit, why=f"its modules had not run within {READY_S_MAX:.0f} s")
                    return Unready(started.pid, exit, frozenset(output.blamed), late)
                write_record(path, structs.replace(record, ready=True))
                for sharer in sharers:
                    sharer.lead(id)
                return process
            except BaseException:
                await asyncio.shield(process.remove())
                raise

    async def _serves(self, process: WorkerProcess, reader: int, sockets: int) -> bool | None:
        """Wait until workerd has said of each socket that it listens, which it does when all modules have run.

        None: not in time.
        """
        ended = asyncio.ensure_future(process.ended())
        heard = asyncio.ensure_future(_lines(reader, sockets))
        try:
            if not (await asyncio.wait({ended, heard}, timeout=READY_S_MAX, return_when=asyncio.FIRST_COMPLETED))[0]:
                return None
            return heard.done() and heard.result() and not ended.done()
        finally:
            ended.cancel()
            heard.cancel()
            await asyncio.gather(ended, heard, return_exceptions=True)

    def _box(self, id: str, sharers: Sequence[Sharer], sockets: int) -> tuple[Box, str]:
        """Return the box and workerd's configuration. Blocking."""
        parts: list[Part] = []
        env: list[tuple[str, str]] = []
        named = [("watch", FIRST)]
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
