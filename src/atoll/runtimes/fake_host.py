"""The machine that fake runtimes run on: processes in memory, which outlive every agent.

Time is the event loop's, so that on a loop with virtual time nothing here waits for real.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Awaitable, Callable

import msgspec

from atoll.model.errors import NotFound, RuntimeFailed
from atoll.model.ports.clock import Clock, SystemClock
from atoll.model.ports.runtime import Box, Started
from atoll.model.records import Exit
from atoll.runtimes.fake_exec import IGNORED_BY_DEFAULT, FakeExecution
from atoll.runtimes.signals import signal_name, signal_number

SIGKILL = 9


class Behaviour(msgspec.Struct, frozen=True, kw_only=True):
    """What a fake process does. Without any field it runs until a signal ends it."""

    exit_code: int | None = None
    """Ends by itself with this status, `after_s` seconds after its start."""
    after_s: float = 0.0
    start_error: str | None = None
    """`start` raises RuntimeFailed with these words."""
    ignores: frozenset[str] = frozenset()
    """Signals that do nothing; SIGKILL cannot be ignored."""
    stop_code: int | None = None
    """The exit status when a signal ends it; 128 + the signal where absent."""
    stop_s: float = 0.0
    """How long it takes from a signal to the end."""
    output: bytes = b""
    """Written to the box's stdout on start, if that FIFO exists."""


def behaviour_of(box: Box) -> Behaviour:
    """The script where a test gives none: read from the command.

    `exit CODE [AFTER_S]` ends by itself; `stubborn` ignores SIGTERM; `graceful [SECONDS]` exits with 0 after a signal;
    `missing` does not exist; `echo WORDS` prints and ends with 0; all else runs until signalled.
    """
    match box.argv:
        case ("exit", code, *rest):
            return Behaviour(exit_code=int(code), after_s=float(rest[0]) if rest else 0.0)
        case ("stubborn", *_):
            return Behaviour(ignores=frozenset({"SIGTERM"}))
        case ("graceful", *rest):
            return Behaviour(stop_code=0, stop_s=float(rest[0]) if rest else 0.0)
        case ("missing", *_):
            return Behaviour(start_error='exec: "missing": executable file not found in $PATH')
        case ("echo", *words):
            return Behaviour(exit_code=0, output=(" ".join(words) + "\n").encode())
        case _:
            return Behaviour()


class FakeProcess:
    """One instance on a FakeHost; not for use from outside the host and its runtimes."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.behaviour = Behaviour()
        self.pid: int | None = None
        self.exit: Exit | None = None
        self.paused = False
        self.ended = asyncio.Event()
        self.held: list[Callable[[], None]] = []
        """What waits for `resume`; bounded by the signals that were sent meanwhile."""
        self.timers: list[asyncio.TimerHandle] = []
        self.executions: list[FakeExecution] = []

    @property
    def running(self) -> bool:
        return self.pid is not None and self.exit is None


class FakeHost:
    """The machine: its processes live on when a FakeRuntime is closed or forgotten.

    `script` says what a box's process does; `before` is awaited ahead of each call with the call's name and the id, and
    may sleep or raise, which is how a simulator makes runtimes slow or faulty.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        script: Callable[[Box], Behaviour] = behaviour_of,
        before: Callable[[str, str], Awaitable[None]] | None = None,
    ) -> None:
        self.clock = clock or SystemClock()
        self.script = script
        self.before = before
        self.processes: dict[str, FakeProcess] = {}
        self._context = contextvars.copy_context()
        self.calls: list[tuple[str, str]] = []
        """The newest calls as (name, id), at most CALLS_MAX."""
        self._next_pid = 1000

    CALLS_MAX = 10_000

    def running(self) -> list[str]:
        """Return the ids of what runs, sorted."""
        return sorted(id for id, process in self.processes.items() if process.running)

    def crash(self, id: str, *, signal: str = "SIGSEGV", oom: bool = False) -> None:
        """End the instance's process as if it had crashed; `oom` as if the kernel had killed it for its memory."""
        process = self.process(id)
        name = "SIGKILL" if oom else signal
        self._end(process, 128 + signal_number(name), signal=name, oom=oom)

    def crash_all(self) -> None:
        """End everything, as a restart of the machine would."""
        for id in self.running():
            self.crash(id, signal="SIGKILL")

    def process(self, id: str) -> FakeProcess:
        """Return the instance; this and what follows is for FakeRuntime."""
        try:
            return self.processes[id]
        except KeyError:
            raise NotFound(f"no instance {id} on this node") from None

    async def enter(self, call: str, id: str) -> None:
        self.calls.append((call, id))
        del self.calls[: -self.CALLS_MAX]
        if self.before is not None:
            await self.before(call, id)

    def launch(self, process: FakeProcess) -> Started:
        process.behaviour = behaviour = self.script(process.box)
        if behaviour.start_error is not None:
            raise RuntimeFailed(behaviour.start_error, mend="check the command and the image")
        self._next_pid += 1
        process.pid = self._next_pid
        if behaviour.output:
            _write_fifo(process.box, behaviour.output)
        if behaviour.exit_code is not None:
            code = behaviour.exit_code
            self._later(process, behaviour.after_s, lambda: self._end(process, code))
        return Started(pid=process.pid, at=self.clock.now())

    def _later(self, process: FakeProcess, delay_s: float, action: Callable[[], None]) -> None:
        def fire() -> None:
            if process.paused:
                process.held.append(action)
            else:
                action()

        # In the host's context: a process goes on though the agent that started it stands still.
        process.timers.append(asyncio.get_running_loop().call_later(delay_s, fire, context=self._context))

    def signal(self, process: FakeProcess, name: str) -> None:
        number = signal_number(name)
        if not process.running:
            return
        behaviour = process.behaviour
        if number == SIGKILL:
            self._end(process, 128 + number, signal=name)
        elif name not in behaviour.ignores and name not in IGNORED_BY_DEFAULT:
            code = behaviour.stop_code
            if code is None:
                self._later(process, behaviour.stop_s, lambda: self._end(process, 128 + number, signal=signal_name(number)))
            else:
                self._later(process, behaviour.stop_s, lambda: self._end(process, code))

    def _end(self, process: FakeProcess, code: int, *, signal: str | None = None, oom: bool = False) -> None:
        if not process.running:
            return
        process.exit = Exit(code=code, at=self.clock.now(), signal=signal, oom=oom)
        process.paused = False
        for timer in process.timers:
            timer.cancel()
        process.timers.clear()
        process.held.clear()
        for execution in process.executions:
            execution.kill()
        process.executions.clear()
        process.ended.set()

    def resume(self, process: FakeProcess) -> None:
        process.paused = False
        held, process.held = process.held, []
        for action in held:
            action()


def _write_fifo(box: Box, data: bytes) -> None:
    if not box.stdout.exists():
        return
    fd = os.open(box.stdout, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(fd, data)
    except BlockingIOError:
        pass  # a full FIFO would block a real process; a fake one must not block the loop
    finally:
        os.close(fd)
