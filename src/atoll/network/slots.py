"""A slot: a namespace and its routed link, ready for an instance to move in. Everything here blocks, for about 2 ms a slot.

In the namespace `eth0` has the slot's address, and `169.254.1.1`, which is the same everywhere, is the way to everything;
on the node a /32 route leads to the link. Neither side ever asks for a hardware address: both know it for good. So it is with IPv6,
where the cell has a network for that: one address, and `fe80::1` as the way to the cell's instances, and to everything where the
node has a way to the world.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import os
import socket
import struct
from collections.abc import Collection, Sequence
from pathlib import Path

from msgspec import Struct

from atoll.model.errors import Conflict, RuntimeFailed
from atoll.model.fabric import ipv6_network_of, ipv6_of
from atoll.network import namespaces, netlink
from atoll.network.addresses import AddressPool
from atoll.network.connections import Connections
from atoll.network.sysctls import open_ipv6, read_sysctl, write_sysctl

GATEWAY = "169.254.1.1"
GATEWAY_IPV6 = "fe80::1"
EVERYWHERE_IPV6 = "::/0"
GATEWAY_MAC = bytes.fromhex("02617400fffe")
"""The node's end of every link; each link is a world of its own, so one address serves all."""
MTU_DEFAULT = 1500
_LOOPBACK_INDEX = 1
_SIOCGIFMTU = 0x8921
_INSIDE = (
    ("ipv6/conf/default/disable_ipv6", "1"),  # for all links but `lo`: ::1 stays, so that an app may listen on `::`
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
    ipv6: str = ""
    """Empty where it has none."""


def tag_of(directory: Path) -> str:
    """Return six characters that tell this data directory's links from any other's on the machine."""
    return hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:6]


class SlotMaker:
    """Makes, finds and removes the slots of one data directory."""

    def __init__(self, tag: str, pool: AddressPool, ula: str = "") -> None:
        """`ula`: the cell's IPv6 network; without it slots have no IPv6."""
        self._ula = ula
        self.prefix = f"at{tag}"
        self._namespace_prefix = f"atoll-{tag}-"
        self._pool = pool
        self._group = int(tag, 16)
        self._routes = netlink.RouteSocket()
        self._connections = Connections()
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._mtu = uplink_mtu()
        self.outward = False
        """Whether slots that are made have an IPv6 route to everywhere, and not to the cell alone."""
        self._led: dict[int, bool] = {}
        """Number → whether the slot has that; of those that are known to."""

    def close(self) -> None:
        self._routes.close()
        os.close(self._home)

    def make(self, number: int) -> Slot:
        """Raises RuntimeFailed; then nothing is left."""
        address, interface = self._pool.address(number), self._interface(number)
        ipv6 = ipv6_of(self._ula, address) if self._ula else ""
        outward = self.outward
        mac = b"\x02\x61" + socket.inet_aton(address)

        def setup() -> None:
            for name, value in _INSIDE:
                write_sysctl(name, value)
            with netlink.RouteSocket() as inside:
                ends = netlink.add_veth("eth0", mac=mac, peer=interface, peer_mac=GATEWAY_MAC, peer_netns=self._home, mtu=self._mtu)
                inside.send(ends, netlink.set_up(_LOOPBACK_INDEX))
                index = socket.if_nametoindex("eth0")
                if ipv6:
                    write_sysctl("ipv6/conf/eth0/disable_ipv6", "0")
                inside.send(
                    *((netlink.no_own_addresses(index),) if ipv6 else ()),
                    netlink.set_up(index),
                    netlink.add_address(index, address),
                    netlink.add_neighbour(index, GATEWAY, GATEWAY_MAC),
                    netlink.add_route(index, GATEWAY),
                    netlink.add_route(index, None, gateway=GATEWAY),
                    *(_inside_ipv6(index, ipv6, EVERYWHERE_IPV6 if outward else self._ula) if ipv6 else ()),
                )

        netns = self._netns(number)
        namespaces.create(netns, setup)
        try:
            slot = Slot(number, address, interface, socket.if_nametoindex(interface), netns, ipv6)
            self.connect(slot)
        except (RuntimeFailed, OSError):
            self.remove([number])
            raise
        self._led[number] = outward
        return slot

    def leads(self, slot: Slot) -> bool | None:
        """Return whether the slot has an IPv6 route to everywhere; None where that is not known, as of one that was found."""
        return self._led.get(slot.number)

    def lead(self, slot: Slot, outward: bool) -> None:
        """Give the slot an IPv6 route to everywhere, or to the cell alone. Safe to repeat. Raises RuntimeFailed, OSError."""

        def change() -> None:
            index = socket.if_nametoindex("eth0")
            with netlink.RouteSocket() as inside:
                if outward:
                    inside.send(netlink.add_route(index, EVERYWHERE_IPV6, gateway=GATEWAY_IPV6))
                else:
                    inside.send(
                        netlink.add_route(index, self._ula, gateway=GATEWAY_IPV6),
                        netlink.delete_route(index, EVERYWHERE_IPV6, gateway=GATEWAY_IPV6),
                    )

        namespaces.run_inside(slot.netns, change)
        self._led[slot.number] = outward

    def connect(self, slot: Slot) -> None:
        """Make the node's side as it should be, whatever it was. Safe to repeat."""
        mac = b"\x02\x61" + socket.inet_aton(slot.address)
        requests = [
            netlink.set_up(slot.index),
            netlink.add_neighbour(slot.index, slot.address, mac),
            netlink.add_route(slot.index, slot.address, source=self._pool.node_address),
        ]
        if slot.ipv6:
            open_ipv6(slot.interface)
            requests.insert(0, netlink.no_own_addresses(slot.index))
            requests += [
                netlink.add_neighbour(slot.index, slot.ipv6, mac),
                netlink.add_route(slot.index, slot.ipv6, source=ipv6_of(self._ula, self._pool.node_address)),
            ]
        else:
            write_sysctl(f"ipv6/conf/{slot.interface}/disable_ipv6", "1")
        self._routes.send(*requests)

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
            number: Slot(
                number,
                self._pool.address(number),
                self._interface(number),
                links[number],
                self._netns(number),
                self._ipv6_there(number),
            )
            for number in files & links.keys()
            if number < self._pool.network.num_addresses and namespaces.is_namespace(self._netns(number))
        }
        return whole, (files | links.keys()) - whole.keys()

    def _ipv6_there(self, number: int) -> str:
        """Return the IPv6 address that the slot was made with: one of an earlier agent may have none."""
        made = self._ula and read_sysctl(f"ipv6/conf/{self._interface(number)}/disable_ipv6") == "0"
        return ipv6_of(self._ula, self._pool.address(number)) if made else ""

    def remove(self, numbers: Sequence[int]) -> None:
        """Remove the slots, whole or half-made, with what is open of their connections, and return when the kernel has. Safe to
        repeat."""
        for number in numbers:
            namespaces.remove(self._netns(number))
            self._led.pop(number, None)
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
        # Only now nothing that is under way can begin one again.
        self.cut([self._pool.address(number) for number in numbers if number < self._pool.network.num_addresses])

    def cut(self, addresses: Collection[str]) -> None:
        """Delete what the kernel knows of connections of instances, by their IPv4 addresses and the IPv6 ones that follow from
        these. Safe to repeat. Raises RuntimeFailed, OSError."""
        six = [ipv6_of(self._ula, address) for address in addresses] if self._ula else []
        self._connections.cut([*addresses, *six])

    def open_subnet(self) -> None:
        """Give the node its address in the subnet, and the subnet's unused addresses to nobody. Safe to repeat."""
        network = self._pool.network
        self._routes.send(
            netlink.add_address(_LOOPBACK_INDEX, self._pool.node_address, link_scope=True),
            netlink.add_dead_end(str(network.network_address), network.prefixlen),
        )
        if self._ula:
            self._routes.send(
                netlink.add_address(_LOOPBACK_INDEX, ipv6_of(self._ula, self._pool.node_address)),
                netlink.add_dead_end(*self._network_ipv6()),
            )

    def close_subnet(self) -> None:
        network = self._pool.network
        self._routes.send(
            netlink.delete_address(_LOOPBACK_INDEX, self._pool.node_address),
            netlink.delete_dead_end(str(network.network_address), network.prefixlen),
        )
        if self._ula:
            self._routes.send(
                netlink.delete_address(_LOOPBACK_INDEX, ipv6_of(self._ula, self._pool.node_address)),
                netlink.delete_dead_end(*self._network_ipv6()),
            )

    def _network_ipv6(self) -> tuple[str, int]:
        address, _, length = ipv6_network_of(self._ula, str(self._pool.network)).partition("/")
        return address, int(length)

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


def _inside_ipv6(index: int, address: str, far: str) -> tuple[netlink.Request, ...]:
    return (
        netlink.add_address(index, address),
        netlink.add_neighbour(index, GATEWAY_IPV6, GATEWAY_MAC),
        netlink.add_route(index, far, gateway=GATEWAY_IPV6),
    )


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


def routes_ipv6() -> list[tuple[str, ipaddress.IPv6Network]]:
    """Return the node's IPv6 routes as (interface, destination)."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/thread-self/net/ipv6_route").read_text().splitlines():
            fields = line.split()
            found.append((fields[-1], ipaddress.IPv6Network((int(fields[0], 16), int(fields[1], 16)))))
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
