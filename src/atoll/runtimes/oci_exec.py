"""A command beside an instance's process, by an OCI runtime's detached `exec` under a shim of its own.

The command holds its pipes or its terminal directly: no byte of it is copied by the runtime's tool.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from atoll.model.errors import NotFound
from atoll.runtimes.exec_tool import Inner
from atoll.runtimes.oci_console import Stream, set_size
from atoll.runtimes.oci_launch import CLOSE_S_MAX, Place, Prepared, make_pipes, prepared, process_of
from atoll.runtimes.readiness import ready
from atoll.runtimes.shim import Launch
from atoll.runtimes.signals import signal_number

DRAIN_S = 1.0
"""How long output is awaited, in silence, after the command's end: its children may hold the pipes for ever."""
_KILLED = 137
_LOST = 128
"""What stands for a command ends with it when it loses sight of the command."""
_EOT = b"\x04"


class OciExecution:
    """Made by a runtime's `exec` when the command runs; see `model.ports.runtime.Execution`."""

    def __init__(
        self, launch: Launch, pid: int, *, stdin: Stream, outputs: dict[int, Stream], tty: bool, inner: Inner | None
    ) -> None:
        self._launch = launch
        self._inner = inner
        self._inner_pid: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pidfd = _open_pid(pid)
        self._stdin = stdin
        self._outputs = outputs
        self._tty = tty
        self._last = 0
        self._closed = False
        self._code: asyncio.Task[int] = asyncio.create_task(self._await_code())

    async def _await_code(self) -> int:
        while (news := await self._launch.news(None)) is not None:  # as long as the command runs
            if news[0] == "inner":
                self._inner_pid.set_result(news[1])
            if news[0] == "exit":
                code = os.waitstatus_to_exitcode(news[1]) if os.WIFEXITED(news[1]) else 128 + os.WTERMSIG(news[1])
                if self._inner is not None and code == _LOST and await self._inner.gone():
                    return _KILLED
                return code
        return _KILLED  # its shim was killed, and the command with it

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def ended(self) -> bool:
        return self._code.done()

    async def read(self) -> tuple[int, bytes] | None:
        while self._outputs:
            for number in sorted(self._outputs, key=lambda number: number == self._last):
                data = self._outputs[number].read()
                if data:
                    self._last = number
                    return number, data
                if data is not None:
                    self._end_output(number)
            if self._outputs and not await self._output_ready():
                for number in list(self._outputs):
                    self._end_output(number)
        return None

    def _end_output(self, number: int) -> None:
        stream = self._outputs.pop(number)
        if stream is not self._stdin:
            stream.close()

    async def _output_ready(self) -> bool:
        """Wait until there is output; return False when the command ended and nothing came for DRAIN_S."""
        waits = {asyncio.create_task(ready(stream.fd)) for stream in self._outputs.values()}
        try:
            done, _ = await asyncio.wait({*waits, self._code}, return_when=asyncio.FIRST_COMPLETED)
            if done & waits:
                return True
            done, _ = await asyncio.wait(waits, timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
            return bool(done)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)

    async def write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            await self._stdin.write(data)

    async def close_stdin(self) -> None:
        if self._tty:
            await self.write(_EOT)
        else:
            self._stdin.close()

    async def resize(self, rows: int, columns: int) -> None:
        if self._tty and self._stdin.fd >= 0:
            set_size(self._stdin.fd, rows, columns)

    async def signal(self, name: str) -> None:
        await self._send(signal_number(name))

    async def _send(self, number: int) -> None:
        if self._inner is not None and not self.ended:
            waits: set[asyncio.Future[Any]] = {self._inner_pid, self._code}
            await asyncio.wait(waits, timeout=CLOSE_S_MAX, return_when=asyncio.FIRST_COMPLETED)
            if self._inner_pid.done():
                await self._inner.send(self._inner_pid.result(), number)
        elif self._pidfd >= 0 and not self.ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> int:
        return await asyncio.shield(self._code)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(NotFound):  # with its instance it went, too
            await self._send(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):  # in a paused instance even this signal waits; the shim then does the rest
            await asyncio.wait_for(asyncio.shield(self._code), CLOSE_S_MAX)
        self._launch.close()
        self._code.cancel()
        for stream in (self._stdin, *self._outputs.values()):
            stream.close()
        self._outputs.clear()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _open_pid(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


async def start_execution(
    place: Place,
    *,
    argv: Sequence[str],
    env: Sequence[tuple[str, str]],
    workdir: str | None,
    user: str | None,
    size: tuple[int, int] | None,
) -> OciExecution:
    """Start `argv` beside the instance; with `size` (rows, columns) it gets a terminal.

    Raises RuntimeFailed, ImageError (no such user).
    """
    body, owner = process_of(place, argv, env, workdir, user, size)
    with prepared(place, body) as ready_made:
        if ready_made.console is None or size is None:
            return await _start_on_pipes(ready_made, owner, argv[0], place.inner)
        launch, pid = await ready_made.launch(None, argv[0])
        try:
            terminal = Stream(await ready_made.console.terminal())
        except BaseException:
            launch.close()
            raise
        set_size(terminal.fd, *size)
        return OciExecution(launch, pid, stdin=terminal, outputs={1: terminal}, tty=True, inner=place.inner)


async def _start_on_pipes(ready_made: Prepared, owner: tuple[int, int], name: str, inner: Inner | None) -> OciExecution:
    with ExitStack() as theirs:
        ours, (stdin, stdout, stderr) = make_pipes(owner, (True, False, False), theirs)
        try:
            launch, pid = await ready_made.launch((stdin, stdout, stderr), name)
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
    streams = [Stream(fd) for fd in ours]
    return OciExecution(launch, pid, stdin=streams[0], outputs={1: streams[1], 2: streams[2]}, tty=False, inner=inner)
