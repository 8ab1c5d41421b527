"""The fabric: one private network for each project over all nodes of a cell, and what nodes must know of each other for it."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from msgspec import Meta, Struct

from atoll.model.errors import Invalid

NETWORK_DEFAULT = "10.64.0.0/10"
"""What nodes get their prefixes from, where the cell has none of its own."""
PREFIX_LENGTH = 20
"""Of a prefix that the cell gives: 4,093 instances; 1,024 nodes in the default network."""
PREFIX_MIN = 8
PREFIX_MAX = 29
"""A subnet is at least a /29, so that something is left beside the network, node and broadcast addresses."""
ULA_BYTES = 5
"""Random ones in a cell's IPv6 network: RFC 4193, section 3.1."""
PRIVATE = tuple(ipaddress.IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))
"""RFC 1918, section 3: what nodes' prefixes are of, as the other nodes lead all that goes there to that node."""
VXLAN_PORT = 7605
WIREGUARD_PORT = 7606
PROBE_PORT = 7607
"""Of UDP: between nodes' own addresses, and the last one inside of the tunnels only."""
DOMAIN = "internal"
"""What names of the fabric end in: `APP.PROJECT.internal`."""

Endpoint = Annotated[str, Meta(max_length=45)]
PublicKey = Annotated[
    str,
    Meta(
        pattern=r"^([A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=)?$(?!\n)",
        description="a key of WireGuard in base64, or nothing",
        max_length=44,
    ),
]
"""32 bytes in the one way to write them, so that equal keys are equal texts."""


class Fabric(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The cell's, one record. Its writer is the API."""

    network: str = NETWORK_DEFAULT
    number: int
    """The VXLAN's, so that several cells may share wires."""
    keys_after: float = 0.0
    """Keys that were made before are replaced."""
    allocations: int = 0
    """Prefixes given so far: each one changes this record, so that no two can overlap."""
    ula: str = ""
    """Read only where there is no `FabricIpv6`: a server that does not know a field leaves it out when it writes the record."""


class FabricIpv6(Struct, frozen=True, kw_only=True):
    """The IPv6 network that the addresses of the cell's instances are of, a /48. One record, written once, by the API: apart
    from `Fabric`, which servers from before IPv6 write again with every node that joins."""

    ula: str


class FabricNode(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one node is reached. The API writes it, when the node asks to join."""

    name: str
    site: str = "local"
    region: str = "local"
    prefix: str
    """Of its instances; the node itself has the first address."""
    endpoint: str = ""
    """IPv4 address; where it is empty nobody can reach the node's instances."""
    public_key: str = ""
    """WireGuard's; where it is empty the node has no WireGuard."""
    key_made_at: float = 0.0
    vxlan_port: int = VXLAN_PORT
    wireguard_port: int = WIREGUARD_PORT
    ipv6: bool = False
    """That it leads IPv6, to its instances and to other nodes."""


class FabricOffer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node asks to join with."""

    site: Annotated[str, Meta(max_length=64)] = "local"
    region: Annotated[str, Meta(max_length=64)] = "local"
    subnet: Annotated[str, Meta(max_length=18)] = ""
    """The prefix that it wants; empty for any, or the one that it had."""
    endpoint: Endpoint = ""
    public_key: PublicKey = ""
    key_made_at: float = 0.0
    vxlan_port: Annotated[int, Meta(ge=1, le=65_535)] = VXLAN_PORT
    wireguard_port: Annotated[int, Meta(ge=1, le=65_535)] = WIREGUARD_PORT
    ipv6: bool = False


class FabricGrant(Struct, frozen=True, kw_only=True):
    """What it then has."""

    network: str
    number: int
    prefix: str
    ula: str = ""


class Member(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An instance, as its project's others see it."""

    id: str
    project: str
    owner: str
    """The app or job."""
    app: bool = True
    index: int = 0
    node: str
    site: str = "local"
    region: str = "local"
    address: str
    ready: bool = False
    ipv6: bool = False
    """That it has the IPv6 address that follows from `address`."""


class FabricBatch(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """With `complete`, `nodes` and `members` are all that the node is to know, and whatever else it knows is gone."""

    revision: int
    complete: bool = False
    keys_after: float = 0.0
    nodes: tuple[FabricNode, ...] = ()
    nodes_removed: tuple[str, ...] = ()
    members: tuple[Member, ...] = ()
    """Of the projects that have an instance on the node."""
    members_removed: tuple[str, ...] = ()


def network_of(text: str, field: str) -> ipaddress.IPv4Network:
    """Raises Invalid for what is no private IPv4 network of /8 to /29."""
    mend = "write a network such as 10.64.0.0/16"
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise Invalid(f"{field}: {error}", field=field, mend=mend) from None
    if not PREFIX_MIN <= network.prefixlen <= PREFIX_MAX:
        raise Invalid(f"{field}: /{network.prefixlen} is not between /{PREFIX_MIN} and /{PREFIX_MAX}", field=field, mend=mend)
    if not any(network.subnet_of(one) for one in PRIVATE):
        raise Invalid(f"{field}: {network} is not of {', '.join(map(str, PRIVATE))}", field=field, mend=mend)
    return network


def node_address(prefix: str) -> str:
    """Return the address that a node has in its own prefix."""
    return str(ipaddress.IPv4Network(prefix).network_address + 1)


def new_ula(random: bytes) -> str:
    """Return the IPv6 network of a cell, from `ULA_BYTES` random bytes: RFC 4193, section 3.1."""
    return str(ipaddress.IPv6Network((b"\xfd" + random[:ULA_BYTES] + bytes(10), 48)))


def ipv6_of(ula: str, address: str) -> str:
    """Return the IPv6 address of who has the IPv4 `address`: the last 32 bits are that, so that nothing more need be kept."""
    return str(ipaddress.IPv6Network(ula).network_address + int(ipaddress.IPv4Address(address)))


def ipv6_network_of(ula: str, prefix: str = "0.0.0.0/0") -> str:
    """Return the IPv6 network of all who have an IPv4 address of `prefix`."""
    network = ipaddress.IPv4Network(prefix)
    return f"{ipv6_of(ula, str(network.network_address))}/{96 + network.prefixlen}"


class FabricPaths(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node found of its ways to others. The API writes it, for the node."""

    node: str
    relayed: dict[str, str] = {}
    """Node → the one through which it is reached."""
    cut: tuple[str, ...] = ()
    """Nodes that it does not reach at all."""


class ReachStep(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that a packet has to get past."""

    what: str
    ok: bool
    detail: str
    mend: str = ""


class ReachView(Struct, frozen=True, kw_only=True):
    """Whether one app reaches a port of another, and what stops it: the first step that is not ok."""

    source: str
    target: str
    port: int
    protocol: str
    ok: bool
    steps: tuple[ReachStep, ...]
