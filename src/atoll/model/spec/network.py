"""What an app or job may send and be sent: without rules everything of its project, and the world outside."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from msgspec import Meta

from atoll.model.errors import Invalid
from atoll.model.names import Name, PortNumber, SpecRecord
from atoll.model.spec.serving import Hostname, PortProtocol
from atoll.model.units import Bytes

ALLOWS_MAX = 32
PORTS_MAX = 16
RATE_MIN = 8 << 10
"""Bytes per second; below that hardly a connection comes about."""


class Allow(SpecRecord, frozen=True, kw_only=True):
    """One of `app`, `cidr` and `host`, and which ports there (of the instance itself, where it is about who comes in)."""

    app: Name | None = None
    """Instances of this app or job of the project."""
    cidr: Annotated[str, Meta(max_length=43)] | None = None
    """IPv4 addresses, and whoever has one of these by its IPv6 address, too; or IPv6 addresses, and those alone."""
    host: Hostname | None = None
    """The addresses that the node's name servers say for this name; `*.` in front means every name below it. Only outwards."""
    ports: Annotated[tuple[PortNumber, ...], Meta(max_length=PORTS_MAX)] = ()
    """Empty for all."""
    protocol: PortProtocol | None = None
    """`tcp` (and so `http`) or `udp`; both where it is left out."""


class NetworkRules(SpecRecord, frozen=True, kw_only=True):
    ingress: Annotated[tuple[Allow, ...], Meta(max_length=ALLOWS_MAX)] | None = None
    """Who may come to its declared ports, beside the ingresses; left out: its project, and whom a published port lets in."""
    egress: Annotated[tuple[Allow, ...], Meta(max_length=ALLOWS_MAX)] | None = None
    """Where it may go; left out: to its project and the world outside. Name servers can always be asked."""
    bandwidth: Bytes | None = None
    """Bytes per second that each instance may send, and as many that it may be sent; what is more is dropped."""
    packets: Annotated[int, Meta(ge=50, le=100_000_000)] | None = None
    """Packets per second, likewise."""


def network_of(cidr: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return the network of a `cidr`. Raises ValueError for what is none, and for one with a zone, which may hold any text."""
    if "%" in cidr:
        raise ValueError(f"{cidr!r} names a link")
    return ipaddress.ip_network(cidr)


def check_network(rules: NetworkRules) -> None:
    """Raise Invalid for rules that say nothing or contradict themselves, naming the field."""
    if rules.bandwidth is not None and rules.bandwidth < RATE_MIN:
        raise Invalid("network.bandwidth: below 8KiB a second nothing works", field="network.bandwidth")
    for side, allows in (("ingress", rules.ingress), ("egress", rules.egress)):
        for index, allow in enumerate(allows or ()):
            field = f"network.{side}[{index}]"
            said = [name for name in ("app", "cidr", "host") if getattr(allow, name) is not None]
            if len(said) != 1:
                raise Invalid(f"{field}: exactly one of app, cidr and host", field=field, mend="write one rule for each")
            if allow.host is not None and side == "ingress":
                raise Invalid(f"{field}.host: who comes has no name", field=f"{field}.host", mend="use app or cidr")
            if allow.cidr is not None:
                try:
                    network_of(allow.cidr)
                except ValueError as error:
                    raise Invalid(f"{field}.cidr: {error}", field=f"{field}.cidr", mend="write e.g. 192.0.2.0/24") from None
