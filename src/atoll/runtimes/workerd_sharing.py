"""Which workers of one project are in which process: all in one, but for those that run apart for a while since one of them fails.

workerd neither adds a worker to a process that runs nor takes one out. So whenever the set changes, a process with the new one is
made at the same ports; once it serves, nobody comes to the one before any more, which ends when its connections are silent. One
that does not come to serve changes nothing for those who are served already.

A process that ends or hangs takes all of its workers with it. They are served again at once, without their instances' ending: those
of whom one may be at fault each in a process apart, where the next failure tells who it is. Who runs well there comes back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable
from typing import Any

import structlog
from msgspec import structs

from atoll.model.errors import AtollError
from atoll.model.ports.runtime import Started
from atoll.model.records import Exit
from atoll.runtimes.workerd_members import Group, Making, Member, Process, Unready, groups

APART_S = 60.0
"""How long a worker of which nothing worse is known runs apart; it doubles with every failure of its own."""
APART_S_MAX = 3600.0
LINGER_S = 45.0
"""How long a process that another took over from goes on for connections that are kept."""
SILENT_S = 5.0
"""A connection by which nothing has come or gone for so long may be closed: ingresses close theirs before."""
LINGER_STEP_S = 0.2
LINGERING_MAX = 4
"""Processes of a project that linger at once; the eldest gives way."""
DRAIN_S = 30.0
"""How long a process may then take to answer what it had taken in."""
LEAVE_S_MAX = 5.0
"""How long a worker that is killed waits for the others to be served without it."""
RETRY_S = 1.0
STARTS_MAX = 8
_KILLED = 137

log = structlog.get_logger()


class Sharing:
    """The workers of one project on this node. `close` leaves them as they are."""

    def __init__(self, making: Making, *, apart_s: float = APART_S, linger_s: float = LINGER_S, drain_s: float = DRAIN_S) -> None:
        self._making = making
        self._apart_s = apart_s
        self._linger_s = linger_s
        self._drain_s = drain_s
        self._members: dict[str, Member] = {}
        self._serving: list[Process] = []
        self._draining: list[Process] = []
        self._apart: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._settled = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._work: asyncio.Task[None] | None = None

    @property
    def members(self) -> dict[str, Member]:
        return self._members

    @property
    def processes(self) -> list[Process]:
        return [*self._serving, *self._draining]

    def process_of(self, member: Member) -> Process | None:
        """Return the process that serves it, if one does."""
        return next((process for process in reversed(self._serving) if member in process.members), None)

    async def enter(self, member: Member) -> Started:
        """Have it served. Raises AtollError where no process could be started."""
        self._members[member.id] = member
        self._wake()
        try:
            return await asyncio.shield(member.begun)  # `make` has its deadlines
        except BaseException:
            self._forget(member, Exit(code=_KILLED, at=time.time(), signal="SIGKILL"))
            raise

    def adopt(self, process: Process) -> None:
        """Take over a process that served before this agent; its members that are not in another one yet are in this."""
        if any(self._members.get(member.id, member) is not member or self.process_of(member) for member in process.members):
            self._draining.append(process)
            self._spawn(self._drain(process))
            return
        for member in process.members:
            self._members[member.id] = member
            member.begin(Started(process.pid, time.time()))
        self._serve(process)
        self._wake()

    def leave(self, member: Member) -> None:
        """Have it end in good order: what it was asked is answered."""
        member.leaving = True
        self._wake()

    async def cut(self, member: Member) -> None:
        """End it now. What it has under way may go on, unseen, in a process that drains."""
        if member.exit is not None:
            return
        member.leaving = True
        process = self.process_of(member)
        if process is not None and all(other.leaving for other in process.members):
            await process.remove()
        self._wake()
        try:
            async with asyncio.timeout(LEAVE_S_MAX), self._settled:
                await self._settled.wait_for(lambda: member.exit is not None or self.process_of(member) is None)
        except TimeoutError:
            if (process := self.process_of(member)) is not None:
                await process.remove()
        self._forget(member, Exit(code=_KILLED, at=time.time(), signal="SIGKILL"))

    async def close(self) -> None:
        tasks = {*self._tasks, *self._watches.values(), *([self._work] if self._work else [])}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, member: Member, exit: Exit) -> None:
        member.end(exit)
        member.leaving = True
        if self._members.get(member.id) is member:
            del self._members[member.id]
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            try:
                await self._settle()
            except Exception:  # the outer edge of the loop: the next change, or the next second, tries again
                log.exception("workers.sharing.failed")
                self._later(RETRY_S)
            async with self._settled:
                self._settled.notify_all()
            due = min(self._apart.values(), default=None)
            delay_s = None if due is None else max(0.0, due - asyncio.get_running_loop().time())
            try:
                async with asyncio.timeout(delay_s):
                    await self._changed.wait()
            except TimeoutError:
                self._end_apart(asyncio.get_running_loop().time())

    async def _settle(self) -> None:
        """Have everyone served by the process that is to serve them, then let the others go."""
        while missing := [group for group in self._wanted() if all(process.members != group for process in self._serving)]:
            if not all(await asyncio.gather(*(self._begin(group) for group in missing[:STARTS_MAX]))):
                self._later(RETRY_S)
                return
        wanted = self._wanted()
        for process in [process for process in self._serving if process.members not in wanted]:
            self._serving.remove(process)
            self._draining.append(process)
            self._watches.pop(process.id).cancel()
            self._spawn(self._drain(process))
        for member in [member for member in self._members.values() if member.leaving]:
            self._end_if_gone(member)

    def _wanted(self) -> list[Group]:
        return groups([member for member in self._members.values() if not member.leaving], self._apart)

    def _later(self, delay_s: float) -> None:
        asyncio.get_running_loop().call_later(delay_s, self._changed.set)

    async def _begin(self, group: Group) -> bool:
        """Start a process for the group. Returns whether something has changed by it."""
        members = [member for member in self._members.values() if member in group]
        new = [member for member in members if self.process_of(member) is None]
        try:
            process = await self._making.make(members)
        except AtollError as error:
            log.warning("workers.process.failed", workers=len(members), error=str(error))
            for member in new:
                if not member.begun.done():
                    member.begun.set_exception(error)
                self._forget(member, Exit(code=_KILLED, at=time.time(), why=f"its process could not be started: {error}"))
            return bool(new)
        if not isinstance(process, Unready):
            for member in members:
                member.begin(Started(process.pid, time.time()))
            self._serve(process)
            return True
        blamed = [member for member in members if member.id in process.blamed or len(members) == 1]
        for member in blamed:
            if member in new or len(members) == 1:
                member.begin(Started(process.pid, time.time()))
                if process.late and member.id not in process.blamed:
                    self._forget(member, process.exit)
                else:
                    self._fail(member, process.exit)
        self._set_apart([member for member in blamed or new or members if member.exit is None])
        return True

    def _serve(self, process: Process) -> None:
        self._serving.append(process)
        self._watches[process.id] = asyncio.create_task(self._watch(process))

    async def _watch(self, process: Process) -> None:
        """See to what serves until it ends, or does not answer any more."""
        ended, hung = asyncio.ensure_future(process.ended()), asyncio.ensure_future(process.hung())
        try:
            await asyncio.wait({ended, hung}, return_when=asyncio.FIRST_COMPLETED)
            suspects = hung.result() if hung.done() and not ended.done() else None
        finally:
            ended.cancel()
            hung.cancel()
        exit = await process.remove() or Exit(code=_KILLED, at=time.time(), signal="SIGKILL")
        self._serving.remove(process)
        self._watches.pop(process.id, None)
        self._failed(process, exit, suspects)
        self._wake()

    def _failed(self, process: Process, exit: Exit, suspects: frozenset[str] | None) -> None:
        """Decide who was at fault for the end of a process, or may have been."""
        count, how = len(process.members), "did not answer" if suspects is not None else describe(exit)
        if any(not member.leaving for member in process.members):
            log.warning("workers.process.ended", process=process.id, workers=count, how=how, suspects=sorted(suspects or ()))
        for member in [member for member in process.members if member.leaving]:
            self._forget(member, exit)
        left = [member for member in process.members if member.exit is None and self.process_of(member) is None]
        one = next(iter(suspects)) if suspects is not None and len(suspects) == 1 else None
        for member in [member for member in left if count == 1 or member.id == one]:
            left.remove(member)
            why = exit.why
            if suspects is not None:
                whose = f"the process that it shares with {_others(count)}" if count > 1 else "its process"
                why = f"it kept {whose} from answering, and was ended; it runs apart from now on"
            self._fail(member, structs.replace(exit, why=why))
            one = member.id
        suspected = [] if one else [member for member in left if not suspects or member.id in suspects]
        self._set_apart(suspected)
        for member in left:
            apart = "; it runs apart until it is clear whose fault that was" if member in suspected else ""
            member.tell(f"atoll: the process that this worker shares with {_others(count)} {how}; it is served again{apart}")

    def _fail(self, member: Member, exit: Exit) -> None:
        """It is at fault, and ends; when its node starts it again, it is apart, the longer the more often that has happened."""
        self._failures[member.id] = failures = self._failures.get(member.id, 0) + 1
        self._apart[member.id] = asyncio.get_running_loop().time() + min(APART_S_MAX, self._apart_s * 2.0 ** min(failures, 16))
        self._forget(member, exit)

    def _set_apart(self, members: Iterable[Member]) -> None:
        until = asyncio.get_running_loop().time() + self._apart_s
        for member in members:
            self._apart[member.id] = max(until, self._apart.get(member.id, 0.0))

    def _end_apart(self, now: float) -> None:
        self._apart = {id: until for id, until in self._apart.items() if until > now}
        known = self._members.keys() | self._apart.keys()
        self._failures = {id: count for id, count in self._failures.items() if id in known}

    async def end_empty(self) -> None:
        """End the processes whose workers have all ended, though connections to them may be open still."""
        for process in [each for each in self._draining if all(member.exit is not None for member in each.members)]:
            await process.remove()

    async def _drain(self, process: Process) -> None:
        exit: Exit | None = None
        try:
            if await self._answers_on(process):
                await process.terminate()
                async with asyncio.timeout(self._drain_s):
                    exit = await process.ended()
        except (AtollError, TimeoutError):
            pass  # it is gone already, or will be now
        exit = await process.remove() or exit
        self._draining.remove(process)
        for member in process.members:
            if member.leaving:
                self._end_if_gone(member, exit)

    async def _answers_on(self, process: Process) -> bool:
        """Let it linger; return whether it answered all the while."""
        lingering, hung = asyncio.ensure_future(self._linger(process)), asyncio.ensure_future(process.hung())
        try:
            await asyncio.wait({lingering, hung}, return_when=asyncio.FIRST_COMPLETED)
            return not hung.done()
        finally:
            lingering.cancel()
            hung.cancel()

    async def _linger(self, process: Process) -> None:
        """Return when no connection to it is in use: to close one that is could meet a request that is on its way."""
        deadline = asyncio.get_running_loop().time() + self._linger_s
        while asyncio.get_running_loop().time() < deadline and any(member.exit is None for member in process.members):
            if process not in self._draining[-LINGERING_MAX:]:
                return
            await asyncio.sleep(LINGER_STEP_S)  # who came just before others were led elsewhere has been let in then
            activity = await process.activity()
            for member in [member for member in process.members if member.leaving]:
                if member not in activity or not activity[member].owes:
                    member.settled.add(process.id)
                    self._end_if_gone(member)
            if all(found.silent_s >= SILENT_S and not found.owes for found in activity.values()):
                return

    def _end_if_gone(self, member: Member, exit: Exit | None = None) -> None:
        around = [process.id for process in self.processes if member in process.members]
        if member.settled.issuperset(around):
            self._forget(member, exit or Exit(code=0, at=time.time()))


def _others(count: int) -> str:
    return "another worker" if count == 2 else f"{count - 1} other workers"


def describe(exit: Exit) -> str:
    """Return in words how a process ended."""
    if exit.oom:
        return "went over its memory limit"
    return f"was ended by {exit.signal}" if exit.signal else f"exited with status {exit.code}"
