"""What went between apps, and what was refused: counted by each node of what its own instances send."""

from __future__ import annotations

import enum

from msgspec import Struct

FLOWS_MAX = 64
"""Pairs of apps that one node tells of, the busiest."""
REFUSALS_MAX = 64


class Reason(enum.StrEnum):
    """Which rule refused."""

    EGRESS = "egress"
    """The source's own rules on where it may go."""
    PORT = "port"
    """The target declares no such port."""
    INGRESS = "ingress"
    """The target's own rules on who may come."""
    PROJECT = "project"
    """The address is of another project, or of nobody."""
    CLOSED = "closed"
    """Where no instance may go: metadata, link-local, other nodes' instances that no way leads to."""
    NODE = "node"
    """A service of the node itself."""


class Flow(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What instances of one app sent to those of another of the project; answers are a flow of the other way."""

    project: str
    source: str
    target: str
    """Apps or jobs."""
    bytes: int = 0
    packets: int = 0
    connections: int = 0
    """Begun by the source, those that were refused among them."""


class Refusal(Struct, frozen=True, kw_only=True, omit_defaults=True):
    project: str
    source: str
    target: str = ""
    """Empty where it is no app of the project; then `address` says where it was to go."""
    address: str = ""
    protocol: str = "tcp"
    port: int = 0
    reason: Reason
    packets: int = 0
    node: str = ""
    """On which node it was refused."""


class Flows(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Counted since a pair was last silent for ten minutes, or its node's agent began."""

    flows: tuple[Flow, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    complete: bool = True
    """False: there was more than a node tells of."""
    begun: dict[str, int] = {}
    """Instance → connections that it began, to wherever. Of a node to its agent only."""
    over: dict[str, int] = {}
    """Instance → packets beyond its limits, in either direction. Likewise."""
