"""Apps' own rules as elements of the firewall's sets: pure. Elements of one set never overlap, which the kernel would refuse."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from msgspec import Struct

from atoll.model.spec import Allow, NetworkRules, PortProtocol
from atoll.model.spec.network import network_of

SETS = (
    "guarded", "admitted", "admitted_six", "fenced", "permitted", "permitted_six", "limited",
    "bytes_out", "bytes_in", "packets_out", "packets_in",
)  # fmt: skip
"""Those whose names end in `six` are of IPv6 networks; the others hold for both families, by the IPv4 address."""
PORT_MAX = 65_535
BURST_SHARE = 10
"""A limit lets pass at once what it lets pass in so many parts of a second."""
BURST_BYTES_MIN = 64 << 10
BURST_PACKETS_MIN = 20


class Ruled(Struct, frozen=True):
    """An instance of this node that has rules."""

    address: str
    project: str
    rules: NetworkRules


Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Members = Mapping[tuple[str, str], Sequence[str]]
"""(Project, app or job) → addresses of its instances, on whatever node."""
Learned = Mapping[tuple[str, str], Sequence[str]]
"""(Address of an instance, `host` of a rule) → what that name meant when the instance asked."""


def elements_of(ruled: Iterable[Ruled], members: Members, learned: Learned) -> dict[str, list[str]]:
    """Return set → elements for all `SETS`."""
    found: dict[str, list[str]] = {name: [] for name in SETS}
    for one in ruled:
        rules = one.rules
        if rules.ingress is not None:
            found["guarded"].append(one.address)
            found["admitted"] += _listed(one, rules.ingress, members, learned, 4)
            found["admitted_six"] += _listed(one, rules.ingress, members, learned, 6)
        if rules.egress is not None:
            found["fenced"].append(one.address)
            found["permitted"] += _listed(one, rules.egress, members, learned, 4)
            found["permitted_six"] += _listed(one, rules.egress, members, learned, 6)
        if rules.bandwidth is not None or rules.packets is not None:
            found["limited"].append(one.address)
        if rules.bandwidth is not None:
            burst = max(rules.bandwidth // BURST_SHARE, BURST_BYTES_MIN)
            limit = f"{one.address} limit rate over {int(rules.bandwidth)} bytes/second burst {burst} bytes"
            found["bytes_out"].append(limit)
            found["bytes_in"].append(limit)
        if rules.packets is not None:
            burst = max(rules.packets // BURST_SHARE, BURST_PACKETS_MIN)
            limit = f"{one.address} limit rate over {rules.packets}/second burst {burst} packets"
            found["packets_out"].append(limit)
            found["packets_in"].append(limit)
    return found


def networks_of(allow: Allow, address: str, project: str, members: Members, learned: Learned) -> list[Network]:
    """Return which addresses a rule of the instance at `address` means now."""
    if allow.cidr is not None:
        return [network_of(allow.cidr)]
    named = members.get((project, allow.app), ()) if allow.app is not None else learned.get((address, allow.host or ""), ())
    return [ipaddress.ip_network(one) for one in named]


def protocols_of(allow: Allow) -> tuple[str, ...]:
    if allow.protocol is None:
        return ("tcp", "udp")
    return ("udp",) if allow.protocol is PortProtocol.UDP else ("tcp",)


def _collapsed(networks: Iterable[Network], version: int) -> Iterable[Network]:
    """Return those of one version of IP, none of them within another."""
    if version == 4:
        return ipaddress.collapse_addresses(one for one in networks if isinstance(one, ipaddress.IPv4Network))
    return ipaddress.collapse_addresses(one for one in networks if isinstance(one, ipaddress.IPv6Network))


def _listed(one: Ruled, allows: Sequence[Allow], members: Members, learned: Learned, version: int) -> list[str]:
    """Return the elements for networks of this version of IP.

    Cut the ports where any rule begins or ends; between two cuts the addresses of all rules are one collection.
    """
    found = []
    for protocol in ("tcp", "udp"):
        spans: list[tuple[int, int, list[Network]]] = []
        for allow in allows:
            networks = networks_of(allow, one.address, one.project, members, learned)
            if protocol in protocols_of(allow) and any(network.version == version for network in networks):
                ports = [(port, port) for port in allow.ports] or [(0, PORT_MAX)]
                spans += [(first, last, networks) for first, last in ports]
        cuts = sorted({first for first, _, _ in spans} | {last + 1 for _, last, _ in spans})
        for first, end in pairwise(cuts):
            there = [network for low, high, networks in spans if low <= first <= high for network in networks]
            for network in _collapsed(there, version):
                ports_text = str(first) if end - 1 == first else f"{first}-{end - 1}"
                found.append(f"{one.address} . {network} . {protocol} . {ports_text}")
    return found
