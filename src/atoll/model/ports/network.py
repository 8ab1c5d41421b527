"""An instance's place on the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from atoll.model.flows import Flows
from atoll.model.spec import NetworkRules, Port


class Link(Struct, frozen=True, kw_only=True):
    """One instance's network: a namespace with an address, reachable from the node."""

    id: str
    netns: Path
    address: str
    """IPv4, unique on the node."""
    interface: str
    """The host's end."""
    ipv6: str | None = None
    """Its IPv6 address, which follows from `address`; None where it has none."""
    resolv_conf: Path | None = None


class Counters(Struct, frozen=True):
    """What went over an instance's link since it was made; as the instance sees it."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int
    drops: int


class Network(Protocol):
    async def attach(self, id: str, *, project: str, ports: Sequence[Port], rules: NetworkRules | None = None) -> Link:
        """Return the instance's link: out through NAT, in only to `ports` from the node's ingress, and from anywhere by the node's
        own addresses to those that are published (`Port.host`), until `detach`. Instances of one project reach each
        other's `ports`. `rules` narrow all that, the node's ingress excepted. Safe to repeat.

        Raises Unavailable when a port of the node is taken, Exhausted when no address is free; then nothing is left behind.
        """
        ...

    async def detach(self, id: str) -> None:
        """Give everything back. Safe to repeat; an unknown id is no error."""
        ...

    async def recover(self, keep: Sequence[str]) -> Sequence[Link]:
        """Adopt the links of `keep` and remove every other that an earlier agent left; return those adopted."""
        ...

    def counters(self) -> Mapping[str, Counters]:
        """Return what went over each instance's link. Reads memory of the kernel only, and costs the same for any number."""
        ...

    async def flows(self) -> Flows:
        """Return what instances of the node sent each other and those of other nodes, by pair of apps, and what was refused, with
        how often each instance began a connection and how many of its packets were beyond its limits. Bounded; some ms at most.
        """
        ...

    async def close(self) -> None:
        """Let go without ending a link."""
        ...
