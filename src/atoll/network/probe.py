"""Probes between nodes, inside of the tunnels: small ones that ask whether a node answers, large ones whether what fills the tunnel
arrives. An answer carries the prefixes that its sender cannot reach, so that nodes find relays among themselves."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct

import structlog

from atoll.model.fabric import PROBE_PORT

CANNOT_MAX = 128
"""Prefixes in one answer; who cannot reach more than that is no relay for the rest."""
_MAGIC = b"atp1"
_HEAD = struct.Struct("!4sBxHQ")
_ASK, _ANSWER = 1, 2
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE = 10, 3
_HEADERS_BYTES = 28
"""Of IPv4 and UDP."""

log = structlog.get_logger()


class Answer:
    """What came back: from which address, to which question, whether it was a large one's, and what its sender cannot reach."""

    __slots__ = ("address", "cannot", "sequence")

    def __init__(self, address: str, sequence: int, cannot: list[str]) -> None:
        self.address, self.sequence, self.cannot = address, sequence, cannot


def question(sequence: int, packet_bytes: int = 0) -> bytes:
    """Return a probe that, with its headers, is `packet_bytes` long (or as short as can be)."""
    body = _HEAD.pack(_MAGIC, _ASK, 0, sequence)
    return body + b"\0" * max(0, packet_bytes - _HEADERS_BYTES - len(body))


def reply(sequence: int, cannot: list[str]) -> bytes:
    listed = [ipaddress.IPv4Network(prefix) for prefix in cannot[:CANNOT_MAX]]
    body = b"".join(network.network_address.packed + bytes([network.prefixlen]) for network in listed)
    return _HEAD.pack(_MAGIC, _ANSWER, len(listed), sequence) + body


def read(data: bytes, address: str) -> Answer | int | None:
    """Return an answer, the number of a question, or None for what is neither."""
    if len(data) < _HEAD.size:
        return None
    magic, kind, count, sequence = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        return None
    if kind == _ASK:
        return int(sequence)
    body = data[_HEAD.size :]
    if kind != _ANSWER or count > CANNOT_MAX or len(body) != count * 5:
        return None
    try:
        cannot = [str(ipaddress.IPv4Network((body[i : i + 4], body[i + 4]))) for i in range(0, len(body), 5)]
    except ValueError:
        return None
    return Answer(address, int(sequence), cannot)


class Prober(asyncio.DatagramProtocol):
    """Asks and answers at `address`. `cannot` is what this node tells others that it does not reach."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.cannot: list[str] = []
        self.answers: asyncio.Queue[Answer] = asyncio.Queue(1024)
        self._transport: asyncio.DatagramTransport | None = None

    async def start(self) -> None:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            # What is too large is to be dropped on the way, not cut: that is the question.
            made.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
            made.setblocking(False)
            made.bind((self._address, PROBE_PORT))
        except OSError:
            made.close()
            raise
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, sock=made)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def ask(self, address: str, sequence: int, packet_bytes: int = 0) -> None:
        if self._transport is not None:
            self._transport.sendto(question(sequence, packet_bytes), (address, PROBE_PORT))

    def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        found = read(data, str(addr[0]))
        if isinstance(found, int) and self._transport is not None:
            self._transport.sendto(reply(found, self.cannot), (str(addr[0]), int(addr[1])))
        elif isinstance(found, Answer) and not self.answers.full():
            self.answers.put_nowait(found)

    def error_received(self, exc: Exception) -> None:
        """The kernel could not send one, or it was refused: no answer is answer enough."""
