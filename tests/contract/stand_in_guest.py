"""What a stand-in for a monitor boots: the real init's test mode for commands, and the instance's process, without a machine.

It reads what a guest is told from the end of its disk, speaks the guest's protocol over the monitor's vsock, sends output to
the node's ports, and writes to the disk how the instance ended: `native/guest/` is the real one. Commands run as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

MAGIC = b"\x89atoll-guest\r\n\x1a\n"
GREETING_BYTES = len(MAGIC) + 12
HEADER = struct.Struct("<IBBH")
SIGNAL, STATS, STARTED, FAILED, ENDED, STATISTICS = 4, 6, 16, 17, 20, 21
AGENT_PORT, OUTPUT_PORTS = 1024, (1025, 1026)
TRAILER_BYTES, ENDING_AT = 4096, 2048
LOG_BYTES = 64 << 10
RETRY_S = 0.02
DRAIN_S_MAX = 60.0


class Guest:
    """`vsock` is the path of the monitor's vsock; `over` is called once the machine has ended by itself."""

    def __init__(self, disk: Path, vsock: str, server: Path, over: Callable[[], None]) -> None:
        self._disk, self._vsock, self._server, self._over = disk, vsock, server, over
        self._running = asyncio.Event()
        self._running.set()
        self._first: asyncio.subprocess.Process | None = None
        self._why = ""
        self._status: int | None = None
        self._session: Session | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def boot(self, listener: socket.socket) -> None:
        """`listener` is where the node connects to."""
        self._task(self._serve(listener))
        self._task(self._live())

    def _task(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def pause(self) -> None:
        """Everything stands, as with a machine's processors."""
        self._running.clear()
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGSTOP)  # of this monitor's processes: it is the first of its own namespace

    def resume(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGCONT)
        self._running.set()

    def stop(self) -> None:
        """As by pulling the plug."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        for task in self._tasks:
            task.cancel()

    # the instance's process

    async def _live(self) -> None:
        words = read_words(self._disk)
        argv, env, directory = process_of(words)
        try:
            self._first = await asyncio.create_subprocess_exec(
                *argv,
                env=env,
                cwd=directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            self._why = f"cannot be executed: {error.strerror}"
            self._tell()
            write_ending(self._disk, started=False, status=127 << 8, text=self._why)
            await asyncio.sleep(RETRY_S)
            self._over()
            return
        assert self._first.stdout is not None
        assert self._first.stderr is not None
        self._tell()
        readers = (self._first.stdout, self._first.stderr)
        pumps = [asyncio.ensure_future(self._pump(reader, port)) for reader, port in zip(readers, OUTPUT_PORTS, strict=True)]
        code = await self._first.wait()
        self._status = -code if code < 0 else code << 8
        self._tell()
        await asyncio.wait(pumps, timeout=DRAIN_S_MAX)
        write_ending(self._disk, started=True, status=self._status)
        self._over()

    async def _pump(self, reader: asyncio.StreamReader, port: int) -> None:
        """Bring one stream to the node, whoever listens there, or nobody for a while."""
        writer: asyncio.StreamWriter | None = None
        while data := await reader.read(LOG_BYTES):
            while True:
                await self._running.wait()
                try:
                    if writer is None:
                        _, writer = await asyncio.open_unix_connection(f"{self._vsock}_{port}")
                    writer.write(data)
                    await writer.drain()
                    break
                except OSError:
                    writer = None
                    await asyncio.sleep(RETRY_S)
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _tell(self) -> None:
        if self._session is not None and not self._session.closed:
            self._session.tell_first()

    # the channel

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            self._task(self._connected(connection))

    async def _connected(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        line = await reader.readline()
        if line != f"CONNECT {AGENT_PORT}\n".encode():
            writer.close()
            return
        await self._running.wait()
        writer.write(b"OK 1073741824\n")
        if self._session is not None:
            self._session.close()  # the newest connection is the node's
        self._session = Session(self, reader, writer)
        await self._session.run(self._server)

    def first_frames(self) -> list[tuple[int, bytes]]:
        if self._why:
            return [(FAILED, self._why.encode())]
        if self._first is None:
            return []
        return [(STARTED, b""), *([(ENDED, struct.pack("<i", self._status))] if self._status is not None else [])]

    def signal(self, number: int) -> None:
        if self._first is not None and self._status is None:
            with contextlib.suppress(ProcessLookupError):
                self._first.send_signal(number)

    def statistics(self) -> bytes:
        alive = self._first is not None and self._status is None
        return struct.pack("<5Q", 0, 1 << 20, int(alive), 0, 0)

    async def runs(self) -> None:
        await self._running.wait()


class Session:
    """One connection of the node: frames of the first process are answered here, all others by the real init."""

    def __init__(self, guest: Guest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._guest, self._reader, self._writer = guest, reader, writer
        self._told = 0
        self._greeted = False
        self.closed = False
        self._init: asyncio.subprocess.Process | None = None

    def close(self) -> None:
        self.closed = True
        self._writer.close()

    def send(self, kind: int, data: bytes) -> None:
        self._writer.write(HEADER.pack(len(data), kind, 0, 0) + data)

    def tell_first(self) -> None:
        if self._greeted:
            frames = self._guest.first_frames()
            for kind, data in frames[self._told :]:
                self.send(kind, data)
            self._told = len(frames)

    async def run(self, server: Path) -> None:
        ours, theirs = socket.socketpair()
        self._init = await asyncio.create_subprocess_exec(str(server), "serve", stdin=theirs, env={"PATH": "/bin"})
        theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            down = asyncio.ensure_future(self._carry(self._reader, writer, self._from_node))
            up = asyncio.ensure_future(self._carry(reader, self._writer, self._from_init))
            await asyncio.wait({down, up}, return_when=asyncio.FIRST_COMPLETED)
            down.cancel()
            up.cancel()
        finally:
            self.close()
            writer.close()
            await self._init.wait()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, take: Callable[[int, int, bytes], bool]
    ) -> None:
        buffer = bytearray()
        with contextlib.suppress(OSError):
            while chunk := await reader.read(LOG_BYTES):
                await self._guest.runs()
                buffer += chunk
                at = 0
                while (length := _whole(buffer, at)) > 0:
                    frame = bytes(buffer[at : at + length])
                    at += length
                    if frame.startswith(MAGIC):
                        writer.write(frame)
                        if take == self._from_init:
                            self._greeted, self._told = True, 0
                            self.tell_first()
                        continue
                    _, kind, _, stream = HEADER.unpack_from(frame)
                    if take(kind, stream, frame[HEADER.size :]):
                        writer.write(frame)
                del buffer[:at]
                await writer.drain()

    def _from_node(self, kind: int, stream: int, data: bytes) -> bool:
        if kind == SIGNAL and stream == 0:
            self._guest.signal(int.from_bytes(data[:4], "little"))
            return False
        if kind == STATS:
            self.send(STATISTICS, self._guest.statistics())
            return False
        return True

    def _from_init(self, kind: int, stream: int, data: bytes) -> bool:
        return True


def _whole(buffer: bytearray, at: int) -> int:
    """Return the length of the frame or greeting that begins at `at`, 0 while it is not whole."""
    left = len(buffer) - at
    if left >= HEADER.size and MAGIC.startswith(bytes(buffer[at : at + HEADER.size])):
        return GREETING_BYTES if left >= GREETING_BYTES else 0
    if left < HEADER.size:
        return 0
    length = HEADER.size + HEADER.unpack_from(buffer, at)[0]
    return length if left >= length else 0


def read_words(disk: Path) -> list[str]:
    with disk.open("rb") as file:
        file.seek(-TRAILER_BYTES, os.SEEK_END)
        magic, _, count, at = struct.unpack("<8sIIQ", file.read(24))
        assert magic == b"atollbox"
        file.seek(at)
        return [word.decode(errors="surrogateescape") for word in file.read(count).split(b"\0")[:-1]]


def process_of(words: list[str]) -> tuple[list[str], dict[str, str], str]:
    """Return command, environment and directory of the instance's process."""
    assert words[12] == "0", "these machines take no volumes"
    rest = words[13 + 6 :]  # hostname and so on; then user, group, groups, capabilities, open files
    directory, count = rest[1], int(rest[2])
    argv, rest = rest[3 : 3 + count], rest[3 + count :]
    return argv, dict(entry.split("=", 1) for entry in rest[1 : 1 + int(rest[0])]), directory


def write_ending(disk: Path, *, started: bool, status: int, text: str = "") -> None:
    now = time.time()
    ending = struct.pack("<8sIIiIqq256s", b"atollend", 1, started, status, 0, int(now), int(now % 1 * 1e9), text.encode())
    with disk.open("r+b") as file:
        file.seek(-TRAILER_BYTES + ENDING_AT, os.SEEK_END)
        file.write(ending)
