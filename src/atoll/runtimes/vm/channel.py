"""The node's side of the channel to a guest's init: frames, credit, one session at a time; `native/guest/guest.h` is the other.

A guest is the tenant's: whatever comes from it is bounded and checked, and the worst that it can do is to lose its own channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import os
import struct
from collections.abc import Awaitable, Callable

from atoll.model.errors import DeadlineExceeded, Exhausted, RuntimeFailed, Unavailable

MAGIC = b"\x89atoll-guest\r\n\x1a\n"
VERSION = 1
GREETING_BYTES = len(MAGIC) + 12
HEADER = struct.Struct("<IBBH")
FRAME_BYTES_MAX = 1 << 20
DATA_BYTES_MAX = 16 << 10
INPUT_WINDOW = 64 << 10
OUTPUT_WINDOW = 256 << 10
TEXT_BYTES_MAX = 256
STREAMS_MAX = 64
GREETING_S = 0.5
"""How long an answer to a greeting is awaited before it is sent again, behind what ends any frame that was cut off."""
CONNECTION_S = 2.0
"""How long a machine's first connection is greeted before another is made, which has twice as long."""
SEND_S_MAX = 5.0
"""How long a guest may leave the frames before one unread, with the pipe full; then its channel is cut."""
ANSWER_S_MAX = 10.0
LOST = "the instance has ended"
"""Why a command does not run whose guest has gone."""
_ANSWER_BYTES_MAX = 64 << 10
"""No frame of a guest is larger: data and texts are."""


class Kind(enum.IntEnum):
    NOTHING = 0
    EXEC = 1
    INPUT = 2
    RESIZE = 3
    SIGNAL = 4
    CLOSE = 5
    STATS = 6
    CREDIT = 7
    REFRESH = 8
    COPY = 9
    STARTED = 16
    FAILED = 17
    OUTPUT = 18
    ERROR = 19
    ENDED = 20
    STATISTICS = 21
    REFRESHED = 22


Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""Opens a stream of bytes to the guest's init. Raises OSError while there is nobody."""


class GuestStream:
    """What comes for one command, and what may be sent to it."""

    def __init__(self) -> None:
        self.started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Empty, or why it does not run."""
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """As of wait(2)."""
        self.output: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
        self.pending_bytes = 0
        """What is in `output`; a guest that keeps to its credit stays below OUTPUT_WINDOW."""
        self.window = INPUT_WINDOW
        self.credit = asyncio.Event()

    def lose(self) -> None:
        """The guest has gone, and the command with it."""
        if not self.started.done():
            self.started.set_result(LOST)
        if not self.status.done():
            self.status.set_result(9)
        self.output.put_nowait((1, b""))
        self.output.put_nowait((2, b""))
        self.credit.set()


class GuestChannel:
    """One session with a guest's init. After `lost` is set nothing works any more; open another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._streams: dict[int, GuestStream] = {}
        self._answers: dict[Kind, list[asyncio.Future[bytes]]] = {}
        self._next = 1
        self._lock = asyncio.Lock()
        self.lost = asyncio.Event()
        self.was_cut = False
        """It is lost because whoever is there was silent for too long."""
        self.stands_still: Callable[[], bool] = lambda: False
        """Says whether the guest was made to stand still, and so cannot help its silence."""
        self.first = GuestStream()
        """The instance's own process."""
        self._reading: asyncio.Task[None] | None = None
        self._rest = b""

    @classmethod
    async def open(
        cls, connect: Connect, *, deadline_s: float, given_up: asyncio.Event | None = None, once: bool = False
    ) -> GuestChannel:
        """Greet the guest until it answers. `given_up` is set when there is no use in waiting any longer.

        `once` says that `connect` can be called once only. Otherwise a connection on which nothing comes is made anew: QEMU 7.2
        sometimes keeps all that a guest answers which was paused when the connection before was closed.

        Raises DeadlineExceeded; Unavailable when `given_up` was set; RuntimeFailed for a guest of another version.
        """
        try:
            async with asyncio.timeout(deadline_s):
                opening = asyncio.ensure_future(cls._open(connect, math.inf if once else CONNECTION_S))
                gone = asyncio.ensure_future((given_up or asyncio.Event()).wait())
                try:
                    await asyncio.wait({opening, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if opening.done():
                        return await opening
                    raise Unavailable("the guest has ended")
                finally:
                    for task in (opening, gone):
                        task.cancel()
                    await asyncio.gather(opening, gone, return_exceptions=True)
        except TimeoutError:
            raise DeadlineExceeded(f"the guest did not answer within {deadline_s:.0f} s") from None

    @classmethod
    async def _open(cls, connect: Connect, patience_s: float) -> GuestChannel:
        step_s = 0.002
        while True:  # until the caller's deadline
            try:
                reader, writer = await connect()
            except OSError:
                await asyncio.sleep(step_s)
                step_s = min(step_s * 1.5, 0.05)
                continue
            channel = cls(reader, writer)
            try:
                await channel._greet(patience_s)
            except TimeoutError:
                writer.transport.abort()
                patience_s *= 2
                continue
            except (OSError, EOFError):
                writer.close()
                await asyncio.sleep(step_s)
                step_s = min(step_s * 1.5, 0.05)
                continue
            except BaseException:
                writer.close()
                raise
            channel._reading = asyncio.create_task(channel._read())
            return channel

    async def _greet(self, patience_s: float) -> None:
        """Raises TimeoutError where nothing has come for `patience_s`; OSError, EOFError, RuntimeFailed."""
        until = asyncio.get_running_loop().time() + patience_s
        nonce = os.urandom(8)
        greeting = MAGIC + struct.pack("<I", VERSION) + nonce
        seen = bytearray()
        self._writer.write(greeting)
        while True:
            try:
                async with asyncio.timeout(GREETING_S):
                    chunk = await self._reader.read(1 << 16)
            except TimeoutError:
                if asyncio.get_running_loop().time() >= until:
                    raise
                # An earlier agent's frame may wait for the rest of its bytes: these end it, whatever it was.
                if self._writer.transport.get_write_buffer_size() == 0:
                    self._writer.write(bytes(FRAME_BYTES_MAX // 8) + greeting)
                continue
            if not chunk:
                raise EOFError
            seen += chunk
            at = seen.find(nonce)
            if at < 0:
                del seen[: -len(greeting)]
                continue
            version = int.from_bytes(seen[at - 4 : at], "little")
            if version != VERSION:
                raise RuntimeFailed(
                    f"the guest speaks version {version} of the protocol, and this agent {VERSION}",
                    mend="create the instance again",
                )
            # What follows the answer is the first frames; the reader must see them again.
            self._rest = bytes(seen[at + len(nonce) :])
            return

    async def _read(self) -> None:
        try:
            await self._read_frames()
        except (OSError, EOFError, ValueError):
            pass
        finally:
            self.lost.set()
            for stream in (self.first, *self._streams.values()):
                stream.lose()
            for futures in self._answers.values():
                for future in futures:
                    if not future.done():
                        future.set_exception(Unavailable("the guest has gone"))
                        future.exception()
            self._writer.close()

    async def _read_frames(self) -> None:
        buffer = bytearray(self._rest)
        while True:
            at = 0
            while len(buffer) - at >= HEADER.size:
                if buffer.startswith(MAGIC[: HEADER.size], at):  # the answer to a greeting that was sent twice
                    if len(buffer) - at < GREETING_BYTES:
                        break
                    at += GREETING_BYTES
                    continue
                length, kind, zero, stream = HEADER.unpack_from(buffer, at)
                if length > _ANSWER_BYTES_MAX or zero:
                    raise ValueError("no frame")
                if len(buffer) - at - HEADER.size < length:
                    break
                self._take(kind, stream, bytes(buffer[at + HEADER.size : at + HEADER.size + length]))
                at += HEADER.size + length
            del buffer[:at]
            chunk = await self._reader.read(1 << 16)
            if not chunk:
                raise EOFError
            buffer += chunk

    def _take(self, kind: int, id: int, data: bytes) -> None:
        stream = self.first if id == 0 else self._streams.get(id)
        if stream is None:
            return  # closed meanwhile
        match kind:
            case Kind.STARTED | Kind.FAILED:
                words = data[:TEXT_BYTES_MAX].decode(errors="replace") if kind == Kind.FAILED else ""
                if not stream.started.done():
                    stream.started.set_result(words or ("" if kind == Kind.STARTED else "it cannot be started"))
            case Kind.OUTPUT | Kind.ERROR:
                stream.pending_bytes += len(data) or 1
                if id == 0 or stream.pending_bytes > OUTPUT_WINDOW + DATA_BYTES_MAX:
                    raise ValueError("output that nobody asked for")
                stream.output.put_nowait((1 if kind == Kind.OUTPUT else 2, data))
            case Kind.ENDED:
                if len(data) == 4 and not stream.status.done():
                    stream.status.set_result(int.from_bytes(data, "little") & 0xFFFF)
            case Kind.CREDIT:
                if len(data) == 4:
                    stream.window = min(INPUT_WINDOW, stream.window + int.from_bytes(data, "little"))
                    stream.credit.set()
            case Kind.STATISTICS | Kind.REFRESHED:
                waiting = self._answers.get(Kind(kind))
                if waiting and not (future := waiting.pop(0)).done():
                    future.set_result(data)
            case _:
                return

    def stream(self) -> tuple[int, GuestStream]:
        """Return a new stream and its number. Raises Exhausted."""
        if len(self._streams) >= STREAMS_MAX:
            raise Exhausted(f"{STREAMS_MAX} commands run beside this instance", mend="end some of them")
        while self._next in self._streams or self._next == 0:
            self._next = (self._next + 1) % 0x10000
        id, self._next = self._next, (self._next + 1) % 0x10000
        self._streams[id] = stream = GuestStream()
        if self.lost.is_set():
            stream.lose()
        return id, stream

    def forget(self, id: int) -> None:
        self._streams.pop(id, None)

    async def send(self, kind: Kind, stream: int = 0, data: bytes = b"") -> None:
        """Send a frame; returns when there is room for the next. A guest that has gone is no error.

        One that makes no room for SEND_S_MAX is `cut`, so that nobody waits for it any longer, unless it `stands_still`.
        """
        async with self._lock:
            if self.lost.is_set():
                return
            self._writer.write(HEADER.pack(len(data), kind, 0, stream) + data)
            while True:
                try:
                    async with asyncio.timeout(SEND_S_MAX):
                        with contextlib.suppress(OSError):
                            await self._writer.drain()
                    return
                except TimeoutError:
                    if not self.stands_still():
                        self.cut()
                        return

    async def ask(self, kind: Kind, answer: Kind, data: bytes = b"", *, deadline_s: float = ANSWER_S_MAX) -> bytes:
        """Send a frame that is answered by one of the kind `answer`. Raises Unavailable, DeadlineExceeded."""
        if self.lost.is_set():
            raise Unavailable("the guest has gone")
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        waiting = self._answers.setdefault(answer, [])
        waiting.append(future)
        try:
            async with asyncio.timeout(deadline_s):
                await self.send(kind, 0, data)
                return await future
        except TimeoutError:
            raise DeadlineExceeded(f"the guest did not answer within {deadline_s:.0f} s") from None
        finally:
            with contextlib.suppress(ValueError):  # it was answered
                waiting.remove(future)

    def cut(self) -> None:
        """Give up a guest that is silent: what waits to be sent is dropped, and all who wait hear that it has gone."""
        if self.lost.is_set():
            return
        self.was_cut = True
        self.lost.set()
        self._writer.transport.abort()
        if self._reading is not None:
            self._reading.cancel()

    def hang_up(self) -> None:
        """Let the guest see the end of the stream behind all that was sent; `lost` is set once it has ended its own side."""
        self._writer.close()

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.close()
