"""Carries out what `decide` says for one instance. Decisions are made where events arrive, without waiting; what takes
time is done by one task per instance, in order, since a runtime takes an instance's calls one at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, assert_never

import structlog
from msgspec.structs import replace

from atoll.model.errors import AtollError
from atoll.model.ports.runtime import Runtime
from atoll.model.records import Assignment, Status
from atoll.model.spec import AppSpec
from atoll.model.states import Phase
from atoll.model.units import format_seconds
from atoll.node.attend import await_exit, probe_once, remove, warm
from atoll.node.decide import decide
from atoll.node.prepare import Preparation, in_words
from atoll.node.record import Entry
from atoll.node.snapshots import Snapshots
from atoll.node.standby import park, wake
from atoll.node.tools import Tools
from atoll.node.transitions import (
    CancelPrepare,
    Clean,
    Due,
    Ended,
    Erase,
    Happening,
    Kill,
    Launch,
    Launched,
    LaunchFailed,
    Note,
    Now,
    Park,
    ParkFailed,
    Prepare,
    PrepareFailed,
    Probe,
    Probed,
    Rest,
    Signal,
    State,
    Used,
    Wake,
    WakeFailed,
    Wanted,
    Watch,
    rules_of,
    status_of,
)

LAUNCH_S = 60.0
"""Deadline of starting a process."""
SIGNAL_S = 30.0
"""Deadline of delivering a signal."""
RECORD_RETRY_S = 5.0
"""Wait before another try at writing the local record."""

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]
log = structlog.get_logger()
_Step = Prepare | Launch | Park | Wake | Signal | Kill | Clean | Erase


class Runner:
    """One instance on this node, from its assignment until every trace of it is gone."""

    def __init__(self, entry: Entry, tools: Tools, spawn: Spawn, *, recorded: bool) -> None:
        """`recorded` says whether the local record holds the entry's assignment already."""
        self.assignment: Assignment = entry.assignment
        self.state: State = entry.state
        self._secrets = entry.secrets
        self._tools = tools
        self._spawn = spawn
        self._rules = rules_of(entry.assignment.workload)
        self._recorded: State | None = None
        self._reported: Status | None = None
        self._assignment_recorded = recorded
        self._end_recorded = recorded and entry.state.phase.final
        self._recording: asyncio.TimerHandle | None = None
        self._steps: deque[_Step] = deque()
        self._wake = asyncio.Event()
        self._idle = False
        self._timer: asyncio.TimerHandle | None = None
        self._preparation: Preparation | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._resting: asyncio.Task[None] | None = None
        instance = entry.assignment.instance
        self.id = instance.id
        self.project = instance.project
        self._users = 0
        self.holding = asyncio.Lock()
        """Its user pauses, resumes or writes it down, one at a time."""
        self.snapshots = Snapshots(tools.directories.snapshots)
        self._log = log.bind(project=instance.project, owner=instance.owner, instance=instance.id, node=tools.node)

    @property
    def runtime(self) -> Runtime | None:
        """The runtime that was chosen with the node; None when this machine cannot run it."""
        chosen = self.assignment.instance.runtime
        names = (chosen,) if chosen else self.assignment.workload.runtimes
        return next((self._tools.runtimes[name] for name in names if name in self._tools.runtimes), None)

    @property
    def digests(self) -> set[str]:
        """The images that must stay on the node for this instance."""
        preparing = (self._preparation.digest, *self._preparation.volume_digests.values()) if self._preparation else ()
        return {digest for digest in (self.state.image_digest, *self.state.volume_digests.values(), *preparing) if digest}

    @property
    def settled(self) -> bool:
        """Whether it has ended for good, and nothing is left to do about it."""
        return self.state.phase.final and self._end_recorded and self._idle and not self._steps

    def update(self, assignment: Assignment) -> None:
        """Take in what the control plane wants now."""
        old, new = self.assignment.instance, assignment.instance
        taken = new.owner != old.owner
        if taken or (new.desired, new.standby) != (old.desired, old.standby):
            self.assignment = assignment
            self._assignment_recorded = False
            self._keep()
        self.handle(Wanted(new.desired, new.standby))
        if taken:
            # Out of a template's pool: it is another job's now, with that one's idle limit.
            self._rules = rules_of(assignment.workload)
            self._log = self._log.bind(owner=new.owner)
            self.handle(Used(self._users > 0))

    @property
    def paused(self) -> bool:
        """Whether its user has it stand still."""
        return self.state.paused

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Somebody works in it meanwhile, so that it is not idle."""
        self._users += 1
        try:
            if self._users == 1:
                self.handle(Used(True))
            yield
        finally:
            self._users -= 1
            if not self._users:
                self.handle(Used(False))

    def handle(self, event: Happening) -> None:
        """Decide, record, report and set going what follows. Never waits, never raises."""
        now = Now(self._tools.clock.now(), self._tools.clock.monotonic())
        before = self.state
        try:
            self.state, actions = decide(self._rules, before, event, now)
        except Exception:  # noqa: BLE001 - a bug in one decision must not end the agent, and with it all other instances' care
            self._log.exception("no decision", event_type=type(event).__name__, phase=before.phase.value)
            return
        if self.state != before:
            if self.state.phase is not before.phase:
                self._log.info("phase", was=before.phase.value, phase=self.state.phase.value, why=self.state.message)
            self._keep()
            self._set_timer(now.monotonic)
        for action in actions:
            self._dispatch(action)

    def let_go(self) -> None:
        """Set nothing going any more: the agent ends, and the next one takes over."""
        for timer in (self._timer, self._recording):
            if timer is not None:
                timer.cancel()
        self._timer = self._recording = None

    def report(self) -> None:
        """Tell the control plane the present state, or what it was before an end that is not on the disk yet."""
        if self._may_be_told:
            self._reported = self._status()
        if self._reported is not None:
            self._tools.reporter.status(self._reported, urgent=self._awaited)

    @property
    def _awaited(self) -> bool:
        """Whether requests may wait for this start: who holds them looks for it where it will be (`Routing.starting`)."""
        workload = self.assignment.workload
        unasked = isinstance(workload, AppSpec) and workload.wakes and workload.health is None
        return unasked and self.state.phase is Phase.STARTING

    @property
    def _may_be_told(self) -> bool:
        """Whether the present state may leave this node: an end only once it is recorded, since the next agent would not know
        of it, and start again what others take for ended."""
        return self._end_recorded or not self.state.phase.final

    def _status(self) -> Status:
        return status_of(self.state, instance=self.id, project=self.project, node=self._tools.node)

    async def run(self) -> None:
        """Work off the steps; returns when the instance is erased."""
        while True:
            while self._steps:
                step = self._steps.popleft()
                try:
                    await self._do(step)
                except Exception:  # noqa: BLE001 - the outer edge: one instance's surprise must not end the others
                    self._log.exception("step failed", step=type(step).__name__)
                    self._surprised(step)
                if isinstance(step, Erase):
                    return
            self._wake.clear()
            self._idle = True
            await self._wake.wait()  # without a deadline: timers and events add steps
            self._idle = False

    def _keep(self) -> None:
        """Record and report what has changed. What could not be recorded is tried again: a full disk costs the adoption of
        a change, and delays the word of an end, but never costs the instance."""
        if self._recording is not None:
            self._recording.cancel()
            self._recording = None
        if self.state.erased:
            return
        durable = self.state.durable
        if not self._assignment_recorded:
            self._assignment_recorded = self._save(lambda: self._tools.record.put_assignment(self.assignment))
        if durable != self._recorded and self._assignment_recorded:
            saved = self._save(lambda: self._tools.record.put_state(self.id, durable))
            self._recorded = durable if saved else None
            self._end_recorded = self._end_recorded or (saved and durable.phase.final)
        if durable != self._recorded:
            self._recording = asyncio.get_running_loop().call_later(RECORD_RETRY_S, self._keep)
        if self._may_be_told and self._status() != self._reported:
            self.report()

    def _save(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except AtollError as error:
            self._log.error("not recorded", error=str(error), mend=error.mend)
            return False
        return True

    def _set_timer(self, monotonic: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.state.due
        if due is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due - monotonic), self._fire)

    def _fire(self) -> None:
        self._timer = None
        before = self.state
        self.handle(Due())
        if self.state == before:
            self._set_timer(self._tools.clock.monotonic())  # it came too early

    def _dispatch(self, action: object) -> None:
        match action:
            case Note():
                self._tools.reporter.event(self.project, f"instance/{self.id}", action.code, action.message, action.severity)
            case CancelPrepare():
                if self._preparing is not None:
                    self._preparing.cancel()
            case Watch():
                self._watching = self._spawn(self._watch())
            case Probe():
                self._probing = self._spawn(self._probe(action.run))
            case Prepare() | Launch() | Park() | Wake() | Signal() | Kill() | Clean() | Erase():
                if isinstance(action, Kill | Clean) and self._resting is not None:
                    self._resting.cancel()  # what ends anyway need not be waited for
                self._steps.append(action)
                self._wake.set()

    async def _do(self, step: _Step) -> None:
        match step:
            case Prepare():
                await self._prepare()
            case Launch():
                await self._launch()
            case Park() | Wake():
                await self._rest(step)
            case Signal():
                await self._send(step.name)
            case Kill():
                await self._send(None)
            case Clean():
                await self._clean(step.all)
            case Erase():
                await self._erase()
            case _:
                assert_never(step)

    def _surprised(self, step: _Step) -> None:
        """A bug or a broken machine: let the instance fail in the ordinary way."""
        message = f"internal error at {type(step).__name__.lower()}; the agent's log has it"
        if isinstance(step, Prepare):
            self.handle(PrepareFailed(message, passing=True))
        elif isinstance(step, Launch):
            self.handle(LaunchFailed(message))
        elif isinstance(step, Park):
            self.handle(ParkFailed(step.run, message))
        elif isinstance(step, Wake):
            self.handle(WakeFailed(step.run, message))

    async def _prepare(self) -> None:
        if self.state.phase is not Phase.PREPARING:
            return  # told to stop while this step waited
        digest = self.state.image_digest or (self._preparation.digest if self._preparation else None)
        volumes = (self._preparation.volume_digests if self._preparation else {}) | self.state.volume_digests
        preparation = self._preparation = Preparation(
            self.assignment, self.runtime, self._tools, self._secrets, digest, self.handle, volume_digests=volumes
        )
        self._preparing = self._spawn(preparation.run())
        try:
            await asyncio.wait({self._preparing})
        finally:
            self._preparing = None
        self._secrets = preparation.secrets

    async def _launch(self) -> None:
        runtime = self.runtime
        if runtime is None:
            raise AssertionError("an instance without a runtime is never prepared")
        if self.state.phase is not Phase.STARTING:
            self.handle(LaunchFailed("stopped before it started"))
            return
        try:
            # Waiting for a turn is no part of the deadline: when a whole node starts at once, the last must not fail for it.
            async with self._tools.launches, asyncio.timeout(LAUNCH_S):
                going_on = self._preparation.going_on if self._preparation else None
                started = await (runtime.restore(*going_on) if going_on else runtime.start(self.id))
        except TimeoutError:
            self.handle(LaunchFailed(f"did not start within {format_seconds(LAUNCH_S)}"))
        except AtollError as error:
            self.handle(LaunchFailed(in_words(error)))
        else:
            self.handle(Launched(started.pid, started.at))

    async def _rest(self, step: Park | Wake) -> None:
        runtime = self.runtime
        if runtime is None:
            raise AssertionError("an instance without a runtime never runs")
        if step.run != self.state.run or self.state.rest is Rest.AWAKE or self.state.phase is not Phase.RUNNING:
            return  # it has ended, or was told to, while this step waited
        instance, known, tools = self.assignment.instance, self.state.suspended, self._tools
        if isinstance(step, Park):
            limit_bytes = self._rules.memory_bytes
            work = park(step, instance, known, runtime, tools.gpus, tools.clock, self.handle, limit_bytes=limit_bytes)
        else:
            work = wake(step, instance, known, runtime, tools.gpus, tools.clock, self.handle)
        self._resting = self._spawn(work)
        try:
            await asyncio.wait({self._resting})
            if not self._resting.cancelled() and (error := self._resting.exception()) is not None:
                raise error
        finally:
            self._resting = None

    async def _send(self, name: str | None) -> None:
        """Send a signal, or without a name kill. A failure is not answered: the kill that is due comes (again)."""
        runtime = self.runtime
        if runtime is None or not self.state.phase.live:
            return
        try:
            async with asyncio.timeout(SIGNAL_S):
                await (runtime.kill(self.id) if name is None else runtime.signal(self.id, name))
        except (AtollError, TimeoutError) as error:
            self._log.warning("signal failed", signal=name or "kill", error=str(error) or "timed out")

    async def _watch(self) -> None:
        exit = await await_exit(self.runtime, self.id)
        self._tools.logs.drain(self.id)
        by_itself = self.state.phase is not Phase.STOPPING and (exit is None or exit.code != 0)
        if self.assignment.instance.gpus and self._tools.gpus is not None and by_itself:
            await self._tools.gpus.examine_for(self.id)
        self.handle(Ended(exit))

    async def _probe(self, run: int) -> None:
        if self._rules.warmed:
            await warm(self.runtime, self.id)
            self.handle(Probed(run))
            return
        workload, address = self.assignment.workload, self.state.address
        self.handle(Probed(run, await probe_once(self._tools, self.runtime, self.id, workload, self._rules, address)))

    async def _clean(self, all: bool) -> None:
        for task in (self._watching, self._probing):
            if task is not None:
                task.cancel()
        if all:
            self._tools.logs.drain(self.id)
        await remove(self._tools, self.runtime, self.id, all=all, holds=bool(self.assignment.instance.gpus))

    async def _erase(self) -> None:
        self.let_go()
        self._tools.logs.remove(self.project, self.id)
        while not self._save(lambda: self._tools.record.remove(self.id)):  # noqa: ASYNC110 - the disk tells nobody when it has room
            # As long as the disk is full: a row that is left behind would be an instance to the next agent.
            await asyncio.sleep(RECORD_RETRY_S)
        self._tools.reporter.forget(self.id)


def new_entry(assignment: Assignment) -> Entry:
    """Return the entry of an instance that this node has just been given."""
    instance = assignment.instance
    return Entry(assignment, replace(State(), desired=instance.desired, standby=instance.standby))
