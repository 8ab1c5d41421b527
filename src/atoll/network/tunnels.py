"""The node's ways to the other nodes: one VXLAN for those of its site, one WireGuard for all others. Everything here blocks.

`Tunnels.set` makes the kernel as it is to be, and only tells it what differs; devices are made with the first node that needs them.
Packets go on while no agent runs.
"""

from __future__ import annotations

import contextlib
import enum
import ipaddress
import socket
from collections.abc import Mapping
from pathlib import Path

import structlog
from msgspec import Struct

from atoll.model.errors import AtollError
from atoll.model.fabric import FabricNode, ipv6_network_of, ipv6_of, node_address
from atoll.network import netlink, tunnel_requests, wireguard
from atoll.network.slots import routes, routes_ipv6, uplink_mtu
from atoll.network.sysctls import open_ipv6, write_sysctl

VXLAN_BYTES = 50
WIREGUARD_BYTES = 80
"""What a tunnel adds to each packet at most."""
IPV6_MTU_MIN = 1280
"""Links that take less have no IPv6: RFC 8200, section 5."""

log = structlog.get_logger()


class Kind(enum.StrEnum):
    VXLAN = "vxlan"
    WIREGUARD = "wireguard"


class Way(Struct, frozen=True):
    """One route: a network, by which device, and through whom."""

    network: str
    kind: Kind
    gateway: str | None
    ipv6: bool = False
    """That all on the way lead IPv6."""


def names_of(tag: str) -> dict[Kind, str]:
    """Return the devices' names, the same for one data directory for ever."""
    return {Kind.VXLAN: f"av{tag}", Kind.WIREGUARD: f"aw{tag}"}


def mac_of(address: str) -> bytes:
    """Return the hardware address that the node with the fabric's `address` has in the VXLAN."""
    return b"\x02\x62" + socket.inet_aton(address)


def kind_of(own: FabricNode, other: FabricNode) -> Kind | None:
    """Return how the two reach each other directly; None: not at all. Between sites only what is encrypted will do."""
    if not own.endpoint or not other.endpoint or own.endpoint == other.endpoint:
        return None
    if own.site == other.site and own.region == other.region:
        return Kind.VXLAN
    return Kind.WIREGUARD if own.public_key and other.public_key else None


def ways_of(own: FabricNode, nodes: Mapping[str, FabricNode], via: Mapping[str, str]) -> dict[str, Way]:
    """Return network → way: each node's own address always directly, so that a probe shows whether that works, and its prefix
    directly or through the node that `via` says."""
    found: dict[str, Way] = {}
    for name, node in nodes.items():
        direct = kind_of(own, node)
        address = node_address(node.prefix)
        if direct is not None:
            found[f"{address}/32"] = Way(f"{address}/32", direct, None, node.ipv6)
        relay = nodes.get(via.get(name, name), node)
        kind = kind_of(own, relay)
        if kind is not None:
            gateway = node_address(relay.prefix) if kind is Kind.VXLAN else None
            found[node.prefix] = Way(node.prefix, kind, gateway, node.ipv6 and relay.ipv6)
    return found


def ipv6_way(ula: str, way: Way) -> Way:
    """Return the same way for the IPv6 addresses of who is there."""
    return Way(ipv6_network_of(ula, way.network), way.kind, ipv6_of(ula, way.gateway) if way.gateway else None, True)


class Tunnels:
    """The tunnels of one data directory, whose tag is in their names; for IPv6, too, where the cell's network `ula` is given."""

    def __init__(self, tag: str, ula: str = "") -> None:
        self.names = names_of(tag)
        self._ula = ula
        self._routes = netlink.RouteSocket()
        self._ways: dict[str, Way] = {}
        self._neighbours: dict[str, str] = {}
        """Address → endpoint, of those in the VXLAN."""
        self._wireguard: object = None
        self._made: dict[Kind, int] = {}

    def close(self, *, remove: bool) -> None:
        """Let go; with `remove`, no device is left."""
        if remove:
            for name in self.names.values():
                try:
                    self._routes.send(tunnel_requests.delete_link(socket.if_nametoindex(name)))
                except OSError:
                    continue
        self._routes.close()

    def missing_wireguard(self) -> str:
        """Return what keeps this machine from WireGuard, or nothing."""
        return wireguard.missing(self._routes, f"{self.names[Kind.WIREGUARD]}x")

    def mtu(self, kind: Kind) -> int:
        return uplink_mtu() - (VXLAN_BYTES if kind is Kind.VXLAN else WIREGUARD_BYTES)

    def ula(self, kind: Kind) -> str:
        """Return the IPv6 network that this kind of tunnel leads to, or nothing."""
        return self._ula if self.mtu(kind) >= IPV6_MTU_MIN else ""

    def set(
        self, own: FabricNode, number: int, nodes: Mapping[str, FabricNode], via: Mapping[str, str], key: wireguard.Key | None
    ) -> None:
        """Lead to `nodes`, through the node that `via` names where it names one. Raises RuntimeFailed, Unsupported: call again."""
        ways = ways_of(own, nodes, via)
        direct = {name: kind_of(own, node) for name, node in nodes.items()}
        trouble: AtollError | None = None
        for kind in Kind:
            if kind in direct.values():
                try:
                    self._make(kind, own, number)
                except AtollError as error:
                    trouble = error
        if Kind.VXLAN in self._made:
            local = {node_address(n.prefix): n.endpoint for name, n in nodes.items() if direct[name] is Kind.VXLAN}
            self._set_neighbours(local)
        if Kind.WIREGUARD in self._made and key is not None:
            self._set_wireguard(own, nodes, direct, via, key)
        wanted = [way for way in ways.values() if way.kind in self._made]
        wanted += [ipv6_way(ula, way) for way in wanted if way.ipv6 and (ula := self.ula(way.kind))]
        self._set_ways(own, {way.network: way for way in wanted})
        if trouble is not None:
            raise trouble

    def _make(self, kind: Kind, own: FabricNode, number: int) -> None:
        name, mtu = self.names[kind], self.mtu(kind)
        if kind in self._made:
            with contextlib.suppress(OSError):
                if socket.if_nametoindex(name) == self._made[kind]:
                    return
            self._forget(kind)  # somebody removed it, or its program ended
        if kind is Kind.WIREGUARD:
            wireguard.make_device(name, self._routes, mtu=mtu)
        else:
            self._make_vxlan(name, own, number, mtu)
        index = socket.if_nametoindex(name)
        if self.ula(kind):
            self._routes.send(netlink.no_own_addresses(index))
            write_sysctl(f"ipv6/conf/{name}/disable_ipv6", "0")
            open_ipv6(name)
        else:
            write_sysctl(f"ipv6/conf/{name}/disable_ipv6", "1")
        write_sysctl(f"ipv4/conf/{name}/rp_filter", "2")  # a relayed answer may come by another tunnel
        self._routes.send(netlink.set_up(index))
        self._made[kind] = index

    def _forget(self, kind: Kind) -> None:
        self._made.pop(kind, None)
        self._ways = {network: way for network, way in self._ways.items() if way.kind is not kind}
        if kind is Kind.VXLAN:
            self._neighbours = {}
        else:
            self._wireguard = None

    def _make_vxlan(self, name: str, own: FabricNode, number: int, mtu: int) -> None:
        alias = f"{number}:{own.vxlan_port}:{own.endpoint}:{own.prefix}"
        try:
            if Path(f"/sys/class/net/{name}/ifalias").read_text().strip() == alias:
                return  # an earlier agent's, and packets are on their way in it
            self._routes.send(tunnel_requests.delete_link(socket.if_nametoindex(name)))
        except OSError:
            pass
        mac = mac_of(node_address(own.prefix))
        self._routes.send(
            tunnel_requests.add_vxlan(name, number=number, port=own.vxlan_port, local=own.endpoint, mac=mac, mtu=mtu, alias=alias)
        )

    def _set_neighbours(self, wanted: Mapping[str, str]) -> None:
        index = self._made[Kind.VXLAN]
        for address, endpoint in self._neighbours.items():
            if wanted.get(address) != endpoint:
                self._routes.send(tunnel_requests.delete_forwarding(index, mac_of(address), endpoint))
        for address, endpoint in wanted.items():
            if self._neighbours.get(address) != endpoint:
                mac = mac_of(address)
                self._routes.send(netlink.add_neighbour(index, address, mac), tunnel_requests.add_forwarding(index, mac, endpoint))
                if ula := self.ula(Kind.VXLAN):
                    self._routes.send(netlink.add_neighbour(index, ipv6_of(ula, address), mac))
        self._neighbours = dict(wanted)

    def _set_wireguard(
        self,
        own: FabricNode,
        nodes: Mapping[str, FabricNode],
        direct: Mapping[str, Kind | None],
        via: Mapping[str, str],
        key: wireguard.Key,
    ) -> None:
        peers: dict[str, tuple[FabricNode, list[str]]] = {
            name: (node, [f"{node_address(node.prefix)}/32"]) for name, node in nodes.items() if direct[name] is Kind.WIREGUARD
        }
        for name, node in nodes.items():
            through = via.get(name, name)
            if through in peers:
                peers[through][1].append(node.prefix)
        if ula := self.ula(Kind.WIREGUARD):
            for _, networks in peers.values():
                networks += [ipv6_network_of(ula, network) for network in networks]
        wanted = (key, own.wireguard_port, peers)
        if wanted != self._wireguard:
            wireguard.configure(self.names[Kind.WIREGUARD], key, own.wireguard_port, peers)
            self._wireguard = wanted

    def _set_ways(self, own: FabricNode, wanted: Mapping[str, Way]) -> None:
        source = node_address(own.prefix)
        sources = {4: source, 6: ipv6_of(self._ula, source) if self._ula else ""}
        kinds = {self.names[kind]: kind for kind in self._made}
        inner = ipaddress.IPv6Network(self._ula or "::/128")
        earlier = [*routes(), *((interface, there) for interface, there in routes_ipv6() if there.subnet_of(inner))]
        for interface, there in earlier if not self._ways else ():
            if interface in kinds and str(there) not in wanted:  # an earlier agent's, and leads nowhere that anybody knows
                self._routes.send(tunnel_requests.delete_way(self._made[kinds[interface]], str(there)))
        for network, way in self._ways.items():
            if network not in wanted or wanted[network].kind is not way.kind:
                self._routes.send(tunnel_requests.delete_way(self._made[way.kind], network))
        # Addresses first: a prefix is led through one of them.
        for network, way in sorted(wanted.items(), key=lambda one: -ipaddress.ip_network(one[0]).prefixlen):
            if self._ways.get(network) != way:
                mine = sources[ipaddress.ip_network(network).version]
                self._routes.send(tunnel_requests.add_way(self._made[way.kind], network, gateway=way.gateway, source=mine))
        self._ways = dict(wanted)
