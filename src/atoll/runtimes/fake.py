"""A runtime in memory: faithful to the port, deterministic, and scripted. For tests and the simulator.

What runs lives in a FakeHost, which stands for the machine: it outlives every FakeRuntime, as processes outlive an agent.
Time is the event loop's, so that on a loop with virtual time nothing here waits for real.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from msgspec import structs

from atoll.model.codec import decode, encode
from atoll.model.copying import Copier
from atoll.model.errors import AtollError, Conflict, NotFound
from atoll.model.ports.runtime import Box, Compatibility, Execution, Feature, Found, Snapshot, Started
from atoll.model.records import Exit, Usage
from atoll.model.spec import RuntimeName
from atoll.runtimes.fake_exec import run_command
from atoll.runtimes.fake_host import Behaviour, FakeHost, FakeProcess, behaviour_of
from atoll.runtimes.snapshots import EMULATED, abandon, begin, check_content, check_fit, load, seal

__all__ = ["FAKE_FEATURES", "Behaviour", "FakeHost", "FakeProcess", "FakeRuntime", "behaviour_of", "failing"]

FAKE_FEATURES = frozenset(
    {Feature.EXEC, Feature.TTY, Feature.PAUSE, Feature.RESIZE, Feature.FILES, Feature.GPU, Feature.SNAPSHOT, Feature.FORK}
)

_STATE = "state"


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
        await self.host.enter("probe", "")
        return "fake 1.0"

    async def create(self, box: Box) -> None:
        if box.id in self.host.processes:
            raise Conflict(f"instance {box.id} exists already")
        await self.host.enter("create", box.id)
        self.host.processes[box.id] = FakeProcess(box)
        self._known.add(box.id)

    async def start(self, id: str) -> Started:
        process = await self._find("start", id)
        if process.pid is not None:
            raise Conflict(f"instance {id} was started already")
        return self.host.launch(process)

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
        self.host.signal(await self._find("signal", id), name)

    async def kill(self, id: str) -> None:
        self.host.signal(await self._find("kill", id), "SIGKILL")

    async def pause(self, id: str) -> None:
        process = await self._find("pause", id)
        if not process.running:
            raise Conflict(f"instance {id} does not run")
        process.paused = True

    async def resume(self, id: str) -> None:
        process = await self._find("resume", id)
        if not process.running:
            raise Conflict(f"instance {id} does not run")
        self.host.resume(process)

    async def snapshot(self, id: str, directory: Path) -> Snapshot:
        process = await self._find("snapshot", id)
        if not process.running:
            raise Conflict(f"instance {id} does not run")
        begin(directory)
        try:
            (directory / _STATE).write_bytes(encode(process.box.argv))
            return seal(
                directory,
                (_STATE,),
                compatibility=self._here(),
                image=process.box.image.digest,
                limits=process.box.limits,
                networked=process.box.netns is not None,
            )
        except BaseException:
            abandon(directory)
            raise

    async def restore(self, box: Box, directory: Path) -> Started:
        snapshot = load(directory)
        check_fit(snapshot, self._here(), box)
        check_content(directory, snapshot)
        argv = decode((directory / _STATE).read_bytes(), tuple[str, ...])
        await self.create(structs.replace(box, argv=argv))
        try:
            await self.host.enter("restore", box.id)
            return self.host.launch(self.host.process(box.id))
        except BaseException:
            await self.delete(box.id)
            raise

    def _here(self) -> Compatibility:
        return Compatibility(self.name, "fake 1.0", EMULATED, "")

    async def usage(self, id: str) -> Usage:
        process = await self._find("usage", id)
        if not process.running:
            return Usage(instance=id)
        memory_bytes = min(10 << 20, process.box.limits.memory_bytes)
        return Usage(instance=id, cpu_milli=1, memory_bytes=memory_bytes, pids=1, disk_bytes=4096)

    async def copier(self, id: str) -> Copier | None:
        return None

    async def root(self, id: str) -> int:
        process = await self._find("root", id)
        root = process.box.directory / "root"
        root.mkdir(parents=True, exist_ok=True)
        return os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    async def delete(self, id: str) -> None:
        await self.host.enter("delete", id)
        self._known.discard(id)
        process = self.host.processes.pop(id, None)
        if process is not None:
            self.host.signal(process, "SIGKILL")
            shutil.rmtree(process.box.directory, ignore_errors=True)

    async def recover(self) -> Sequence[Found]:
        await self.host.enter("recover", "")
        self._known.update(self.host.processes)
        return [
            Found(id=id, pid=process.pid if process.running else None, exit=process.exit)
            for id, process in sorted(self.host.processes.items())
        ]

    async def close(self) -> None:
        self._known.clear()

    async def _find(self, call: str, id: str) -> FakeProcess:
        await self.host.enter(call, id)
        if id not in self._known:
            raise NotFound(f"no instance {id} is known to this runtime")
        return self.host.process(id)


def failing(calls: dict[str, AtollError]) -> Callable[[str, str], Awaitable[None]]:
    """Return a `before` that raises the error given for a call's name, once each."""

    async def before(call: str, id: str) -> None:
        error = calls.pop(call, None)
        if error is not None:
            raise error

    return before
