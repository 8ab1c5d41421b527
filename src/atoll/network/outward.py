"""The node's own ways by IPv6: whether there is one to the world, and by which links what comes for instances may go on to them.

Looked at every other second, by what the kernel itself would do; nothing is sent, and no packet waits for it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from atoll.model.errors import Invalid
from atoll.network import sysctls
from atoll.network.sysctls import read_sysctl, write_sysctl

WORLD = "2001:db8::1"
"""An address of documentation (RFC 3849): asked only which of this node's addresses would be used towards the world."""
MARKS = Path("/run/atoll/uplinks")
"""Which links an agent of this machine has let forward; gone when the machine starts anew, as is what they say."""
_GLOBAL = ipaddress.IPv6Network("2000::/3")
"""All global unicast addresses (RFC 4291, IANA's registry)."""
_GLOBAL_SCOPE = "00"


class Outward:
    """By which address instances reach the world: the one that the operator named, else a global one of the node's."""

    def __init__(self, address: str = "", *, world: str = WORLD) -> None:
        """`address` may be any but a loopback, link-local or multicast one, such as a unique local one that something beyond the
        node translates. `world` stands for everywhere. Raises Invalid."""
        self.address = _checked(address) if address else ""
        self._world = world

    def find(self) -> str:
        """Return the node's address by which the world is reached now; empty where there is none, or no way. Blocks for some µs."""
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as asking, contextlib.suppress(OSError):
            if self.address:
                asking.bind((self.address, 0))
            asking.connect((self._world, 9))
            found = ipaddress.IPv6Address(asking.getsockname()[0].partition("%")[0])
            return str(found) if self.address or is_global(found) else ""
        return ""


def is_global(address: ipaddress.IPv6Address) -> bool:
    """Return whether the world knows the way back to `address`; those of documentation and of tests are none."""
    return address in _GLOBAL and address.is_global


def _checked(text: str) -> str:
    mend = "give an IPv6 address that one of this node's links has, such as 2001:db8::7"
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError as error:
        raise Invalid(f"--ipv6-address: {error}", field="ipv6-address", mend=mend) from None
    mapped = address.ipv4_mapped is not None or address.scope_id is not None
    if mapped or address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified:
        raise Invalid(f"--ipv6-address: {text} is none that leads into the world", field="ipv6-address", mend=mend)
    return str(address)


def uplinks(ours: Sequence[str], listing: Path = Path("/proc/thread-self/net/if_inet6")) -> tuple[str, ...]:
    """Return the links, in order, by which something may come for this node: those with an address of more than the link.

    `lo`, and links whose names begin as `ours` do, are left out. `listing` has lines of address, index, length, scope, flags, name.
    """
    found = set()
    with contextlib.suppress(OSError):
        for line in listing.read_text().splitlines():
            _, _, _, scope, _, name = line.split()
            if scope == _GLOBAL_SCOPE and name != "lo" and not name.startswith(tuple(ours)):
                found.add(name)
    return tuple(sorted(found))


def let_forward(names: Iterable[str], directory: Path = sysctls.DIRECTORY, marks: Path = MARKS) -> tuple[str, ...]:
    """Let what comes by these links go on to instances; return those that nobody but agents had go on anything.

    By those the machine is to be no router for others. Where it forwards as a whole, or before Linux 6.17, there are none. Raises
    RuntimeFailed.
    """
    if read_sysctl("ipv6/conf/all/forwarding", directory) != "0":
        return ()
    space = Path("/proc/thread-self/ns/net").stat().st_ino
    found = []
    for name in names:
        setting, mark = f"ipv6/conf/{name}/force_forwarding", marks / f"{space}-{name}"
        if read_sysctl(setting, directory) == "0":
            with contextlib.suppress(OSError):  # then the next agent takes the setting for the operator's
                marks.mkdir(parents=True, exist_ok=True)
                mark.touch()
            write_sysctl(setting, "1", directory)
            found.append(name)
        elif mark.exists():
            found.append(name)
    return tuple(found)
