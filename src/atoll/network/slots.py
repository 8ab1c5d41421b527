"""A slot: a namespace and its routed link, ready for an instance to move in. Everything here blocks, for about 2 ms a slot.

In the namespace `eth0` has the slot's address, and `169.254.1.1`, which is the same everywhere, is the way to everything;
on the node a /32 route leads to the link. Neither side ever asks for a hardware address: both know it for good.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import ipaddress
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from atoll.model.errors import Conflict, RuntimeFailed
from atoll.network import namespaces, netlink
from atoll.network.addresses import AddressPool

GATEWAY = "169.254.1.1"
GATEWAY_MAC = bytes.fromhex("02617400fffe")
"""The node's end of every link; each link is a world of its own, so one address serves all."""
MTU_DEFAULT = 1500
_LOOPBACK_INDEX = 1
_SIOCGIFMTU = 0x8921
_SYSCTL = Path("/proc/sys/net")
_INSIDE = (
    ("ipv6/conf/default/disable_ipv6", "1"),  # for eth0; ::1 stays, so that an app may listen on `::`
    ("ipv4/ip_unprivileged_port_start", "0"),  # port 80 without being root, as with Docker
    ("ipv4/ping_group_range", "0 2147483647"),
)


class Slot(Struct, frozen=True):
    number: int
    address: str
    interface: str
    index: int
    """The interface's, which the kernel never uses twice."""
    netns: Path


def tag_of(directory: Path) -> str:
    """Return six characters that tell this data directory's links from any other's on the machine."""
    return hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:6]


class SlotMaker:
    """Makes, finds and removes the slots of one data directory."""

    def __init__(self, tag: str, pool: AddressPool) -> None:
        self.prefix = f"at{tag}"
        self._namespace_prefix = f"atoll-{tag}-"
        self._pool = pool
        self._group = int(tag, 16)
        self._routes = netlink.RouteSocket()
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._mtu = uplink_mtu()

    def close(self) -> None:
        self._routes.close()
        os.close(self._home)

    def make(self, number: int) -> Slot:
        """Raises RuntimeFailed; then nothing is left."""
        address, interface = self._pool.address(number), self._interface(number)
        mac = b"\x02\x61" + socket.inet_aton(address)

        def setup() -> None:
            for name, value in _INSIDE:
                write_sysctl(name, value)
            with netlink.RouteSocket() as inside:
                ends = netlink.add_veth("eth0", mac=mac, peer=interface, peer_mac=GATEWAY_MAC, peer_netns=self._home, mtu=self._mtu)
                inside.send(ends, netlink.set_up(_LOOPBACK_INDEX))
                index = socket.if_nametoindex("eth0")
                inside.send(
                    netlink.set_up(index),
                    netlink.add_address(index, address),
                    netlink.add_neighbour(index, GATEWAY, GATEWAY_MAC),
                    netlink.add_route(index, GATEWAY),
                    netlink.add_route(index, None, gateway=GATEWAY),
                )

        netns = self._netns(number)
        namespaces.create(netns, setup)
        try:
            slot = Slot(number, address, interface, socket.if_nametoindex(interface), netns)
            self.connect(slot)
        except (RuntimeFailed, OSError):
            self.remove([number])
            raise
        return slot

    def connect(self, slot: Slot) -> None:
        """Make the node's side as it should be, whatever it was. Safe to repeat."""
        write_sysctl(f"ipv6/conf/{slot.interface}/disable_ipv6", "1")
        self._routes.send(
            netlink.set_up(slot.index),
            netlink.add_neighbour(slot.index, slot.address, b"\x02\x61" + socket.inet_aton(slot.address)),
            netlink.add_route(slot.index, slot.address, source=self._pool.node_address),
        )

    def find(self) -> tuple[dict[int, Slot], set[int]]:
        """Return the whole slots that exist by number, and the numbers of those of which only a part is there."""
        links = {}
        for index, name in socket.if_nameindex():
            number = _number(name, self.prefix)
            if number is not None:
                links[number] = index
        try:
            names = [path.name for path in namespaces.DIRECTORY.iterdir()]
        except FileNotFoundError:
            names = []
        files = {number for name in names if (number := _number(name, self._namespace_prefix)) is not None}
        whole = {
            number: Slot(number, self._pool.address(number), self._interface(number), links[number], self._netns(number))
            for number in files & links.keys()
            if number < self._pool.network.num_addresses and namespaces.is_namespace(self._netns(number))
        }
        return whole, (files | links.keys()) - whole.keys()

    def remove(self, numbers: Sequence[int]) -> None:
        """Remove the slots, whole or half-made, and return when the kernel has. Safe to repeat."""
        for number in numbers:
            namespaces.remove(self._netns(number))
        # The kernel would remove the links with their namespaces, but not while a process is left in one.
        indices = []
        for number in numbers:
            try:
                indices.append(socket.if_nametoindex(self._interface(number)))
            except OSError:
                continue
        if indices:
            self._routes.send(*(netlink.set_group(index, self._group) for index in indices))
            self._routes.send(netlink.delete_group(self._group))

    def open_subnet(self) -> None:
        """Give the node its address in the subnet, and the subnet's unused addresses to nobody. Safe to repeat."""
        network = self._pool.network
        self._routes.send(
            netlink.add_address(_LOOPBACK_INDEX, self._pool.node_address, link_scope=True),
            netlink.add_dead_end(str(network.network_address), network.prefixlen),
        )

    def close_subnet(self) -> None:
        network = self._pool.network
        self._routes.send(
            netlink.delete_address(_LOOPBACK_INDEX, self._pool.node_address),
            netlink.delete_dead_end(str(network.network_address), network.prefixlen),
        )

    def check_overlap(self) -> None:
        """Raise Conflict where part of the subnet is in use on this machine for something else.

        A route to a larger network around it, as many VPNs set, is none: ours are more exact and win.
        """
        for interface, network in routes():
            if network.subnet_of(self._pool.network) and not interface.startswith(self.prefix):
                raise Conflict(
                    f"the subnet {self._pool.network} holds {network}, which already leads to {interface}",
                    mend="give this node's instances another: --subnet 10.N.0.0/16",
                    field="subnet",
                )

    def _interface(self, number: int) -> str:
        return f"{self.prefix}{number:x}"

    def _netns(self, number: int) -> Path:
        return namespaces.DIRECTORY / f"{self._namespace_prefix}{number:x}"


def write_sysctl(name: str, value: str) -> None:
    """Raises RuntimeFailed where /proc/sys is not writable; one that this kernel does not have is left out."""
    try:
        (_SYSCTL / name).write_text(value)
    except FileNotFoundError:
        return
    except OSError as error:
        mend = "run as root, with a writable /proc/sys" if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else None
        raise RuntimeFailed(f"cannot set {name} to {value}: {error.strerror}", mend=mend) from None


def read_sysctl(name: str) -> str:
    """Return the value, or `""` where this kernel has no such setting."""
    try:
        return (_SYSCTL / name).read_text().strip()
    except OSError:
        return ""


def routes() -> list[tuple[str, ipaddress.IPv4Network]]:
    """Return the node's IPv4 routes that lead somewhere as (interface, destination), the default route included."""
    found = []
    for line in Path("/proc/thread-self/net/route").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[0] == "*":  # a dead end, such as our own
            continue
        destination, mask = (int.from_bytes(bytes.fromhex(fields[i]), "little") for i in (1, 7))
        found.append((fields[0], ipaddress.IPv4Network((destination, mask.bit_count()))))
    return found


def uplink_mtu() -> int:
    """Return the MTU of the link of the default route, so that what instances send need not be cut on its way out."""
    for interface, network in routes():
        if network.prefixlen == 0:
            # Not from /sys, which shows the links of whoever mounted it.
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
                try:
                    answer = fcntl.ioctl(asking, _SIOCGIFMTU, struct.pack("16sI12x", interface.encode(), 0))
                except OSError:
                    break
            return int(struct.unpack_from("I", answer, 16)[0])
    return MTU_DEFAULT


def _number(name: str, prefix: str) -> int | None:
    """Return the slot's number if `name` is `prefix` and a hexadecimal number."""
    digits = name.removeprefix(prefix)
    if digits == name or not digits or any(digit not in "0123456789abcdef" for digit in digits):
        return None
    return int(digits, 16)
