"""Workers that share processes, and the processes, as `workerd_sharing` sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from atoll.model.ports.runtime import Started
from atoll.model.records import Exit
from atoll.runtimes.box_record import check_id
from atoll.runtimes.workerd_sockets import Activity

MEMBERS_MAX = 32
"""Workers of one process; more are in further ones. All are loaded anew whenever one comes or goes."""


class Member:
    """One worker that is in the sharing, from its start to its end; two of one instance, one after the other, are not the same."""

    def __init__(self, id: str, tell: Callable[[str], None]) -> None:
        self.id = check_id(id)
        self.tell = tell
        """Writes a line into its log."""
        self.begun: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        self.exit: Exit | None = None
        self.leaving = False
        self.settled: set[str] = set()
        """Processes that have answered all that this one was asked."""

    def end(self, exit: Exit) -> None:
        if self.exit is None:
            self.exit = exit
            self.ended.set()

    def begin(self, started: Started) -> None:
        if not self.begun.done():
            self.begun.set_result(started)


Group = frozenset[Member]


class Process(Protocol):
    """A process that serves its members."""

    id: str
    pid: int
    members: Group

    async def ended(self) -> Exit:
        """Return how it ended, once it has."""
        ...

    async def hung(self) -> frozenset[str]:
        """Return once it does not answer any more: whose requests it had taken in and not answered, by id."""
        ...

    async def activity(self) -> Mapping[Member, Activity]:
        """Return what goes on in connections to its members; those who have none are not in it."""
        ...

    async def terminate(self) -> None:
        """Tell it to end in good order."""
        ...

    async def remove(self) -> Exit | None:
        """Kill it if it runs, remove every trace of it, and return how it ended."""
        ...


class Unready(Struct, frozen=True):
    """A process that ended, or did not serve in time; nothing of it is left."""

    pid: int
    exit: Exit
    blamed: frozenset[str]
    """Whose fault that is, as far as workerd says."""
    late: bool = False
    """It was ended because it did not serve in time: the node may have been busy."""


class Making(Protocol):
    async def make(self, members: Sequence[Member]) -> Process | Unready:
        """Return a process that serves them. Raises AtollError: none was started, and nothing is left."""
        ...


def groups(members: Iterable[Member], apart: Iterable[str]) -> list[Group]:
    """Return who is to be with whom, each in the order in which they came."""
    alone = set(apart)
    together = [member for member in members if member.id not in alone]
    found = [frozenset(together[at : at + MEMBERS_MAX]) for at in range(0, len(together), MEMBERS_MAX)]
    return found + [frozenset({member}) for member in members if member.id in alone]
