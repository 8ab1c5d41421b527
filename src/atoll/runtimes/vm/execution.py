"""A command beside an instance's process in a virtual machine, run by the guest's init."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Any

from atoll.model.errors import DeadlineExceeded, TooLarge
from atoll.runtimes.oci_container import cannot_run
from atoll.runtimes.signals import signal_number
from atoll.runtimes.vm.channel import DATA_BYTES_MAX, FRAME_BYTES_MAX, INPUT_WINDOW, GuestChannel, GuestStream, Kind

DRAIN_S = 1.0
"""How long output is awaited, in silence, after the command's end: its children may hold the pipes for ever."""
CLOSE_S_MAX = 2.0
EXEC_S_MAX = 60.0
_EOT = b"\x04"


class GuestExecution:
    """See `model.ports.runtime.Execution`."""

    def __init__(self, channel: GuestChannel, id: int, stream: GuestStream, *, tty: bool) -> None:
        self._channel = channel
        self._id = id
        self._stream = stream
        self._tty = tty
        self._open = {1} if tty else {1, 2}
        self._closed = False
        self._input_ended = False

    @property
    def ended(self) -> bool:
        """Whether its end is known."""
        return self._stream.status.done()

    @property
    def closed(self) -> bool:
        return self._closed

    async def read(self) -> tuple[int, bytes] | None:
        while self._open and not self._closed:
            item = await self._next()
            if item is None:
                self._open.clear()
                break
            number, data = item
            self._stream.pending_bytes -= len(data) or 1
            if data:
                await self._channel.send(Kind.CREDIT, self._id, len(data).to_bytes(4, "little"))
                return number, data
            self._open.discard(number)
        return None

    async def _next(self) -> tuple[int, bytes] | None:
        """Return the next piece; None when the command has ended and nothing came for DRAIN_S."""
        queue = self._stream.output
        if not queue.empty():
            return queue.get_nowait()
        getting = asyncio.ensure_future(queue.get())
        try:
            waits: set[asyncio.Future[Any]] = {getting, self._stream.status}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                await asyncio.wait({getting}, timeout=DRAIN_S)
            return getting.result() if getting.done() else None
        finally:
            getting.cancel()

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._input_ended and not self._stream.status.done():
            part = min(len(view), self._stream.window, DATA_BYTES_MAX)
            if part == 0:
                await self._room()
                continue
            self._stream.window -= part
            await self._channel.send(Kind.INPUT, self._id, bytes(view[:part]))
            view = view[part:]
        while self._stream.window < INPUT_WINDOW // 2 and not self._stream.status.done():
            await self._room()

    async def _room(self) -> None:
        """Wait until the command has taken some of its input, or ends."""
        self._stream.credit.clear()
        credit = asyncio.ensure_future(self._stream.credit.wait())
        try:
            waits: set[asyncio.Future[Any]] = {credit, self._stream.status}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            credit.cancel()

    async def close_stdin(self) -> None:
        if self._tty:
            await self.write(_EOT)
        elif not self._input_ended:
            self._input_ended = True
            await self._channel.send(Kind.INPUT, self._id)

    async def resize(self, rows: int, columns: int) -> None:
        if self._tty:
            await self._channel.send(Kind.RESIZE, self._id, _size(rows, columns))

    async def signal(self, name: str) -> None:
        await self._send(signal_number(name))

    async def _send(self, number: int) -> None:
        if not self._stream.status.done():
            await self._channel.send(Kind.SIGNAL, self._id, number.to_bytes(4, "little"))

    async def wait(self) -> int:
        status = await asyncio.shield(self._stream.status)
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._send(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):  # a paused guest does it when it goes on
            await asyncio.wait_for(asyncio.shield(self._stream.status), CLOSE_S_MAX)
        await self._channel.send(Kind.CLOSE, self._id)
        self._channel.forget(self._id)
        self._stream.lose()


def _size(rows: int, columns: int) -> bytes:
    return min(rows, 0xFFFF).to_bytes(2, "little") + min(columns, 0xFFFF).to_bytes(2, "little")


async def start_beside(
    channel: GuestChannel, process: bytes, name: str, size: tuple[int, int] | None, *, kind: Kind = Kind.EXEC
) -> GuestExecution:
    """Start `process` (words, see config.py) in the guest; with `size` (rows, columns) it gets a terminal.

    Raises CommandNotFound, RuntimeFailed, with the command's name, for one that cannot be started; DeadlineExceeded; Exhausted;
    TooLarge.
    """
    execution = await try_beside(channel, process, name, size, kind=kind)
    if isinstance(execution, str):
        raise cannot_run(name, execution)
    return execution


async def try_beside(
    channel: GuestChannel, process: bytes, name: str, size: tuple[int, int] | None, *, kind: Kind = Kind.EXEC
) -> GuestExecution | str:
    """As `start_beside`, but return why it cannot be started in the guest's words. Raises DeadlineExceeded, Exhausted, TooLarge."""
    frame = (_size(*size) if size else bytes(4)) + process
    if len(frame) > FRAME_BYTES_MAX:  # else the guest would take it for no frame, and end all that it runs
        raise TooLarge(
            f"the command has {len(frame)} bytes with its environment; at most {FRAME_BYTES_MAX} are taken",
            mend="put large values into files",
        )
    id, stream = channel.stream()
    execution = GuestExecution(channel, id, stream, tty=size is not None)
    try:
        await channel.send(kind, id, frame)
        async with asyncio.timeout(EXEC_S_MAX):
            why = await asyncio.shield(stream.started)
    except TimeoutError:
        await execution.close()
        raise DeadlineExceeded(f"the guest did not start {name!r} within {EXEC_S_MAX:.0f} s") from None
    except BaseException:
        await asyncio.shield(execution.close())
        raise
    if why:
        channel.forget(id)
    return why or execution
