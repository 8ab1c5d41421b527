"""The kernel's table of connections, rid of what the last holder of an address left in it: that would be let through as
established, and translated as it was, for as long as either end goes on sending.

Layouts are those of <linux/netfilter/nfnetlink_conntrack.h>.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection

import structlog

from atoll.model.errors import RuntimeFailed, Unsupported
from atoll.network.netlink import Refused, Request, RequestSocket, attribute, attributes, dump, packed

FEW = 64
"""Up to so many addresses are looked for in a whole answer of the kernel's, some 160 entries, before any is taken apart."""

_NETFILTER = 12
_FAMILY = struct.Struct("!BBH")
_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2
_ORIGINAL, _REPLY, _ID, _ZONE = 1, 2, 12, 18
_ADDRESSES = 1
_NESTED = 0x8000
_ABSENT = (errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP)
"""What the kernel says where it has no such table to show, or not to us."""

log = structlog.get_logger()


class Connections:
    """The table of the network namespace of whoever calls; any thread may."""

    def __init__(self) -> None:
        self._said = False

    def cut(self, addresses: Collection[str]) -> None:
        """Delete the entries from or to any of `addresses`, of IPv4 or IPv6, as they were before or after translation.

        Blocking: one look at the whole table, for however many addresses. Safe to repeat. Where the kernel lets nobody look the
        entries stay, and the log says so once. Raises RuntimeFailed, OSError.
        """
        if not addresses:
            return
        try:
            found = _entries({packed(address)[2] for address in addresses})
        except Unsupported as error:
            if not self._said:
                log.warning("network.connections-kept", message=str(error), mend=error.mend)
            self._said = True
            return
        if found:
            with RequestSocket(_NETFILTER) as asking:
                asking.send(*found)


def _entries(near: Collection[bytes]) -> list[Request]:
    """Return what deletes each entry that has one of these addresses. Raises Unsupported, RuntimeFailed, OSError."""
    everything = _FAMILY.pack(socket.AF_UNSPEC, 0, 0)
    try:
        listed = dump(_NETFILTER, _GET, everything, near=near if len(near) <= FEW else ())
        return [request for _, entry in listed if (request := _deletion(entry, near)) is not None]
    except Refused as error:
        words = f"cannot list the kernel's connections: {error.strerror}"
        if error.errno not in _ABSENT:
            raise RuntimeFailed(words) from None
        mend = "load the kernel's module nf_conntrack_netlink, and run as root with CAP_NET_ADMIN"
        raise Unsupported(f"{words}; those of an instance stay after its end", mend=mend) from None


def _deletion(entry: bytes, near: Collection[bytes]) -> Request | None:
    """Return what deletes the entry, and no later one like it, if it has one of these addresses."""
    kept, ours = b"", False
    for kind, value in attributes(entry[_FAMILY.size :]):
        if kind in (_ORIGINAL, _REPLY):
            pair = next((inner for part, inner in attributes(value) if part == _ADDRESSES), b"")
            ours = ours or any(address in near for _, address in attributes(pair))
            if kind == _REPLY and not ours:
                return None
        if kind in (_ORIGINAL, _ID, _ZONE):
            kept += attribute(kind | (_NESTED if kind == _ORIGINAL else 0), value)
    if not ours:
        return None
    return Request(_DELETE, entry[: _FAMILY.size] + kept, "cut a connection", ignore=(errno.ENOENT,))
