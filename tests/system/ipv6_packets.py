"""IPv6 packets as a tenant's root sends them, and who hears of them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from ipaddress import IPv6Address

from atoll.model.ports.network import Link
from atoll.network import namespaces, slots

PATIENCE_S = 0.3
"""For what must not arrive."""
TIMEOUT_S = 5.0
UDP, ICMP, FRAGMENT = 17, 58, 44


def six(link: Link) -> str:
    assert link.ipv6 is not None
    return link.ipv6


def socket_in(link: Link, family: int = socket.AF_INET6, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
    made = namespaces.run_inside(link.netns, lambda: socket.socket(family, kind, protocol))
    made.settimeout(TIMEOUT_S)
    return made


@contextmanager
def listening(link: Link, port: int, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    with closing(socket_in(link, kind=kind)) as server:
        server.bind(("::", port))
        if kind == socket.SOCK_STREAM:
            server.listen()
        yield server


def connects(client: socket.socket, address: str, port: int, timeout_s: float = TIMEOUT_S) -> bool:
    with closing(client):
        client.settimeout(timeout_s)
        try:
            client.connect((address, port))
        except OSError:
            return False
        return True


def from_node(address: str, port: int) -> bool:
    return connects(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET), address, port)


def summed(source: str, target: str, protocol: int, data: bytes) -> int:
    """Return the checksum of an upper layer: RFC 8200, section 8.1."""
    pseudo = IPv6Address(source).packed + IPv6Address(target).packed + struct.pack("!IxxxB", len(data), protocol) + data
    total = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF or 0xFFFF


def datagram(source: str, target: str, port: int, payload: bytes = b"hello!") -> bytes:
    head = struct.pack("!HHH", 4000, port, 8 + len(payload))
    return head + struct.pack("!H", summed(source, target, UDP, head + b"\0\0" + payload)) + payload


def sends(link: Link, source: str, target: str, body: bytes, protocol: int = UDP, hops: int = 64) -> None:
    """Send an IPv6 packet out of the instance's link, past whatever its namespace would say to it."""
    packet = (
        struct.pack("!IHBB", 6 << 28, len(body), protocol, hops) + IPv6Address(source).packed + IPv6Address(target).packed + body
    )
    with closing(socket_in(link, socket.AF_PACKET, socket.SOCK_DGRAM)) as sender:
        sender.sendto(packet, ("eth0", 0x86DD, 0, 0, slots.GATEWAY_MAC))


def says(link: Link, source: str, target: str, port: int) -> None:
    sends(link, source, target, datagram(source, target, port))


def gets_through(link: Link, target: str, port: int, server: socket.socket) -> bool:
    """Return whether a packet comes: the kernel drops those sent in the moment before it has seen that a new link is up."""
    for _ in range(20):
        says(link, six(link), target, port)
        if hears(server):
            while hears(server):
                pass
            return True
    return False


def hears(server: socket.socket, timeout_s: float = PATIENCE_S) -> bool:
    """Return whether anything comes in time."""
    server.settimeout(timeout_s)
    try:
        server.recv(2_000)
    except TimeoutError:
        return False
    return True
