"""IPv6's rules: the same walls as IPv4's, of the same sets.

An instance's IPv6 address ends in its IPv4 address, so these rules look up the last 32 bits in the sets that IPv4's rules use.
There is no second set that could be forgotten, or that is to be filled when an instance starts; limits and counts are of both
together. The library's language has types, and none for this: what needs no set is in `firewall`'s text (`chains`), and all else
here as expressions (`rules`), which are written right after it. Until they are, each of their chains drops everything.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from atoll.model.fabric import ipv6_network_of
from atoll.network.counted import CLOSED, EGRESS, INGRESS, PORT, PROJECT
from atoll.network.expressions import (
    ACCEPT,
    DROP,
    RETURN,
    begins,
    by_link,
    comes_by,
    counted,
    crowded,
    found_by,
    goto,
    header,
    jump,
    leaves_by,
    led_to,
    mark,
    mark_by,
    marked,
    not_within,
    port,
    protocol,
    put,
    within,
)

WORLD = (
    "2000::-2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "2001:1::-2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "2003::-3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
)
"""Where instances may go beyond the cell: global unicast addresses (2000::/3), without those that stand for an IPv4 address
(Teredo, 2001::/32, and 6to4, 2002::/16). So link-local and multicast addresses are closed, unique local ones, with those every
cloud's metadata service (fd00:ec2::254, fd20:ce::254), and what NAT64 translates (64:ff9b::/96)."""

_SOURCE, _TARGET = 8, 24
"""Where a packet's IPv6 addresses begin."""
_EMBEDDED = 12
"""Where in them the IPv4 address begins."""
CHAINS = (
    "links_six", "peers_six", "limits_out_six", "limits_in_six", "crowded_six", "turned_away_six", "paired_six", "relayed_six",
    "others_six", "private_six", "same_project_six", "fence_six", "open_ports_six", "guard_six", "declared_six",
    "outward_six", "fence_outward_six", "published_in_six", "guard_outward_six",
)  # fmt: skip
"""Those of `rules`."""
PASSED = ("published_six",)
"""Those of `rules` that do nothing before these are written: what they do not lead to an instance is for the node itself."""


def source(at: int = 0) -> bytes:
    return header(_SOURCE + _EMBEDDED, 4, at)


def target(at: int = 0) -> bytes:
    return header(_TARGET + _EMBEDDED, 4, at)


def whole(offset: int, at: int) -> bytes:
    return header(offset, 16, at)


def chains(*, ula: str, links: str, fabric: str) -> str:
    """Return the chains that need no set, and the others as they begin. `links` and `fabric` name links to instances and nodes."""
    inner = ipv6_network_of(ula)
    return (
        "\n".join([*(f"  chain {name} {{ drop; }}" for name in CHAINS), *(f"  chain {name} {{ }}" for name in PASSED)])
        + f"""
  chain from_link_six {{
    ip6 saddr != {inner} drop
    goto links_six
  }}
  chain from_others_six {{
    ip6 saddr != {inner} drop
    goto peers_six
  }}
  chain known_six {{
    oifname {links} jump limits_in_six
    iifname {links} oifname {links} jump paired_six
    iifname {links} oifname {fabric} jump paired_six
    accept
  }}
  chain beyond_six {{
    iifname {fabric} drop
    oifname {fabric} drop
    oifname {links} drop
    iifname != {links} goto passing_six
    jump crowded
    ip6 daddr != @world meta mark set {CLOSED} jump refused
    goto outward_six
  }}
  chain passing_six {{
    iifname @uplinks oifname != "at*" drop
  }}
  chain between_six {{
    ip6 daddr != {inner} goto beyond_six
    oifname {links} jump limits_in_six
    iifname {links} jump crowded
    iifname {fabric} oifname {fabric} goto relayed_six
    iifname {fabric} oifname != {links} drop
    oifname {fabric} iifname != {links} drop
    iifname {links} oifname {links} goto private_six
    iifname {links} oifname {fabric} goto private_six
    iifname {fabric} goto others_six
    oifname {links} ct status dnat goto published_in_six
    oifname {links} drop
    iifname {links} meta mark set {CLOSED} jump refused
  }}
  chain from_node_six {{
    ip6 daddr != {inner} drop
    jump limits_in_six
    ct state established,related accept
    jump declared_six
    meta mark set {PORT} jump refused
  }}
  chain echo_six {{
    icmpv6 type echo-request accept
    meta mark set {PORT} jump refused
  }}
"""
    )


def rules(*, ula: str, links: str, tunnels: Sequence[str], connections_max: int) -> dict[str, tuple[bytes, ...]]:
    """Return chain → rules. `links` is what names of instances' links begin with, `tunnels` are the links to other nodes."""
    inner = ipaddress.IPv6Network(ula).network_address.packed[:_EMBEDDED]
    pair = source(0) + target(1)
    backwards = target(0) + source(1)

    def refuse(reason: int) -> bytes:
        return marked(reason) + jump("refused")

    return {
        "links_six": (
            comes_by(0) + source(4) + not_within("sources") + DROP,
            source() + within("limited") + jump("limits_out_six"),
        ),
        "peers_six": (source() + not_within("peers") + DROP,),
        "limits_out_six": (
            source() + within("packets_out") + counted("over") + DROP,
            source() + within("bytes_out") + counted("over") + DROP,
        ),
        "limits_in_six": (
            target() + not_within("limited") + RETURN,
            target() + within("packets_in") + counted("over") + DROP,
            target() + within("bytes_in") + counted("over") + DROP,
        ),
        "crowded_six": (source() + counted("opened"), source() + crowded("connections", connections_max) + DROP),
        "turned_away_six": (
            begins(_TARGET, inner) + pair + protocol(2) + port(3) + mark(4) + counted("turned_away") + RETURN,
            source() + whole(_TARGET, 1) + protocol(5) + port(6) + mark(7) + counted("turned_away_six"),
        ),
        "paired_six": (pair + counted("pairs"),),
        "relayed_six": (target() + within("peers") + ACCEPT, DROP),
        "others_six": (
            source() + within("nodes") + target(0) + protocol(1) + port(2) + within("inbound") + ACCEPT,
            source() + within("nodes") + refuse(PORT),
            goto("private_six"),
        ),
        "private_six": (
            marked(0),
            source() + mark_by("project_of"),
            target(0) + mark(1) + within("member") + goto("same_project_six"),
            refuse(PROJECT),
        ),
        "same_project_six": (
            marked(0),
            by_link(links) + pair + counted("begun") + counted("pairs"),
            source() + within("fenced") + jump("fence_six"),
            *(leaves_by(name) + ACCEPT for name in tunnels),
            goto("open_ports_six"),
        ),
        "fence_six": (
            pair + protocol(2) + port(3) + within("permitted") + RETURN,
            source() + whole(_TARGET, 1) + protocol(5) + port(6) + within("permitted_six") + RETURN,
            refuse(EGRESS),
        ),
        "open_ports_six": (
            target() + within("guarded") + jump("guard_six"),
            target(0) + protocol(1) + port(2) + within("inbound") + ACCEPT,
            goto("echo_six"),
        ),
        "guard_six": (
            backwards + protocol(2) + port(3) + within("admitted") + RETURN,
            target() + whole(_SOURCE, 1) + protocol(5) + port(6) + within("admitted_six") + RETURN,
            refuse(INGRESS),
        ),
        "declared_six": (target(0) + protocol(1) + port(2) + within("inbound") + ACCEPT,),
        # Beyond the cell an address's last 32 bits mean nothing: there whole addresses alone are looked up.
        "outward_six": (source() + within("fenced") + jump("fence_outward_six"), ACCEPT),
        "fence_outward_six": (
            source() + whole(_TARGET, 1) + protocol(5) + port(6) + within("permitted_six") + RETURN,
            refuse(EGRESS),
        ),
        "published_in_six": (
            target() + within("guarded") + jump("guard_outward_six"),
            target(0) + protocol(1) + port(2) + within("inbound") + ACCEPT,
            DROP,
        ),
        "guard_outward_six": (target() + whole(_SOURCE, 1) + protocol(5) + port(6) + within("admitted_six") + RETURN, DROP),
        "published_six": (protocol(5) + port(6) + found_by("published", 5, 3) + put(inner, 0) + led_to(0, 4),),
    }
