"""Elements of nftables sets, added and deleted in one netlink transaction of 0.1 ms, however much else is in the kernel.

libnftables would first read every table, chain and set of the machine, whoever made them: 0.3 ms on an empty machine, and
2.5 ms beside seven other tables. Layouts are those of <linux/netfilter/nf_tables.h> and <linux/netfilter/nfnetlink.h>.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence

from atoll.model.errors import RuntimeFailed
from atoll.model.spec import Port, PortProtocol
from atoll.network.netlink import REPLY_TIMEOUT_S, attribute

_NETLINK_NETFILTER = 12
_HEADER = struct.Struct("=IHHII")
_FAMILY = struct.Struct("!BBH")
_PREFIX = struct.Struct("=HHHHHH")
_SUBSYSTEM = 10
_BEGIN, _END = 0x10, 0x11
_NEW, _DELETE = _SUBSYSTEM << 8 | 12, _SUBSYSTEM << 8 | 14
_NEW_RULE, _DELETE_RULE = _SUBSYSTEM << 8 | 6, _SUBSYSTEM << 8 | 8
_REQUEST, _ACK, _CREATE, _APPEND = 0x1, 0x4, 0x400, 0x800
_INET = 1
_NESTED = 0x8000
_ERROR = 2

Elements = tuple[str, Sequence[bytes | tuple[bytes, bytes]]]
"""A set's name, and keys in it; a map's, and keys with their values."""


def inbound(address: str, ports: Sequence[Port]) -> Elements:
    """Return the keys of a set of `ipv4_addr . inet_proto . inet_service`; every field takes whole words of four bytes."""
    packed = socket.inet_aton(address)
    return "inbound", [packed + key for key in _port_keys(tuple(ports))]


def plain(address: str, ports: Sequence[Port]) -> Elements:
    """Return the keys of a set of `ipv4_addr . inet_service`; see `firewall.plain`."""
    packed = socket.inet_aton(address)
    return "plain", [packed + key for key in _plain_keys(tuple(ports))]


@functools.lru_cache(maxsize=1024)
def _plain_keys(ports: tuple[Port, ...]) -> tuple[bytes, ...]:
    if any(port.host is not None for port in ports):
        return ()
    numbers = {port.port for port in ports if port.protocol is not PortProtocol.UDP}
    return tuple(struct.pack("!Hxx", number) for number in sorted(numbers))


@functools.lru_cache(maxsize=1024)
def _port_keys(ports: tuple[Port, ...]) -> tuple[bytes, ...]:
    numbers = {(socket.IPPROTO_UDP if port.protocol is PortProtocol.UDP else socket.IPPROTO_TCP, port.port) for port in ports}
    return tuple(struct.pack("!BxxxHxx", protocol, port) for protocol, port in sorted(numbers))


def published(address: str, ports: Sequence[Port]) -> Elements:
    """Return what a map of `inet_proto . inet_service : ipv4_addr . inet_service` has for ports that are published on the node."""
    packed = socket.inet_aton(address)
    found = {
        (socket.IPPROTO_UDP if port.protocol is PortProtocol.UDP else socket.IPPROTO_TCP, port.host, port.port)
        for port in ports
        if port.host is not None
    }
    return "published", [
        (struct.pack("!BxxxHxx", protocol, host), packed + struct.pack("!Hxx", inside)) for protocol, host, inside in sorted(found)
    ]


def source(interface: str, address: str) -> Elements:
    """Return the key of a set of `ifname . ipv4_addr`."""
    return "sources", [interface.encode().ljust(16, b"\0") + socket.inet_aton(address)]


def merged(parts: Iterable[Elements]) -> list[Elements]:
    """Return the same with one part for each set, in the order in which they first come."""
    found: dict[str, list[bytes | tuple[bytes, bytes]]] = {}
    for name, keys in parts:
        found.setdefault(name, []).extend(keys)
    return list(found.items())


def _element(key: bytes | tuple[bytes, bytes]) -> bytes:
    """Return one element's attributes, all but keys and values made once for each length of them."""
    if isinstance(key, bytes):
        return _around(len(key)) + key
    inner, value = key
    return _around(len(inner), len(value)) + inner + _between(len(value)) + value


@functools.lru_cache(maxsize=64)
def _around(key: int, value: int | None = None) -> bytes:
    """Return what stands before a key of so many bytes, which is a multiple of four, as is a value's length."""
    nested = 8 + key
    whole = 4 + nested + (0 if value is None else 8 + value)
    return _PREFIX.pack(whole, 1 | _NESTED, nested, 1 | _NESTED, 4 + key, 1)


@functools.lru_cache(maxsize=64)
def _between(value: int) -> bytes:
    return struct.pack("=HHHH", 8 + value, 2 | _NESTED, 4 + value, 1)


class ElementSocket:
    """Changes the sets of one table. Calls from any thread are made one at a time."""

    def __init__(self, table: str) -> None:
        self._table = attribute(1, table.encode() + b"\0")
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.settimeout(REPLY_TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        self._socket.close()

    def change(self, *, add: Sequence[Elements] = (), delete: Sequence[Elements] = ()) -> None:
        """Make all changes, or none. What is there already, or is gone already, is no error.

        Raises RuntimeFailed; nothing was changed.
        """
        changes = [(_NEW, each) for each in add if each[1]] + [(_DELETE, each) for each in delete if each[1]]
        if not changes:
            return
        number = self._commit([(kind, _CREATE if kind == _NEW else 0, self._body(elements)) for kind, elements in changes])
        if number == errno.ENOENT and not add:
            if len(delete) > 1:
                for each in delete:
                    self.change(delete=[each])
            return
        if number:
            mend = "run as root with CAP_NET_ADMIN" if number == errno.EPERM else None
            raise RuntimeFailed(f"cannot change the firewall's sets: {os.strerror(number)}", mend=mend)

    def replace_rules(self, chains: Mapping[str, Sequence[bytes]]) -> None:
        """Have each chain hold exactly these rules, made of `expressions`: all or nothing. Raises RuntimeFailed."""
        changes = []
        for name, rules in chains.items():
            chain = self._table + attribute(2, name.encode() + b"\0")
            changes.append((_DELETE_RULE, 0, chain))
            changes += [(_NEW_RULE, _CREATE | _APPEND, chain + attribute(4 | _NESTED, rule)) for rule in rules]
        number = self._commit(changes)
        if number:
            raise RuntimeFailed(f"cannot write the firewall's rules: {os.strerror(number)}", mend="use Linux 5.10 or newer")

    def _commit(self, changes: Sequence[tuple[int, int, bytes]]) -> int:
        """Make all changes, each a kind with flags and a body, in one transaction; return 0 or the number of an error."""
        with self._lock:
            first = self._sequence + 1
            self._sequence += len(changes) + 2
            parts = [self._part(_BEGIN, 0, first, _FAMILY.pack(0, 0, _SUBSYSTEM))]
            for sequence, (kind, flags, body) in enumerate(changes, first + 1):
                parts.append(self._part(kind, flags | _ACK, sequence, _FAMILY.pack(_INET, 0, 0) + body))
            parts.append(self._part(_END, 0, self._sequence, _FAMILY.pack(0, 0, _SUBSYSTEM)))
            self._socket.send(b"".join(parts))
            return self._result(first, len(changes))

    def intact(self, known: Elements) -> bool:
        """Return whether the table still has the set of `known`, which is added to it if it has."""
        try:
            self.change(add=[known])
        except RuntimeFailed:
            return False
        return True

    def _part(self, kind: int, flags: int, sequence: int, body: bytes) -> bytes:
        return _HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, sequence, 0) + body

    def _body(self, elements: Elements) -> bytes:
        name, keys = elements
        listed = b"".join([_element(key) for key in keys])
        return self._table + attribute(2, name.encode() + b"\0") + attribute(3 | _NESTED, listed)

    def _result(self, first: int, expected: int) -> int:
        """Return 0, or the number of the first error; one may also be about the transaction as a whole."""
        answered = 0
        while answered < expected:
            answer = self._socket.recv(1 << 16)
            while len(answer) >= _HEADER.size:
                length, kind, _, sequence, _ = _HEADER.unpack_from(answer)
                if kind == _ERROR and sequence >= first:
                    number = -int(struct.unpack_from("=i", answer, _HEADER.size)[0])
                    if number:
                        return number
                    answered += 1
                answer = answer[(length + 3) & ~3 :]
        return 0
