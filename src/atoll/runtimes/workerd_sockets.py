"""Sockets that a process of several workers is given, and what they say about it from outside. Blocking, but for moments only.

Each worker listens in the network of its own instance; the process that serves it is in one of them. Its successor gets sockets
of its own at the same ports (SO_REUSEPORT of socket(7)), and once it serves, the kernel is told to lead all that come to them: what
the one before has accepted or not, it still serves. No connection is refused, reset or left to itself between the two.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import termios
import threading
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from atoll.model.errors import RuntimeFailed

FIRST = 4
"""The number in the process of the first socket that it is given; 3 is empty."""
BACKLOG = 1024
_ABOVE = 512
"""Ours are above those of the process that is about to have them."""
_CLONE_NEWNET = 0x40000000
_PIDFD_GETFD = 438
_SO_NETNS_COOKIE = 71
_SO_ATTACH_REUSEPORT_CBPF = 51
_BPF_RETURN = 6
_TCP_OPEN = (1, 8)
"""Established, or closed by the other side alone: who asked may have given up."""
_TCP_INFO_BYTES = 160
_WAITING_AT = 24
_LAST_SENT_AT, _LAST_RECEIVED_AT, _SEGMENTS_AT = 44, 52, 152
"""In `struct tcp_info` of linux/tcp.h: how many ms ago data was last sent and last came; how much came and was sent."""
_MIGRATE = Path("/proc/sys/net/ipv4/tcp_migrate_req")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Listening(Struct, frozen=True):
    """A worker's sockets in one process. Nobody shuts them down before it has ended: workerd ends with a socket that fails."""

    http: int
    alive: int | None
    cookie: int
    """The kernel's name for their network."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.http,) if self.alive is None else (self.http, self.alive)

    def steer(self, place: int) -> None:
        """Lead all that come to the ports to those at `place`: in the order of their making, the last in that of one gone."""
        # One instruction of classic BPF: return `place`.
        step = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RETURN, 0, 0, place))
        program = struct.pack("HxxxxxxP", 1, ctypes.addressof(step))
        for fd in self.descriptors:
            _borrow(fd).setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, program)

    def waiting(self) -> bool:
        """Return whether somebody waits to be let in."""
        infos = [_borrow(fd).getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES) for fd in self.descriptors]
        return any(struct.unpack_from("=I", info, _WAITING_AT)[0] for info in infos)

    def let_go(self) -> None:
        """Close ours; the process has its own."""
        for fd in self.descriptors:
            os.close(fd)


class Activity(Struct, frozen=True):
    """What goes on in the connections that a process has accepted for a worker."""

    silent_s: float
    """Since when nothing has come or gone by any of them."""
    owes: bool
    """Whether a request was taken in to which no answer has begun."""


def listen(netns: Path, port: int, alive_port: int | None) -> Listening:
    """Listen at `port`, and `alive_port`, of all addresses in the network namespace. Raises RuntimeFailed."""
    ports = [port] if alive_port is None else [port, alive_port]
    return listening(_inside(netns, ports))


def listening(descriptors: list[int]) -> Listening:
    """Return what stands behind sockets that listen: the worker's own, then that for the node's check where it has one."""
    return Listening(descriptors[0], descriptors[1] if len(descriptors) > 1 else None, _cookie(descriptors[0]))


def watch_socket() -> int:
    """Return a socket by which the node alone can ask a process; no path leads to it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # the kernel gives it a name (unix(7), autobind), which no other network namespace sees
        listener.listen(BACKLOG)
        return _above(listener.fileno())


def name_of(fd: int) -> bytes:
    """Return the name by which one connects to a `watch_socket`."""
    name = _borrow(fd).getsockname()
    return name if isinstance(name, bytes) else str(name).encode()


def take(pid: int, fds: Iterable[int]) -> list[int]:
    """Return copies of a process's descriptors. Raises OSError where it has ended, or has none of these numbers."""
    process = os.pidfd_open(pid)
    found: list[int] = []
    try:
        for fd in fds:
            copy = _libc.syscall(_PIDFD_GETFD, process, fd, 0)
            if copy < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            found.append(_above(copy))
            os.close(copy)
    except OSError:
        for fd in found:
            os.close(fd)
        raise
    finally:
        os.close(process)
    return found


def activities(pid: int) -> dict[int, Activity]:
    """Return what goes on in a process, by network (`Listening.cookie`); nothing for one that has ended.

    A request is owed an answer on each connection on which data came after the last was sent, and all of it was read. What came
    after a process had stopped reading is none of these: it waits in the socket.
    """
    found: dict[int, Activity] = {}
    try:
        numbers = [int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return found
    for number in numbers:
        with contextlib.suppress(OSError):
            if not str(Path(f"/proc/{pid}/fd/{number}").readlink()).startswith("socket:"):
                continue
            (fd,) = take(pid, [number])
            try:
                if (one := _activity(fd)) is not None:
                    cookie = _cookie(fd)
                    other = found.get(cookie, one)
                    found[cookie] = Activity(min(one.silent_s, other.silent_s), one.owes or other.owes)
            finally:
                os.close(fd)
    return found


def _activity(fd: int) -> Activity | None:
    """Return what goes on in a connection; None for what is none, or one that is over."""
    connection = _borrow(fd)
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return None
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _TCP_INFO_BYTES or info[0] not in _TCP_OPEN:
        return None
    (sent_ms,) = struct.unpack_from("=I", info, _LAST_SENT_AT)
    (received_ms,) = struct.unpack_from("=I", info, _LAST_RECEIVED_AT)
    came, sent = struct.unpack_from("=II", info, _SEGMENTS_AT)
    (unread,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))
    owes = bool(unread == 0 and came and (not sent or received_ms < sent_ms))
    return Activity(0.0 if unread else min(sent_ms, received_ms) / 1000, owes)


class _Borrowed(socket.socket):
    """Somebody else's descriptor, which it does not close."""

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.detach()


def _borrow(fd: int) -> socket.socket:
    return _Borrowed(fileno=fd)


def _cookie(fd: int) -> int:
    value = _borrow(fd).getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return int(struct.unpack("=Q", value)[0])


def _above(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE)


def _inside(netns: Path, ports: list[int]) -> list[int]:
    """A thread of its own enters the namespace, and ends there."""
    found: list[int] = []
    failures: list[OSError] = []

    def enter() -> None:
        try:
            with open(netns, "rb") as file:
                if _libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number), str(netns))
            with contextlib.suppress(OSError):  # before Linux 5.14 there is none
                # Should a socket close on somebody who waits to be let in, another of its kind lets him in.
                _MIGRATE.write_text("1")
            for port in ports:
                found.append(_listener(port))
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failures:
        for fd in found:
            os.close(fd)
        raise RuntimeFailed(f"cannot listen for the worker: {failures[0]}") from None
    return found


def _listener(port: int) -> int:
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):  # noqa: S104 - in its own network
        with contextlib.suppress(OSError):  # this kernel, or this network, has no IPv6
            return _bound(family, address, port)
    raise OSError(errno.EADDRINUSE, "something listens there already", f"port {port}")


def _bound(family: socket.AddressFamily, address: str, port: int) -> int:
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, port))
        listener.listen(BACKLOG)
        return _above(listener.fileno())
