"""A process that several workers of one project share: asked from outside whether it answers, and removed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from atoll.model.errors import AtollError, NotFound
from atoll.model.ports.runtime import Box, Started
from atoll.model.records import Exit, Usage
from atoll.runtimes.workerd_members import Member
from atoll.runtimes.workerd_output import Output
from atoll.runtimes.workerd_sharer import Sharer
from atoll.runtimes.workerd_sockets import Activity, Listening, activities

WATCH_S = 1.0
"""How often a process is asked whether it answers, and how long it may take to."""
MISSES_MAX = 3
BUSY_US = 20_000
"""A silent process waits for the node where it had no processor time meanwhile, and is not at fault. One that had less than this
counts in proportion: a small quota gives no more."""
REMOVE_S = 0.5
REMOVE_TRIES_MAX = 10

log = structlog.get_logger()


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
        id: str,
        pid: int,
        members: Mapping[Member, Listening],
        output: Output,
        watch: bytes,
        path: Path,
    ) -> None:
        """`members` have their sockets in it; `watch` is the name of the socket by which it is asked, `path` its record's."""
        self.id = id
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
        misses = 0.0
        while misses < MISSES_MAX:
            if not misses:
                await asyncio.sleep(WATCH_S)
            before = await self._boxes.cpu_us(self.id)
            try:
                async with asyncio.timeout(WATCH_S):
                    await self._ask()
                misses = 0.0
            except TimeoutError:
                worked_us = await self._boxes.cpu_us(self.id) - before
                misses += min(1.0, worked_us / BUSY_US)
            except BlockingIOError:  # it has not let in one of the last `BACKLOG` that asked
                misses += 1.0
                await asyncio.sleep(WATCH_S)
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
