"""The descriptors of a command beside an instance: pipes, and the terminal that a runtime's tool hands over."""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import os
import socket
import struct
import termios
from pathlib import Path

from atoll.model.errors import RuntimeFailed
from atoll.runtimes.readiness import ready

CHUNK_BYTES_MAX = 64 << 10
CONSOLE_S_MAX = 30.0


class Stream:
    """A descriptor that does not block, read or written by waiting on the event loop."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)

    def read(self) -> bytes | None:
        """Return bytes, `b""` at the end, or None when there is nothing yet."""
        try:
            return os.read(self.fd, CHUNK_BYTES_MAX)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EIO:  # a terminal whose other side is closed
                return b""
            raise

    async def write(self, data: bytes) -> None:
        """Return when all of it is in the pipe. Raises BrokenPipeError."""
        view = memoryview(data)
        while view and self.fd >= 0:
            try:
                view = view[os.write(self.fd, view) :]
            except BlockingIOError:
                await ready(self.fd, writing=True)
            except OSError as error:
                if error.errno == errno.EIO:
                    raise BrokenPipeError from None
                raise

    def close(self) -> None:
        if self.fd >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self.fd)
            loop.remove_writer(self.fd)
            os.close(self.fd)
            self.fd = -1


def set_size(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class ConsoleSocket:
    """Where the runtime's tool sends the terminal that it made in the instance (OCI `--console-socket`)."""

    def __init__(self, directory: Path, name: str) -> None:
        # By way of a descriptor, because the path of a socket holds at most 107 bytes.
        self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._file = directory / name
        self.path = f"/proc/{os.getpid()}/fd/{self._directory}/{name}"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen(1)
        self._socket.setblocking(False)

    async def terminal(self) -> int:
        """Return the terminal's descriptor; call it when the tool has ended well. Raises RuntimeFailed."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONSOLE_S_MAX):
                peer, _ = await loop.sock_accept(self._socket)
                with peer:
                    await ready(peer.fileno())
                    _, ancillary, _, _ = peer.recvmsg(4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise RuntimeFailed("the runtime's tool sent no terminal") from None
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                return array.array("i", data[:4])[0]
        raise RuntimeFailed("the runtime's tool sent no terminal")

    def close(self) -> None:
        self._socket.close()
        self._file.unlink(missing_ok=True)
        os.close(self._directory)
