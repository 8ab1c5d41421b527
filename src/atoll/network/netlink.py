"""The few rtnetlink messages that links need, packed by hand: a tenth of the time and none of the 24 MB of a general library.

Layouts are those of <linux/netlink.h>, <linux/rtnetlink.h> and <linux/if_link.h>.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Collection, Iterator, Sequence
from types import TracebackType
from typing import Self

from atoll.model.errors import RuntimeFailed

AT_ONCE = 64
"""Requests in one message: the answers to all of them must fit into the socket's buffer."""
REPLY_TIMEOUT_S = 10.0
"""The kernel answers at once; only a machine in deep trouble takes longer."""

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")

_ACK_REQUEST = 0x1 | 0x4
_DUMP_REQUEST = 0x1 | 0x300
_CREATE, _EXCLUSIVE, _REPLACE = 0x400, 0x200, 0x100
_ERROR, _DONE = 2, 3
_NEWLINK, _DELLINK, _SETLINK, _NEWADDR, _DELADDR, _NEWROUTE, _DELROUTE, _NEWNEIGH = 16, 17, 19, 20, 21, 24, 25, 28
_IFF_UP = 1
_SCOPE_LINK, _SCOPE_UNIVERSE = 253, 0
_TABLE_MAIN, _PROTOCOL_STATIC, _UNICAST, _UNREACHABLE = 254, 4, 1, 7
_METRIC_LAST = 1 << 30
_PERMANENT = 0x80
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_NO_DETECTION, _NO_ROUTE = 0x02, 0x200
_GENERATE_NONE = 1


def attribute(kind: int, value: bytes) -> bytes:
    """Return one attribute, padded to four bytes."""
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + b"\0" * (-length % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the kind and the value of each attribute, up to the first that is none."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


class Request:
    """One message for the kernel, and in words what it does, for the error."""

    __slots__ = ("body", "flags", "ignore", "kind", "what")

    def __init__(self, kind: int, body: bytes, what: str, *, flags: int = 0, ignore: Sequence[int] = ()) -> None:
        self.kind, self.body, self.what = kind, body, what
        self.flags = flags | _ACK_REQUEST
        self.ignore = ignore
        """Error numbers that mean that it was done already."""


def add_veth(name: str, *, mac: bytes, peer: str, peer_mac: bytes, peer_netns: int, mtu: int) -> Request:
    """Make a pair of links: `name` here, `peer` in the namespace that the descriptor `peer_netns` names."""
    ends = _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _text(3, peer) + attribute(1, peer_mac) + _number(4, mtu)
    ends += _number(28, peer_netns)
    info = _text(1, "veth") + attribute(2 | _NESTED, attribute(1 | _NESTED, ends))
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _text(3, name) + attribute(1, mac) + _number(4, mtu)
    body += attribute(18 | _NESTED, info)
    return Request(_NEWLINK, body, f"make the link {peer}", flags=_CREATE | _EXCLUSIVE)


def set_group(index: int, group: int) -> Request:
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0) + _number(27, group)
    return Request(_SETLINK, body, "group a link", ignore=(errno.ENODEV,))


def delete_group(group: int) -> Request:
    """Remove all links of a group at once: one grace period of the kernel (tens of ms) instead of one for each."""
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _number(27, group)
    return Request(_DELLINK, body, f"remove the links of group {group:#x}", ignore=(errno.ENODEV,))


def set_up(index: int) -> Request:
    return Request(_SETLINK, _IFINFO.pack(socket.AF_UNSPEC, 0, index, _IFF_UP, _IFF_UP), "bring a link up")


def no_own_addresses(index: int) -> Request:
    """Keep the kernel from giving the link IPv6 addresses by itself; before it is brought up."""
    six = attribute(socket.AF_INET6 | _NESTED, attribute(8, bytes([_GENERATE_NONE])))
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0) + attribute(26 | _NESTED, six)
    return Request(_SETLINK, body, "keep a link from addresses of its own")


def packed(address: str) -> tuple[int, int, bytes]:
    """Return an address's family, its length in bits, and its bytes."""
    if ":" in address:
        return socket.AF_INET6, 128, socket.inet_pton(socket.AF_INET6, address)
    return socket.AF_INET, 32, socket.inet_aton(address)


def add_address(index: int, address: str, *, link_scope: bool = False) -> Request:
    """Give the link `address`/32, or an IPv6 one /128, in use at once; one that is there already is no error."""
    family, length, data = packed(address)
    body = _IFADDR.pack(family, length, 0, _SCOPE_LINK if link_scope else _SCOPE_UNIVERSE, index)
    body += attribute(1, data) + attribute(2, data)
    if family == socket.AF_INET6:
        body += _number(8, _NO_DETECTION | _NO_ROUTE)
    return Request(_NEWADDR, body, f"set the address {address}", flags=_CREATE | _REPLACE, ignore=(errno.EEXIST,))


def delete_address(index: int, address: str) -> Request:
    family, length, data = packed(address)
    body = _IFADDR.pack(family, length, 0, 0, index) + attribute(2, data)
    return Request(_DELADDR, body, f"remove the address {address}", ignore=(errno.EADDRNOTAVAIL,))


def add_neighbour(index: int, address: str, mac: bytes) -> Request:
    """Tell the kernel for good where `address` is, so that nothing ever has to ask."""
    family, _, data = packed(address)
    body = _NEIGHBOUR.pack(family, index, _PERMANENT, 0, 0) + attribute(1, data) + attribute(2, mac)
    return Request(_NEWNEIGH, body, f"set the neighbour {address}", flags=_CREATE | _REPLACE)


def add_route(index: int, destination: str | None, *, gateway: str | None = None, source: str | None = None) -> Request:
    """Route `destination`, an address or a network (None: all of IPv4), to the link, through `gateway` where given, with `source`
    as own address."""
    body = _route(index, destination, gateway, source)
    return Request(_NEWROUTE, body, f"set the route to {destination or 'everywhere'}", flags=_CREATE | _REPLACE)


def delete_route(index: int, destination: str, *, gateway: str) -> Request:
    return Request(
        _DELROUTE, _route(index, destination, gateway, None), f"remove the route to {destination}", ignore=(errno.ESRCH,)
    )


def _route(index: int, destination: str | None, gateway: str | None, source: str | None) -> bytes:
    text, _, bits = (destination or "0.0.0.0/0").partition("/")
    family, length, data = packed(text)
    scope = _SCOPE_UNIVERSE if gateway else _SCOPE_LINK
    body = _ROUTE.pack(family, int(bits or length), 0, 0, _TABLE_MAIN, _PROTOCOL_STATIC, scope, _UNICAST, 0)
    if destination:
        body += attribute(1, data)
    for kind, address in ((5, gateway), (7, source)):
        if address:
            body += attribute(kind, packed(address)[2])
    return body + _number(4, index)


def add_dead_end(network: str, prefix_length: int) -> Request:
    """Answer at once that what has no better route in `network` cannot be reached, instead of asking the world for it."""
    return Request(_NEWROUTE, _dead_end(network, prefix_length), f"close {network}", flags=_CREATE | _REPLACE)


def delete_dead_end(network: str, prefix_length: int) -> Request:
    return Request(_DELROUTE, _dead_end(network, prefix_length), f"open {network}", ignore=(errno.ESRCH,))


def _dead_end(network: str, prefix_length: int) -> bytes:
    family, _, data = packed(network)
    body = _ROUTE.pack(family, prefix_length, 0, 0, _TABLE_MAIN, _PROTOCOL_STATIC, _SCOPE_UNIVERSE, _UNREACHABLE, 0)
    return body + attribute(1, data) + _number(6, _METRIC_LAST)


class RequestSocket:
    """A netlink socket in the network namespace of the thread that makes it; it stays there, whoever uses it later."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(REPLY_TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, *requests: Request) -> None:
        """Have the kernel do all of `requests` in order; each is one change of its own. Threads take turns.

        Raises RuntimeFailed with the first that was refused; the others have been done nevertheless.
        """
        failures: list[RuntimeFailed | None] = []
        with self._lock:
            for at in range(0, len(requests), AT_ONCE):
                failures += self._send_some(requests[at : at + AT_ONCE])
        for failure in failures:
            if failure is not None:
                raise failure

    def _send_some(self, requests: Sequence[Request]) -> list[RuntimeFailed | None]:
        first = self._sequence + 1
        self._sequence += len(requests)
        parts = []
        for sequence, request in enumerate(requests, first):
            head = _HEADER.pack(_HEADER.size + len(request.body), request.kind, request.flags, sequence, 0)
            parts.append(head + request.body)
        self._socket.send(b"".join(parts))
        return self._answers(requests, first)

    def _answers(self, requests: Sequence[Request], first: int) -> list[RuntimeFailed | None]:
        results: list[RuntimeFailed | None] = []
        while len(results) < len(requests):
            answer = self._socket.recv(1 << 16)
            while len(answer) >= _HEADER.size:
                length, kind, _, sequence, _ = _HEADER.unpack_from(answer)
                # Answers to a request that an earlier caller no longer waited for have a lower number.
                if kind == _ERROR and sequence >= first:
                    number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
                    results.append(_refusal(requests[sequence - first], number))
                answer = answer[(length + 3) & ~3 :]
        return results


class Refused(OSError):
    """The kernel's own no to a request."""


def dump(protocol: int, kind: int, body: bytes, *, near: Collection[bytes] = ()) -> Iterator[tuple[int, bytes]]:
    """Ask for all that there is of something in the network namespace of whoever calls; yield each message's kind and body.

    With `near`, of those that came together in which one of these bytes occurs: looking through them is quick. Blocking.
    Raises Refused, OSError.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as asking:
        asking.settimeout(REPLY_TIMEOUT_S)
        asking.bind((0, 0))
        asking.send(_HEADER.pack(_HEADER.size + len(body), kind, _DUMP_REQUEST, 1, 0) + body)
        while True:
            answer = asking.recv(1 << 17)
            close = not near or any(one in answer for one in near)
            at = 0
            while at + _HEADER.size <= len(answer):
                length, said, _, _, _ = _HEADER.unpack_from(answer, at)
                if said in (_DONE, _ERROR):
                    number = -int(struct.unpack_from("=i", answer, at + _HEADER.size)[0])
                    if number:
                        raise Refused(number, os.strerror(number))
                    return
                if length < _HEADER.size:
                    return
                if close:
                    yield said, answer[at + _HEADER.size : at + length]
                at += (length + 3) & ~3


class RouteSocket(RequestSocket):
    """One for links, addresses and routes."""

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)


def _refusal(request: Request, number: int) -> RuntimeFailed | None:
    if number == 0 or number in request.ignore:
        return None
    mend = "run as root with CAP_NET_ADMIN" if number == errno.EPERM else None
    return RuntimeFailed(f"cannot {request.what}: {os.strerror(number)}", mend=mend)
