"""What a worker that shares its process has of its own on the node: its record, its pipes, its sockets in each process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct

from atoll.model.codec import decode, encode
from atoll.model.errors import AtollError
from atoll.model.ports.runtime import Limits, WorkerCode
from atoll.model.records import Exit
from atoll.runtimes.oci_box import write_private
from atoll.runtimes.workerd_members import Member
from atoll.runtimes.workerd_output import Pipes
from atoll.runtimes.workerd_sockets import Listening, listen

PARTIAL = ".next"
"""The end of the name of a record that is being written."""


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


class Sharer(Member):
    """A worker that was started, with what is its own."""

    def __init__(self, record: WorkerRecord, order: Path, *, listen: Callable[[Path, int, int | None], Listening] = listen) -> None:
        """`order` is a file of its own; `listen` makes sockets. Raises OSError where its pipes cannot be opened."""
        self.record = record
        self._listen = listen
        self.pipes = Pipes(Path(record.stdout), Path(record.stderr))
        self.sockets: Listening | None = None
        """To which those who come are led."""
        self._holder = ""
        self._order = order
        self._group: dict[str, Listening] = {}
        """All that there are, by process, in the kernel's order."""
        self._one = threading.RLock()
        """`offer` is in a thread: between a change of the kernel's order and that of ours there may be no other."""
        super().__init__(record.id, lambda text: self.pipes.write(text, error=True))

    def offer(self, holder: str) -> Listening:
        """Return sockets for one more process: those that are left of one that has ended, or new ones. Blocking.

        Raises RuntimeFailed.
        """
        with self._one:
            if self.sockets is not None and not self._holder:
                (last,) = [id for id, sockets in self._group.items() if sockets is self.sockets]
                self._group = {holder if id == last else id: sockets for id, sockets in self._group.items()}
                self._keep()
                return self.sockets
            sockets = self._listen(Path(self.record.netns), self.record.code.port, self.record.code.alive_port)
            self._group[holder] = sockets
            self._keep()
            if len(self._group) == 1:
                sockets.steer(0)
            return sockets

    def lead(self, holder: str) -> None:
        """From now on all are led to that process."""
        with self._one:
            if holder in self._group:  # else the worker has ended meanwhile
                left = None if self._holder else self.sockets
                self.sockets, self._holder = self._group[holder], holder
                self._steer()
                if left is not None and left is not self.sockets:  # the one before ended while this one was made
                    self.take_back(next(id for id, sockets in self._group.items() if sockets is left))

    def take_back(self, holder: str) -> None:
        """A process has ended, or never served. Who comes meanwhile waits, if it was the last."""
        with self._one:
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
        with self._one:
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
            write_record(self._order, tuple(self._group))

    def let_go(self) -> None:
        """Close what this agent has of it; processes and the next agent go on."""
        with self._one:
            for sockets in self._group.values():
                sockets.let_go()
            self._group.clear()
            self.sockets = None
        self.pipes.close()


T = TypeVar("T")


def write_record(path: Path, record: Any) -> None:
    """Write what the next agent must know, for root alone. Who reads it has it as it was, or as it is now. Raises OSError.

    Safe against a crash of the agent; after one of the machine nothing that it describes runs, so it is not synced.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        write_private(partial, encode(record))
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def without(group: Mapping[str, T], id: str) -> dict[str, T]:
    """Return the group as the kernel has it when one of it has closed: the last is in its place."""
    items = list(group.items())
    at = [key for key, _ in items].index(id)
    items[at] = items[-1]
    return dict(items[:-1])
