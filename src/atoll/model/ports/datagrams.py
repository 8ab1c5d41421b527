"""Datagrams as a port: sent and forgotten, late, twice, or never there. UDP in production; a network in memory elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import socket
import struct
from collections.abc import Callable
from typing import Protocol

from atoll.model.errors import Unavailable

Address = tuple[str, int]
"""Host (a number, not a name) and port."""
Receive = Callable[[bytes, Address], None]
"""Called with each datagram and where it came from. It must not raise."""

BYTES_MAX = 2_048
DRAIN_MAX = 128
"""Datagrams taken at once before the event loop gets its turn: what else waits there waits for these, some milliseconds."""
BUFFER_BYTES = 32 << 20
"""Asked of the kernel for what waits to be taken: three seconds of 10,000 a second, at some 770 bytes of its memory each."""
BEHIND_SHARE = 8
"""A socket of whose buffer more than this part waits is behind: by about a second at 10,000 a second."""
_MEMINFO, _MEMINFO_WORDS = 55, struct.Struct("9I")
"""SO_MEMINFO (linux/sock_diag.h): bytes that wait, the buffer's size, …, and last how many datagrams were lost for want of it."""


class Datagrams(Protocol):
    """One open end."""

    @property
    def address(self) -> Address: ...

    def send(self, data: bytes, to: Address) -> None:
        """Send, or lose it: this neither waits nor raises."""
        ...

    def behind(self) -> bool:
        """Whether much waits to be taken, or was lost since the last call because too much did: who is not heard may be in it."""
        ...

    def close(self) -> None: ...


class Opener(Protocol):
    async def open(self, bind: Address, receive: Receive) -> Datagrams:
        """Raises Unavailable: the address cannot be had."""
        ...

    async def resolve(self, host: str, port: int) -> Address:
        """Return a name's address. Raises Unavailable."""
        ...

    async def source(self, to: Address) -> str:
        """Return the host address from which this machine goes to `to`; empty where it cannot."""
        ...


class UdpDatagrams:
    """A UDP socket on the running event loop, drained many at a time: a task for each datagram would cost more than its work."""

    def __init__(self, sock: socket.socket, receive: Receive) -> None:
        self._socket = sock
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._drain)
        self._lost = 0

    @property
    def address(self) -> Address:
        host, port = self._socket.getsockname()[:2]
        return host, port

    def _drain(self) -> None:
        receive, take = self._receive, self._socket.recvfrom
        for _ in range(DRAIN_MAX):
            try:
                data, sender = take(BYTES_MAX)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                continue  # an ICMP error of an earlier send: that one is lost, as any may be
            receive(data, (sender[0], sender[1]))

    def send(self, data: bytes, to: Address) -> None:
        try:  # noqa: SIM105 - thousands of times a second, where `suppress` would cost half of what sending does
            self._socket.sendto(data, to)
        except OSError:
            pass

    def behind(self) -> bool:
        try:
            words: tuple[int, ...] = _MEMINFO_WORDS.unpack(
                self._socket.getsockopt(socket.SOL_SOCKET, _MEMINFO, _MEMINFO_WORDS.size)
            )
        except (OSError, struct.error):
            return False  # a kernel that does not tell
        lost, self._lost = words[8] != self._lost, words[8]
        return lost or words[0] > words[1] // BEHIND_SHARE

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()


class Udp:
    """Opens UDP sockets. Implements `Opener`."""

    async def open(self, bind: Address, receive: Receive) -> UdpDatagrams:
        sock = socket.socket(socket.AF_INET6 if ":" in bind[0] else socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        for option in (getattr(socket, "SO_RCVBUFFORCE", 33), socket.SO_RCVBUF):
            with contextlib.suppress(OSError):  # without the right to force it, as much as the machine allows
                sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
                break
        try:
            sock.bind(bind)
        except OSError as error:
            sock.close()
            raise Unavailable(f"cannot listen for datagrams on {bind[0]}:{bind[1]}: {error.strerror}") from None
        return UdpDatagrams(sock, receive)

    async def resolve(self, host: str, port: int) -> Address:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        except OSError as error:
            raise Unavailable(f"no address of '{host}': {error.strerror}") from None
        return str(found[0][4][0]), int(found[0][4][1])

    async def source(self, to: Address) -> str:
        with socket.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(to)  # of datagrams, that sends nothing
            except OSError:
                return ""
            return str(probe.getsockname()[0])


class MemoryNet:
    """A network in memory on the running event loop's clock. Implements `Opener`.

    `fate` says what becomes of a datagram: the delays in seconds of each copy that arrives; none when it is lost.
    """

    def __init__(self, fate: Callable[[Address, Address], tuple[float, ...]] = lambda _from, _to: (0.0,)) -> None:
        self.fate = fate
        self.sent = 0
        self.behind: set[Address] = set()
        """Ends that say that they are behind."""
        self._ends: dict[Address, MemoryDatagrams] = {}
        self._ports = 40_000

    async def open(self, bind: Address, receive: Receive) -> MemoryDatagrams:
        if bind[1] == 0:
            self._ports += 1
            bind = (bind[0], self._ports)
        if bind in self._ends:
            raise Unavailable(f"cannot listen for datagrams on {bind[0]}:{bind[1]}: in use")
        self._ends[bind] = end = MemoryDatagrams(self, bind, receive)
        return end

    async def resolve(self, host: str, port: int) -> Address:
        return host, port

    async def source(self, to: Address) -> str:
        return ""

    def carry(self, data: bytes, sender: Address, to: Address) -> None:
        self.sent += 1
        end = self._ends.get(to)
        # In the context of who receives: what a simulated process is sent while it stands still waits for it.
        context = end.context if end is not None else None
        for delay_s in self.fate(sender, to):
            asyncio.get_running_loop().call_later(delay_s, self._arrive, data, sender, to, context=context)

    def _arrive(self, data: bytes, sender: Address, to: Address) -> None:
        end = self._ends.get(to)
        if end is not None:
            end.receive(data, sender)

    def closed(self, address: Address) -> None:
        self._ends.pop(address, None)


class MemoryDatagrams:
    def __init__(self, net: MemoryNet, address: Address, receive: Receive) -> None:
        self._net = net
        self.context = contextvars.copy_context()
        self.address = address
        self.receive = receive

    def send(self, data: bytes, to: Address) -> None:
        self._net.carry(data, self.address, to)

    def behind(self) -> bool:
        return self.address in self._net.behind

    def close(self) -> None:
        self._net.closed(self.address)
