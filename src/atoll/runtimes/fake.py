"""A runtime in memory: faithful to the port, deterministic, and scripted. For tests and the simulator.

What runs lives in a FakeHost, which stands for the machine: it outlives every FakeRuntime, as processes outlive an agent.
Time is the event loop's, so that on a loop with virtual time nothing here waits for real.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from atoll.model.errors import AtollError, Conflict, NotFound, RuntimeFailed
from atoll.model.ports.clock import Clock, SystemClock
from atoll.model.ports.runtime import Box, Execution, Feature, Found, Started
from atoll.model.records import Exit, Usage
from atoll.model.spec import RuntimeName
from atoll.runtimes.fake_exec import FakeExecution, run_command
from atoll.runtimes.signals import signal_name, signal_number

SIGKILL = 9
FAKE_FEATURES = frozenset({Feature.EXEC, Feature.TTY, Feature.PAUSE, Feature.RESIZE, Feature.FILES})

_IGNORED_BY_DEFAULT = frozenset({"SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH"})


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
        self.calls: list[tuple[str, str]] = []
        """The newest calls as (name, id), at most CALLS_MAX."""
        self._next_pid = 1000

    CALLS_MAX = 10_000

    def running(self) -> list[str]:
        """Return the ids of what runs, sorted."""
        return sorted(id for id, process in self.processes.items() if process.running)

    def crash(self, id: str, *, signal: str = "SIGSEGV", oom: bool = False) -> None:
        """End the instance's process as if it had crashed; `oom` as if the kernel had killed it for its memory."""
        process = self._process(id)
        name = "SIGKILL" if oom else signal
        self._end(process, 128 + signal_number(name), signal=name, oom=oom)

    def crash_all(self) -> None:
        """End everything, as a restart of the machine would."""
        for id in self.running():
            self.crash(id, signal="SIGKILL")

    def _process(self, id: str) -> FakeProcess:
        try:
            return self.processes[id]
        except KeyError:
            raise NotFound(f"no instance {id} on this node") from None

    async def _enter(self, call: str, id: str) -> None:
        self.calls.append((call, id))
        del self.calls[: -self.CALLS_MAX]
        if self.before is not None:
            await self.before(call, id)

    def _launch(self, process: FakeProcess) -> Started:
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

        process.timers.append(asyncio.get_running_loop().call_later(delay_s, fire))

    def _signal(self, process: FakeProcess, name: str) -> None:
        number = signal_number(name)
        if not process.running:
            return
        behaviour = process.behaviour
        if number == SIGKILL:
            self._end(process, 128 + number, signal=name)
        elif name not in behaviour.ignores and name not in _IGNORED_BY_DEFAULT:
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

    def _resume(self, process: FakeProcess) -> None:
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


class FakeRuntime:
    """The agent's side: it knows what it made, and after `recover` what earlier ones made on the same host."""

    features = FAKE_FEATURES

    def __init__(self, host: FakeHost | None = None, *, name: RuntimeName = RuntimeName.RUNC) -> None:
        self.host = host or FakeHost()
        self.name = name
        self._known: set[str] = set()

    def crash(self, id: str, *, signal: str = "SIGSEGV", oom: bool = False) -> None:
        """As FakeHost.crash."""
        self.host.crash(id, signal=signal, oom=oom)

    async def probe(self) -> str:
        await self.host._enter("probe", "")
        return "fake 1.0"

    async def create(self, box: Box) -> None:
        if box.id in self.host.processes:
            raise Conflict(f"instance {box.id} exists already")
        await self.host._enter("create", box.id)
        self.host.processes[box.id] = FakeProcess(box)
        self._known.add(box.id)

    async def start(self, id: str) -> Started:
        process = await self._find("start", id)
        if process.pid is not None:
            raise Conflict(f"instance {id} was started already")
        return self.host._launch(process)

    async def wait(self, id: str) -> Exit:
        process = await self._find("wait", id)
        if process.pid is None:
            raise Conflict(f"instance {id} was not started")
        await process.ended.wait()  # as long as the process runs: it has no deadline
        assert process.exit is not None  # noqa: S101 - `ended` is set with it
        return process.exit

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
        process = await self._find("exec", id)
        if not process.running:
            raise Conflict(f"instance {id} does not run")
        execution = run_command(tuple(argv), tty=tty, rows=rows, columns=columns)
        process.executions = [*(other for other in process.executions if not other.ended), execution]
        return execution

    async def signal(self, id: str, name: str) -> None:
        self.host._signal(await self._find("signal", id), name)

    async def kill(self, id: str) -> None:
        self.host._signal(await self._find("kill", id), "SIGKILL")

    async def pause(self, id: str) -> None:
        process = await self._find("pause", id)
        if not process.running:
            raise Conflict(f"instance {id} does not run")
        process.paused = True

    async def resume(self, id: str) -> None:
        process = await self._find("resume", id)
        if not process.running:
            raise Conflict(f"instance {id} does not run")
        self.host._resume(process)

    async def usage(self, id: str) -> Usage:
        process = await self._find("usage", id)
        if not process.running:
            return Usage(instance=id)
        memory_bytes = min(10 << 20, process.box.limits.memory_bytes)
        return Usage(instance=id, cpu_milli=1, memory_bytes=memory_bytes, pids=1, disk_bytes=4096)

    async def root(self, id: str) -> int:
        process = await self._find("root", id)
        root = process.box.directory / "root"
        root.mkdir(parents=True, exist_ok=True)
        return os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    async def delete(self, id: str) -> None:
        await self.host._enter("delete", id)
        self._known.discard(id)
        process = self.host.processes.pop(id, None)
        if process is not None:
            self.host._signal(process, "SIGKILL")
            shutil.rmtree(process.box.directory, ignore_errors=True)

    async def recover(self) -> Sequence[Found]:
        await self.host._enter("recover", "")
        self._known.update(self.host.processes)
        return [
            Found(id=id, pid=process.pid if process.running else None, exit=process.exit)
            for id, process in sorted(self.host.processes.items())
        ]

    async def close(self) -> None:
        self._known.clear()

    async def _find(self, call: str, id: str) -> FakeProcess:
        await self.host._enter(call, id)
        if id not in self._known:
            raise NotFound(f"no instance {id} is known to this runtime")
        return self.host._process(id)


def failing(calls: dict[str, AtollError]) -> Callable[[str, str], Awaitable[None]]:
    """Return a `before` that raises the error given for a call's name, once each."""

    async def before(call: str, id: str) -> None:
        error = calls.pop(call, None)
        if error is not None:
            raise error

    return before
