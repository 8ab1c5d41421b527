"""Vsock as Firecracker and Cloud Hypervisor give it: unix sockets beside the monitor instead of a device of the node's kernel.

Towards the guest: connect to SOCKET, say `CONNECT PORT`, read `OK PORT`. From the guest to PORT of the node: the monitor
connects to SOCKET_PORT, where somebody must listen (Firecracker documentation: vsock). An instance's output comes that way, on
one port for each stream, and is carried into its FIFOs. While no agent is there the guest keeps what it can, and connects again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from atoll.model.errors import RuntimeFailed
from atoll.runtimes.mounts import descriptor
from atoll.runtimes.readiness import ready
from atoll.runtimes.vm.sockets import open_socket

SOCKET = "vsock.sock"
AGENT_PORT, STDOUT_PORT, STDERR_PORT = 1024, 1025, 1026
"""As in native/guest/guest.h."""
GUEST_CID = 3
"""Every machine's: it is known to its own monitor only."""
CONNECTIONS_MAX = 4
"""Of one stream at once; what is more is closed unread."""
_CHUNK = 64 << 10
_ANSWER_BYTES_MAX = 64


async def connect_to_guest(path: Path, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return a stream to the program that listens on `port` in the guest. Raises OSError where nobody does.

    A monitor that does not answer is waited for: the caller sets the deadline.
    """
    reader, writer = await open_socket(path)
    try:
        writer.write(f"CONNECT {port}\n".encode())
        answer = bytearray()
        while not answer.endswith(b"\n"):  # byte by byte: what follows is the guest's
            byte = await reader.read(1)
            if not byte or len(answer) >= _ANSWER_BYTES_MAX:
                raise ConnectionResetError(f"nobody listens on port {port} of the guest")
            answer += byte
        if not answer.startswith(b"OK "):
            raise ConnectionResetError("the monitor answers with what is none of vsock's")
    except BaseException:
        writer.close()
        raise
    return reader, writer


class LogCarrier:
    """Listens for one stream of an instance's output, and carries what comes to its FIFO, no faster than that is read.

    `directory` is the monitor's own: what it has put in the socket's place is removed, and no link there is followed.
    """

    def __init__(self, directory: Path, port: int, fifo: Path, uid: int) -> None:
        """Raises RuntimeFailed."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._order = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._listener = _listen(directory, f"{SOCKET}_{port}", uid)
        try:
            self._fifo = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self._listener.close()
            raise RuntimeFailed(f"cannot open the instance's output: {error}") from None
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> bool:
        """Take one connection in, and return whether there was one."""
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return False
        if len(self._tasks) >= CONNECTIONS_MAX:
            connection.close()
            return True
        connection.setblocking(False)
        task = self._loop.create_task(self._carry(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _carry(self, connection: socket.socket) -> None:
        async with self._order:  # of connections: a stream has one order
            try:
                while data := await self._loop.sock_recv(connection, _CHUNK):
                    await self._write(data)
            except OSError:
                pass  # the monitor went away
            finally:
                connection.close()

    async def _write(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            try:
                at += os.write(self._fifo, data[at:])
            except BlockingIOError:
                await ready(self._fifo, writing=True)

    async def finish(self, deadline_s: float) -> None:
        """Carry what the monitor, which has ended, has left in its connections; give up after `deadline_s`."""
        for _ in range(CONNECTIONS_MAX):
            if self._listener.fileno() < 0 or not self._accept():
                break
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=deadline_s)

    def close(self) -> None:
        if self._listener.fileno() < 0:
            return
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        fd, self._fifo = self._fifo, -1
        if not tasks:
            os.close(fd)
            return
        gone = asyncio.gather(*tasks, return_exceptions=True)
        gone.add_done_callback(lambda _: os.close(fd))


class LogCarriers:
    """Both streams of one instance."""

    def __init__(self, directory: Path, *, stdout: Path, stderr: Path, uid: int) -> None:
        """Raises RuntimeFailed."""
        self._carriers: Sequence[LogCarrier] = ()
        first = LogCarrier(directory, STDOUT_PORT, stdout, uid)
        try:
            self._carriers = (first, LogCarrier(directory, STDERR_PORT, stderr, uid))
        except RuntimeFailed:
            first.close()
            raise

    async def finish(self, deadline_s: float) -> None:
        await asyncio.gather(*(carrier.finish(deadline_s) for carrier in self._carriers))

    def close(self) -> None:
        for carrier in self._carriers:
            carrier.close()


def _listen(directory: Path, name: str, uid: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with descriptor(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=fd)
            listener.bind(f"/proc/self/fd/{fd}/{name}")
            _give_socket(fd, name, uid)
        listener.listen(CONNECTIONS_MAX)
    except OSError as error:
        listener.close()
        raise RuntimeFailed(f"cannot listen for the instance's output: {error}") from None
    return listener


def _give_socket(directory: int, name: str, uid: int) -> None:
    """Make a socket the monitor's. What it may have put in its place meanwhile, a file of the node's, stays whose it is."""
    with descriptor(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)) as fd:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConnectionRefusedError(f"{name} is no socket any more")
        os.chown(f"/proc/self/fd/{fd}", uid, uid)
