"""Which name servers instances ask: the node's, as far as they can be reached from a namespace."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

SOURCES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"), Path("/run/NetworkManager/no-stub-resolv.conf"))
"""The node's, then those where the servers behind a local stub are written down."""
SERVERS_MAX = 3
"""What a C library reads of a resolv.conf (MAXNS)."""
FILE_BYTES_MAX = 1 << 16
_KEPT = ("search", "options")


class Resolvers(Struct, frozen=True):
    """`servers` are IPv4 addresses, none of them loopback; `text` is the resolv.conf that names them."""

    servers: tuple[str, ...]
    text: str


def parse(texts: Sequence[str]) -> Resolvers:
    """Return the resolvers of the first of `texts` that has one which an instance can reach; maybe none.

    A loopback server means the instance itself in its namespace, so it is left out; IPv6 does not reach it yet.
    """
    for text in texts:
        servers: list[str] = []
        kept: list[str] = []
        for line in text.splitlines():
            words = line.split("#")[0].split(";")[0].split()
            if len(words) > 1 and words[0] == "nameserver" and _reachable(words[1]):
                servers.append(words[1])
            elif len(words) > 1 and words[0] in _KEPT:
                kept.append(" ".join(words))
        if servers:
            servers = list(dict.fromkeys(servers))[:SERVERS_MAX]
            return Resolvers(tuple(servers), "\n".join([*(f"nameserver {server}" for server in servers), *kept, ""]))
    return Resolvers((), "# This node has no name server that can be reached from an instance.\n")


def asking(address: str, named: Resolvers) -> Resolvers:
    """Return the resolvers of instances that ask the node itself, at `address`; what else the node's files say is kept."""
    kept = [line for line in named.text.splitlines() if line.split(" ")[0] in _KEPT]
    # One second, so that a name server that starts anew is hardly missed.
    return Resolvers((address,), "\n".join([f"nameserver {address}", *kept, "options timeout:1 attempts:5", ""]))


def read(sources: Sequence[Path] = SOURCES) -> Resolvers:
    """Return the resolvers that the files of this node name; a file that is not there names none."""
    texts = []
    for source in sources:
        try:
            with source.open("rb") as file:
                texts.append(file.read(FILE_BYTES_MAX).decode(errors="replace"))
        except OSError:
            continue
    return parse(texts)


def _reachable(text: str) -> bool:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast)
