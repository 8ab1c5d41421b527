"""Workers that share a process with the others of their project: what each has of its own on the node.

An instance that shares has a network, pipes, modules and sockets of its own, and no process, root or control group. A process is
a box of the runtime's like that of any worker, in the network of its eldest worker, limited to the sum of what its workers may use.
Files say who is in which, so that the next agent adopts all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import structlog
from msgspec import structs

from atoll.model.codec import decode
from atoll.model.errors import AtollError, Conflict, Invalid, NotFound, RuntimeFailed
from atoll.model.ports.runtime import Box, Found, Started
from atoll.model.records import Exit, Usage
from atoll.model.worker import MODULES
from atoll.runtimes.box_record import check_id
from atoll.runtimes.mounts import bind
from atoll.runtimes.oci_box import explain
from atoll.runtimes.rootfs import remove_root
from atoll.runtimes.signals import signal_number
from atoll.runtimes.workerd_assets import is_asset
from atoll.runtimes.workerd_config import MODULES_BYTES_MAX, part_of
from atoll.runtimes.workerd_making import Processes, ProcessRecord, is_process, number_of, read_record
from atoll.runtimes.workerd_members import Member
from atoll.runtimes.workerd_modules import copy_modules, list_modules, merged
from atoll.runtimes.workerd_output import Output
from atoll.runtimes.workerd_process import Boxes, WorkerProcess, remove_box
from atoll.runtimes.workerd_sharer import PARTIAL, Sharer, WorkerRecord, write_record
from atoll.runtimes.workerd_sharing import APART_S, Sharing
from atoll.runtimes.workerd_sockets import FIRST, Listening, listening, name_of, take

SAMPLE_S = 1.0
"""A process is asked for its usage so often at most: each of its workers is, one after the other."""

log = structlog.get_logger()


class SharedWorkers:
    """All workers of a runtime that share; its calls are the runtime's. `directory` is its own."""

    def __init__(self, boxes: Boxes, directory: Path, services: Path | None, *, apart_s: float = APART_S) -> None:
        self._boxes = boxes
        self._workers = directory / "workers"
        self._processes = directory / "processes"
        self._services = services
        self._apart_s = apart_s
        self._records: dict[str, WorkerRecord] = {}
        self._sharers: dict[str, Sharer] = {}
        self._attending: dict[str, asyncio.Task[Exit]] = {}
        self._sharings: dict[str, Sharing] = {}
        self._first: dict[str, int] = {}

    def _make_directories(self) -> None:
        for path in (self._workers, self._processes):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def __contains__(self, id: str) -> bool:
        return id in self._records

    async def create(self, box: Box) -> None:
        """Raises Conflict, Invalid, ImageError, RuntimeFailed; nothing is left then."""
        if box.id in self._records or self._path(box.id).exists():
            raise Conflict(f"instance {box.id} exists already", mend="delete it first")
        if box.worker is None or box.netns is None:
            raise Invalid("worker.shared: the instance has no network of its own to be reached by", field="worker.shared")
        record = WorkerRecord(
            id=box.id,
            serial=uuid.uuid4().hex,
            path=str(box.directory),
            code=box.worker,
            env=box.env,
            limits=box.limits,
            netns=str(box.netns),
            resolv_conf=str(box.resolv_conf) if box.resolv_conf else None,
            stdout=str(box.stdout),
            stderr=str(box.stderr),
        )
        making = asyncio.ensure_future(asyncio.to_thread(self._make, box, record))
        try:
            await asyncio.shield(making)
        except BaseException:
            await asyncio.wait({making})
            await asyncio.to_thread(self._remove, record)
            raise
        self._records[box.id] = record

    def _make(self, box: Box, record: WorkerRecord) -> None:
        target = record.root / MODULES[1:]
        try:
            self._make_directories()
            write_record(self._path(record.id), record)
            Path(record.path).mkdir(parents=True, mode=0o700)
            target.mkdir(parents=True)
            with merged(box.image.layers, record.root) as root:
                modules = list_modules(root)
            part = part_of(record.code, modules, name=record.id, number=0)
            assets = [module for module in modules if is_asset(record.code.worker, module.path)]
            if sum(module.size_bytes for module in assets) > MODULES_BYTES_MAX:
                text = f"worker.assets: more than {MODULES_BYTES_MAX >> 20} MiB, which a worker that shares its process cannot have"
                raise Invalid(text, field="worker.assets", mend="leave worker.shared out")
            copy_modules(box.image.layers, [*part.modules, *assets], target)
            bind(record.root, record.root, read_only=True)
        except OSError as error:
            raise explain(error) from None

    async def start(self, id: str) -> Started:
        """Return once it is served. One whose modules do not load was started nevertheless, and has ended."""
        record = self._record(id)
        if id in self._sharers or record.exit is not None:
            raise Conflict(f"instance {id} was started already", mend="delete it and create it again")
        try:
            sharer = Sharer(record, self._order(id))
        except OSError as error:
            raise RuntimeFailed(f"cannot open the instance's pipes: {error}") from None
        self._hold(sharer)
        try:
            return await self._sharing(record.code.project).enter(sharer)
        except BaseException:
            await asyncio.shield(self._let_go(id))
            raise

    def _hold(self, sharer: Sharer) -> None:
        self._sharers[sharer.id] = sharer
        self._attending[sharer.id] = asyncio.create_task(self._attend(sharer))

    async def _attend(self, sharer: Sharer) -> Exit:
        await sharer.ended.wait()  # as long as the worker lives
        exit = sharer.exit
        if exit is None:
            raise AssertionError("a worker ends with its exit")
        if (record := self._records.get(sharer.id)) is not None and record.serial == sharer.record.serial:
            self._records[sharer.id] = record = structs.replace(record, exit=exit)
            try:
                await asyncio.to_thread(write_record, self._path(sharer.id), record)
            except OSError as error:
                log.error("worker.exit.not.recorded", instance=sharer.id, error=str(error))
        return exit

    async def wait(self, id: str) -> Exit:
        record = self._record(id)
        attending = self._attending.get(id)
        if attending is not None:
            return await asyncio.shield(attending)
        if record.exit is None:
            raise Conflict(f"instance {id} was not started")
        return record.exit

    async def signal(self, id: str, name: str) -> None:
        """There is one thing that workerd does on any signal: it ends in good order."""
        number = signal_number(name)
        sharer = self._sharer(id)
        if number == signal_number("SIGKILL"):
            await self.kill(id)
        elif sharer.exit is None:
            self._sharing(sharer.record.code.project).leave(sharer)

    async def kill(self, id: str) -> None:
        self._record(id)
        if (sharer := self._sharers.get(id)) is not None:
            await self._sharing(sharer.record.code.project).cut(sharer)

    async def usage(self, id: str) -> Usage:
        """Return its equal part of what its process uses: V8 does not say whose it is."""
        sharer = self._sharer(id)
        process = self._sharing(sharer.record.code.project).process_of(sharer)
        if not isinstance(process, WorkerProcess):
            return Usage(instance=id)
        now = time.monotonic()
        if process.usage is None or now - process.usage[0] >= SAMPLE_S:
            process.usage = now, await self._boxes.usage(process.id)
        whole, count = process.usage[1], len(process.members)
        return Usage(
            instance=id,
            cpu_milli=whole.cpu_milli // count,
            memory_bytes=whole.memory_bytes // count,
            pids=-(-whole.pids // count),
            shared_by=count,
        )

    async def root(self, id: str) -> int:
        record = self._record(id)
        try:
            return os.open(record.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeFailed(f"cannot open the root of instance {id}: {error}") from None

    async def delete(self, id: str) -> None:
        record = self._records.get(id)
        if record is None:
            return
        if id in self._sharers:
            await self.kill(id)
            await self._sharing(record.code.project).end_empty()
            await self._let_go(id)
        await asyncio.to_thread(self._remove, record)
        del self._records[id]

    async def _let_go(self, id: str) -> None:
        sharer, attending = self._sharers.pop(id), self._attending.pop(id)
        await attending
        sharer.let_go()

    def _remove(self, record: WorkerRecord) -> None:
        remove_root(Path(record.path))
        self._order(record.id).unlink(missing_ok=True)
        self._path(record.id).unlink(missing_ok=True)

    async def recover(self, found: Sequence[Found]) -> list[Found]:
        """Return the instances among the boxes that the runtime found, and those that share. What is nobody's is removed."""
        await asyncio.to_thread(self._make_directories)
        if not self._records:  # else it may be this agent that writes one
            for path in (*self._workers.glob(f"*{PARTIAL}"), *self._processes.glob(f"*{PARTIAL}")):
                path.unlink(missing_ok=True)
        processes = sorted((each for each in found if is_process(each.id)), key=lambda each: number_of(each.id), reverse=True)
        for path in self._workers.glob("*.json"):
            if path.stem not in self._records:
                self._read(path)
        taken = []
        for each in processes:
            project = each.id.split(".")[1]
            self._first[project] = max(self._first.get(project, 0), number_of(each.id) + 1)
            if (process := await self._take_over(each)) is not None:
                taken.append((project, process))
        for sharer in self._sharers.values():
            holders = {process.id: process.sockets[sharer] for _, process in reversed(taken) if sharer in process.sockets}
            if holders:
                sharer.restore(holders, next(process.id for _, process in taken if sharer in process.sockets))
        for project, process in taken:
            self._sharing(project).adopt(process)
        self._drop_strays({each.id for each in processes})
        instances = [each for each in found if not is_process(each.id)]
        for id, record in self._records.items():
            known = self._sharers.get(id)
            server = self._sharing(record.code.project).process_of(known) if known is not None else None
            instances.append(Found(id=id, pid=server.pid if server else None, exit=record.exit))
        return instances

    def _read(self, path: Path) -> None:
        try:
            record = decode(path.read_bytes(), WorkerRecord)
            self._records[record.id] = record
        except (OSError, AtollError) as error:
            log.error("worker.record.damaged", path=str(path), error=str(error))
            path.unlink(missing_ok=True)

    async def _take_over(self, found: Found) -> WorkerProcess | None:
        if any(found.id == process.id for sharing in self._sharings.values() for process in sharing.processes):
            return None
        path = self._processes / f"{found.id}.json"  # an id has dots: `with_suffix` takes the last alone
        record = read_record(path)
        if found.pid is not None and record is not None and record.ready:
            with contextlib.suppress(OSError, NotFound):  # it ends just now
                return self._take(found.pid, await self._boxes.parent(found.id), record, path)
        await remove_box(self._boxes, found.id)
        for left in (path, path.with_suffix(".out")):
            left.unlink(missing_ok=True)
        return None

    def _take(self, pid: int, parent: int, record: ProcessRecord, path: Path) -> WorkerProcess:
        """Return the process with its workers, those that are still there with the sockets that were made for them."""
        counts = [count for _, _, count in record.workers]
        fds = take(parent, range(FIRST, FIRST + 1 + sum(counts)))
        watch, at = name_of(fds[0]), 1
        os.close(fds[0])
        members: dict[Member, Listening] = {}
        for id, serial, count in record.workers:
            sockets = listening(fds[at : at + count])
            at += count
            known, sharer = self._records.get(id), self._sharers.get(id)
            if known is not None and known.serial == serial and known.exit is None:
                if sharer is None:
                    sharer = Sharer(known, self._order(id))
                    self._hold(sharer)
                members[sharer] = sockets
            else:
                gone = Member(id, lambda text: None)
                gone.leaving = True
                gone.end(Exit(code=0, at=time.time()))
                members[gone] = sockets
                sockets.let_go()
        pipes = {member.id: member.pipes for member in members if isinstance(member, Sharer)}
        output = Output(self._processes / f"{record.id}.out", pipes)
        return WorkerProcess(self._boxes, record.id, pid, members, output, watch, path)

    def _drop_strays(self, known: set[str]) -> None:
        for path in (*self._processes.glob("*.json"), *self._processes.glob("*.out")):
            if path.stem not in known:
                path.unlink(missing_ok=True)

    async def close(self) -> None:
        """Let go of all, and leave it as it is."""
        for sharing in self._sharings.values():
            await sharing.close()
            for process in sharing.processes:
                if isinstance(process, WorkerProcess):
                    process.output.let_go()
        for task in self._attending.values():
            task.cancel()
        for sharer in self._sharers.values():
            sharer.let_go()
        self._attending.clear()
        self._sharers.clear()
        self._sharings.clear()

    def _sharing(self, project: str) -> Sharing:
        if project not in self._sharings:
            making = Processes(self._boxes, self._processes, project, self._first.get(project, 0), self._services)
            self._sharings[project] = Sharing(making, apart_s=self._apart_s)
        return self._sharings[project]

    def _record(self, id: str) -> WorkerRecord:
        try:
            return self._records[id]
        except KeyError:
            raise NotFound(f"no instance {id} is known to this runtime") from None

    def _sharer(self, id: str) -> Sharer:
        self._record(id)
        try:
            return self._sharers[id]
        except KeyError:
            raise Conflict(f"instance {id} was not started") from None

    def _order(self, id: str) -> Path:
        return self._workers / f"{check_id(id)}.order"

    def _path(self, id: str) -> Path:
        return self._workers / f"{check_id(id)}.json"
