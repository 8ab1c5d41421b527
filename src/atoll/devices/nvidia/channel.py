"""The agent's end of a worker: its start, one request at a time with a deadline each, and its end; no wait without a bound.

A process that hangs in the driver cannot be killed at once, nor waited for: it is told to die, left to the kernel, and collected
when it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import msgspec

from atoll.model.errors import Unavailable
from atoll.model.ports.clock import Clock

RETRY_S, RETRY_MAX_S = 0.5, 30.0
"""How long after a second failure in a row no new worker is started; doubled with each one more."""
LEFT_MAX = 4
"""Workers that were told to die and still hang: with so many, no new one is started."""
ANSWER_BYTES_MAX = 8 << 20
Start = Callable[[], tuple[list[str], dict[str, str]]]
"""Returns a worker's arguments and environment. Raises Unavailable where none may run now."""
_SILENT_MEND = "see the kernel's log (dmesg) for NVRM and XID; reset the GPU or restart the node if it stays so"


class WorkerEnded(Exception):
    """The worker ended, or its answer cannot be read."""


class Refused(Exception):
    """The worker answered with an error; `error` is as `worker.failure` makes it."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(str(error))
        self.error = error


def command(library: str, mode: str) -> list[str]:
    return [sys.executable, "-S", "-P", "-m", "atoll.devices.nvidia.worker", str(os.getpid()), library, mode]


def environment_of(base: Mapping[str, str], library_directory: str) -> dict[str, str]:
    """Return a worker's environment: it starts without `site`, so it is told where this package and the bindings lie."""
    bindings = find_spec("pynvml")
    places = dict.fromkeys((str(Path(__file__).parents[3]), str(Path(bindings.origin or "").parent) if bindings else ""))
    environment = {name: value for name, value in base.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = ":".join(filter(None, places))
    if library_directory:
        environment["LD_LIBRARY_PATH"] = ":".join(filter(None, (library_directory, base.get("LD_LIBRARY_PATH", ""))))
    return environment


class Worker:
    """One worker process. To be used from one event loop."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._pidfd = os.pidfd_open(process.pid)
        self._sequence = 0
        self.greeted = False
        self.gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._pidfd, self._collect)

    @classmethod
    async def start(cls, argv: list[str], environment: Mapping[str, str]) -> Self:
        """Raises OSError. Cancelled, it leaves no worker."""
        ours, theirs = socket.socketpair()
        try:
            # From the loop's own thread: the worker dies with the thread that started it. A group of its own: Ctrl-C is not for it.
            null = subprocess.DEVNULL
            process = subprocess.Popen(  # noqa: ASYNC220 (returns as soon as the new program is there: milliseconds)
                argv, stdin=theirs.fileno(), stdout=null, stderr=null, env=dict(environment), cwd="/", process_group=0
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        try:
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=ANSWER_BYTES_MAX)
        except BaseException:
            process.kill()
            ours.close()
            raise
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, call: str, arguments: Mapping[str, Any]) -> Any:
        """Return the answer. Without a deadline: the caller sets one. Raises Refused, WorkerEnded."""
        self._sequence += 1
        request = {"id": self._sequence, "call": call, "arguments": arguments}
        self._writer.write(msgspec.json.encode(request) + b"\n")
        while True:
            answer = await self.read()
            # An older number answers a request whose caller was cancelled.
            if answer.get("id") in (self._sequence, 0):
                break
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["result"]

    async def read(self) -> dict[str, Any]:
        """Return the next line. Raises WorkerEnded."""
        try:
            line = await self._reader.readline()
            if not line.endswith(b"\n"):
                raise WorkerEnded("it ended")
            answer: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise WorkerEnded(f"its answer cannot be read: {error}") from None
        return answer

    def kill(self) -> None:
        """Tell it to die, and let go of it. Returns at once; `gone` is set when it has ended."""
        self._writer.close()
        if not self.gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _collect(self) -> None:
        """Called when the process has ended."""
        if self._process.poll() is None:
            return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.gone.set()


class Channel:
    """Calls into a worker that is started when it is needed, and replaced when it does not answer."""

    def __init__(self, start: Start, *, clock: Clock, start_s: float) -> None:
        self._start, self._clock, self._start_s = start, clock, start_s
        self._lock = asyncio.Lock()
        self._worker: Worker | None = None
        self._left: list[Worker] = []
        self._stale = False
        """The worker knows an older state of the driver: it answers what it was asked, and nothing more."""
        self._closed = 0
        """How often all workers were ended: one whose start began before that is ended too."""
        self._failures = 0
        self._not_before = 0.0

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the worker's process, and those that were told to die and have not ended yet."""
        workers = [*self._left, *([self._worker] if self._worker else [])]
        return tuple(worker.pid for worker in workers if not worker.gone.is_set())

    async def call(self, call: str, deadline_s: float, **arguments: Any) -> Any:
        """Return the worker's answer, within twice `deadline_s` and the start's own deadline.

        Raises Refused (its answer is an error), Unavailable (no answer; the next call may start a new worker).
        """
        try:
            async with asyncio.timeout(deadline_s):
                await self._lock.acquire()
        except TimeoutError:
            raise Unavailable(f"NVIDIA's driver is busy with another request; no turn within {deadline_s:g} s") from None
        try:
            worker = await self._ready()
            if not worker.greeted:
                await self._ask(worker, "hello", self._start_s, {})
                worker.greeted = True
            answer = await self._ask(worker, call, deadline_s, arguments)
            self._failures = 0
            return answer
        finally:
            if self._stale:
                self._drop()
            self._lock.release()

    def check_pause(self) -> None:
        """Raise Unavailable while no new worker is started after failures in a row."""
        wait = self._not_before - self._clock.monotonic()
        if wait > 0:
            message = f"NVIDIA's driver did not answer {self._failures} times; it is asked again in {wait:.1f} s"
            raise Unavailable(message, mend=_SILENT_MEND)

    async def _ready(self) -> Worker:
        if self._worker is not None and not self._worker.gone.is_set():
            return self._worker
        self._left = [worker for worker in self._left if not worker.gone.is_set()]
        if len(self._left) >= LEFT_MAX:
            raise Unavailable(f"NVIDIA's driver does not answer; {LEFT_MAX} processes hang in it", mend=_SILENT_MEND)
        self.check_pause()
        closed = self._closed
        try:
            self._worker = worker = await Worker.start(*self._start())
        except OSError as error:
            self._fail()
            raise Unavailable(f"the process that asks NVIDIA's driver cannot be started: {error}") from None
        if closed != self._closed:
            self._drop()
            raise Unavailable("NVIDIA's devices were let go of meanwhile")
        return worker

    async def _ask(self, worker: Worker, call: str, deadline_s: float, arguments: Mapping[str, Any]) -> Any:
        try:
            async with asyncio.timeout(deadline_s):
                return await worker.ask(call, arguments)
        except TimeoutError:
            self._fail()
            message = f"NVIDIA's driver did not answer ({_words(call)}) within {deadline_s:g} s"
            raise Unavailable(message, mend=_SILENT_MEND) from None
        except WorkerEnded as error:
            self._fail()
            raise Unavailable(
                f"the process that asks NVIDIA's driver failed ({_words(call)}): {error}", mend=_SILENT_MEND
            ) from None
        except Refused:
            if not worker.greeted:
                self._drop()  # it ends by itself: the library could not be used
            raise

    def _fail(self) -> None:
        self._drop()
        self._failures += 1
        if self._failures > 1:
            self._not_before = self._clock.monotonic() + min(RETRY_S * 2 ** (self._failures - 2), RETRY_MAX_S)

    def retire(self) -> None:
        """Let go of the worker, so that the next call sees the driver as it is then. One that is being asked answers first: its
        caller did nothing wrong, and would take the driver for silent."""
        self._stale = self._lock.locked()
        if not self._stale:
            self._drop()

    def _drop(self) -> None:
        self._stale = False
        if self._worker is not None:
            self._worker.kill()
            self._left.append(self._worker)
            self._worker = None

    async def close(self, deadline_s: float) -> None:
        """End the worker, and one that is being started; one that cannot die within `deadline_s` is left to the kernel."""
        self._closed += 1
        self._drop()
        await ended(self._left, deadline_s, self._lock)


async def ended(workers: list[Worker], deadline_s: float, starting: asyncio.Lock) -> None:
    """Return when the workers have ended, those that are being started under `starting` too, or the deadline has passed."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(deadline_s):
            async with starting:
                pass
            for worker in workers:
                await worker.gone.wait()


def _words(call: str) -> str:
    return {"hello": "initialise"}.get(call, call.replace("_", " "))
